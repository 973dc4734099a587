"""The effective settings of a queue: its most specific entry, then `defaults`, then the built-ins."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from celery_dlx.letters import Reason

DEFAULT_REASONS = frozenset(str(reason) for reason in Reason if reason is not Reason.REVOKED)
_DAY = 86_400.0


@dataclass(frozen=True)
class QueueSettings:
    """What the policy says of one queue. ``None`` leaves the choice to the task, the app or the broker.

    Times are in seconds, sizes in bytes.
    """

    acks_late: bool | None = None
    reject_on_worker_lost: bool | None = None
    time_limit: float | None = None
    soft_time_limit: float | None = None
    max_deliveries: int = 20
    type: str | None = None
    message_ttl: float | None = None
    max_length: int | None = None
    enabled: bool = True
    reasons: frozenset[str] = DEFAULT_REASONS
    dlq_max_length: int = 100_000
    dlq_max_bytes: int | None = None
    dlq_max_age: float = 180 * _DAY
    strategy: str | None = None
    redact: tuple[str, ...] = ()
    redact_stored: bool = False
    #: The entry that matched: a queue's name, a glob, or "" for a policy without `queues`.
    entry: str = ""

    def captures(self, reason: str) -> bool:
        return self.enabled and reason in self.reasons


BUILT_IN = QueueSettings()
#: Part of a DLQ's caps from which on is warned.
NEARLY_FULL = 0.8
MANAGEMENT_VARIABLE = "CELERY_DLX_MANAGEMENT_URL"


@dataclass(frozen=True)
class Policy:
    """A validated policy. ``queues`` maps names and globs to what their entries say; ``None`` manages every queue."""

    path: str | None = None
    service: str | None = None
    exchange: str = "celery.dlx"
    queue_template: str = "{queue}.dlq"
    via: str = "arguments"
    management_url: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    queues: Mapping[str, Mapping[str, Any]] | None = None

    def dlq(self, queue: str) -> str:
        """The name of a queue's DLQ."""
        return self.queue_template.replace("{queue}", queue)

    @cached_property
    def _resolved(self) -> dict[str, QueueSettings | None]:
        return {}

    def settings(self, queue: str) -> QueueSettings | None:
        """The effective settings of a queue; ``None`` if the policy does not manage it."""
        resolved = self._resolved
        if queue not in resolved:
            resolved[queue] = self._resolve(queue)
        return resolved[queue]

    def named_queues(self) -> list[str]:
        """The queues that the policy names in full, without globs."""
        return [name for name in self.queues or () if not is_glob(name)]

    def _resolve(self, queue: str) -> QueueSettings | None:
        if self.queues is None:
            return self.effective("", {})
        if queue in self.queues and not is_glob(queue):
            return self.effective(queue, self.queues[queue])
        globs = [name for name in self.queues if is_glob(name) and fnmatchcase(queue, name)]
        if not globs:
            return None
        best = max(globs, key=specificity)  # max keeps the first of equals: file order
        return self.effective(best, self.queues[best])

    def effective(self, entry: str, says: Mapping[str, Any]) -> QueueSettings:
        """Lay an entry over `defaults` over the built-ins, key by key."""
        merged = {**self.defaults, **says}
        return replace(BUILT_IN, entry=entry, **merged)


def fill(settings: QueueSettings, letters: int, size: int | None = None) -> float:
    """Which part of its caps a DLQ of so many letters and bytes has used."""
    by_bytes = size / settings.dlq_max_bytes if size is not None and settings.dlq_max_bytes else 0.0
    return max(letters / settings.dlq_max_length, by_bytes)


def management_url(policy: Policy) -> str | None:
    """Where RabbitMQ's management API is: the environment's word, else the policy's."""
    return os.environ.get(MANAGEMENT_VARIABLE) or policy.management_url


def is_glob(name: str) -> bool:
    return any(character in name for character in "*?[")


def specificity(glob: str) -> tuple[int, int]:
    """Order globs: more literal characters first, then fewer `*`."""
    literal, inside = 0, False
    for character in glob:
        if character == "[":
            inside = True
        elif character == "]":
            inside = False
        elif not inside and character not in "*?":
            literal += 1
    return literal, -glob.count("*")
