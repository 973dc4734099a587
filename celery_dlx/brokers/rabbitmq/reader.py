"""Takes letters out of a DLQ unacknowledged, and puts back what is not settled.

AMQP has no browsing: letters are taken unacknowledged and come back, in order, when the channels close. That is safe on
our DLQs, whose delivery limit is off (`topology.arguments.dlq_arguments`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from time import monotonic, sleep
from typing import Any

from amqp.exceptions import NotFound

from celery_dlx.brokers.rabbitmq.declare import SideChannel

#: Letters held unacknowledged at most by one channel, and channels at most: the broker knows each letter that is out.
PER_CHANNEL, CHANNELS = 5_000, 200
#: Without a delivery for this long, in seconds, what the queue counted at the start is taken to be gone or held.
_QUIET = 5.0
#: Acknowledgements sent before the broker must answer.
_ACKS = 16
#: A queue that takes letters back counts them one after the other; no change for this long, in seconds, is the end of it.
_SETTLE = 1.0
#: However busy it is otherwise, it is not waited for any longer, in seconds.
_RETURNED = 60.0


class Reader:
    """Takes the letters that were in a DLQ when it was opened, oldest first; leaving puts back what was not settled."""

    def __init__(self, connection: Any, dlq: str, few: int | None = None) -> None:
        """``few``: that many letters are probably enough: those beyond are only asked for when they are wanted."""
        self._connection = connection.connection
        self._dlq = dlq
        #: By channel: tags of letters handed out and not acknowledged.
        self._open: dict[Any, set[int]] = {}
        #: By channel: how many it may hold.
        self._window: dict[Any, int] = {}
        #: Ids of letters that were.
        self.acknowledged: set[str] = set()
        self._settled = 0
        self.depth = 0
        self.seen = 0
        #: Letters that were counted at the start, and not seen.
        self.missed = 0
        self._buffer: deque[Any] = deque()
        channel = connection.channel()
        try:
            self.depth = channel.queue_declare(dlq, passive=True).message_count
        except NotFound:
            self._dlq = ""
        else:
            self._consume(channel, PER_CHANNEL if few is None else min(few, PER_CHANNEL))

    def _consume(self, channel: Any, most: int = PER_CHANNEL) -> None:
        channel.auto_decode = False  # bodies byte for byte
        self._open[channel] = set()
        self._window[channel] = max(min(self.depth, most), 1)
        channel.basic_qos(0, self._window[channel], False)
        # Only buffer in the callback: whatever publishes there would re-enter the reading of the socket.
        channel.basic_consume(self._dlq, callback=self._buffer.append)

    def __iter__(self) -> Iterator[Any]:
        self.missed = self.missed or self.depth
        while self.missed and (raw := self._next()) is not None:
            self.missed -= 1
            self.seen += 1
            self._open[raw.channel].add(raw.delivery_tag)
            yield raw

    def _next(self) -> Any:
        if not self._buffer and all(len(tags) >= self._window[channel] for channel, tags in self._open.items()):
            if len(self._open) >= CHANNELS:
                return None
            self._consume(self._connection.channel())
        deadline = monotonic() + _QUIET
        while not self._buffer and (remaining := deadline - monotonic()) > 0:
            try:
                self._connection.drain_events(timeout=remaining)
            except TimeoutError:
                break
        return self._buffer.popleft() if self._buffer else None

    def more(self) -> bool:
        """Whether letters are there that were not counted at the start: new ones, or some that were just put back."""
        with SideChannel(self._connection) as side:
            live = side.live_queue(self._dlq) if self._dlq else None
        self.missed = live.message_count if live is not None else 0
        self.depth += self.missed
        return self.missed > 0

    def ready(self) -> bool:
        return bool(self._buffer)

    def acknowledge(self, letters: Sequence[tuple[Any, str]]) -> None:
        """Acknowledge letters (message and id), and wait for the broker to have heard it.

        A quorum queue holds back what comes too fast, and forgets it when the channel closes (seen on 3.10: a tail of
        acknowledgements lost): so few commands, each answered for.
        """
        self.acknowledged.update(letter_id for _, letter_id in letters)
        self._settled += len(letters)
        by_channel: dict[Any, list[int]] = {}
        for raw, _ in letters:
            by_channel.setdefault(raw.channel, []).append(raw.delivery_tag)
        for channel, tags in by_channel.items():
            self._acknowledge(channel, sorted(tags))

    def _acknowledge(self, channel: Any, tags: list[int]) -> None:
        still_open = self._open[channel]
        still_open.difference_update(tags)
        first = min(still_open, default=tags[-1] + 1)
        for start in range(0, len(tags), _ACKS):
            batch = tags[start : start + _ACKS]
            if first > batch[-1]:
                channel.basic_ack(batch[-1], multiple=True)
            else:
                for tag in batch:
                    channel.basic_ack(tag)
            channel.queue_declare(self._dlq, passive=True)

    def close(self) -> bool:
        """Put back what was not acknowledged, and wait a moment until the queue counts it so; whether it does.

        Quorum queues settle a little later than they answer: the next look would find letters missing, or still there.
        """
        open_channels = [channel for channel in self._open if channel.is_open]
        for channel in open_channels:
            channel.close()
        if not self._dlq or not open_channels:
            return True
        expected = self.depth - self._settled
        last, changed, begun = -1, monotonic(), monotonic()
        with SideChannel(self._connection) as side:
            while live := side.live_queue(self._dlq):
                count, now = live.message_count, monotonic()
                if count == expected:
                    return True
                if count != last:
                    last, changed = count, now
                if now - changed > _SETTLE or now - begun > _RETURNED:
                    # Others add or take letters too: fewer are theirs, more may be ours.
                    return not self._settled or count < expected
                sleep(0.01)
        return True
