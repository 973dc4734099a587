"""Which queues a policy file is about, and where two of them disagree."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Any

from celery_dlx.policy.settings import Policy, QueueSettings, is_glob
from celery_dlx.topology.findings import Finding
from celery_dlx.topology.live import LiveBroker, LiveQueue
from celery_dlx.topology.policies import PREFIX

#: Queues of Celery's and RabbitMQ's own that hold no tasks.
_INTERNAL = ("celeryev.", "celery_delayed_", "amq.", PREFIX)
#: What a queue's settings decide on the broker, where only one service can have its way.
_ON_THE_BROKER = (
    "type",
    "max_deliveries",
    "message_ttl",
    "max_length",
    "enabled",
    "dlq_max_length",
    "dlq_max_bytes",
    "dlq_max_age",
    "strategy",
)


def queues_in_scope(policy: Policy, known: Iterable[str], live: LiveBroker) -> list[str]:
    """Queues that the app or the policy names, and live ones that an entry of the policy is about, sorted.

    An entry for *every* queue is about the queues of this app, not about those of other programs on the broker: of those
    it takes in only what has a DLQ of ours already.
    """
    names = {queue for queue in known if policy.settings(queue) is not None}
    for name, queue in live.queues.items():
        settings = policy.settings(name)
        if settings is None or name in names or not _may_be_ours(queue, policy):
            continue
        if settings.entry.strip("*") or policy.dlq(name) in live.queues:
            names.add(name)
    return sorted(names)


def _may_be_ours(queue: LiveQueue, policy: Policy) -> bool:
    if queue.exclusive or queue.auto_delete or queue.type == "stream":
        return False
    return not (queue.name.startswith(_INTERNAL) or queue.name.endswith(".pidbox") or is_dlq(queue.name, policy))


def is_dlq(name: str, policy: Policy) -> bool:
    """Whether a name has the shape of a DLQ's, and the policy does not name it as a source."""
    before, _, after = policy.queue_template.partition("{queue}")
    after = after.replace("{queue}", "")
    shaped = name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after)
    return shaped and name not in (policy.queues or {})


def conflicts(policies: Iterable[Policy], live_names: Iterable[str] = ()) -> list[Finding]:
    """Queues that two policy files want differently; each finding names both files."""
    found = []
    names = list(live_names)
    for one, other in combinations(policies, 2):
        for queue in sorted({*one.named_queues(), *other.named_queues(), *names}):
            first, second = _claim(one, queue), _claim(other, queue)
            if first is not None and second is not None and (difference := _difference(one, first, other, second, queue)):
                found.append(Finding("DLX140", queue, f"{one.path} and {other.path} both manage it: {difference}"))
    return found


def _claim(policy: Policy, queue: str) -> QueueSettings | None:
    """What a policy wants for a queue that it is about; an entry for every queue claims none."""
    settings = policy.settings(queue)
    if settings is None or not settings.entry or (is_glob(settings.entry) and not settings.entry.strip("*")):
        return None
    return settings


def _difference(one: Policy, first: QueueSettings, other: Policy, second: QueueSettings, queue: str) -> str:
    pairs: list[tuple[str, Any, Any]] = [(name, getattr(first, name), getattr(second, name)) for name in _ON_THE_BROKER]
    pairs += [("topology.exchange", one.exchange, other.exchange), ("DLQ", one.dlq(queue), other.dlq(queue))]
    pairs.append(("topology.via", one.via, other.via))
    return "; ".join(f"{name} {before} and {after}" for name, before, after in pairs if before != after)
