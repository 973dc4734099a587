"""What must change in a message so that it can live again (pure)."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from celery_dlx.letters import HEADER, DeadLetter, Reason

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


def revive_headers(letter: DeadLetter, now: datetime | None = None) -> tuple[dict[str, Any], list[str]]:
    """The headers a letter is replayed with, and what changed in them for people to read.

    Everything else of the message stays as it was. The lineage goes into our own header.
    """
    headers = {key: value for key, value in letter.original.headers.items() if key not in BROKER_HEADERS}
    changes = []
    if headers.get("retries"):
        changes.append(f"retries {headers['retries']} → 0")
        headers["retries"] = 0
    if past(headers.get("expires"), now):
        changes.append(f"expires {headers['expires']} dropped: it is past")
        headers["expires"] = None
    headers[HEADER] = {"replays": letter.replays + 1, "last": letter.id, "died_of": letter.reason}
    return headers, changes


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
    if letter.reason == Reason.EXPIRED.value:
        return None, [f"expiration {expiration} ms dropped: it died of it"]
    return str(expiration), []
