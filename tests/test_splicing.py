"""A replay's headers are the very bytes its letter rested with, but for our own."""

from __future__ import annotations

import struct

import amqp
import pytest
from amqp.serialization import decode_properties_basic, dumps
from hypothesis import given
from hypothesis import strategies as st
from test_deliveries import _properties
from test_framing import _keys, _tables

from celery_dlx.brokers.rabbitmq import letters, splicing
from celery_dlx.brokers.rabbitmq.deliveries import Taken
from celery_dlx.brokers.rabbitmq.framing import content_frames, encode_properties, publish_frames
from celery_dlx.brokers.rabbitmq.letters import at_rest, letter_of, revived, revived_bytes
from celery_dlx.brokers.rabbitmq.splicing import layout
from celery_dlx.letters import HEADER, DeadLetter, Death, Original, compose
from celery_dlx.replaying import lineage

_METHOD = dumps("sLbss", ("consumer", 1, False, "celery.dlx", "q"))


def spliced(content: bytes, drop, add):
    found = layout(content)
    return None if found is None else splicing.spliced(content, found, frozenset(drop), splicing.entries(add))


def encoded(properties: dict) -> bytes:
    return encode_properties(properties, amqp.Message.PROPERTIES)


@given(_properties, _tables, st.lists(_keys, max_size=3), st.booleans())
def test_the_same_as_decoding_and_encoding_again(properties, add, names, some_of_its_own):
    headers = properties.get("application_headers")
    names = {*names, *(list(headers)[::2] if headers and some_of_its_own else ())}
    found = spliced(encoded(properties), {name.encode() for name in names}, add)
    if headers is None:
        assert found is None
        return
    kept = [(key, value) for key, value in headers.items() if key not in names]
    table = b"".join(dumps("F", [{key: value}])[4:] for key, value in [*kept, *add.items()])
    expected = encoded({**properties, "application_headers": {}})
    empty = encoded({key: properties[key] for key in ("content_type", "content_encoding") if key in properties})
    at = len(empty)
    assert found == expected[:at] + struct.pack(">I", len(table)) + table + expected[at + 4 :]


@given(_properties, st.integers(0, 300), st.binary(max_size=4))
def test_what_is_damaged_raises_nothing(properties, at, junk):
    whole = encoded(properties)
    found = spliced(whole[:at] + junk, {b"a"}, {})
    assert found is None or isinstance(found, bytes)


@pytest.mark.parametrize("item", [b"s\x00\x05", b"?", b"S\0\0\1\0short", b"F\0\0", b""])
def test_headers_that_cannot_be_told_apart(item):
    entry = b"\x04name" + item
    assert spliced(b"\x20\x00" + struct.pack(">I", len(entry)) + entry, (), {}) is None


def resting(headers: dict, **properties: object) -> tuple[Taken, object]:
    """A letter as it lies in a DLQ, with what RabbitMQ adds."""
    original = Original(
        b"[[1], {}, {}]", headers, {"content_type": "application/json", "delivery_mode": 2, **properties}, "", "q"
    )
    letter = compose(Death("failure", "q", 1_700_000_000_000, "E", "m", "t"), original, "q.dlq")
    message = at_rest(letter, "guest")
    message.properties["application_headers"]["x-delivery-count"] = 3
    raw = Taken(_METHOD, encoded(message.properties), message.body)
    return raw, letter_of(raw, "q", "q.dlq")


@given(_tables)
def test_a_replay_is_written_as_if_its_headers_had_been_decoded(headers):
    headers = {key: value for key, value in headers.items() if key not in ("CC", "BCC")}
    headers |= {"task": "t", "id": "i", "retries": 0, "expires": None, "x-death": [{"count": 1}]}
    raw, letter = resting(headers)
    content, changes = revived_bytes(raw, letter, "guest", "0" * 12)
    message, theirs = revived(letter, "guest", "0" * 12)
    frames = publish_frames(1, message, "", "q", 131_072)
    found = content_frames(1, content, raw.body, "", "q", 131_072)
    assert changes == theirs == []
    assert decode_properties_basic(content, 0)[0]["application_headers"].keys() == message.headers.keys()
    assert found == frames or any(type(value) not in (str, int) for value in headers.values())


def test_types_that_py_amqp_would_change_come_back_as_they_were():
    raw, _ = resting({"task": "t"})
    octet = b"\x01nb\x05"
    raw.content = spliced(raw.content, (), {})
    begin = raw.content.index(b"\x04task")
    size = begin - 4
    table = struct.pack(">I", struct.unpack_from(">I", raw.content, size)[0] + len(octet)) + octet
    raw.content = raw.content[:size] + table + raw.content[begin:]
    content, _ = revived_bytes(raw, letter_of(Taken(_METHOD, raw.content, raw.body), "q", "q.dlq"), "guest", None)
    assert octet + b"\x04task" in content and b"x-delivery-count" not in content


@pytest.mark.parametrize(
    ("headers", "properties"),
    [
        ({"retries": 3}, {}),
        ({"expires": "2020-01-01T00:00:00Z"}, {}),
        ({"x-dlx-undecoded-properties": b"\xff"}, {}),
        ({"CC": ["other"]}, {}),
        ({}, {"expiration": "1000"}),
        ({}, {"user_id": "somebody"}),
    ],
)
def test_what_changes_is_left_to_who_looks_closer(headers, properties):
    raw, letter = resting({"task": "t", **headers}, **properties)
    assert revived_bytes(raw, letter, "guest", None) is None
    raw, letter = resting({"task": "t"}, user_id="guest")
    content, _ = revived_bytes(raw, letter, "guest", None)
    assert decode_properties_basic(content, 0)[0]["user_id"] == "guest"
    letter.edited = b"[]"
    assert revived_bytes(raw, letter, "guest", None) is None
    assert HEADER.encode() in content


@given(
    st.sampled_from(["failure", "expired", "é\0"]),
    st.one_of(st.sampled_from(["1-5f0c1d2e3a4b5c6d", "", "\x01" * 32, "\0\0\1\0\0\0\0\0"]), st.text()),
    st.integers(0, 3),
    st.one_of(st.none(), st.just("0123456789ab")),
    st.one_of(st.text("0123456789abcdef", min_size=32, max_size=32), st.text()),
    st.one_of(st.integers(1_700_000_000_000, 1_800_000_000_000), st.integers(-(2**63), 2**63 - 1)),
    st.lists(st.just({"id": "x", "reason": "failure", "fingerprint": "", "died_at": 1}), max_size=2),
)
def test_lineages_by_pattern_are_those_that_are_encoded(reason, fingerprint, replays, replay, letter_id, died_at, deaths):
    letter = DeadLetter(letter_id, "q", "q.dlq", reason, died_at, Original(), fingerprint=fingerprint)
    letter.replays, letter.deaths = replays, deaths
    told = lineage(letter, replay)
    assert letters._lineage(letter, replay, told) == splicing.entries({HEADER: told})
