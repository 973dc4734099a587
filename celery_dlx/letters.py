"""What a dead letter is: the original message, and the record of its death."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from hashlib import blake2b
from typing import Any
from uuid import uuid4

from celery_dlx.fingerprints import fingerprint
from celery_dlx.lazy import Lazy, lazy

#: The one header that carries the record of a death (RabbitMQ) and the lineage of a replayed message (both).
HEADER = "x-celery-dlx"
#: Header with the bytes of properties that could not be decoded (RabbitMQ).
UNDECODED = "x-dlx-undecoded-properties"
RECORD_VERSION = 1

#: Longest traceback kept, in characters; the tail is kept, where the cause stands.
MAX_TRACEBACK = 16_384
MAX_MESSAGE = 2_048
#: Earlier deaths that a message's lineage tells of.
MAX_DEATHS = 10
#: A body larger than this, in bytes, is not parsed to find an old-protocol task's name.
_MAX_PARSED_BODY = 65_536


class Reason(str, Enum):
    """Why a message became a dead letter."""

    FAILURE = "failure"
    RETRIES_EXHAUSTED = "retries_exhausted"
    REJECTED = "rejected"
    TIME_LIMIT = "time_limit"
    SOFT_TIME_LIMIT = "soft_time_limit"
    WORKER_LOST = "worker_lost"
    MAX_DELIVERIES = "max_deliveries"
    UNREGISTERED = "unregistered"
    UNDECODABLE = "undecodable"
    MALFORMED = "malformed"
    CONTENT_DISALLOWED = "content_disallowed"
    EXPIRED = "expired"
    MAXLEN = "maxlen"
    REVOKED = "revoked"

    def __str__(self) -> str:
        return self.value


#: RabbitMQ's word for a death (``x-death[].reason``), where ours differs.
BROKER_REASONS = {"delivery_limit": Reason.MAX_DELIVERIES.value}


@dataclass
class Original:
    """The message as its producer sent it.

    ``body`` is the payload's exact bytes (still compressed, if it was); ``properties`` are AMQP's basic properties
    (``content_type``, ``priority``, ``correlation_id``, …) without the headers.
    """

    body: bytes = b""
    headers: Mapping[str, Any] = field(default_factory=dict)
    properties: Mapping[str, Any] = field(default_factory=dict)
    exchange: str = ""
    routing_key: str = ""
    #: Tells apart two messages that are alike in everything (Redis: the publish's delivery tag).
    identity: str = ""
    #: The whole message as the broker holds it, where that is one piece of bytes (Redis).
    raw: bytes = b""


@dataclass
class Death:
    """What is known of one death. ``died_at`` is in milliseconds since the epoch."""

    reason: str
    queue: str
    died_at: int
    exception_type: str | None = None
    message: str = ""
    traceback: str = ""
    deliveries: int = 1
    worker: str | None = None
    service: str | None = None


@lazy
@dataclass
class DeadLetter(Lazy):
    """One dead letter, as the Python calls, the signals and the command line see it."""

    id: str
    queue: str
    dlq: str
    reason: str
    died_at: int
    original: Original
    task: str | None = None
    task_id: str | None = None
    root_id: str | None = None
    parent_id: str | None = None
    args: str | None = None
    kwargs: str | None = None
    retries: int = 0
    deliveries: int = 1
    exception: dict[str, str] | None = None
    worker: str | None = None
    service: str | None = None
    fingerprint: str = ""
    replays: int = 0
    #: Earlier deaths of the message, the oldest first: ``id``, ``reason``, ``fingerprint`` and ``died_at`` of each.
    deaths: list[dict[str, Any]] = field(default_factory=list)
    #: The body it had, if its message was edited.
    edited: bytes | None = None
    #: Paths of arguments that were blanked when it was stored.
    redacted: list[str] = field(default_factory=list)
    #: Properties that had to leave the message so that it can rest in a queue, and come back at replay.
    stripped: dict[str, Any] = field(default_factory=dict)

    @property
    def priority(self) -> int:
        value = self.original.properties.get("priority")
        return value if isinstance(value, int) else 0

    def as_dict(self) -> dict[str, Any]:
        """The contract's fields, JSON-ready."""
        return {
            "id": self.id,
            "queue": self.queue,
            "dlq": self.dlq,
            "reason": self.reason,
            "died_at": iso_time(self.died_at),
            "task": self.task,
            "task_id": self.task_id,
            "root_id": self.root_id,
            "parent_id": self.parent_id,
            "args": self.args,
            "kwargs": self.kwargs,
            "retries": self.retries,
            "deliveries": self.deliveries,
            "exception": self.exception,
            "worker": self.worker,
            "service": self.service,
            "fingerprint": self.fingerprint,
            "replays": self.replays,
            "exchange": self.original.exchange,
            "routing_key": self.original.routing_key,
            "priority": self.priority,
        }

    def record(self) -> dict[str, Any]:
        """The death's part only, as it travels in the header `HEADER`: what the message itself does not tell."""
        record: dict[str, Any] = {
            "v": RECORD_VERSION,
            "id": self.id,
            "reason": self.reason,
            "queue": self.queue,
            "died_at": self.died_at,
            "deliveries": self.deliveries,
            "replays": self.replays,
            "fingerprint": self.fingerprint,
            "worker": self.worker,
            "service": self.service,
            "exchange": self.original.exchange,
            "routing_key": self.original.routing_key,
        }
        if self.exception:
            record["exception"] = self.exception
        if self.stripped:
            record["stripped"] = self.stripped
        if self.redacted:
            record["redacted"] = self.redacted
        if self.deaths:
            record["deaths"] = self.deaths
        return record


