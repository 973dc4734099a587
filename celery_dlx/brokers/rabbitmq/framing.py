"""AMQP 0-9-1 frames of one publish, encoded in half of py-amqp's time.

Byte for byte what py-amqp writes (a test compares them); values that are not plain are left to its serializer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from struct import Struct
from typing import Any

import amqp
from amqp.serialization import dumps
from amqp.spec import Basic

#: Frame: type, channel, size, payload, end (AMQP 0-9-1 §4.2.3).
_FRAME = Struct(">BHI").pack
_FRAME_END = b"\xce"
#: What a frame takes besides its payload, in bytes.
FRAME_OVERHEAD = 8
_CONTENT = Struct(">HHQ").pack
_CLASS, _PUBLISH = Basic.Publish
_SIZE = Struct(">I").pack
_TEXT = Struct(">cI").pack
_SHORT = Struct(">ci").pack
_LONG = Struct(">cq").pack
_DOUBLE = Struct(">cd").pack


class HeadersTooLargeError(Exception):
    """A message's headers and properties do not fit one frame: the broker would close the connection."""


def publish_frames(
    channel_id: int, message: amqp.Message, exchange: str, routing_key: str, frame_max: int, *, mandatory: bool = True
) -> bytes:
    """All frames of a ``basic.publish``.

    Raises:
        HeadersTooLargeError: the header frame cannot be split (AMQP 0-9-1 §4.2.6), and does not fit ``frame_max`` bytes.
        Exception: whatever the values of headers and properties make an encoder raise.
    """
    body = message.body
    body = body.encode() if isinstance(body, str) else body or b""
    properties = encode_properties(message.properties, message.PROPERTIES)
    return content_frames(channel_id, properties, body, exchange, routing_key, frame_max, mandatory=mandatory)


def content_frames(
    channel_id: int,
    properties: bytes,
    body: bytes,
    exchange: str,
    routing_key: str,
    frame_max: int,
    *,
    mandatory: bool = True,
) -> bytes:
    """As `publish_frames`, of properties that are encoded already."""
    content = _CONTENT(_CLASS, 0, len(body)) + properties
    room = frame_max - FRAME_OVERHEAD
    if len(content) > room:
        raise HeadersTooLargeError(f"headers of {len(content)} bytes, the frame holds {room}")
    parts = [_method(channel_id, exchange, routing_key, mandatory), _FRAME(2, channel_id, len(content)), content, _FRAME_END]
    for start in range(0, len(body), room):
        chunk = body[start : start + room]
        parts += (_FRAME(3, channel_id, len(chunk)), chunk, _FRAME_END)
    return b"".join(parts)


@lru_cache(maxsize=256)
def _method(channel_id: int, exchange: str, routing_key: str, mandatory: bool) -> bytes:
    arguments = _SIZE(_CLASS << 16 | _PUBLISH) + dumps("Bssbb", (0, exchange, routing_key, mandatory, False))
    frame: bytes = _FRAME(1, channel_id, len(arguments)) + arguments + _FRAME_END
    return frame


def encode_properties(properties: Mapping[str, Any], kinds: Sequence[tuple[str, str]]) -> bytes:
    """Flags and values of basic properties; ``kinds`` are py-amqp's names and types of them, in order."""
    flags, shift, parts = 0, 15, []
    for name, kind in kinds:
        value = properties.get(name)
        if value is not None:
            flags |= 1 << shift
            if kind == "F":
                parts.append(encode_table(value))
            elif kind == "s" and type(value) is str:
                parts.append(_name(value) if len(value) < 32 else _short_text(value))
            else:
                parts.append(dumps(kind, [value]))
        shift -= 1
    return flags.to_bytes(2, "big") + b"".join(parts)


def encode_table(table: Mapping[Any, Any]) -> bytes:
    """A field table (AMQP 0-9-1 §4.2.5.5, with RabbitMQ's types)."""
    parts: list[bytes] = []
    for key, value in table.items():
        encode = _ENCODERS.get(type(value))
        if encode is None or type(key) is not str:
            # Rare: decimals, times, subclasses. Without the size in front it is an entry of ours.
            parts.append(dumps("F", [{key: value}])[4:])
        else:
            parts.append(_name(key) + encode(value))
    data = b"".join(parts)
    return _SIZE(len(data)) + data


def _array(values: Sequence[Any]) -> bytes:
    parts = []
    for value in values:
        encode = _ENCODERS.get(type(value))
        parts.append(encode(value) if encode is not None else dumps("A", [[value]])[4:])
    data = b"".join(parts)
    return b"A" + _SIZE(len(data)) + data


def _short_text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return bytes((len(data),)) + data


#: The same few names stand in every message.
_name = lru_cache(maxsize=1024)(_short_text)


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return _TEXT(b"S", len(data)) + data


def _integer(value: int) -> bytes:
    return _SHORT(b"I", value) if -2147483647 <= value <= 2147483647 else _LONG(b"L", value)


_ENCODERS: dict[type, Callable[[Any], bytes]] = {
    str: _text,
    bytes: lambda value: _TEXT(b"S", len(value)) + value,
    int: _integer,
    bool: lambda value: b"t\x01" if value else b"t\x00",
    float: lambda value: _DOUBLE(b"d", value),
    type(None): lambda value: b"V",
    dict: lambda value: b"F" + encode_table(value),
    list: _array,
    tuple: _array,
}
