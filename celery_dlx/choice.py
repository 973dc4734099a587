"""What a replay is to send: chosen once, looked at, and sent."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from celery_dlx.brokers.base import Broker
from celery_dlx.letters import DeadLetter
from celery_dlx.selection import Selection


class Chosen(NamedTuple):
    """What a replay remembers of a letter: its id, the queue whose DLQ it lies in, and its fingerprint.

    By that queue, for what the letter's record says may be anybody's word.
    """

    id: str
    queue: str
    fingerprint: str | None


class Choice:
    """Letters of some queues that match, oldest first within each; at most ``limit``. ``text``: which ones, in words.

    On RabbitMQ they are read once, and held until they are sent, or `release`d: nobody else sees them meanwhile.
    """

    def __init__(self, broker: Broker, queues: list[str], match: Selection, limit: int | None, text: str) -> None:
        self.queues, self.text = queues, text
        self._broker, self._match, self._limit = broker, match, limit
        broker.release()  # an earlier choice that nobody sent

    def letters(self) -> Iterator[DeadLetter]:
        """The letters with their messages."""
        left = self._limit
        for queue in self.queues:
            held = self._broker.hold(queue, self._match, left)
            found = held.letters() if held is not None else self._broker.browse(queue, self._match.with_bodies(), left)
            count = 0
            for letter in found:
                count += 1
                yield letter
            if left is not None:
                left -= count
                if left <= 0:
                    return

    def chosen(self) -> Iterator[Chosen]:
        """What is to be remembered of them; without reading them, where that can be told."""
        left = self._limit
        for queue in self.queues:
            count = 0
            for letter_id, fingerprint in self._chosen(queue, left):
                count += 1
                yield Chosen(letter_id, queue, fingerprint)
            if left is not None:
                left -= count
                if left <= 0:
                    return

    def _chosen(self, queue: str, limit: int | None) -> Iterator[tuple[str, str | None]]:
        known = self._broker.select(queue, self._match)
        if known is not None:
            return islice(known, limit)
        held = self._broker.hold(queue, self._match, limit)
        if held is not None:
            return iter(held.chosen)
        if limit is not None:
            return ((letter.id, letter.fingerprint) for letter in self._broker.browse(queue, self._match, limit))
        found: list[tuple[str, str | None]] = []
        note = self._match.each(lambda letter: found.append((letter.id, letter.fingerprint)))
        for _ in self._broker.browse(queue, note):
            pass
        return iter(found)

    def release(self) -> None:
        """Put back what is held."""
        self._broker.release()
