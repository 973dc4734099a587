"""Letters: composing, identifying, cutting; nothing a message holds may stop its own capture."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_dlx.errors import UsageError
from celery_dlx.fingerprints import fingerprint
from celery_dlx.letters import (
    HEADER,
    Death,
    Original,
    clip,
    compose,
    iso_time,
    read_broker_death,
    read_record,
    safe_text,
)
from celery_dlx.replaying import past, revive_expiration, revive_headers
from celery_dlx.selection import match, moment

HEADERS = {"task": "shop.mail", "id": "t1", "root_id": "r", "parent_id": None, "argsrepr": "(1,)", "kwargsrepr": "{}",
           "retries": 2}  # fmt: skip
CONTRACT = [
    "id", "queue", "dlq", "reason", "died_at", "task", "task_id", "root_id", "parent_id", "args", "kwargs", "retries",
    "deliveries", "exception", "worker", "service", "fingerprint", "replays", "exchange", "routing_key", "priority",
]  # fmt: skip


def original(**changes) -> Original:
    fields = {"body": b"[[1], {}, {}]", "headers": HEADERS, "properties": {"priority": 3}, "routing_key": "mail"}
    return Original(**{**fields, **changes})


def death(**changes) -> Death:
    fields = {"reason": "failure", "queue": "mail", "died_at": 1_763_625_600_123, "exception_type": "builtins.ValueError",
              "message": "boom", "traceback": "Traceback", "worker": "w", "service": "s"}  # fmt: skip
    return Death(**{**fields, **changes})


def test_contract_fields():
    letter = compose(death(), original(), "mail.dlq").as_dict()
    assert list(letter) == CONTRACT
    assert letter["died_at"] == "2025-11-20T08:00:00.123Z"
    assert letter["exception"] == {"type": "builtins.ValueError", "message": "boom", "traceback": "Traceback"}
    assert (letter["task"], letter["retries"], letter["priority"], letter["dlq"]) == ("shop.mail", 2, 3, "mail.dlq")
    json.dumps(letter)


def test_record_round_trip():
    letter = compose(death(), original(), "mail.dlq")
    letter.stripped["expiration"] = "5"
    again = read_record(letter.record(), original(), "mail.dlq")
    assert again == letter


def test_id_is_the_same_for_the_same_message_and_attempt_only():
    ids = {
        compose(death(**d), original(**o), "x").id
        for d, o in [
            ({}, {}), ({"queue": "other"}, {}), ({}, {"body": b"[]"}), ({}, {"identity": "x"}),
            ({}, {"headers": {**HEADERS, "retries": 3}}), ({}, {"headers": {**HEADERS, HEADER: {"replays": 1}}}),
        ]
    }  # fmt: skip
    assert len(ids) == 6
    assert compose(death(died_at=1, reason="rejected"), original(), "x").id == compose(death(), original(), "x").id


def test_a_message_without_a_task_gets_an_id_of_its_own():
    assert compose(death(), Original(body=b"x"), "d").id != compose(death(), Original(body=b"x"), "d").id


def test_a_broker_made_letter_has_the_id_the_worker_would_have_given():
    x_death = {"x-death": [{"reason": "delivery_limit", "queue": "mail", "count": 1, "exchange": "e",
                            "routing-keys": ["k"], "time": datetime(2026, 1, 1)}]}  # fmt: skip
    letter = read_broker_death({**HEADERS, **x_death}, original(headers={**HEADERS, **x_death}), "mail.dlq", "mail")
    assert letter.id == compose(death(), original(), "mail.dlq").id
    assert (letter.reason, letter.original.exchange, letter.original.routing_key) == ("max_deliveries", "e", "k")
    assert letter.died_at == 1_767_225_600_000


@pytest.mark.parametrize("garbage", [None, 5, "x", [], [5], [{}], [{"reason": 5, "time": "x", "routing-keys": 3}]])
def test_any_x_death_is_survived(garbage):
    letter = read_broker_death({"x-death": garbage}, Original(body=b"b"), "q.dlq", "q")
    assert letter.queue == "q" and len(letter.id) == 32 and letter.reason


def test_old_protocol_is_described_from_a_json_body():
    body = json.dumps({"task": "a.b", "id": "1", "args": [1], "kwargs": {"x": 2}, "retries": 1}).encode()
    letter = compose(death(), Original(body=body, properties={"content_type": "application/json"}), "d")
    assert (letter.task, letter.task_id, letter.args, letter.kwargs, letter.retries) == (
        "a.b",
        "1",
        "[1]",
        "{'x': 2}",
        1,
    )


@given(
    st.dictionaries(st.text(max_size=5) | st.sampled_from(["task", "id", "retries", HEADER]), st.integers() | st.text()
                    | st.lists(st.integers()) | st.dictionaries(st.text(), st.integers())),
    st.binary(max_size=50),
)  # fmt: skip
def test_any_message_makes_a_letter(headers, body):
    letter = compose(death(), Original(body=body, headers=headers), "d")
    json.dumps(letter.as_dict())
    read_record(letter.record(), letter.original, "d")


@given(st.text(max_size=300), st.integers(min_value=0, max_value=100), st.sampled_from(["head", "tail"]))
def test_clip(text, limit, keep):
    cut = clip(text, limit, keep=keep)
    assert cut == text if len(text) <= limit else len(cut) <= max(limit, 40)


def test_clip_keeps_the_end_of_a_traceback():
    assert clip("a" * 500 + "the cause", 60, keep="tail").endswith("the cause")


def test_text_of_what_cannot_be_printed():
    class Bad:
        def __str__(self):
            raise SystemExit("no")

    assert safe_text(Bad()) == "<unprintable Bad: SystemExit>"
    assert safe_text("\udc80") == "?"
    assert len(safe_text("x" * 10_000)) <= 2048


def test_time_of_any_size():
    assert iso_time(0) == "1970-01-01T00:00:00.000Z"
    assert iso_time(10**30).startswith("1970")


TRACE = """Traceback (most recent call last):
  File "/usr/lib/python3.11/site-packages/celery/app/trace.py", line {celery}, in trace_task
    R = retval = fun(*args, **kwargs)
  File "/srv/{release}/shop/tasks.py", line {line}, in mail
    raise ValueError
