"""Letters by cause: what died of the same, how often, since when (pure)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from time import time
from typing import Any

from celery_dlx.letters import DeadLetter, iso_time

#: What a trend compares, in milliseconds: the last hour and the one before.
TREND = 3_600_000


@dataclass
class Group:
    """Letters with one fingerprint. Times are in milliseconds since the epoch; ``example`` is the id of the newest."""

    fingerprint: str
    reason: str
    task: str | None
    exception: str | None
    count: int = 0
    first_seen: int = 0
    last_seen: int = 0
    example: str = ""
    message: str = ""
    #: How many died in the last hour, and in the hour before.
    last_hour: int = 0
    hour_before: int = 0

    @property
    def trend(self) -> str:
        """``new``, ``rising``, ``steady``, ``falling``, or ``over``: nothing for an hour at least."""
        if not self.last_hour:
            return "over"
        if self.count == self.last_hour:
            return "new"
        if self.last_hour > 1.25 * self.hour_before:
            return "rising"
        return "falling" if self.last_hour < 0.8 * self.hour_before else "steady"

    def add(self, letter: DeadLetter, now: float) -> None:
        self.first_seen = _first(self.first_seen, letter.died_at)
        if letter.died_at >= self.last_seen or not self.count:
            self.last_seen, self.example = letter.died_at, letter.id
            self.message = (letter.exception or {}).get("message", "")[:200]
        self.count += 1
        age = now - letter.died_at
        self.last_hour += age <= TREND
        self.hour_before += TREND < age <= 2 * TREND

    def merge(self, other: Group) -> None:
        """Take in the same group of another queue."""
        self.first_seen = _first(self.first_seen, other.first_seen)
        if other.last_seen >= self.last_seen:
            self.last_seen, self.example, self.message = other.last_seen, other.example, other.message
        self.count += other.count
        self.last_hour += other.last_hour
        self.hour_before += other.hour_before

    def as_dict(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "count": self.count,
            "reason": self.reason,
            "task": self.task,
            "exception": self.exception,
            "first_seen": iso_time(self.first_seen),
            "last_seen": iso_time(self.last_seen),
            "example": self.example,
            "message": self.message,
            "trend": self.trend,
            "last_hour": self.last_hour,
            "hour_before": self.hour_before,
        }


def _first(one: int, other: int) -> int:
    """The earlier of two times, of those that are known: 0 stands for none."""
    return min(one, other) if one and other else one or other


class Groups:
    """Collects letters into groups; as many as there are causes are kept, not as many as there are letters."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str | None], Group] = {}
        self._now = time() * 1000

    def add(self, letter: DeadLetter) -> None:
        # What only the broker saw die has no fingerprint of its own frames: reason and task tell it apart.
        key = (letter.fingerprint, letter.reason, letter.task)
        group = self._found.get(key)
        if group is None:
            group = self._found[key] = group_of(letter)
        group.add(letter, self._now)

    def merge(self, groups: Iterable[Group]) -> None:
        for other in groups:
            group = self._found.setdefault((other.fingerprint, other.reason, other.task), other)
            if group is not other:
                group.merge(other)

    def sorted(self) -> list[Group]:
        """The largest first."""
        return sorted(self._found.values(), key=lambda group: (-group.count, group.fingerprint))


def group_of(letter: DeadLetter) -> Group:
    """The group of a letter, still empty."""
    return Group(letter.fingerprint, letter.reason, letter.task, (letter.exception or {}).get("type"))


def group(letters: Iterable[DeadLetter]) -> list[Group]:
    groups = Groups()
    for letter in letters:
        groups.add(letter)
    return groups.sorted()
