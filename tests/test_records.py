"""Records of deaths on Redis: small, and as telling as before."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from celery_dlx.brokers.redis import records
from celery_dlx.brokers.redis.records import inflated, to_json
from celery_dlx.brokers.redis.stored import letter_of
from celery_dlx.letters import DeadLetter, Original
from celery_dlx.selection import match

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
SOME = st.none() | TEXTS
SMALL = st.integers(0, 3)
TRACEBACK = 'Traceback (most recent call last):\n  File "/app/shop.py", line 3, in pay\n    raise error\nValueError: 7\n'
EXCEPTIONS = st.fixed_dictionaries(
    {"type": TEXTS, "message": TEXTS, "traceback": TEXTS | TEXTS.map(lambda text: text + TRACEBACK)}
)
LETTERS = st.builds(
    DeadLetter,
    *(st.just("i"), st.sampled_from(("q", "other")), st.just("q.dlq"), st.just("failure"), st.just(5)),
    original=st.builds(
        Original,
        properties=SMALL.map(lambda number: {"priority": number}),
        exchange=TEXTS,
        routing_key=st.sampled_from(("q", "", "key")),
    ),
    exception=st.none() | EXCEPTIONS,
    redacted=st.lists(st.just("args[0]"), max_size=1),
    **dict.fromkeys(("task", "task_id", "root_id", "parent_id", "args", "kwargs", "worker", "service"), SOME),
    **dict.fromkeys(("retries", "deliveries", "replays"), SMALL),
    fingerprint=TEXTS,
)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(LETTERS)
def test_what_is_left_out_is_read_all_the_same(letter):
    stored = to_json(letter)
    assert letter_of(stored.encode(), None, 5.0, "q.dlq", "i").as_dict() == letter.as_dict()
    assert letter_of(stored.encode(), None, 5.0, "q.dlq", "i").redacted == letter.redacted
    before = {key: value for key, value in letter.as_dict().items() if key != "died_at"}
    old = json.dumps(before, separators=(",", ":")).encode()
    assert letter_of(old, None, 5.0, "q.dlq").as_dict() == letter.as_dict(), "stored by an earlier version"
    assert json.loads(stored)["fingerprint"] == letter.fingerprint


def test_tracebacks_are_deflated_and_messages_can_be_found():
    exception = {"type": "builtins.ValueError", "message": "order 7", "traceback": TRACEBACK * 20}
    letter = DeadLetter(
        "i", "q", "q.dlq", "failure", 5, Original(), task_id="t", root_id="r", worker="w", exception=exception
    )
    stored = to_json(letter)
    assert len(stored) < len(TRACEBACK) * 5
    for asked in ({"text": "order 7"}, {"worker": "w*"}, {"task_id": "t"}, {"root_id": "r"}):
        assert all(word in stored for word in match(**asked).words)
    same = to_json(replace(letter, root_id="t"))
    assert "root_id" not in same and match(root_id="t").words[0] in same


def test_a_deflated_traceback_that_cannot_be_read_is_none():
    exception = {"type": "E", "message": "m", "traceback_1": ""}
    for packed in ("", "-", "AAAA", "\ud800", "/////w==", 7, None):
        found = inflated({**exception, "traceback_1": packed})
        assert found["type"] == "E" and not found.get("traceback")
    assert inflated([1]) == [1] and inflated(None) is None


def test_the_dictionary_never_changes():
    """Stored tracebacks need it: a better one gets another key."""
    assert hashlib.sha256(records._KNOWN).hexdigest() == "3e6ede4f50e7dac1d6edadfc13124c81ff22020e391a347c702a2019a6d342f8"
