"""Letters by cause: what died of the same, how often, since when (pure)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from celery_dlx.letters import DeadLetter, iso_time


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

    def add(self, letter: DeadLetter) -> None:
        self.first_seen = min(self.first_seen or letter.died_at, letter.died_at)
        if letter.died_at >= self.last_seen:
            self.last_seen, self.example = letter.died_at, letter.id
            self.message = (letter.exception or {}).get("message", "")[:200]
        self.count += 1

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
        }


class Groups:
    """Collects letters into groups; as many as there are causes are kept, not as many as there are letters."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str | None], Group] = {}

    def add(self, letter: DeadLetter) -> None:
        # What only the broker saw die has no fingerprint of its own frames: reason and task tell it apart.
        key = (letter.fingerprint, letter.reason, letter.task)
        group = self._found.get(key)
        if group is None:
            kind = (letter.exception or {}).get("type")
            group = self._found[key] = Group(letter.fingerprint, letter.reason, letter.task, kind)
        group.add(letter)

    def sorted(self) -> list[Group]:
        """The largest first."""
        return sorted(self._found.values(), key=lambda group: (-group.count, group.fingerprint))


def group(letters: Iterable[DeadLetter]) -> list[Group]:
    groups = Groups()
    for letter in letters:
        groups.add(letter)
    return groups.sorted()
