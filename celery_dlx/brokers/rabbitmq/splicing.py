"""Finds headers in encoded properties, takes some out and puts others in; all other bytes stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Set
from struct import Struct
from struct import error as StructError
from typing import Any, NamedTuple

from celery_dlx.brokers.rabbitmq.framing import encode_table

_SIZE = Struct(">I")
#: Flags of the properties before the headers, of the headers, the user id, and of more flags (AMQP 0-9-1, class `basic`).
_BEFORE, _HEADERS, _USER, _MORE = (0x8000, 0x4000), 0x2000, 0x0010, 0x0001
#: Bytes that values of a fixed size take, by type; and types whose values say their size. Of others nothing is sure.
_FIXED = {ord(kind): size for kind, size in zip("VtbBUuIifDlLdT", (0, 1, 1, 1, 2, 2, 4, 4, 4, 5, 8, 8, 8, 8), strict=True)}
_SIZED = frozenset(b"SFAx")


class Layout(NamedTuple):
    """Where encoded properties have their headers: begin and end of the entries; by name, begin of its entry, of its typed
    value, and the end of both. The size of the table stands before."""

    begin: int
    end: int
    spans: dict[bytes, tuple[int, int, int]]


def layout(content: bytes) -> Layout | None:
    """``None``: there are no headers, one stands there twice, or they cannot be told apart."""
    try:
        return _layout(content)
    except (IndexError, ValueError, StructError):
        return None


def _layout(content: bytes) -> Layout | None:
    flags, at = content[0] << 8 | content[1], 2
    if not flags & _HEADERS or flags & _MORE:
        return None
    for flag in _BEFORE:
        if flags & flag:
            at += 1 + content[at]
    begin = at + _SIZE.size
    end = begin + int.from_bytes(content[at:begin], "big")
    spans: dict[bytes, tuple[int, int, int]] = {}
    count, fixed, size_at = 0, _FIXED, _SIZE.unpack_from
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
        spans[content[at + 1 : stop]] = at, stop, after
        count += 1
        at = after
    if at != end or end > len(content) or count != len(spans):
        return None
    return Layout(begin, end, spans)


def entries(table: Mapping[str, Any]) -> bytes:
    """The encoded entries of a table, without the size in front."""
    return encode_table(table)[_SIZE.size :]


def says_user(content: bytes) -> bool:
    """Whether encoded properties have a ``user_id``."""
    return bool(content[1] & _USER)


def spliced(content: bytes, found: Layout, drop: Set[bytes], add: bytes) -> bytes:
    """The properties without the headers of some names, and with more, encoded ones, at their end."""
    parts, kept = [], found.begin
    for at, _, after in sorted(found.spans[name] for name in found.spans.keys() & drop):
        parts.append(content[kept:at])
        kept = after
    parts += (content[kept : found.end], add)
    table = b"".join(parts)
    return b"".join((content[: found.begin - _SIZE.size], _SIZE.pack(len(table)), table, content[found.end :]))
