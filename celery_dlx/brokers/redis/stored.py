"""What is stored of a letter, read as far as somebody asks: replays and filters look at little of it."""

from __future__ import annotations

from math import isfinite
from typing import Any

from celery_dlx.brokers.redis.letters import original_of, parsed_item
from celery_dlx.brokers.redis.records import inflated, read_fields
from celery_dlx.lazy import unread
from celery_dlx.letters import (
    HEADER,
    RECORDED,
    DeadLetter,
    Original,
    describe,
    earlier_deaths,
    exception_record,
    text_or_none,
    whole,
)

#: What a replay asks for.
_LINEAGE = ("queue", "reason", "fingerprint", "replays", "deaths", "stripped")


class Stored:
    """A letter's record, and its item if that was read too; says what each field of the letter is.

    ``queue`` is whose DLQ it lies in, for records that do not say so.
    """

    __slots__ = ("_fields", "_original", "_parsed", "item", "queue", "record")

    def __init__(self, record: bytes | None, item: bytes | None, queue: str = "") -> None:
        self.record, self.item, self.queue = record, item, queue
        self._fields: dict[str, Any] | None = None
        self._parsed: tuple[dict[str, Any] | None, tuple[int, int] | None] | None = None
        self._original: Original | None = None

    def __call__(self, name: str) -> dict[str, Any]:
        if name in _LINEAGE:
            fields = self.fields
            found = {each: RECORDED[each](fields) for each in _LINEAGE}
            if not found["deaths"] and self.item is not None:
                headers = (self.parsed[0] or {}).get("headers")
                found["deaths"] = earlier_deaths(headers.get(HEADER)) if isinstance(headers, dict) else []
            found["queue"] = found["queue"] or self.queue
            return found
        if name == "exception":
            return {name: exception_record(inflated(self.fields.get(name)))}
        read = RECORDED.get(name)
        if read is not None:
            return {name: read(self.fields)}
        if name == "original":
            return {name: self.original}
        if self.item is not None:
            return describe(self.original)
        value = self.fields.get(name)
        return {name: whole(value, 0) if name == "retries" else text_or_none(value)}

    @property
    def fields(self) -> dict[str, Any]:
        if self._fields is None:
            self._fields = read_fields(self.record) or {}
        return self._fields

    @property
    def parsed(self) -> tuple[dict[str, Any] | None, tuple[int, int] | None]:
        """See `parsed_item`."""
        if self._parsed is None:
            self._parsed = parsed_item(self.item or b"")
        return self._parsed

    @property
    def original(self) -> Original:
        if self._original is None:
            if self.item is not None:
                self._original = original_of(self.item, self.parsed[0])
            else:
                exchange, routing_key = (str(self.fields.get(name) or "") for name in ("exchange", "routing_key"))
                priority = whole(self.fields.get("priority"), 0)
                self._original = Original(properties={"priority": priority}, exchange=exchange, routing_key=routing_key)
        return self._original


def millisecond(score: float) -> int:
    """When a letter died; 0 for what is no time."""
    return int(score) if isfinite(score) else 0


def letter_of(
    record: bytes | None, item: bytes | None, score: float, dlq: str, letter_id: str | None = None, queue: str = ""
) -> DeadLetter:
    """The letter of a stored record; with its payload, if that was read too. Nothing is parsed before it is asked for."""
    known: dict[str, Any] = {"dlq": dlq, "died_at": millisecond(score), "edited": None}
    if letter_id is not None:
        known["id"] = letter_id
    return unread(DeadLetter, Stored(record, item, queue), known)
