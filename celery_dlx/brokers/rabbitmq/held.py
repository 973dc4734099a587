"""Letters that were selected for a replay and wait for it outside their DLQ.

RabbitMQ tells nothing of letters that it does not give out, and giving them out is what a replay costs most: so those that
are selected are not put back before they are sent. Whatever ends the process puts them back.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import Any

from celery_dlx.brokers.base import Chosen, Match
from celery_dlx.brokers.rabbitmq.deliveries import Taken
from celery_dlx.brokers.rabbitmq.reader import Reader
from celery_dlx.brokers.rabbitmq.spool import Spool
from celery_dlx.letters import DeadLetter


class Held:
    """The matching letters of a reader, set aside, their deliveries unacknowledged: see `moving.Letters`."""

    def __init__(self, reader: Reader, letter_of: Callable[[Taken], DeadLetter], match: Match, limit: int | None) -> None:
        """Reads all of them.

        Raises:
            SpoolError: they cannot be set aside.
        """
        self.reader = reader
        #: What they were chosen by: they are nobody else's.
        self.match, self.limit = match, limit
        self._letter_of = letter_of
        #: In their order.
        self.chosen: list[Chosen] = []
        self._spool = Spool()
        self._numbers: dict[Any, int] = {}
        #: By letter: the number of the channel that it was delivered on.
        self._channels = array("H")
        for raw in reader:
            letter = letter_of(raw)
            if match(letter):
                self._spool.add(raw)
                self._channels.append(self._numbers.setdefault(raw.channel, len(self._numbers)))
                self.chosen.append(Chosen.of(letter))
                if len(self.chosen) == limit:
                    break
        self._spool.flush()
        # What is acknowledged makes room, in which what dies again meanwhile would be delivered to us.
        reader.stop()

    def letters(self) -> Iterator[DeadLetter]:
        """What is held, with messages."""
        return map(self._letter_of, self._spool.read(keep=True))

    def __iter__(self) -> Iterator[Taken]:
        channels = list(self._numbers)
        for number, raw in zip(self._channels, self._spool.read(), strict=True):
            raw.channel = channels[number]
            yield raw

    def ready(self) -> bool:
        return True

    def forget(self) -> None:
        """Let go of what was set aside; the reader is the caller's to close."""
        self._spool.close()
