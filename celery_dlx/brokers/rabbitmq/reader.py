"""Takes letters out of a DLQ unacknowledged, and puts back what is not settled.

AMQP has no browsing: letters are taken unacknowledged and come back, in order, when the channels close. That is safe on
our DLQs, whose delivery limit is off (`topology.arguments.dlq_arguments`).
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from time import monotonic, sleep
from typing import Any

from amqp.exceptions import AMQPError, NotFound

from celery_dlx.brokers.rabbitmq.declare import SideChannel
from celery_dlx.brokers.rabbitmq.deliveries import Taken, deliveries_of, taken
from celery_dlx.ids import IdList

logger = logging.getLogger("celery_dlx")

#: Letters held unacknowledged at most by one channel, and channels at most: the broker knows each letter that is out.
PER_CHANNEL, CHANNELS = 5_000, 200
#: Read before it is wanted at most, in bytes; and how often what has arrived is looked at while a window is handed out.
_AHEAD, _LOOKS = 16_777_216, 80
#: Without a delivery for this long, in seconds, what the queue counted at the start is taken to be gone or held.
_QUIET = 5.0
#: Acknowledgements sent before the broker must answer.
_ACKS = 16
#: A queue that takes letters back counts them one after the other; no change for this long, in seconds, is the end of it.
_SETTLE = 1.0
#: However busy it is otherwise, it is not waited for any longer, in seconds.
_RETURNED = 60.0


class _Tags:
    """Delivery tags of one channel, which count up: handed out, and settled since. A million cost next to nothing."""

    __slots__ = ("_gone", "_settled", "handed")

    def __init__(self) -> None:
        self.handed = 0
        #: All up to this one were settled; beyond it, these.
        self._settled = 0
        self._gone: set[int] = set()

    @property
    def open(self) -> int:
        return self.handed - self._settled - len(self._gone)

    def settle(self, tags: Sequence[int]) -> tuple[int | None, list[int]]:
        """Note that these, in order, are settled: the one up to which all are now, if that changed, and those beyond."""
        self._gone.update(tags)
        while self._settled + 1 in self._gone:
            self._settled += 1
            self._gone.discard(self._settled)
        together = bisect_right(tags, self._settled)
        return tags[together - 1] if together else None, list(tags[together:])


class Reader:
    """Takes the letters that were in a DLQ when it was opened, oldest first; leaving puts back what was not settled."""

    def __init__(self, connection: Any, dlq: str, few: int | None = None, *, ahead: bool = False) -> None:
        """``few``: that many letters are probably enough: those beyond are only asked for when they are wanted.

        ``ahead``: none is acknowledged while they are read, which would make room for others out of turn.
        """
        self._connection = connection.connection
        self._dlq = dlq
        self._deliveries = deliveries_of(self._connection)
        #: By channel: which letters were handed out and not acknowledged.
        self._open: dict[Any, _Tags] = {}
        #: By channel: how many it may hold.
        self._window: dict[Any, int] = {}
        #: Ids of letters that were.
        self.acknowledged = IdList()
        self._settled = 0
        self.depth = 0
        self.seen = 0
        #: Letters that were counted at the start, and not seen.
        self.missed = 0
        #: Whether the last one was put back before; and whether one more is wanted, to see if that was too.
        self._redelivered = self._probing = False
        #: More are there than may be held: what lies beyond is not seen.
        self.full = False
        self._buffer: deque[Taken] = deque()
        self._reads_ahead = ahead
        #: Bytes of what was read ahead.
        self._bytes = 0
        #: Called with each letter that is seen, whoever wants it.
        self.note: Callable[[Taken], None] | None = None
        channel = connection.channel()
        try:
            self.depth = channel.queue_declare(dlq, passive=True).message_count
        except NotFound:
            self._dlq = ""
        else:
            if self.depth:
                self._consume(channel, PER_CHANNEL if few is None else min(few, PER_CHANNEL))
            else:  # what somebody else puts back just now would come here, and go back behind the others
                channel.close()

    def _consume(self, channel: Any, most: int) -> None:
        channel.auto_decode = False  # bodies byte for byte
        self._open[channel] = _Tags()
        self._window[channel] = max(min(self.depth, most), 1)
        channel.basic_qos(0, self._window[channel], False)
        # Only buffer in the callback: whatever publishes there would re-enter the reading of the socket.
        self._deliveries.take(channel, self._buffer.append)
        channel.basic_consume(self._dlq, callback=lambda message: self._buffer.append(taken(message)))

    def __iter__(self) -> Iterator[Taken]:
        self.missed = self.missed or self.depth
        while self.missed and (raw := self._next()) is not None:
            self.missed -= 1
            self.seen += 1
            self._open[raw.channel].handed = raw.delivery_tag
            self._redelivered = raw.redelivered
            if self.note is not None:
                self.note(raw)
            yield raw

    def _next(self) -> Taken | None:
        last = next(reversed(self._open), None)
        if not self._buffer and (last is None or self._open[last].open >= self._window[last]):
            if len(self._open) >= CHANNELS:
                self._say_full()
                return None
            if last is not None:
                # What is acknowledged later must not make room there: it would be filled out of turn.
                for tag in list(last.callbacks):
                    last.basic_cancel(tag)
            self._consume(self._connection.channel(), 1 if self._probing else PER_CHANNEL)
            self._probing = False
        deadline = monotonic() + _QUIET
        while not self._buffer and (remaining := deadline - monotonic()) > 0:
            self._bytes = 0
            if not self._drain(remaining):
                break
        if not self._buffer:
            return None
        if self._reads_ahead and not self.full and self.seen % max(PER_CHANNEL // _LOOKS, 1) == 0:
            self._read_ahead()
        raw = self._buffer.popleft()
        self._bytes -= len(raw.content) + len(raw.body)
        return raw

    def _drain(self, timeout: float) -> bool:
        known = len(self._buffer)
        try:
            self._deliveries.drain(timeout=timeout)
        except (TimeoutError, BlockingIOError):
            return False
        self._bytes += sum(len(raw.content) + len(raw.body) for raw in islice(self._buffer, known, None))
        return True

    def _read_ahead(self) -> None:
        """Take what has arrived; with all that a channel gets here, have the queue begin on the next one.

        What was put back before costs RabbitMQ more than us, and it prepares a window as a whole: so nobody should wait
        for the other. Only what is here already surely comes before what the next channel gets (a classic queue
        goes on giving to both).
        """
        while self._bytes < _AHEAD and self._drain(0):
            pass
        last = self._buffer[-1]
        channel = last.channel
        wanted = last.delivery_tag >= self._window[channel] == PER_CHANNEL and channel is next(reversed(self._open))
        if wanted and self.missed > len(self._buffer) and self._bytes < _AHEAD and len(self._open) < CHANNELS:
            self._consume(self._connection.channel(), PER_CHANNEL)

    def _say_full(self) -> None:
        if not self.full:
            self.full = True
            logger.warning(
                "%s: %d letters were looked at, %d more were not: more are not read at once; replay or discard some first",
                self._dlq,
                self.seen,
                self.missed,
            )

    def more(self) -> bool:
        """Whether letters are there that were not counted at the start: new ones, or some that were just put back."""
        with SideChannel(self._connection) as side:
            live = side.live_queue(self._dlq) if self._dlq else None
        self.missed = live.message_count if live is not None else 0
        self.depth += self.missed
        return self.missed > 0

    def ready(self) -> bool:
        return bool(self._buffer)

    def is_on(self, connection: Any) -> bool:
        """Whether it reads over this connection: another one was opened when that broke."""
        return self._connection is connection.connection

    def acknowledge(self, letters: Sequence[tuple[Any, str]]) -> None:
        """Acknowledge letters (message and id), and wait for the broker to have heard it.

        A quorum queue holds back what comes too fast, and forgets it when the channel closes (seen on 3.10: a tail of
        acknowledgements lost): so few commands, each answered for.
        """
        self.acknowledged.extend(letter_id for _, letter_id in letters)
        self._settled += len(letters)
        by_channel: dict[Any, list[int]] = {}
        for raw, _ in letters:
            by_channel.setdefault(raw.channel, []).append(raw.delivery_tag)
        for channel, tags in by_channel.items():
            self._acknowledge(channel, sorted(tags))

    def _acknowledge(self, channel: Any, tags: list[int]) -> None:
        together, alone = self._open[channel].settle(tags)
        if together is not None:
            channel.basic_ack(together, multiple=True)
            channel.queue_declare(self._dlq, passive=True)
        for start in range(0, len(alone), _ACKS):
            for tag in alone[start : start + _ACKS]:
                channel.basic_ack(tag)
            channel.queue_declare(self._dlq, passive=True)

    def stop(self) -> None:
        """Take no more, and see to it that letters come back in their order.

        A quorum queue gives out what was put back before all else, in the order in which it was: so whoever took some of
        what was put back earlier takes the rest of it along. And what one channel puts back must not go to the next one.
        """
        with suppress(AMQPError, OSError):  # whose connection is broken puts everything back anyhow
            if self._redelivered and self.missed:
                self._probing = True  # mostly it is all of them: then one more letter tells
                self.full = True  # nobody is told of what lies beyond
                for raw in self:
                    if not raw.redelivered:
                        break
            for channel in self._open:
                if channel.is_open:
                    for tag in list(channel.callbacks):
                        channel.basic_cancel(tag)

    def _put_back(self, side: SideChannel) -> None:
        """Close the channels, each when the queue has counted what the one before put back.

        The queue hears of each by itself, and under load not in the order in which they were closed.
        """
        channels = list(self._open)
        ahead = {raw.channel for raw in self._buffer}
        for channel in channels:
            waits = channel is not channels[-1] and (self._open[channel].open or channel in ahead)
            before = side.live_queue(self._dlq) if waits else None
            self._deliveries.close(channel)
            deadline = monotonic() + _SETTLE
            while before is not None and monotonic() < deadline:
                live = side.live_queue(self._dlq)
                if live is None or live.message_count > before.message_count:
                    break
                sleep(0.002)

    def close(self) -> bool:
        """Put back what was not acknowledged, and wait a moment until the queue counts it so; whether it does.

        Quorum queues settle a little later than they answer: the next look would find letters missing, or still there.
        """
        open_channels = [channel for channel in self._open if channel.is_open]
        if open_channels:
            self.stop()
        if not self._dlq or not open_channels:
            for channel in self._open:
                self._deliveries.close(channel)
            return True
        with SideChannel(self._connection) as side:
            self._put_back(side)
            expected = self.depth - self._settled
            last, changed, begun = -1, monotonic(), monotonic()
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
