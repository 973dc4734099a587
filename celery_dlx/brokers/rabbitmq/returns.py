"""How often a message came back to a classic queue: the broker does not count, so it is sent again with a count.

Where the broker counts (quorum queues), nothing of this happens. The count travels in a header of its own, which is no part
of the message its producer sent.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import amqp

from celery_dlx.letters import Original

#: How often the message came back, and what a copy of it does not tell by itself.
RETURNS = "x-celery-dlx-returns"
#: By these RabbitMQ says that it counts: quorum queues, the second since 4.3.
BROKER_COUNTERS = ("x-delivery-count", "x-acquired-count")
#: Routes copies elsewhere (RabbitMQ: "Sender-selected Distribution").
_ROUTES = ("CC", "BCC")


def count_of(headers: Mapping[str, Any]) -> int:
    """How often a message came back, as far as its header tells: anybody can send one."""
    found = headers.get(RETURNS)
    if not isinstance(found, Mapping) or found.get("retries") != headers.get("retries"):
        return 0  # Celery hands headers on to the next retry, which is another message
    count = found.get("count")
    return count if isinstance(count, int) and 0 <= count < 1_000_000 else 0


def route_of(headers: Mapping[str, Any]) -> tuple[str, str] | None:
    """Exchange and routing key that a message was sent with first; ``None`` if it is no copy."""
    found = headers.get(RETURNS)
    if found is None or not isinstance(found, Mapping):
        return None
    return str(found.get("exchange") or ""), str(found.get("routing_key") or "")


def copy_of(original: Original, returns: int, user: str | None) -> tuple[amqp.Message, str] | None:
    """The message to send in place of one that came back, and the key by which the broker returns it.

    ``None`` if the broker would refuse it, or send it elsewhere: another user's, or one with routes of its own.
    """
    headers, properties = original.headers, original.properties
    if any(name in headers for name in _ROUTES) or properties.get("user_id", user) != user:
        return None
    key = uuid.uuid4().hex
    counted = {
        "count": returns,
        "key": key,
        "retries": headers.get("retries"),
        "exchange": original.exchange,
        "routing_key": original.routing_key,
    }
    return amqp.Message(original.body, application_headers={**headers, RETURNS: counted}, **properties), key