def compose(death: Death, original: Original, dlq: str) -> DeadLetter:
    """Make the letter of a death. Never raises on account of what the message holds."""
    fields = describe(original)
    lineage = original.headers.get(HEADER)
    replays = whole(lineage.get("replays"), 0) if isinstance(lineage, Mapping) else 0
    exception = None
    if death.exception_type is not None:
        exception = {"type": death.exception_type, "message": death.message, "traceback": death.traceback}
    return DeadLetter(
        id=letter_id(death.queue, original, fields["task_id"], fields["retries"], replays),
        queue=death.queue,
        dlq=dlq,
        reason=death.reason,
        died_at=death.died_at,
        original=original,
        deliveries=death.deliveries,
        exception=exception,
        worker=death.worker,
        service=death.service,
        fingerprint=fingerprint(death.reason, fields["task"], death.exception_type, death.traceback),
        replays=replays,
        deaths=earlier_deaths(lineage),
        **fields,
    )


def bare_letter(death: Death, original: Original, dlq: str) -> DeadLetter:
    """A letter that says no more than what is certain."""
    return DeadLetter(uuid4().hex, death.queue, dlq, death.reason, death.died_at, original)


def letter_id(queue: str, original: Original, task_id: str | None, retries: int, replays: int) -> str:
    """The id of a death: the same for the same message in the same attempt, so that duplicates are recognised.

    At-least-once means that a crash between storing a letter and settling its message makes a second, equal letter:
    both carry this id, also when one of them was made by the broker. A message that names no task has nothing to be
    recognised by, and gets a random id.
    """
    if not task_id:
        return uuid4().hex
    digest = blake2b(digest_size=16)
    for part in (queue, original.identity, task_id, str(retries), str(replays)):
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    digest.update(original.body)
    return digest.hexdigest()


#: Headers that `describe` reads.
DESCRIBED = ("task", "id", "root_id", "parent_id", "argsrepr", "kwargsrepr", "retries")


def describe(original: Original) -> dict[str, Any]:
    """What a message says of its task, in either of Celery's message protocols; nothing is unpickled.

    Source: https://docs.celeryq.dev/en/stable/internals/protocol.html
    """
    source: Mapping[str, Any] = original.headers
    old = "task" not in source and _is_json(original)
    if old:
        source = _parsed_body(original)
    args, kwargs = source.get("argsrepr"), source.get("kwargsrepr")
    if old:
        args = args or (_repr(source["args"]) if "args" in source else None)
        kwargs = kwargs or (_repr(source["kwargs"]) if "kwargs" in source else None)
    return {
        "task": text_or_none(source.get("task")),
        "task_id": text_or_none(source.get("id")),
        "root_id": text_or_none(source.get("root_id")),
        "parent_id": text_or_none(source.get("parent_id")),
        "args": text_or_none(args),
        "kwargs": text_or_none(kwargs),
        "retries": whole(source.get("retries"), 0),
    }


def _repr(value: object) -> str:
    try:
        return repr(value)
    except RecursionError:
        return "<nested too deeply>"


def _is_json(original: Original) -> bool:
    return original.properties.get("content_type") == "application/json" and len(original.body) <= _MAX_PARSED_BODY


def _parsed_body(original: Original) -> Mapping[str, Any]:
    try:
        body = json.loads(original.body)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def exception_record(death: Mapping[str, Any] | None) -> dict[str, str] | None:
    """Read an exception's part of a record, tolerating whatever was stored."""
    if not isinstance(death, Mapping) or not death:
        return None
    return {key: str(death.get(key) or "") for key in ("type", "message", "traceback")}


def read_record(
    record: Mapping[str, Any], original: Original, dlq: str, described: dict[str, Any] | None = None
) -> DeadLetter:
    """Make the letter that a stored record tells of. Unknown keys are ignored, missing ones get defaults.

    ``described``: what the message says of its task, where it was not read.
    """
    fields = describe(original) if described is None else described
    recorded = {name: read(record) for name, read in RECORDED.items()}
    recorded["deaths"] = recorded["deaths"] or earlier_deaths(original.headers.get(HEADER))
    return DeadLetter(dlq=dlq, original=original, **recorded, **fields)


