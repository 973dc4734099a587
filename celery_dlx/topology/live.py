"""A broker's topology as it was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Of an argument and a policy that both set one of these, the lower counts
#: (https://www.rabbitmq.com/docs/parameters#policies, "Policies and arguments"); of any other, the argument.
NUMERIC = frozenset({"max-length", "max-length-bytes", "message-ttl", "expires", "delivery-limit"})


@dataclass
class LiveQueue:
    """One queue. ``effective`` is what policy and operator policy give it together, ``None`` where they cannot be seen."""

    name: str
    type: str = "classic"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    durable: bool = True
    auto_delete: bool = False
    exclusive: bool = False
    policy: str | None = None
    operator_policy: str | None = None
    effective: Mapping[str, Any] | None = None
    messages: int = 0
    #: Messages a quorum queue holds because at-least-once dead-lettering has not delivered them yet.
    held: int = 0

    def setting(self, key: str) -> Any:
        """What counts for this queue, e.g. ``setting("max-length")``; ``None`` if nothing sets it."""
        argument = self.arguments.get(f"x-{key}")
        given = (self.effective or {}).get(key)
        if argument is None or given is None:
            return given if argument is None else argument
        if key == "delivery-limit" and (argument < 0 or given < 0):
            return max(argument, given)  # -1 is no limit: the other one counts
        return min(argument, given) if key in NUMERIC else argument


def has_net(queue: LiveQueue | None, exchange: str) -> bool:
    """Whether the broker itself dead-letters this queue's messages to its DLQ."""
    if queue is None or queue.setting("dead-letter-exchange") != exchange:
        return False
    return bool(queue.setting("dead-letter-routing-key") == queue.name)


@dataclass
class LivePolicy:
    """One RabbitMQ policy, ours or not."""

    name: str
    pattern: str
    apply_to: str = "all"
    definition: Mapping[str, Any] = field(default_factory=dict)
    priority: int = 0


@dataclass
class LiveBroker:
    """What was found. ``None`` stands for what cannot be seen over AMQP alone or by this user."""

    version: tuple[int, ...]
    vhost: str
    #: Exchanges by name: type, durable.
    exchanges: dict[str, tuple[str, bool]]
    queues: dict[str, LiveQueue]
    #: Of the dead-letter exchange: queue and routing key.
    bindings: set[tuple[str, str]] | None = None
    policies: list[LivePolicy] | None = None
    #: Whether this user may write policies; ``None``: cannot be known.
    may_set_policies: bool | None = None
    user: str = ""

    @property
    def sees_policies(self) -> bool:
        return self.policies is not None
