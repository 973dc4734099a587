"""What must change in a message so that it can live again (pure)."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from celery_dlx.letters import HEADER, MAX_DEATHS, DeadLetter, Reason

#: An id of a replay, as `celery_dlx.replay.start` makes them.
_REPLAY = re.compile(r"[0-9a-f]{12}")
#: A longer body, in bytes, is kept in the journal of the replay that edited it only.
_IN_LINEAGE = 4096
#: How long reports are kept, in seconds.
REPORT_SECONDS = 86_400
#: Headers the broker wrote on the way to the DLQ. Left in, they make RabbitMQ's cycle detection drop the message
#: silently at its next death (seen on 3.10.8), or carry a spent delivery count.
BROKER_HEADERS = (
    "x-death",
    "x-first-death-exchange",
    "x-first-death-queue",
    "x-first-death-reason",
    "x-last-death-exchange",
    "x-last-death-queue",
    "x-last-death-reason",
    "x-delivery-count",
    "x-acquired-count",
)

#: Headers that a replay changes.
CHANGED = ("retries", "expires")


def revive_headers(
    letter: DeadLetter, now: datetime | None = None, replay: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The headers a letter is replayed with, and what changed in them for people to read.

    Everything else of the message stays as it was. The lineage goes into our own header; ``replay`` is the id of the
    replay that wants to hear what becomes of it.
    """
    return revive(letter.original.headers, letter, now, replay)


def revive(
    original: Mapping[str, Any], letter: DeadLetter, now: datetime | None = None, replay: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """As `revive_headers`, of some of a letter's headers; the others stay as they are.

    Only those in `CHANGED` are ever changed, those in `BROKER_HEADERS` dropped, and our own added.
    """
    headers = {key: value for key, value in original.items() if key not in BROKER_HEADERS}
    changes = []
    if headers.get("retries"):
        changes.append(f"retries {headers['retries']} → 0")
        headers["retries"] = 0
    if past(headers.get("expires"), now):
        changes.append(f"expires {headers['expires']} dropped: it is past")
        headers["expires"] = None
    headers[HEADER] = lineage(letter, replay)
    if letter.edited is not None:
        changes.append("arguments edited")
    return headers, changes


def lineage(letter: DeadLetter, replay: str | None = None) -> dict[str, Any]:
    """What a replayed message tells of its deaths, and of the replay that wants to hear what becomes of it."""
    this = {"id": letter.id, "reason": letter.reason, "fingerprint": letter.fingerprint, "died_at": letter.died_at}
    told: dict[str, Any] = {
        "replays": min(max(letter.replays, 0), 1_000_000) + 1,
        "last": letter.id,
        "died_of": letter.reason,
        "deaths": [*letter.deaths, this][-MAX_DEATHS:],
    }
    if letter.edited is not None:
        kept = base64.b64encode(letter.edited).decode() if len(letter.edited) <= _IN_LINEAGE else ""
        told["edited"] = {"bytes": len(letter.edited), "body": kept}
    if replay is not None:
        told["replay"] = replay
    return told


def replay_of(headers: object) -> str | None:
    """The id of the replay that a message came back by; ``None`` for any other message."""
    lineage = headers.get(HEADER) if isinstance(headers, Mapping) else None
    replay = lineage.get("replay") if isinstance(lineage, Mapping) else None
    # Anybody can send such a header: it becomes a queue's name.
    return replay if isinstance(replay, str) and _REPLAY.fullmatch(replay) else None


def lineage_of(headers: object) -> str:
    """The id of the letter that a replayed message was; "" for any other message."""
    lineage = headers.get(HEADER) if isinstance(headers, Mapping) else None
    last = lineage.get("last") if isinstance(lineage, Mapping) else None
    return last[:64] if isinstance(last, str) else ""


def report_queue(replay: str) -> str:
    """Where workers report what became of a replay's messages (a queue on RabbitMQ, a list on Redis)."""
    return f"celery-dlx.replay.{replay}"


def read_report(body: bytes | str) -> dict[str, Any]:
    """A worker's report; what cannot be read is an empty one."""
    try:
        report = json.loads(body)
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}


def past(expires: object, now: datetime | None = None) -> bool:
    """Whether Celery's ``expires`` header lies in the past. What cannot be read is left alone."""
    if isinstance(expires, str):
        try:
            expires = datetime.fromisoformat(expires.replace("Z", "+00:00"))
        except ValueError:
            return False
    if not isinstance(expires, datetime):
        return False
    if expires.tzinfo is None:
        expires = expires.replace(tzinfo=timezone.utc)
    return expires <= (now or datetime.now(timezone.utc))


def revive_expiration(letter: DeadLetter) -> tuple[str | None, list[str]]:
    """The per-message TTL (AMQP ``expiration``, in milliseconds) a letter is replayed with."""
    expiration = letter.stripped.get("expiration")
    if expiration is None:
        return None, []
    if not (str(expiration).isascii() and str(expiration).isdecimal()):
        return None, [f"expiration {expiration!r:.40} dropped: RabbitMQ accepts milliseconds only"]
    if letter.reason == Reason.EXPIRED.value:
        return None, [f"expiration {expiration} ms dropped: it died of it"]
    return str(expiration), []
