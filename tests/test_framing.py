"""What we write on the wire is what py-amqp would write."""

from __future__ import annotations

import struct
from datetime import datetime, timezone
from decimal import Decimal
from types import SimpleNamespace

import amqp
import pytest
from amqp.method_framing import frame_writer
from amqp.serialization import dumps
from amqp.spec import Basic
from hypothesis import given
from hypothesis import strategies as st

from celery_dlx.brokers.rabbitmq.frames import tolerant_frame_handler
from celery_dlx.brokers.rabbitmq.framing import HeadersTooLargeError, encode_properties, encode_table, publish_frames
from celery_dlx.letters import UNDECODED


class Shouting(str):
    """A subclass: what it encodes to is py-amqp's to say."""


_text = st.text(max_size=60)
_moment = st.datetimes(datetime(1971, 1, 1), datetime(2100, 1, 1), timezones=st.just(timezone.utc))
_scalars = (
    _text
    | st.binary(max_size=40)
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.none()
    | _moment
    | st.decimals(-1000, 1000, places=3)
    | st.builds(Shouting, _text)
)
_keys = st.text(max_size=40)
_values = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=4), max_leaves=12
)
_tables = st.dictionaries(_keys, _values, max_size=8)


class Wire:
    """As much of a connection and a transport as py-amqp's frame writer needs."""

    def __init__(self, frame_max: int) -> None:
        self.frame_max, self.data, self.bytes_sent = frame_max, b"", 0

    def write(self, frame: bytes) -> None:
        self.data += bytes(frame)


def as_py_amqp(message: amqp.Message, exchange: str, key: str, frame_max: int) -> bytes:
    wire = Wire(frame_max)
    arguments = dumps("Bssbb", (0, exchange, key, True, False))
    frame_writer(wire, wire)(1, 7, Basic.Publish, arguments, message)
    return wire.data


@given(_tables)
def test_tables_are_encoded_as_py_amqp_does(table):
    assert encode_table(table) == dumps("F", [table])


@given(
    headers=_tables,
    body=st.binary(max_size=20_000),
    properties=st.fixed_dictionaries(
        {},
        optional={
            "content_type": _text,
            "content_encoding": st.just("utf-8"),
            "delivery_mode": st.sampled_from([1, 2]),
            "priority": st.integers(0, 255),
            "correlation_id": _text,
            "expiration": st.just("60000"),
            "timestamp": st.integers(0, 2**40),
            "app_id": _text,
        },
    ),
    route=st.tuples(_keys, _keys),
)
def test_a_publish_is_written_as_py_amqp_does(headers, body, properties, route):
    message = amqp.Message(body, application_headers=headers, **properties)
    assert publish_frames(7, message, *route, 8192) == as_py_amqp(message, *route, 8192)


@pytest.mark.parametrize("value", [object(), {1, 2}, 2**70, Decimal("NaN")])
def test_what_py_amqp_cannot_encode_is_refused(value):
    with pytest.raises(Exception) as theirs:
        dumps("F", [{"key": value}])
    with pytest.raises(type(theirs.value)):
        encode_table({"key": value})


def test_headers_that_do_not_fit_a_frame_are_refused_before_anything_is_written():
    message = amqp.Message(b"{}", application_headers={"long": "x" * 9000})
    with pytest.raises(HeadersTooLargeError, match="the frame holds 8184"):
        publish_frames(1, message, "", "q", 8192)


def test_headers_that_py_amqp_cannot_decode():
    got, raised = [], []

    def callback(channel, method, arguments, message):
        got.append(message)
        if raised:
            raise raised.pop()

    on_frame = tolerant_frame_handler(SimpleNamespace(bytes_recv=0), callback)
    deliver = Basic.Deliver

    def receive(properties: bytes, body: bytes = b"body"):
        on_frame((1, 1, struct.pack(">HH", *deliver)))
        on_frame((2, 1, struct.pack(">HHQ", 60, 0, len(body)) + properties))
        if body:
            on_frame((3, 1, body))
        return got[-1]

    good = encode_properties({"content_type": "text/plain", "application_headers": {"a": 1}}, amqp.Message.PROPERTIES)
    assert receive(good).properties == {"content_type": "text/plain", "application_headers": {"a": 1}}
    for bad in (good.replace(b"text", b"\xff\xfett"), good[:-3], b"\x20\x00\x00\x00\x00\x04\x01a?\x00", b""):
        for body in (b"body", b""):
            message = receive(bad, body)
            assert bytes(message.properties["application_headers"][UNDECODED].encode("utf-8", "surrogateescape")
                         if isinstance(message.properties["application_headers"][UNDECODED], str)
                         else message.properties["application_headers"][UNDECODED]) == bad  # fmt: skip
            assert (message.body or b"") == body
    raised.append(ValueError("a consumer's"))
    with pytest.raises(ValueError, match="a consumer's"):
        receive(good, b"")
    assert len(got) == 1 + 8 + 1, "the consumer was called once"
