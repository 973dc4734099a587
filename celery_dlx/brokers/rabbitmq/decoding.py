"""Decodes basic properties in a third of py-amqp's time.

Value for value what py-amqp makes of them (a test compares the two); whatever is not plain is left to its decoder.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime, timezone
from functools import lru_cache
from struct import Struct
from typing import Any

from amqp.serialization import decode_properties_basic

from celery_dlx.letters import UNDECODED

_SIZE = Struct(">I").unpack_from
_INTEGER = Struct(">i").unpack_from
_LONG = Struct(">q").unpack_from
_DOUBLE = Struct(">d").unpack_from
#: Flags of basic properties that nothing is decoded for here: the first is not in use, the other announces more flags.
_OTHER_FLAGS = 0x0003
#: Name, flag and kind (short text, octet, long, table), in the order of AMQP 0-9-1's class `basic`.
_PROPERTIES = tuple(
    (name, 0x8000 >> position, kind)
    for position, (name, kind) in enumerate(
        (
            ("content_type", "s"),
            ("content_encoding", "s"),
            ("application_headers", "F"),
            ("delivery_mode", "o"),
            ("priority", "o"),
            ("correlation_id", "s"),
            ("reply_to", "s"),
            ("expiration", "s"),
            ("message_id", "s"),
            ("timestamp", "L"),
            ("type", "s"),
            ("user_id", "s"),
            ("app_id", "s"),
            ("cluster_id", "s"),
        )
    )
)


class _UnusualError(Exception):
    """For py-amqp to decode: its versions differ in rare types, and in what they make of what is cut short."""


def decode_properties(data: bytes) -> dict[str, Any]:
    """The basic properties in ``data``; those that cannot be decoded stand in a header, as bytes."""
    with suppress(Exception):  # rare; py-amqp's decoder says what it is
        return _properties(data)
    try:
        decoded: dict[str, Any] = decode_properties_basic(data, 0)[0]
    except Exception:  # noqa: BLE001 - a decoder over a stranger's bytes
        return {"application_headers": {UNDECODED: _text(data)}}
    return decoded


def decode_value(data: bytes, at: int, end: int) -> Any:
    """The value, after its type, that takes ``data`` from ``at`` to ``end``.

    Raises:
        ValueError: it is not plain; py-amqp may know it.
    """
    try:
        value, stop = _value(data, at, end)
    except Exception as exc:  # noqa: BLE001 - a stranger's bytes
        raise ValueError(type(exc).__name__) from None
    if stop != end:
        raise ValueError(f"expected {end}, found {stop}")
    return value


def _properties(data: bytes) -> dict[str, Any]:
    flags, at, end = data[0] << 8 | data[1], 2, len(data)
    if flags & _OTHER_FLAGS:
        raise _UnusualError
    found: dict[str, Any] = {}
    for name, kind in _present(flags):
        if kind == "s":
            stop = at + 1 + data[at]
            found[name] = data[at + 1 : stop].decode()
            at = stop
        elif kind == "F":
            stop = at + 4 + _SIZE(data, at)[0]
            if stop > end:
                raise _UnusualError
            found[name] = _table(data, at + 4, stop)
            at = stop
        elif kind == "o":
            found[name] = data[at]
            at += 1
        else:
            found[name] = _LONG(data, at)[0]
            if found[name] < 0:
                raise _UnusualError
            at += 8
    if at != end:
        raise _UnusualError
    return found


@lru_cache(maxsize=256)
def _present(flags: int) -> tuple[tuple[str, str], ...]:
    return tuple((name, kind) for name, flag, kind in _PROPERTIES if flags & flag)


@lru_cache(maxsize=1024)
def _name(data: bytes) -> str | bytes:
    return _text(data)


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _table(data: bytes, at: int, end: int) -> dict[Any, Any]:
    table: dict[Any, Any] = {}
    while at < end:
        stop = at + 1 + data[at]
        name = _name(data[at + 1 : stop])
        kind = data[stop]
        if kind == 0x53:  # as below; most are text
            at = stop + 5 + _SIZE(data, stop + 1)[0]
            if at > end:
                raise _UnusualError
            table[name] = _text(data[stop + 5 : at])
        elif kind == 0x56:
            table[name], at = None, stop + 1
        else:
            table[name], at = _value(data, stop, end)
    if at != end:
        raise _UnusualError
    return table


def _value(data: bytes, at: int, end: int) -> tuple[Any, int]:
    kind = data[at]
    at += 1
    if kind == 0x53:  # S: text, or bytes
        stop = at + 4 + _SIZE(data, at)[0]
        if stop > end:
            raise _UnusualError
        return _text(data[at + 4 : stop]), stop
    if kind == 0x56:  # V
        return None, at
    if kind == 0x49:  # I
        return _INTEGER(data, at)[0], at + 4
    if kind in (0x6C, 0x4C):  # l and L: py-amqp's versions differ in the sign
        value = _LONG(data, at)[0]
        if value < 0:
            raise _UnusualError
        return value, at + 8
    if kind == 0x46:  # F
        stop = at + 4 + _SIZE(data, at)[0]
        return _table(data, at + 4, stop), stop
    if kind == 0x74:  # t
        return bool(data[at]), at + 1
    if kind == 0x41:  # A
        stop, values = at + 4 + _SIZE(data, at)[0], []
        at += 4
        while at < stop:
            value, at = _value(data, at, stop)
            values.append(value)
        if at != stop:
            raise _UnusualError
        return values, at
    if kind == 0x64:  # d
        return _DOUBLE(data, at)[0], at + 8
    if kind == 0x54:  # T
        value = _LONG(data, at)[0]
        if value < 0:
            raise _UnusualError
        return datetime.fromtimestamp(value, tz=timezone.utc).replace(tzinfo=None), at + 8
    raise _UnusualError
