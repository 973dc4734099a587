"""Letters that were selected for a replay and wait for it outside their DLQ.

RabbitMQ tells nothing of letters that it does not give out, and giving them out is what a replay costs most: so those that
are selected are not put back before they are sent. Whatever ends the process puts them back. And what they will be sent as
is noted when they are read, for then they are decoded.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

from celery_dlx.brokers.base import Chosen, Match, Run
from celery_dlx.brokers.rabbitmq.deliveries import Taken
from celery_dlx.brokers.rabbitmq.index import whole
from celery_dlx.brokers.rabbitmq.letters import letter_of, revived_bytes
from celery_dlx.brokers.rabbitmq.reader import Reader
from celery_dlx.brokers.rabbitmq.spool import Spool
from celery_dlx.ids import IdList
from celery_dlx.lazy import unread
from celery_dlx.letters import DeadLetter


class Held:
    """The matching letters of a reader, set aside, their deliveries unacknowledged: see `moving.Letters`."""

    def __init__(
        self, reader: Reader, queue: str, dlq: str, match: Match, limit: int | None, replay: str, user: str | None
    ) -> None:
        """Reads all of them. ``replay``: the id of the replay they are for; ``user``: who will send them.

        Raises:
            SpoolError: they cannot be set aside.
        """
        self.reader = reader
        #: What they were chosen by: they are nobody else's.
        self.match, self.limit = match, limit
        self._queue, self._dlq, self._replay, self._user = queue, dlq, replay, user
        #: By letter, in their order: its id, the number of its cause, and when it died.
        self._ids, self._causes, self._died_at = IdList(), array("I"), array("q")
        self._cause_numbers: dict[str, int] = {}
        #: The letters; and the properties they will be sent with, or nothing, if that is not plain.
        self._spool, self._plain = Spool(share=4), Spool(share=4)  # much else is remembered of them
        self._use_plain = False
        self._numbers: dict[Any, int] = {}
        #: By letter: the number of the channel that it was delivered on.
        self._channels = array("H")
        causes = self._cause_numbers
        for raw in reader:
            letter = letter_of(raw, queue, dlq)
            if match(letter):
                self._spool.add(raw)
                same = revived_bytes(raw, letter, user, replay) if letter.queue == queue else None
                self._plain.add(Taken(b"", b"" if same is None else same[0], b""))
                self._channels.append(self._numbers.setdefault(raw.channel, len(self._numbers)))
                self._ids.append(letter.id)
                self._causes.append(causes.setdefault(letter.fingerprint, len(causes)))
                self._died_at.append(whole(letter.died_at))
                if len(self._ids) == limit:
                    break
        self._spool.flush()
        self._plain.flush()
        # What is acknowledged makes room, in which what dies again meanwhile would be delivered to us.
        reader.stop()

    def chosen(self) -> Iterator[Chosen]:
        """What is to be remembered of them, in their order."""
        causes = list(self._cause_numbers)
        each = zip(self._ids, self._causes, self._died_at, strict=True)
        return (Chosen(letter_id, causes[number], died_at) for letter_id, number, died_at in each)

    def letters(self) -> Iterator[DeadLetter]:
        """What is held, with messages."""
        return (letter_of(raw, self._queue, self._dlq) for raw in self._spool.read(keep=True))

    def prepare(self, run: Run, user: str | None) -> None:
        """How they will be sent is known now."""
        self._use_plain = run.edit is None and run.replay == self._replay and user == self._user

    def __iter__(self) -> Iterator[tuple[Taken, DeadLetter, bytes | None]]:
        channels = list(self._numbers)
        each = zip(self.chosen(), self._channels, self._spool.read(), self._plain.read(), strict=True)
        for chosen, number, raw, plain in each:
            raw.channel = channels[number]
            if self._use_plain and plain.content:
                known = {"id": chosen.id, "fingerprint": chosen.fingerprint, "died_at": chosen.died_at, "queue": self._queue}
                source = _Late(raw, self._queue, self._dlq)
                yield raw, unread(DeadLetter, source, {**known, "dlq": self._dlq, "edited": None}), plain.content
            else:
                yield raw, letter_of(raw, self._queue, self._dlq), None

    def ready(self) -> bool:
        return True

    def forget(self) -> None:
        """Let go of what was set aside; the reader is the caller's to close."""
        self._spool.close()
        self._plain.close()


class _Late:
    """Says what a field of a letter is; of most that are sent nobody asks more than is known."""

    __slots__ = ("_dlq", "_letter", "_queue", "_raw")

    def __init__(self, raw: Taken, queue: str, dlq: str) -> None:
        self._raw, self._queue, self._dlq = raw, queue, dlq
        self._letter: DeadLetter | None = None

    def __call__(self, name: str) -> dict[str, Any]:
        if self._letter is None:
            self._letter = letter_of(self._raw, self._queue, self._dlq)
        return {name: getattr(self._letter, name)}