#: How each field is read that a stored record tells of.
RECORDED: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "id": lambda record: str(record.get("id") or ""),
    "queue": lambda record: str(record.get("queue") or ""),
    "reason": lambda record: str(record.get("reason") or ""),
    "died_at": lambda record: whole(record.get("died_at"), 0),
    "deliveries": lambda record: whole(record.get("deliveries"), 1),
    "exception": lambda record: exception_record(record.get("exception")),
    "worker": lambda record: text_or_none(record.get("worker")),
    "service": lambda record: text_or_none(record.get("service")),
    "fingerprint": lambda record: str(record.get("fingerprint") or ""),
    "replays": lambda record: whole(record.get("replays"), 0),
    "redacted": lambda record: _texts(record.get("redacted")),
    "deaths": lambda record: earlier_deaths(record),
    "stripped": lambda record: dict(found) if isinstance(found := record.get("stripped"), Mapping) else {},
}


def _texts(found: object) -> list[str]:
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []


def earlier_deaths(lineage: object) -> list[dict[str, Any]]:
    """The earlier deaths that a message's lineage or a letter's record tells of; anybody may have written it."""
    found = lineage.get("deaths") if isinstance(lineage, Mapping) else None
    if not isinstance(found, list):
        return []
    return [
        {
            **{key: safe_text(death.get(key) or "", 64) for key in ("id", "reason", "fingerprint")},
            "died_at": whole(death.get("died_at"), 0),
        }
        for death in found[-MAX_DEATHS:]
        if isinstance(death, Mapping)
    ]


def read_broker_death(headers: Mapping[str, Any], original: Original, dlq: str, source: str) -> DeadLetter:
    """Make the letter of a message that only RabbitMQ saw die, from its ``x-death`` header.

    ``source`` is the queue whose DLQ it lies in: the fallback where the header is missing or not readable.
    Source: https://www.rabbitmq.com/docs/dlx#effects
    """
    deaths = headers.get("x-death")
    # Newest first; other programs' messages may carry anything here.
    newest = deaths[0] if isinstance(deaths, list) and deaths and isinstance(deaths[0], Mapping) else {}
    word = str(newest.get("reason") or headers.get("x-first-death-reason") or "")
    reason = BROKER_REASONS.get(word, word) or Reason.MALFORMED.value
    when = newest.get("time")
    died_at = int(when.replace(tzinfo=timezone.utc).timestamp() * 1000) if isinstance(when, datetime) else 0
    keys = newest.get("routing-keys")
    original.exchange = str(newest.get("exchange") or "")
    original.routing_key = str(keys[0]) if isinstance(keys, list) and keys else original.routing_key
    death = Death(reason=reason, queue=str(newest.get("queue") or source), died_at=died_at)
    letter = compose(death, original, dlq)
    if "original-expiration" in newest:
        letter.stripped["expiration"] = str(newest["original-expiration"])
    if not letter.task_id:
        letter.id = stable_id(letter)
    return letter


def stable_id(letter: DeadLetter) -> str:
    """The id of a letter that nobody gave one: the same whenever it is read."""
    if letter.task_id:
        return letter_id(letter.queue, letter.original, letter.task_id, letter.retries, letter.replays)
    # Nothing but the death itself to derive it from.
    digest = blake2b(f"{letter.queue}\0{letter.reason}\0{letter.died_at}\0".encode("utf-8", "surrogatepass"), digest_size=16)
    digest.update(letter.original.body)
    return digest.hexdigest()


def clip(text: str, limit: int, *, keep: str = "head") -> str:
    """Cut a text to at most ``limit`` characters, keeping its ``head`` or its ``tail``, and say so in it."""
    if len(text) <= limit:
        return text
    note = f"[{len(text) - limit} characters cut]"
    room = max(limit - len(note) - 1, 0)
    if keep == "tail":
        return f"{note}\n{text[-room:] if room else ''}"
    return f"{text[:room]} {note}"


def safe_text(value: object, limit: int = MAX_MESSAGE) -> str:
    """``str(value)`` that cannot fail, at most ``limit`` characters; lone surrogates are replaced."""
    if type(value) is str and len(value) <= limit and value.isascii():
        return value  # nearly all are
    try:
        text = str(value)
    except BaseException as exc:  # noqa: BLE001 - a failing __str__ may raise anything at all
        text = f"<unprintable {type(value).__name__}: {type(exc).__name__}>"
    return clip(text, limit).encode("utf-8", "replace").decode("utf-8")


def type_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def iso_time(milliseconds: int) -> str:
    """``2026-11-20T08:00:00.123Z`` for milliseconds since the epoch."""
    try:
        moment = datetime.fromtimestamp(milliseconds / 1000, timezone.utc)
    except (OverflowError, ValueError, OSError):
        moment = datetime.fromtimestamp(0, timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def text_or_none(value: object) -> str | None:
    return None if value is None else safe_text(value)


def whole(value: object, default: int) -> int:
    """A stored number; the default for what is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) else default
