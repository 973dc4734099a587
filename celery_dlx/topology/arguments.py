"""From a policy to what RabbitMQ must hold: exchanges, queues, bindings and their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery_dlx.policy.settings import Policy, QueueSettings

EXCHANGE_TYPE = "direct"
#: Longest name AMQP carries, in bytes (a short string, AMQP 0-9-1 §4.2.5.3).
MAX_NAME = 255


def source_arguments(
    policy: Policy, queue: str, settings: QueueSettings, own: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The arguments a source queue is declared with when we create it; the application's ``own`` ones win."""
    own = own or {}
    arguments: dict[str, Any] = {}
    if settings.type is not None:
        arguments["x-queue-type"] = settings.type
    if policy.via == "policy":
        return {**arguments, **own}  # all the rest a RabbitMQ policy says; producers may declare the queue plainly
    if settings.message_ttl is not None:
        arguments["x-message-ttl"] = max(int(settings.message_ttl * 1000), 1)
    if settings.max_length is not None:
        arguments["x-max-length"] = settings.max_length
    if own.get("x-queue-type", settings.type) == "quorum":
        # The limit counts redeliveries, not deliveries (https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling).
        arguments["x-delivery-limit"] = settings.max_deliveries - 1
    if settings.enabled:
        # The routing key is always set: without it a replayed message, whose key is its queue's name, and a message
        # published by another key would be lost at their next death.
        arguments["x-dead-letter-exchange"] = policy.exchange
        arguments["x-dead-letter-routing-key"] = queue
        if settings.strategy == "at-least-once" and own.get("x-queue-type", settings.type) == "quorum":
            # Both or neither: with any other overflow the broker silently falls back to at-most-once
            # (https://www.rabbitmq.com/docs/quorum-queues#activating-at-least-once-dead-lettering).
            arguments["x-dead-letter-strategy"] = "at-least-once"
            arguments["x-overflow"] = "reject-publish"
    if "x-dead-letter-exchange" in own:
        # Half of our pair with half of theirs would route letters to nowhere.
        arguments.pop("x-dead-letter-routing-key", None)
    return {**arguments, **own}


def dlq_arguments(settings: QueueSettings, broker_version: tuple[int, ...]) -> dict[str, Any]:
    """The arguments of a queue's DLQ."""
    arguments: dict[str, Any] = {
        "x-queue-type": "quorum",
        "x-max-length": settings.dlq_max_length,
        "x-message-ttl": max(int(settings.dlq_max_age * 1000), 1),
    }
    if settings.dlq_max_bytes is not None:
        arguments["x-max-length-bytes"] = settings.dlq_max_bytes
    if broker_version >= (4,):
        # From 4.0 the default limit of 20 makes looking at a letter 21 times delete it; before 4.0 the same -1 would
        # drop it at the first return.
        arguments["x-delivery-limit"] = -1
    return arguments


def version_tuple(version: object) -> tuple[int, ...]:
    """``(4, 0, 5)`` for ``"4.0.5-rc.1"``; what cannot be read is ``(0,)``."""
    numbers = []
    for part in str(version).split(".")[:3]:
        digits = "".join(character for character in part.split("-")[0] if character.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers) or (0,)
