"""Takes deliveries off a py-amqp connection as the bytes they are, many to a system call.

py-amqp asks the socket nine times for each delivery and decodes all of it. Here its connection is read in large pieces;
frames of deliveries to channels that ask for it are put together as bytes, every other frame goes to py-amqp as before.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from struct import Struct
from typing import Any

import amqp
from amqp.exceptions import UnexpectedFrame
from amqp.serialization import dumps
from amqp.spec import Basic

from celery_dlx.brokers.rabbitmq.decoding import decode_properties
from celery_dlx.brokers.rabbitmq.framing import encode_properties

#: Read at once at most, in bytes.
_LOT = 131_072
#: Type, channel and size of a frame (AMQP 0-9-1 §4.2.3), and the octet it ends with.
_FRAME = Struct(">BHI").unpack_from
_FRAME_HEAD, _FRAME_END = 7, 0xCE
_METHOD, _HEADER = 1, 2
_DELIVER = Struct(">HH").pack(*Basic.Deliver)
#: Arguments of `basic.deliver`.
_ARGUMENTS, _NAMES = "sLbss", ("consumer_tag", "delivery_tag", "redelivered", "exchange", "routing_key")
_TAG, _TAG_AND_FLAG = Struct(">Q").unpack_from, 9
#: Class, weight and body size (AMQP 0-9-1 §4.2.6.1) stand before the properties.
_HEADER_SIZE = 12
_BODY_SIZE = Struct(">Q").unpack_from


class Taken:
    """A delivery as bytes, decoded when it is asked for: what `amqp.Message` is to its readers."""

    __slots__ = ("_properties", "body", "channel", "content", "method")

    def __init__(self, method: bytes, content: bytes, body: bytes, channel: Any = None) -> None:
        """``method``: arguments of `basic.deliver`; ``content``: the properties."""
        self.method, self.content, self.body, self.channel = method, content, body, channel
        self._properties: dict[str, Any] | None = None

    @property
    def delivery_tag(self) -> int:
        tag: int = _TAG(self.method, 1 + self.method[0])[0]
        return tag

    @property
    def redelivered(self) -> bool:
        return self.method[self.method[0] + _TAG_AND_FLAG] & 1 == 1

    @property
    def delivery_info(self) -> dict[str, Any]:
        method = self.method
        at = 1 + method[0] + _TAG_AND_FLAG
        stop = at + 1 + method[at]
        exchange, key = method[at + 1 : stop], method[stop + 1 :]
        return {
            "consumer_tag": _name(method[1 : 1 + method[0]]),
            "delivery_tag": self.delivery_tag,
            "redelivered": self.redelivered,
            "exchange": _name(exchange),
            "routing_key": _name(key),
        }

    @property
    def properties(self) -> dict[str, Any]:
        if self._properties is None:
            self._properties = decode_properties(self.content)
        return self._properties


def _name(data: bytes) -> str:
    try:
        return data.decode("utf-8", "surrogatepass")  # as py-amqp does
    except UnicodeDecodeError:  # for the eye only: letters go back by the names of queues
        return data.decode("utf-8", "replace")


def taken(message: amqp.Message) -> Taken:
    """A delivery that py-amqp decoded."""
    info = message.delivery_info
    method = dumps(
        _ARGUMENTS, [info[key] for key in ("consumer_tag", "delivery_tag", "redelivered", "exchange", "routing_key")]
    )
    content = encode_properties(message.properties, message.PROPERTIES)
    return Taken(method, content, bytes(message.body or b""), message.channel)


class Deliveries:
    """Reads one py-amqp connection, for all who use it: see `deliveries_of`."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._handle, self._drain = connection.on_inbound_frame, connection.drain_events
        #: By channel id: the channel, and what is called with its deliveries; ``None``: they are not wanted any more.
        self._channels: dict[int, tuple[Any, Callable[[Taken], object] | None]] = {}
        #: By channel id: arguments, properties, body so far and bytes of it that are still to come.
        self._partial: dict[int, list[Any]] = {}
        # Of this connection alone, which is a tool's. Its channels wait for answers by `drain_events`, amid deliveries.
        connection.on_inbound_frame, connection.drain_events = self, self.drain

    def take(self, channel: Any, callback: Callable[[Taken], object]) -> None:
        """Call back with what is delivered to a channel."""
        self._channels[channel.channel_id] = (channel, callback)

    def close(self, channel: Any) -> None:
        """Close a channel; what still comes for it is dropped."""
        # py-amqp forgets a closed channel's id; another may get it.
        ids = [channel_id for channel_id, (each, _) in self._channels.items() if each is channel]
        try:
            if channel.is_open:
                self._channels.update((channel_id, (channel, None)) for channel_id in ids)
                channel.close()
        finally:
            for channel_id in ids:
                self._channels.pop(channel_id, None)
                self._partial.pop(channel_id, None)

    def __call__(self, frame: tuple[int, int, bytes]) -> Any:
        """Handle a frame, whoever read it; whether that completed something."""
        if not self._is_ours(frame):
            return self._handle(frame)
        kind, channel_id, payload = frame
        self._connection.bytes_recv += 1
        if kind == _METHOD:
            self._partial[channel_id] = [payload[4:], b"", [], 0]
            return False
        partial = self._partial[channel_id]
        if kind == _HEADER:
            partial[1], partial[3] = payload[_HEADER_SIZE:], _BODY_SIZE(payload, 4)[0]
        else:
            partial[2].append(payload)
            partial[3] -= len(payload)
        return partial[3] <= 0 and self._complete(channel_id)

    def _complete(self, channel_id: int) -> bool:
        method, content, chunks, _ = self._partial.pop(channel_id)
        channel, callback = self._channels[channel_id]
        if callback is not None:
            callback(Taken(method, content, chunks[0] if len(chunks) == 1 else b"".join(chunks), channel))
        return True

    def drain(self, timeout: float | None = None) -> None:
        """Handle all that has arrived, waiting at most ``timeout`` seconds for the first; in place of `drain_events`.

        Raises:
            TimeoutError: nothing came.
        """
        transport = self._connection.transport
        if not isinstance(getattr(transport, "_read_buffer", None), bytes):
            self._drain(timeout=timeout)  # a py-amqp that keeps what it has read elsewhere
            return
        while not self._frames(transport):
            with transport.having_timeout(timeout):
                try:
                    more = transport.sock.recv(_LOT)
                except (BlockingIOError, ssl.SSLWantReadError):
                    raise TimeoutError from None
                except OSError as exc:
                    transport.connected = isinstance(exc, TimeoutError)
                    raise
            if not more:
                transport.connected = False
                raise OSError("Server unexpectedly closed connection")
            transport._read_buffer += more

    def _frames(self, transport: Any) -> bool:
        """Handle the whole frames that were read; whether that completed something."""
        data, at, done = transport._read_buffer, 0, False
        try:
            while len(data) - at > _FRAME_HEAD:
                kind, channel_id, size = _FRAME(data, at)
                start = at + _FRAME_HEAD
                stop = start + size
                if stop >= len(data):
                    break
                if data[stop] != _FRAME_END:
                    raise UnexpectedFrame(f"Received frame_end {data[stop]:#04x} while expecting 0xce")
                frame = (kind, channel_id, data[start:stop])
                at = stop + 1
                if self._is_ours(frame):
                    done = self(frame) or done
                    continue
                # Whoever handles it may read on by himself, or raise.
                transport._read_buffer, data, at = data[at:], b"", 0
                done = self._handle(frame) or done
                data = transport._read_buffer
        finally:
            if at:
                transport._read_buffer = data[at:]
        return done

    def _is_ours(self, frame: tuple[int, int, bytes]) -> bool:
        kind, channel_id, payload = frame
        if kind == _METHOD:
            return payload.startswith(_DELIVER) and channel_id in self._channels
        return channel_id in self._partial


def deliveries_of(connection: Any) -> Deliveries:
    """The reader of a py-amqp connection, made at its first use; it stays for the connection's life."""
    found = connection.on_inbound_frame
    return found if isinstance(found, Deliveries) else Deliveries(connection)
