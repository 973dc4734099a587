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
    """One queue, with what the policy and the operator policy that apply to it say (nothing, where they cannot be seen)."""

    name: str
    type: str = "classic"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    durable: bool = True
    auto_delete: bool = False
    exclusive: bool = False
    policy: str | None = None
    operator_policy: str | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    above: Mapping[str, Any] = field(default_factory=dict)
    messages: int = 0
    #: Messages a quorum queue holds because at-least-once dead-lettering has not delivered them yet.
    held: int = 0

    def setting(self, key: str) -> Any:
        """What counts for this queue, e.g. ``setting("max-length")``; ``None`` if nothing sets it."""
        given = _both(key, self.above.get(key), self.given.get(key))
        return _both(key, self.arguments.get(f"x-{key}"), given)


def _both(key: str, first: Any, second: Any) -> Any:
    """Of two that set the same: for limits the lower, else the first."""
    if first is None or second is None:
        return second if first is None else first
    if key == "delivery-limit" and (first < 0 or second < 0):
        return max(first, second)  # -1 is no limit: the other one counts
    return min(first, second) if key in NUMERIC else first


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
