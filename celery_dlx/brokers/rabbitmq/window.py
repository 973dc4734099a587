"""What one channel holds of a DLQ: letters that arrived, were handed out and are not settled."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from typing import Any

from celery_dlx.brokers.rabbitmq.deliveries import Taken


class Window:
    """Letters of one channel; their delivery tags count up. A million that are held cost next to nothing."""

    __slots__ = ("_gone", "_settled", "arrived", "channel", "handed", "size")

    def __init__(self, channel: Any, size: int) -> None:
        """``size``: so many may be unacknowledged."""
        self.channel, self.size = channel, size
        #: Those that are here and nobody was given yet.
        self.arrived: deque[Taken] = deque()
        #: The delivery tag of the last one that somebody was.
        self.handed = 0
        #: All up to this one were settled; beyond it, these.
        self._settled = 0
        self._gone: set[int] = set()

    @property
    def open(self) -> int:
        """How many were handed out and not settled."""
        return self.handed - self._settled - len(self._gone)

    @property
    def coming(self) -> int:
        """How many the broker may still send."""
        return self.size - self.open - len(self.arrived)

    @property
    def used(self) -> bool:
        """Whether nothing is here, and nothing comes."""
        return not self.arrived and self.open >= self.size

    def hand_out(self) -> Taken:
        """The next of those that arrived."""
        raw = self.arrived.popleft()
        self.handed = raw.delivery_tag
        return raw

    def settle(self, tags: Sequence[int]) -> tuple[int | None, list[int]]:
        """Note that these, in order, are settled: the one up to which all are now, if that changed, and those beyond."""
        self._gone.update(tags)
        while self._settled + 1 in self._gone:
            self._settled += 1
            self._gone.discard(self._settled)
        together = bisect_right(tags, self._settled)
        return tags[together - 1] if together else None, list(tags[together:])
