"""Takes headers out of encoded properties, and puts others in; all other bytes stay as they are."""

from __future__ import annotations

from collections.abc import Container, Mapping
from struct import Struct
from struct import error as StructError
from typing import Any

from celery_dlx.brokers.rabbitmq.framing import encode_table

_SIZE = Struct(">I")
#: Flags of the properties that stand before the headers, of the headers, and of more flags (AMQP 0-9-1, class `basic`).
_BEFORE, _HEADERS, _MORE = (0x8000, 0x4000), 0x2000, 0x0001
#: Bytes that values of a fixed size take, by type; and types whose values say their size. Of others nothing is sure.
_FIXED = {ord(kind): size for kind, size in zip("VtbBUuIifDlLdT", (0, 1, 1, 1, 2, 2, 4, 4, 4, 5, 8, 8, 8, 8), strict=True)}
_SIZED = frozenset(b"SFAx")


def spliced(content: bytes, drop: Container[bytes], add: Mapping[str, Any]) -> bytes | None:
    """The properties without the headers of some names, and with more at their end; ``None``: they cannot be told apart."""
    try:
        return _spliced(content, drop, encode_table(add)[_SIZE.size :])
    except (IndexError, ValueError, StructError):
        return None


def _spliced(content: bytes, drop: Container[bytes], add: bytes) -> bytes | None:
    flags, at = content[0] << 8 | content[1], 2
    if not flags & _HEADERS or flags & _MORE:
        return None
    for flag in _BEFORE:
        if flags & flag:
            at += 1 + content[at]
    begin = kept = at + _SIZE.size
    end = begin + int.from_bytes(content[at:begin], "big")
    head, parts, fixed, size_at = content[:at], [], _FIXED, _SIZE.unpack_from
    at = begin
    while at < end:
        stop = at + 1 + content[at]
        kind = content[stop]
        if kind in _SIZED:
            after = stop + 5 + size_at(content, stop + 1)[0] if stop + 5 <= end else end + 1
        elif kind in fixed:
            after = stop + 1 + fixed[kind]
        else:
            return None
        if content[at + 1 : stop] in drop:
            parts.append(content[kept:at])
            kept = after
        at = after
    if at != end or end > len(content):
        return None
    parts += (content[kept:end], add)
    table = b"".join(parts)
    return b"".join((head, _SIZE.pack(len(table)), table, content[end:]))
