"""The items that letters are replayed as."""

from __future__ import annotations

import json
from typing import Any

from celery_dlx.brokers.redis.letters import parsed_item, set_body
from celery_dlx.brokers.redis.records import decode
from celery_dlx.brokers.redis.stored import Stored
from celery_dlx.lazy import source_of
from celery_dlx.letters import HEADER, DeadLetter
from celery_dlx.replaying import BROKER_HEADERS, lineage, revive_expiration, revive_headers

#: Headers that do not go back as they are.
_CHANGED = frozenset((*BROKER_HEADERS, "redelivered"))
#: Numbers that Lua keeps exactly, and more than anybody sends.
_MOST = 1_000_000
_LINEAGE = f', "{HEADER}": '


def revived(item: bytes, letter: DeadLetter, replay: str | None = None) -> tuple[bytes, list[str], dict[str, Any] | None]:
    """The item a letter is replayed as, what changed in it, and what it parses to. Raw garbage goes back as it is."""
    source = source_of(letter)
    payload, span = source.parsed if isinstance(source, Stored) and source.item is item else parsed_item(item)
    if payload is None:
        return item, [], None
    more = revive_expiration(letter)[1] if letter.stripped else []
    if span is not None and _is_plain(payload, letter):
        message = _spliced(item.decode(), span, payload["headers"], json.dumps(lineage(letter, replay)))
        if message is not None:
            return message.encode(), more, payload
    try:
        message, changes, payload = _rewritten(payload, letter, replay)
        return message.encode(), changes + more, payload
    except RecursionError:
        return item, [], payload


def told(letter: DeadLetter, replay: str | None = None) -> tuple[bytes, int, int] | None:
    """The lineage of a letter with priority and retries of its message, where its record promises a message in which only
    that is put in and the retries are counted anew; splice.lua looks whether it is one."""
    source = source_of(letter)
    if not isinstance(source, Stored) or letter.edited is not None:
        return None
    known = source.fields.get
    # Without a task id it may be no message at all.
    if not known("task_id") or known("replays") or known("deaths") or known("stripped") or known("redacted"):
        return None
    priority, retries = known("priority", 0), known("retries", 0)
    if type(priority) is not int or type(retries) is not int or not (0 <= priority < _MOST and 0 <= retries < _MOST):
        return None
    return json.dumps(lineage(letter, replay)).encode(), priority, retries


def _is_plain(payload: dict[str, Any], letter: DeadLetter) -> bool:
    """Whether nothing but the lineage changes."""
    headers, info = payload["headers"], payload["properties"].get("delivery_info")
    return (
        letter.edited is None
        and not headers.get("retries")
        and headers.get("expires") is None
        and _CHANGED.isdisjoint(headers)
        and not (isinstance(info, dict) and "redelivered" in info)
    )


def _spliced(text: str, span: tuple[int, int], headers: dict[str, Any], told: str) -> str | None:
    """An item with its lineage put in, or put in place of an earlier one; ``None`` where that is not the last header."""
    start, end = span
    if HEADER not in headers:
        return f"{text[: end - 1]}{_LINEAGE[0 if headers else 2 :]}{told}{text[end - 1 :]}"
    # Quotes inside strings are escaped: what this finds is a key. That of a nested object ends before the headers do.
    at = text.rfind(_LINEAGE, start, end)
    if at < 0:
        return None
    value, last = decode(text, at + len(_LINEAGE))
    return f"{text[: at + len(_LINEAGE)]}{told}{text[last:]}" if last == end - 1 and value == headers[HEADER] else None


def _rewritten(payload: dict[str, Any], letter: DeadLetter, replay: str | None) -> tuple[str, list[str], dict[str, Any]]:
    """The whole item written anew."""
    payload = {**payload, "properties": dict(payload["properties"])}
    payload["headers"], changes = revive_headers(letter, replay=replay)
    if letter.edited is not None:
        set_body(payload, letter.original)
    info = payload["properties"].get("delivery_info")
    if isinstance(info, dict) and "redelivered" in info:
        payload["properties"]["delivery_info"] = {key: value for key, value in info.items() if key != "redelivered"}
    return json.dumps(payload), changes, payload
