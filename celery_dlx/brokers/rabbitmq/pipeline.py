"""Publishes many messages with few system calls, and learns what became of each from confirms and returns."""

from __future__ import annotations

import logging
import ssl
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import amqp
from amqp import spec
from kombu.transport.pyamqp import Channel

from celery_dlx.brokers.rabbitmq.framing import content_frames, publish_frames
from celery_dlx.brokers.rabbitmq.returns import RETURNS
from celery_dlx.letters import HEADER

logger = logging.getLogger("celery_dlx")

#: Written at once at most, in bytes.
_BATCH_BYTES = 262_144

#: With more than this waiting to be written, in bytes, notes are dropped.
_MOST_UNWRITTEN = 1_048_576

#: How a publish ended.
STORED, RETURNED, REFUSED = "stored", "returned", "refused"


class OneShotChannel(Channel):  # type: ignore[misc]
    """A channel that stays closed when the broker closes it, so that the broker's reason is seen.

    py-amqp's own opens itself again first, which waits for an answer and forgets the confirm mode.
    """

    def _do_revive(self) -> None:
        self.is_open = False


class NoteChannel(OneShotChannel):
    """A channel for what may be lost. The broker closing it (no permission) is nobody else's business."""

    def _on_close(self, reply_code: int, reply_text: str, class_id: int, method_id: int) -> None:
        self.send_method(spec.Channel.CloseOk)
        self.is_open = False
        logger.warning("replays are not told of outcomes: %s", reply_text)


class ConfirmPipeline:
    """A channel in confirm mode. Used by one thread at a time; the socket blocks while the broker does not read.

    py-amqp's own `basic_publish` reads from the socket before every publish and writes each message by itself; this
    writes whole batches and reads confirms when there are some.
    """

    def __init__(self, connection: Any, on_outcome: Callable[[Any, str], None], *, notes: bool = False) -> None:
        """``connection`` is an open `amqp.Connection`; ``notes``: `tell` will be used."""
        self._notes: NoteChannel | None = None
        if notes:
            self._notes = NoteChannel(connection)
            self._notes.open()
        channel = OneShotChannel(connection)
        channel.open()
        self._channel = channel
        self._connection = connection
        self._on_outcome = on_outcome
        self._data = bytearray()
        self._sequence = 0
        self._waiting: OrderedDict[int, Any] = OrderedDict()
        #: Keys of returned messages: several in flight may share one.
        self._returned: Counter[str] = Counter()
        channel.confirm_select()
        channel.events["basic_ack"].add(self._on_ack)
        channel.events["basic_nack"].add(self._on_nack)
        channel.events["basic_return"].add(self._on_return)

    @property
    def unconfirmed(self) -> int:
        return len(self._waiting)

    def waiting(self) -> list[Any]:
        """What was published and not yet settled, in order."""
        return list(self._waiting.values())

    def oldest(self) -> list[Any]:
        """The first of them, if there is one: the broker settles in about the order of publishing."""
        return [next(iter(self._waiting.values()))] if self._waiting else []

    def publish(self, token: Any, message: amqp.Message, exchange: str, routing_key: str) -> None:
        """Encode one message, mandatory; ``token`` comes back with its outcome. Nothing is written yet.

        Raises:
            HeadersTooLargeError: its headers and properties do not fit one frame.
            Exception: whatever the message's headers make the encoder raise. Nothing of it is written then.
        """
        self._add(
            token, publish_frames(self._channel.channel_id, message, exchange, routing_key, self._connection.frame_max)
        )

    def publish_bytes(self, token: Any, properties: bytes, body: bytes, exchange: str, routing_key: str) -> None:
        """As `publish`, of properties that are encoded already."""
        channel_id, frame_max = self._channel.channel_id, self._connection.frame_max
        self._add(token, content_frames(channel_id, properties, body, exchange, routing_key, frame_max))

    def _add(self, token: Any, frames: bytes) -> None:
        self._data += frames
        self._sequence += 1
        self._waiting[self._sequence] = token

    def tell(self, queue: str, body: bytes) -> None:
        """Encode a message that may be lost, to a queue that need not exist; nobody hears of its outcome."""
        if self._notes is None or not self._notes.is_open or self.unwritten > _MOST_UNWRITTEN:
            return
        message = amqp.Message(body, content_type="application/json", delivery_mode=2)
        self._data += publish_frames(self._notes.channel_id, message, "", queue, self._connection.frame_max, mandatory=False)

    def write(self) -> None:
        """Hand what was encoded to the broker; blocks while the broker does not read."""
        if self._data:
            data, self._data = self._data, bytearray()
            self._connection.transport.write(bytes(data))

    def write_some(self) -> bool:
        """Hand over as much as the socket, which must not block, takes now; whether that was all."""
        data, sock = self._data, self._connection.sock
        while data:
            try:
                sent = sock.send(memoryview(data)[:_BATCH_BYTES])
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return False
            del data[:sent]
        return True

    @property
    def unwritten(self) -> int:
        """Bytes encoded and not yet handed over."""
        return len(self._data)

    def read_some(self, *, once: bool = False) -> None:
        """Take what has arrived, without waiting; ``once``: the next frame only, for a caller that is told of more."""
        try:
            self._connection.drain_events(timeout=0)
            # What TLS has decrypted already does not make the socket readable again.
            pending = getattr(self._connection.sock, "pending", lambda: 0)
            while not once or pending():
                self._connection.drain_events(timeout=0)
        except (TimeoutError, BlockingIOError, ssl.SSLWantReadError):
            pass

    def read(self, timeout: float | None = 0) -> None:
        """Take the confirms that have arrived, waiting at most ``timeout`` seconds for the first."""
        self.write()
        try:
            self._connection.drain_events(timeout=timeout)
            while True:
                self._connection.drain_events(timeout=0)
        except (TimeoutError, BlockingIOError):
            pass

    def _settle(self, tag: int, multiple: bool, outcome: str) -> None:
        if not multiple:
            self._finish(tag, outcome)
            return
        while self._waiting:
            first = next(iter(self._waiting))
            if first > tag:
                break
            self._finish(first, outcome)

    def _finish(self, tag: int, outcome: str) -> None:
        token = self._waiting.pop(tag, None)
        if token is None:
            return
        if outcome == STORED and self._returned and self._returned[token.key] > 0:
            self._returned[token.key] -= 1
            outcome = RETURNED
            if not self._returned[token.key]:
                del self._returned[token.key]
        self._on_outcome(token, outcome)

    def _on_ack(self, delivery_tag: int, multiple: bool) -> None:
        self._settle(delivery_tag, multiple, STORED)

    def _on_nack(self, delivery_tag: int, multiple: bool) -> None:
        self._settle(delivery_tag, multiple, REFUSED)

    def _on_return(self, exc: Exception, exchange: str, routing_key: str, message: Any) -> None:
        # The broker sends a return before the acknowledgement of the same message
        # (https://www.rabbitmq.com/docs/confirms#when-publishes-are-confirmed).
        key = return_key(message)
        if key:
            self._returned[key] += 1


def return_key(message: Any) -> str:
    """What tells a returned message apart: a counted copy's key, our record's id, or the lineage of a replay."""
    headers = message.properties.get("application_headers") or {}
    header = next((each for each in map(headers.get, (RETURNS, HEADER)) if isinstance(each, Mapping)), {})
    return str(header.get("key") or header.get("id") or header.get("last") or "")
