"""Deliveries read as bytes are what py-amqp reads."""

from __future__ import annotations

import base64
import socket
import ssl
import struct
from contextlib import contextmanager
from types import SimpleNamespace

import amqp
import pytest
from amqp.exceptions import UnexpectedFrame
from amqp.method_framing import frame_handler
from amqp.serialization import decode_properties_basic, dumps
from amqp.spec import Basic, Queue
from hypothesis import given
from hypothesis import strategies as st
from test_framing import _tables, _text

from celery_dlx.brokers.rabbitmq import moving
from celery_dlx.brokers.rabbitmq.decoding import decode_properties
from celery_dlx.brokers.rabbitmq.deliveries import Deliveries, Taken, deliveries_of, taken
from celery_dlx.brokers.rabbitmq.framing import encode_properties
from celery_dlx.brokers.rabbitmq.letters import exported, imported, letter_of
from celery_dlx.errors import ReplayError
from celery_dlx.letters import HEADER, UNDECODED, DeadLetter, Original
from celery_dlx.policy.settings import Policy

_PURGED = struct.pack(">HH", *Queue.PurgeOk)
_properties = st.fixed_dictionaries(
    {},
    optional={
        "content_type": _text,
        "content_encoding": st.just("utf-8"),
        "application_headers": _tables,
        "delivery_mode": st.sampled_from([1, 2]),
        "priority": st.integers(0, 255),
        "correlation_id": _text,
        "reply_to": _text,
        "expiration": st.just("60000"),
        "message_id": _text,
        "timestamp": st.integers(0, 2**64 - 1),
        "type": _text,
        "user_id": _text,
        "app_id": _text,
        "cluster_id": _text,
    },
)


def as_py_amqp(data: bytes) -> object:
    try:
        return decode_properties_basic(data, 0)[0]
    except Exception:  # noqa: BLE001 - whatever it raises
        return None


@given(_properties)
def test_properties_are_decoded_as_py_amqp_does(properties):
    data = encode_properties(properties, amqp.Message.PROPERTIES)
    found = decode_properties(data)
    assert repr(found) == repr(as_py_amqp(data)), "types and order too"


@given(_properties, st.integers(0, 400), st.binary(max_size=4))
def test_what_is_damaged_is_decoded_as_py_amqp_does_or_kept_as_bytes(properties, at, junk):
    whole = encode_properties(properties, amqp.Message.PROPERTIES)
    data = whole[:at] + junk + whole[at + len(junk) :]
    theirs, found = as_py_amqp(data), decode_properties(data)
    if theirs is not None:
        assert repr(found) == repr(theirs)
    else:
        kept = found["application_headers"][UNDECODED]
        assert (kept.encode() if isinstance(kept, str) else kept) == data


@pytest.mark.parametrize(
    "item",
    [
        b"s\x00\x05", b"b\xff", b"B\xff", b"U\xff\xff", b"u\xff\xff", b"i\xff\xff\xff\xff", b"l" + b"\xff" * 8,
        b"L" + b"\xff" * 8, b"x\0\0\0\1\xff", b"f\0\0\0\0", b"D\x01\0\0\0\x05", b"T" + struct.pack(">Q", 1_700_000_000),
        b"T" + b"\xff" * 8, b"?", b"F\0\0\0\x03\x01aV", b"F\0\0\0\x09\x01aV", b"A\0\0\0\x02VV", b"A\0\0\0\x01S\0\0\0\x01a",
        b"S\0\0\1\0short",
    ],
)  # fmt: skip
def test_values_of_every_type(item):
    entry = b"\x04name" + item
    data = b"\x20\x00" + struct.pack(">I", len(entry)) + entry
    theirs = as_py_amqp(data)
    expected = theirs if theirs is not None else {"application_headers": {UNDECODED: data}}
    found = decode_properties(data)["application_headers"]
    if isinstance(found.get(UNDECODED), str):
        found[UNDECODED] = found[UNDECODED].encode()
    assert repr(found) == repr(expected["application_headers"])


class Transport:
    """As much of py-amqp's as reading needs, over a real socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self._read_buffer, self.connected = sock, b"", True

    @contextmanager
    def having_timeout(self, timeout):
        self.sock.settimeout(timeout)
        yield self.sock


class Wire:
    """A connection whose other end is ours; py-amqp's own frame handler hears what is not a delivery to channel 7."""

    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair()
        self.transport, self.bytes_recv, self.others = Transport(theirs), 0, []
        self.on_inbound_frame = frame_handler(self, lambda *method: self.others.append(method))
        self.drain_events = lambda timeout=None: self.others.append("py-amqp")
        self.got = []
        self.deliveries = deliveries_of(self)
        self.channel = SimpleNamespace(channel_id=7, is_open=True)
        self.deliveries.take(self.channel, self.got.append)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.ours.close()
        self.transport.sock.close()