"""


def test_fingerprint_groups_by_cause():
    def print_of(reason="failure", exception="ValueError", celery=1, line=2, release="r1", function="mail"):
        text = TRACE.format(celery=celery, line=line, release=release).replace("in mail", f"in {function}")
        return fingerprint(reason, "shop.mail", exception, text)

    same = print_of()
    assert same.startswith("1-")
    assert print_of(celery=99) == print_of(line=77) == print_of(release="r2") == same
    assert len({same, print_of(exception="KeyError"), print_of(reason="rejected"), print_of(function="other")}) == 4


def test_revived_headers():
    letter = compose(death(), original(headers={**HEADERS, "x-death": [], "x-delivery-count": 3, "extra": [],
                                                "expires": "2020-01-01T00:00:00+00:00"}), "d")  # fmt: skip
    headers, changes = revive_headers(letter)
    assert headers["extra"] == [] and headers["expires"] is None and headers["retries"] == 0
    assert "x-death" not in headers and "x-delivery-count" not in headers
    this = {"id": letter.id, "reason": "failure", "fingerprint": letter.fingerprint, "died_at": letter.died_at}
    assert headers[HEADER] == {"replays": 1, "last": letter.id, "died_of": "failure", "deaths": [this]}
    assert changes == ["retries 2 → 0", "expires 2020-01-01T00:00:00+00:00 dropped: it is past"]


def test_earlier_deaths_are_remembered_and_bounded():
    headers, ids = HEADERS, []
    for _ in range(13):
        letter = compose(death(), original(headers=headers), "d")
        assert [each["id"] for each in letter.deaths] == ids[-10:]
        assert read_record(letter.record(), Original(), "d").deaths == letter.deaths
        headers, _ = revive_headers(letter)
        ids.append(letter.id)
    assert letter.replays == 12
    for hostile in ({"deaths": 5}, {"deaths": [5, {"id": ["x"], "died_at": "now"}]}, {"deaths": None}, "deaths"):
        letter = compose(death(), original(headers={**HEADERS, HEADER: hostile}), "d")
        assert all(set(each) == {"id", "reason", "fingerprint", "died_at"} for each in letter.deaths)


def test_past():
    now = datetime.now(timezone.utc)
    assert past(now - timedelta(seconds=1)) and not past(now + timedelta(seconds=60))
    assert past((now - timedelta(seconds=1)).isoformat()) and past("2020-01-01T00:00:00Z") and past("2020-01-01T00:00:00")
    assert not past("never") and not past(None) and not past(5)


def test_revived_expiration():
    letter = compose(death(), original(), "d")
    assert revive_expiration(letter) == (None, [])
    letter.stripped["expiration"] = "60000"
    assert revive_expiration(letter) == ("60000", [])
    letter.reason = "expired"
    assert revive_expiration(letter) == (None, ["expiration 60000 ms dropped: it died of it"])


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        ({"text": "no address"}, ["no address"]),
        ({"text": "Tom & Jerry's <b>"}, [" Jerry"]),
        ({"text": 'the "größte" number'}, [" number"]),
        ({"text": "\\é"}, []),
        ({"worker": "celery@shop-*[12]?x"}, ["celery@shop-"]),
        ({"worker": "[ab]*", "task_id": "t-1"}, ["t-1"]),
        ({"task": "shop.*", "reason": "failure"}, []),
    ],
)
def test_what_stands_in_every_record_that_matches(filters, words):
    assert match(**filters).words == words


@pytest.mark.parametrize(
    ("wanted", "found"), [(3, True), ("3", True), (">=3", True), (" > 2", True), ("<3", False), ("!=3", False), (0, False)]
)
def test_letters_by_retries(wanted, found):
    letter = replace(compose(death(), original(), "d"), retries=3)
    assert match(retries=wanted)(letter) is found
    with pytest.raises(UsageError, match="retries 'often': expected a number"):
        match(retries="often")


def test_selection():
    letter = compose(death(), original(), "d")
    for wanted in ({"task": "shop.*"}, {"reason": "failure"}, {"exception": "ValueError"}, {"ids": [letter.id]},
                   {"exception": "builtins.V*"}, {"since": "2025-11-20T08:00:00Z"}, {"until": 1_763_625_601}):  # fmt: skip
        assert match(**wanted)(letter), wanted
    for unwanted in ({"task": "x"}, {"reason": "rejected"}, {"exception": "KeyError"}, {"ids": []}, {"since": "2h"},
                     {"until": "2025-11-20T07:59:59"}, {"task": "shop.*", "reason": "expired"}):  # fmt: skip
        assert not match(**unwanted)(letter), unwanted
    with pytest.raises(Exception, match="expected one of failure"):
        match(reason="nonsense")
    with pytest.raises(Exception, match="expected a time such as"):
        moment("yesterday", "since")
