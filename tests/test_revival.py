"""A replayed item is the same whether its lineage is put in or all of it is written anew."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from celery_dlx.brokers.redis import revival
from celery_dlx.brokers.redis.letters import original_of, parse_item
from celery_dlx.brokers.redis.records import read_fields, to_json
from celery_dlx.brokers.redis.stored import letter_of
from celery_dlx.letters import HEADER, DeadLetter, Death, compose, read_record

NAMES = st.one_of(
    st.sampled_from(
        ("task", "id", "retries", "expires", "redelivered", "x-death", HEADER, "headers", "properties", 'a"b\\', "é")
    ),
    st.text(max_size=5),
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8))
JSON = st.recursive(
    st.one_of(SCALARS, st.sampled_from((f', "{HEADER}": ', "}", '"}', "\ud800"))),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=8,
)
LINEAGE = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {"replays": st.integers(0, 3), "deaths": st.lists(st.dictionaries(NAMES, JSON, max_size=2), max_size=12)}
    ),
)
HEADERS = st.tuples(
    st.dictionaries(NAMES, JSON, max_size=4), st.none() | LINEAGE, st.dictionaries(NAMES, JSON, max_size=1)
).map(lambda parts: {**parts[0], **({} if parts[1] is None else {HEADER: parts[1]}), **parts[2]})
PROPERTIES = st.dictionaries(
    st.sampled_from(("delivery_tag", "delivery_info", "body_encoding", "priority")), JSON, max_size=4
)


def whole(item: bytes, letter: DeadLetter, replay: str | None) -> Any:
    """What is replayed if all of it is written anew."""
    payload = parse_item(item)
    return None if payload is None else revival._rewritten(payload, letter, replay)


def text(item: bytes) -> str:
    """What an item says, in the order in which it says it."""
    return repr(json.loads(item))


@settings(max_examples=400, derandomize=True, deadline=None)
@given(
    HEADERS,
    PROPERTIES,
    st.text(max_size=10),
    st.booleans(),
    st.sampled_from((None, "0123456789ab")),
    st.sampled_from(((", ", ": "), (",", ":"))),
)
@example({}, {}, "", True, None, (", ", ": "))
@example({"a": {HEADER: {"replays": 1}}}, {}, "", True, None, (", ", ": "))
@example({HEADER: {"a": 1}, "z": {HEADER: {"a": 1}}}, {}, "", True, None, (", ", ": "))
@example({HEADER: {"a": 1}, f'", "{HEADER}": ': 2}, {}, "", True, None, (", ", ": "))
def test_both_roads_lead_to_the_same_item(headers, properties, body, ascii_only, replay, separators):
    kinds = {"content-encoding": "utf-8", "content-type": "application/json"}
    envelope = {"body": body, **kinds, "headers": headers, "properties": properties}
    item = json.dumps(envelope, ensure_ascii=ascii_only, separators=separators).encode("utf-8", "surrogatepass")
    record = to_json(compose(Death("failure", "q", 5, "E", "m", "t"), original_of(item), "q.dlq")).encode()
    letter = letter_of(record, item, 5.0, "q.dlq")
    found, changes, payload = revival.revived(item, letter, replay)
    expected, expected_changes, expected_payload = whole(item, letter_of(record, item, 5.0, "q.dlq"), replay)
    assert text(found) == text(expected.encode())
    assert changes == expected_changes
    assert payload["properties"] == expected_payload["properties"]
    if ascii_only and separators[0] == ", ":
        assert found == expected.encode(), "as kombu writes it: byte for byte"


def test_what_is_ordinary_is_not_written_anew(monkeypatch):
    headers = {"task": "t", "id": "i", "retries": 0, "expires": None, "argsrepr": "é"}
    item = json.dumps(
        {
            "body": "W1tdLCB7fSwge31d",
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": headers,
            "properties": {"delivery_tag": "d", "delivery_info": {"exchange": "", "routing_key": "q"}},
        }
    ).encode()
    monkeypatch.setattr(revival, "_rewritten", None)
    for replays in (1, 2, 3):
        record = to_json(compose(Death("failure", "q", 5, "E", "m", "t"), original_of(item), "q.dlq")).encode()
        item, changes, payload = revival.revived(item, letter_of(record, item, 5.0, "q.dlq"))
        assert json.loads(item)["headers"][HEADER]["replays"] == replays
        assert (changes, payload["properties"]["delivery_tag"]) == ([], "d")


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    st.none()
    | st.dictionaries(st.sampled_from((*DeadLetter.__dataclass_fields__, "exchange", "routing_key", "priority")), JSON),
    HEADERS,
)
def test_a_letter_is_the_same_read_late_or_at_once(record, headers):
    item = json.dumps({"body": "[]", "headers": headers, "properties": {}}).encode()
    stored = None if record is None else json.dumps(record).encode()
    late = letter_of(stored, item, 7.0, "q.dlq")
    at_once = read_record(record or {}, original_of(item), "q.dlq")
    at_once.died_at = 7
    assert repr(late) == repr(at_once)
    assert vars(late)["task"] == at_once.task
    late.task = "mine"
    assert late.task == "mine"


def test_only_fields_are_read_late():
    letter = letter_of(b"{}", None, 0.0, "q.dlq")
    for name in ("nothing", "_source_", "__len__"):
        assert not hasattr(letter, name)
    ours = read_fields(b'{"a": 1}')
    assert (
        ours is not None
        and ours["a"] == 1
        and ours == read_fields(b' {"a": 1} ') == read_fields('{"a": 1}'.encode("utf-16"))
    )
    assert read_fields(b"") == read_fields(None) == {}
    assert read_fields(b"[]") is read_fields(b"{") is None
