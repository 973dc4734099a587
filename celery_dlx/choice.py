"""What a replay is to send: chosen once, looked at, and sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any
from uuid import uuid4

from celery_dlx.brokers.base import Broker, Chosen
from celery_dlx.journal import QueueLocks
from celery_dlx.letters import DeadLetter
from celery_dlx.selection import Selection


class Choice:
    """Letters of some queues that match, oldest first within each; at most ``limit``. ``text``: which ones, in words.

    From the first look on other replays are kept off these queues, until the letters were sent, or `release`. On RabbitMQ
    they are read once, and held until then: nobody else sees them meanwhile. ``url``: the broker's, as journals know it.
    """

    def __init__(self, broker: Broker, url: str, queues: list[str], match: Selection, limit: int | None, text: str) -> None:
        #: Id of the replay that will send them.
        self.replay = uuid4().hex[:12]
        self.queues, self.match, self.text = queues, match, text
        self._broker, self._url, self._limit = broker, url, limit
        self._locks: QueueLocks | None = None

    def lock(self) -> None:
        """Keep other replays off.

        Raises:
            UsageError: one is at these queues.
        """
        if self._locks is None:
            self._locks = QueueLocks(self._url, self.queues, self.replay)

    def hand_over(self) -> QueueLocks:
        """What keeps others off, now the caller's to release."""
        self.lock()
        locks, self._locks = self._locks, None
        assert locks is not None
        return locks

    def letters(self) -> Iterator[DeadLetter]:
        """The letters with their messages."""
        self.lock()
        left = self._limit
        for queue in self.queues:
            held = self._broker.hold(queue, self.match, self.replay, left)
            found = held.letters() if held is not None else self._broker.browse(queue, self.match.with_bodies(), left)
            count = 0
            for letter in found:
                count += 1
                yield letter
            if left is not None:
                left -= count
                if left <= 0:
                    return

    def chosen(self) -> Iterator[tuple[str, Chosen]]:
        """What is to be remembered of them; without reading them, where that can be told.

        With the queue whose DLQ each lies in: what its record says of that may be anybody's word.
        """
        self.lock()
        left = self._limit
        for queue in self.queues:
            count = 0
            for each in self._chosen(queue, left):
                count += 1
                yield queue, each
            if left is not None:
                left -= count
                if left <= 0:
                    return

    def _chosen(self, queue: str, limit: int | None) -> Iterator[Chosen]:
        known = self._broker.select(queue, self.match)
        if known is not None:
            return islice(known, limit)
        held = self._broker.hold(queue, self.match, self.replay, limit)
        if held is not None:
            return held.chosen()
        if limit is not None:
            return map(Chosen.of, self._broker.browse(queue, self.match, limit))
        found: list[Chosen] = []
        note = self.match.each(lambda letter: found.append(Chosen.of(letter)))
        for _ in self._broker.browse(queue, note):
            pass
        return iter(found)

    def release(self) -> None:
        """Put back what is held, and let others at it."""
        self._broker.release()
        locks, self._locks = self._locks, None
        if locks is not None:
            locks.release()


def describe(queue: str | None, ids: Any, selected: dict[str, Any]) -> str:
    """A selection in words, for the journal."""
    what = f"{len(ids)} ids" if ids else json.dumps(selected, default=str) if selected else "all"
    return f"{queue or 'every queue'}: {what}"
