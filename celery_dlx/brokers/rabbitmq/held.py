"""Letters that were selected for a replay and wait for it outside their DLQ.

RabbitMQ tells nothing of letters that it does not give out, and giving them out is what a replay costs most: so those that
are selected are not put back before they are sent. Whatever ends the process puts them back. And what they will be sent as
is noted when they are read, for then they are decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Any

from celery_dlx.brokers.base import Chosen, Match, Run
from celery_dlx.brokers.rabbitmq.deliveries import Taken
from celery_dlx.brokers.rabbitmq.index import whole
from celery_dlx.brokers.rabbitmq.letters import letter_of, revived_bytes
from celery_dlx.brokers.rabbitmq.reader import Reader
from celery_dlx.brokers.rabbitmq.spool import Spool
from celery_dlx.lazy import unread
from celery_dlx.letters import DeadLetter

#: Numbers of a letter's channel and cause, and when it died; then comes its id.
_KNOWN = Struct(">HIq")


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
        #: The letters; and, as properties and body, the properties that each will be sent with, or nothing, if that is not
        #: plain, and what is remembered of it.
        self._spool, self._plain = Spool(share=4), Spool(share=4)  # much else is remembered of them elsewhere
        self._use_plain = False
        #: Their numbers.
        self._channels: dict[Any, int] = {}
        self._causes: dict[str, int] = {}
        for raw in reader:
            letter = letter_of(raw, queue, dlq)
            if match(letter):
                self._spool.add(raw)
                same = revived_bytes(raw, letter, user, replay) if letter.queue == queue else None
                self._plain.add(Taken(b"", b"" if same is None else same[0], self._known(raw, letter)))
                if len(self._plain) == limit:
                    break
        self._spool.flush()
        self._plain.flush()
        # What is acknowledged makes room, in which what dies again meanwhile would be delivered to us.
        reader.stop()

    def _known(self, raw: Taken, letter: DeadLetter) -> bytes:
        channel = self._channels.setdefault(raw.channel, len(self._channels))
        cause = self._causes.setdefault(letter.fingerprint, len(self._causes))
        return _KNOWN.pack(channel, cause, whole(letter.died_at)) + letter.id.encode("utf-8", "surrogatepass")

    def _read(self, keep: bool) -> Iterator[tuple[Any, Chosen, bytes]]:
        """Channels, what is remembered, and the properties that they will be sent with."""
        channels, causes = list(self._channels), list(self._causes)
        for plain in self._plain.read(keep=keep):
            channel, cause, died_at = _KNOWN.unpack_from(plain.body)
            letter_id = plain.body[_KNOWN.size :].decode("utf-8", "surrogatepass")
            yield channels[channel], Chosen(letter_id, causes[cause], died_at), plain.content

    def chosen(self) -> Iterator[Chosen]:
        """What is to be remembered of them, in their order."""
        return (chosen for _, chosen, _ in self._read(keep=True))

    def letters(self) -> Iterator[DeadLetter]:
        """What is held, with messages."""
        return (letter_of(raw, self._queue, self._dlq) for raw in self._spool.read(keep=True))

    def prepare(self, run: Run, user: str | None) -> None:
        """How they will be sent is known now."""
        self._use_plain = run.edit is None and run.replay == self._replay and user == self._user

    def __iter__(self) -> Iterator[tuple[Taken, DeadLetter, bytes | None]]:
        for raw, (channel, chosen, content) in zip(self._spool.read(), self._read(keep=False), strict=True):
            raw.channel = channel
            if self._use_plain and content:
                known = {"id": chosen.id, "fingerprint": chosen.fingerprint, "died_at": chosen.died_at, "queue": self._queue}
                source = _Late(raw, self._queue, self._dlq)
                yield raw, unread(DeadLetter, source, {**known, "dlq": self._dlq, "edited": None}), content
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
