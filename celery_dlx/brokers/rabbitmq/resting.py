"""A letter as it rests in a DLQ, read as far as somebody asks: most are only told apart, grouped or sent back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery_dlx.brokers.rabbitmq.decoding import decode_value
from celery_dlx.brokers.rabbitmq.deliveries import Taken
from celery_dlx.brokers.rabbitmq.splicing import Layout, layout
from celery_dlx.lazy import unread
from celery_dlx.letters import DESCRIBED, HEADER, RECORDED, DeadLetter, Original, describe, text_or_none

_RECORD = HEADER.encode()
_TASK = b"task"
_DESCRIBED = [name.encode() for name in DESCRIBED]
#: What nearly everybody asks for, and what whoever replays does; how it is read.
_COMMON = [(name, RECORDED[name]) for name in ("id", "queue", "reason", "fingerprint", "died_at")]
_LINEAGE = {name: RECORDED[name] for name in ("replays", "deaths", "stripped")}


class Resting:
    """A letter's bytes, with where its headers are and its record; says what each field of the letter is.

    ``original_of`` decodes all of it.
    """

    __slots__ = ("_original_of", "layout", "raw", "record")

    def __init__(self, raw: Taken, found: Layout, record: dict[str, Any], original_of: Callable[[Taken], Original]) -> None:
        self.raw, self.layout, self.record, self._original_of = raw, found, record, original_of

    def __call__(self, name: str) -> dict[str, Any]:
        if name in _LINEAGE:
            return {each: read(self.record) for each, read in _LINEAGE.items()}
        read = RECORDED.get(name)
        if read is not None:
            return {name: read(self.record)}
        if name == "original":
            return {name: self._original()}
        if name == "task" and (headers := self._headers([_TASK])):  # groups ask for no more
            return {name: text_or_none(headers["task"])}
        return self._described()

    def _headers(self, names: list[bytes]) -> dict[str, Any] | None:
        return headers_of(self.raw.content, self.layout, names) if _TASK in self.layout.spans else None

    def _described(self) -> dict[str, Any]:
        headers = self._headers(_DESCRIBED)
        return describe(self._original() if headers is None else Original(headers=headers))

    def _original(self) -> Original:
        original = self._original_of(self.raw)
        original.headers = {key: value for key, value in original.headers.items() if key != HEADER}
        original.exchange = str(self.record.get("exchange") or "")
        original.routing_key = str(self.record.get("routing_key") or "")
        return original


def headers_of(content: bytes, found: Layout, names: list[bytes]) -> dict[str, Any] | None:
    """Those of some headers that are there; ``None`` if one cannot be decoded."""
    headers = {}
    try:
        for name in names:
            if (span := found.spans.get(name)) is not None:
                headers[name.decode()] = decode_value(content, span[1], span[2])
    except ValueError:
        return None
    return headers


def resting(raw: Taken, queue: str, dlq: str, original_of: Callable[[Taken], Original]) -> DeadLetter | None:
    """The letter that a message is, if it has a record of ours; nothing else of it is decoded before it is asked for."""
    found = layout(raw.content)
    if found is None or (headers := headers_of(raw.content, found, [_RECORD])) is None:
        return None
    record = headers.get(HEADER)
    if not isinstance(record, dict) or not record.get("reason") or not record.get("id"):
        return None
    known: dict[str, Any] = {"dlq": dlq, "edited": None}
    for name, read in _COMMON:
        known[name] = read(record)
    known["queue"] = known["queue"] or queue
    return unread(DeadLetter, Resting(raw, found, record, original_of), known)
