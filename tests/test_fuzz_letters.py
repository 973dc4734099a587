"""Whatever lies in a DLQ, it is a letter that every command can show."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from datetime import datetime, timezone

import amqp
from hypothesis import example, given, settings
from hypothesis import strategies as st

from celery_dlx import selection
from celery_dlx.brokers.rabbitmq import letters as rabbitmq
from celery_dlx.brokers.redis.records import to_json
from celery_dlx.brokers.redis.revival import revived
from celery_dlx.brokers.redis.stored import letter_of
from celery_dlx.canvas import canvas_of
from celery_dlx.cli import output
from celery_dlx.groups import Groups
from celery_dlx.letters import HEADER, DeadLetter
from celery_dlx.replaying import revive_headers

TEXTS = st.one_of(
    st.text(st.characters(), max_size=8),
    st.sampled_from(
        ("\ud800", "\x00", "1e999", "2020-01-01T00:00:00+00:00", "application/json", "0001-01-01T00:00:00+14:00")
    ),
)
NUMBERS = st.one_of(st.integers(), st.sampled_from((10**400, -(10**18), 2**63, -1)), st.floats())
TIMES = st.datetimes(timezones=st.sampled_from((None, timezone.utc)))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)


def _values(scalars: st.SearchStrategy) -> st.SearchStrategy:
    return st.recursive(
        scalars,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
        max_leaves=6,
    )


JSON = _values(SCALARS)
AMQP = _values(st.one_of(SCALARS, TIMES, st.binary(max_size=4), st.decimals(allow_nan=False)))
RECORD = (
    "v", "id", "reason", "queue", "died_at", "deliveries", "replays", "fingerprint", "worker", "service", "exchange",
    "routing_key",
    "exception", "stripped", "task", "task_id", "retries", "priority", "args", "kwargs", "root_id", "parent_id",
)  # fmt: skip
DEATH = ("reason", "queue", "time", "exchange", "routing-keys", "original-expiration", "count")
HEADERS = (
    "task",
    "id",
    "retries",
    "expires",
    "eta",
    "compression",
    "group",
    "argsrepr",
    "x-first-death-reason",
    "x-delivery-count",
)


def some(keys: tuple[str, ...], values: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(values, st.dictionaries(st.sampled_from(keys), values, max_size=6))


def exercise(letter: DeadLetter) -> None:
    """What the commands do with a letter."""
    groups = Groups()
    groups.add(letter)
    matches = selection.match(
        task="*x*",
        exception="x",
        since="1h",
        until="1h",
        worker="*",
        text="x",
        arguments=["0=1"],
        where=["kwargs.a > 1"],
        bodies=True,
    )
    matches(letter)
    selection.match(exception="x", text="x")(letter)
    selection.match(arguments=["a=1"], where=["args[0] ~ 1"])(letter)
    selection.age(letter.died_at)
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")):
        output.json_line({**letter.as_dict(), "headers": dict(letter.original.headers), "stripped": letter.stripped})
        output.json_line({**canvas_of(letter.original).as_dict(), "properties": dict(letter.original.properties)})
        output.table(output.LETTER_HEADINGS, [output.letter_row(letter)])
        output.show_letter(letter)
        for group in groups.sorted():
            output.json_line(group.as_dict())
    revive_headers(letter)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    headers=st.dictionaries(st.sampled_from(HEADERS), AMQP, max_size=4),
    record=st.one_of(st.none(), some(RECORD, AMQP)),
    death=st.one_of(st.none(), AMQP, some(DEATH, AMQP).map(lambda death: [death])),
    content=st.one_of(st.none(), st.just("application/json"), TEXTS),
    body=st.one_of(st.binary(max_size=20), JSON.map(lambda value: json.dumps(value).encode())),
)
@example({}, None, [{"reason": "rejected", "queue": "\ud800", "time": datetime.max}], None, b"")
@example({b"\xff": {b"\xfe": [{b"\xfd": 1}]}}, None, None, None, b"")
@example({}, {"reason": "x", "died_at": -(10**18)}, None, None, b"")
@example({}, None, None, "application/json", b'{"task": "x", "args": ' + b"[" * 980 + b"]" * 980 + b"}")
@example({}, None, None, "application/json", b"[[], {}, " + b"[" * 980 + b"]" * 980 + b"]")
def test_any_message_of_a_rabbitmq_dlq(headers, record, death, content, body):
    found = {**headers, **({} if record is None else {HEADER: record}), **({} if death is None else {"x-death": death})}
    properties = {} if content is None else {"content_type": content}
    letter = rabbitmq.letter_of(amqp.Message(body, application_headers=found, **properties), "q", "q.dlq")
    exercise(letter)
    rabbitmq.revived(letter, "guest")


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    record=st.one_of(st.none(), st.binary(max_size=20), some(RECORD, JSON).map(lambda value: json.dumps(value).encode())),
    item=st.one_of(
        st.none(),
        st.binary(max_size=20),
        some(("body", "headers", "properties", "content-type", "content-encoding"), JSON).map(
            lambda value: json.dumps(value).encode()
        ),
        some(("delivery_info", "priority", "body_encoding", "delivery_tag", "expiration"), JSON).map(
            lambda value: json.dumps({"body": "e30=", "headers": {}, "properties": value}).encode()
        ),
    ),
    score=st.floats(allow_nan=False),
)
@example(b"[" * 5_000, b"[" * 5_000, 0.0)
@example(b'{"task": [1], "fingerprint": {"a": 1}, "retries": "x", "priority": "x"}', None, -1e300)
@example(b"{}", b'{"headers": {"x": ' + b"[" * 980 + b"]" * 980 + b'}, "properties": {}, "body": ""}', 0.0)
@example(b"{}", b'{"headers": {}, "properties": {"x": ' + b"[" * 980 + b"]" * 980 + b'}, "body": ""}', 0.0)
@example(b"{}", b'{"headers": {}, "properties": {}, "body": ' + b"[" * 980 + b"]" * 980 + b"}", 0.0)
@example(b'{"stripped": ' + b'{"a":' * 980 + b"1" + b"}" * 980 + b"}", None, 0.0)
def test_any_bytes_of_a_redis_dlq(record, item, score):
    letter = letter_of(record, item, score, "q.dlq")
    exercise(letter)
    revived(item or b"", letter)
    to_json(letter)