def frame(kind: int, channel: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + b"\xce"


def delivery(channel: int, tag: int, content: bytes, chunks: list[bytes]) -> list[bytes]:
    method = struct.pack(">HH", *Basic.Deliver) + dumps("sLbss", ("consumer", tag, True, "exchange", "key"))
    header = struct.pack(">HHQ", 60, 0, sum(map(len, chunks))) + content
    return [frame(1, channel, method), frame(2, channel, header), *(frame(3, channel, chunk) for chunk in chunks)]


_chunks = st.binary(min_size=1, max_size=50)


@given(
    messages=st.lists(
        st.tuples(_properties, st.lists(st.binary(min_size=1, max_size=50), max_size=3)), min_size=1, max_size=4
    ),
    cuts=st.lists(st.integers(1, 200), min_size=1, max_size=8),
)
def test_deliveries_that_come_in_pieces_among_other_frames(messages, cuts):
    frames = []
    for tag, (properties, chunks) in enumerate(messages, 1):
        parts = delivery(7, tag, encode_properties(properties, amqp.Message.PROPERTIES), chunks)
        other = delivery(8, tag, b"\0\0", [b"other"])
        pairs = [part for pair in zip(parts, other, strict=False) for part in pair]
        frames += [
            *pairs,
            *parts[3:],
            *other[len(parts) :],
            frame(8, 0, b""),
            frame(1, 7, struct.pack(">HH", *Queue.PurgeOk)),
        ]
    data = b"".join(frames)
    with Wire() as wire:
        at = 0
        while data:
            cut = cuts[at % len(cuts)]
            at += 1
            wire.ours.sendall(data[:cut])
            data = data[cut:]
            try:
                while True:
                    wire.deliveries.drain(timeout=0)
            except TimeoutError:
                pass
        assert [each.delivery_tag for each in wire.got] == list(range(1, len(messages) + 1))
        for each, (properties, chunks) in zip(wire.got, messages, strict=True):
            decoded = as_py_amqp(encode_properties(properties, amqp.Message.PROPERTIES))
            assert (each.body, repr(each.properties)) == (b"".join(chunks), repr(decoded))
            assert each.channel is wire.channel
            assert each.delivery_info["routing_key"] == "key"
        assert [(channel, sig) for channel, sig, *_ in wire.others] == [(8, Basic.Deliver), (7, Queue.PurgeOk)] * len(
            messages
        )
        assert wire.bytes_recv == len(frames), "heartbeats are judged by it"
        assert wire.transport._read_buffer == b""


def test_frames_that_py_amqp_reads_by_itself_come_to_the_same():
    with Wire() as wire:
        done = []
        for data in delivery(7, 3, b"\0\0", [b"bo", b"dy"]):
            kind, channel, size = struct.unpack_from(">BHI", data)
            done.append(wire.on_inbound_frame((kind, channel, data[7 : 7 + size])))
        assert done == [False, False, False, True]
        assert (wire.got[0].body, wire.got[0].delivery_tag) == (b"body", 3)


def test_what_a_handler_reads_or_raises_loses_no_frame():
    with Wire() as wire:
        first, second = b"".join(delivery(7, 1, b"\0\0", [])), b"".join(delivery(7, 2, b"\0\0", []))
        method = frame(1, 9, _PURGED)

        def handle(frame):
            raised.append(wire.transport._read_buffer)
            wire.deliveries.drain(timeout=0)
            raise ValueError("the broker closed a channel")

        raised = []
        wire.deliveries._handle = handle
        wire.ours.sendall(first + method + second + first[:9])
        with pytest.raises(ValueError, match="closed a channel"):
            wire.deliveries.drain(timeout=1)
        assert raised == [second + first[:9]]
        assert [each.delivery_tag for each in wire.got] == [1, 2]
        wire.ours.sendall(first[9:])
        wire.deliveries.drain(timeout=1)
        assert [each.delivery_tag for each in wire.got] == [1, 2, 1]


def test_a_channel_that_is_closed_hears_no_more():
    with Wire() as wire:
        data = b"".join(delivery(7, 1, b"\0\0", []))
        wire.channel.close = lambda: (wire.ours.sendall(data), wire.deliveries.drain(timeout=1))
        wire.deliveries.close(wire.channel)
        assert wire.got == [] and wire.others == []
        wire.ours.sendall(data)
        wire.deliveries.drain(timeout=1)
        assert wire.others[0][:2] == (7, Basic.Deliver), "the id is another channel's now"
        assert isinstance(wire.on_inbound_frame, Deliveries) and deliveries_of(wire) is wire.deliveries


def test_a_connection_that_breaks():
    with Wire() as wire:
        with pytest.raises(TimeoutError):
            wire.deliveries.drain(timeout=0)
        assert wire.transport.connected
        wire.ours.sendall(frame(8, 0, b"")[:-1] + b"\0")
        with pytest.raises(UnexpectedFrame, match="frame_end 0x00"):
            wire.deliveries.drain(timeout=1)
    with Wire() as wire:
        wire.ours.close()
        with pytest.raises(OSError, match="unexpectedly closed"):
            wire.deliveries.drain(timeout=1)
        assert not wire.transport.connected


def test_tls_that_has_nothing_yet_and_a_py_amqp_that_reads_otherwise():
    with Wire() as wire:

        def wants_more(size):
            raise ssl.SSLWantReadError

        real, wire.transport.sock = wire.transport.sock, SimpleNamespace(recv=wants_more, settimeout=lambda timeout: None)
        with pytest.raises(TimeoutError):
            wire.deliveries.drain(timeout=0)
        assert wire.transport.connected
        wire.transport.sock = real
        del wire.transport._read_buffer
        wire.deliveries.drain(timeout=0)
        assert wire.others == ["py-amqp"]


@given(_properties, st.binary(max_size=40))
def test_a_message_that_py_amqp_decoded_after_all(properties, body):
    theirs = as_py_amqp(encode_properties(properties, amqp.Message.PROPERTIES))
    message = amqp.Message(body, **theirs)
    message.channel = None
    message.delivery_info = {
        "consumer_tag": "c", "delivery_tag": 2**40, "redelivered": True, "exchange": "", "routing_key": "q"
    }  # fmt: skip
    found = taken(message)
    assert (found.body, found.delivery_tag, found.delivery_info) == (body, 2**40, message.delivery_info)
    assert found.content == encode_properties(theirs, amqp.Message.PROPERTIES)


def test_an_export_has_the_very_bytes_of_the_properties():
    entry = b"\x01nb\x05"  # an octet, which py-amqp reads and would write as four bytes
    content = b"\x20\x00" + struct.pack(">I", len(entry)) + entry
    line = exported(Taken(b"", content, b"body"), DeadLetter("id", "q", "q.dlq", "failure", 1, Original()), "q")
    assert base64.b64decode(line["properties"]) == content
    restored, _ = imported(line, Policy())
    assert (restored.properties, restored.body) == ({"application_headers": {"n": 5}}, b"body")


def test_what_cannot_be_decoded_can_be_exported_and_imported():
    raw = Taken(dumps("sLbss", ("c", 1, False, "", "q.dlq")), b"\x80\x00\x04\xff\xfe\xfd\xfc", b"body")
    restored, letter = imported(exported(raw, letter_of(raw, "q", "q.dlq"), "q"), Policy())
    assert (restored.properties, restored.body) == (raw.properties, b"body")
    assert letter.original.headers == {UNDECODED: raw.content}


def test_a_routing_key_that_is_no_text_is_read_all_the_same():
    method = dumps("sLbs", ("c", 1, False, "events")) + b"\x02\xff\xfe"
    letter = letter_of(Taken(method, b"\0\0", b"body"), "q", "q.dlq")
    assert letter.original.routing_key == "\ufffd\ufffd"


@pytest.mark.parametrize("headers", [{}, {"task": "t", "id": "t1"}])
def test_a_record_without_an_id_makes_letters_that_can_be_told_apart(headers):
    def read(body: bytes) -> str:
        table = {**headers, HEADER: {"reason": "failure"}}
        content = encode_properties({"application_headers": table}, amqp.Message.PROPERTIES)
        return letter_of(Taken(dumps("sLbss", ("c", 1, False, "", "q.dlq")), content, body), "q", "q.dlq").id

    assert read(b"one"), "letters that the broker returns are known by their ids: one without was taken for sent"
    assert read(b"one") == read(b"one") != read(b"two")


def test_a_broker_that_confirms_slowly_is_waited_for_and_a_silent_one_is_not(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(moving, "monotonic", lambda: now[0])

    class Pipeline:
        unconfirmed = 1_000

        def __init__(self, each: int) -> None:
            self.each = each

        def write(self) -> None:
            now[0] += 60  # a large message over a thin line

        def read(self, timeout: float) -> None:
            now[0] += timeout
            self.unconfirmed -= self.each

    slow = Pipeline(10)
    moving.confirmed(slow, 500)
    assert slow.unconfirmed == 500
    with pytest.raises(ReplayError, match="1000 letters stay"):
        moving.confirmed(Pipeline(0), 500)
