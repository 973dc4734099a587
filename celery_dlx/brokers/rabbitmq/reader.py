"""Takes letters out of a DLQ unacknowledged, and puts back what is not settled.

AMQP has no browsing: letters are taken unacknowledged and come back, in order, when the channels close. That is safe on
our DLQs, whose delivery limit is off (`topology.arguments.dlq_arguments`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from time import monotonic, sleep
from typing import Any

from amqp.exceptions import AMQPError, NotFound

from celery_dlx.brokers.rabbitmq.counting import counted
from celery_dlx.brokers.rabbitmq.declare import SideChannel
from celery_dlx.brokers.rabbitmq.deliveries import Taken, deliveries_of, taken
from celery_dlx.brokers.rabbitmq.window import Window
from celery_dlx.errors import BrokerUnreachableError
from celery_dlx.ids import IdList

logger = logging.getLogger("celery_dlx")

#: Letters held unacknowledged at most by one channel, usually, and such channels at most: the broker knows each that is out.
PER_CHANNEL, CHANNELS = 5_000, 200
#: Of small letters, of so many bytes on average at most, a channel beyond the first may hold so many times as many: RabbitMQ
#: goes through all that is out several times for each window (its queue process collects garbage).
_SMALL, _LARGER = 8_192, 2
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


class Reader:
    """Takes the letters that were in a DLQ when it was opened, oldest first; leaving puts back what was not settled."""

    def __init__(
        self, connection: Any, dlq: str, few: int | None = None, *, ahead: bool = False, whole: bool = False
    ) -> None:
        """``few``: that many letters are probably enough: those beyond are only asked for when they are wanted.

        ``ahead``: none is acknowledged while they are read, which would make room for others out of turn. ``whole``: the
        DLQ decides at once on all that a channel gets, as quorum queues do.
        """
        self._connection = connection.connection
        self._dlq = dlq
        self._deliveries = deliveries_of(self._connection)
        #: By channel, in the order in which they were opened.
        self._windows: dict[Any, Window] = {}
        #: Those of which letters are still to be handed out, in that order.
        self._unread: deque[Window] = deque()
        #: Letters that they may hold, together.
        self._room = 0
        #: Ids of letters that were acknowledged.
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
        self._few, self._reads_ahead, self._whole = few, ahead, whole
        #: Bytes of what is here and not handed out; of all that came.
        self._bytes = self._came = 0
        #: Called with each letter that is seen, whoever wants it.
        self.note: Callable[[Taken], None] | None = None
        channel = connection.channel()
        try:
            self.depth = counted(channel, dlq).message_count
        except NotFound:
            self._dlq = ""
        else:
            if self.depth:
                self._consume(channel, PER_CHANNEL if few is None else min(few, PER_CHANNEL))
            else:  # what somebody else puts back just now would come here, and go back behind the others
                channel.close()

    def _consume(self, channel: Any, most: int) -> None:
        channel.auto_decode = False  # bodies byte for byte
        window = Window(channel, max(min(self.depth, most), 1))
        self._windows[channel] = window
        self._unread.append(window)
        self._room += window.size

        # Only keep it in the callback: whatever publishes there would re-enter the reading of the socket.
        def arrived(raw: Taken) -> None:
            window.arrived.append(raw)
            size = len(raw.content) + len(raw.body)
            self._bytes += size
            self._came += size

        channel.basic_qos(0, window.size, False)
        self._deliveries.take(channel, arrived)
        # If somebody else took what was counted, two windows have room: what comes back is for the first of them.
        order = {"x-priority": 1 - len(self._windows)}
        channel.basic_consume(self._dlq, callback=lambda message: arrived(taken(message)), arguments=order)

    def __iter__(self) -> Iterator[Taken]:
        self.missed = self.missed or self.depth
        while self.missed and (raw := self._next()) is not None:
            self.missed -= 1
            self.seen += 1
            self._redelivered = raw.redelivered
            if self.note is not None:
                self.note(raw)
            yield raw

    def _next(self) -> Taken | None:
        window = self._window()
        came, deadline = self._came, monotonic() + _QUIET
        while window is not None and not window.arrived:
            if not self._drain(deadline - monotonic()):
                return None
            if came != self._came:
                came, deadline = self._came, monotonic() + _QUIET
        if window is None:
            return None
        if self._reads_ahead and self.seen % max(PER_CHANNEL // _LOOKS, 1) == 0:
            self._read_ahead()
        raw = window.hand_out()
        self._bytes -= len(raw.content) + len(raw.body)
        return raw

    def _window(self) -> Window | None:
        """The one that the next letter comes from."""
        while not self._unread or self._unread[0].used:
            if len(self._unread) <= 1:
                if self._room >= CHANNELS * PER_CHANNEL:
                    self._say_full()
                    return None
                # What is acknowledged later must not make room there: it would be filled out of turn.
                for used in self._unread:
                    self._cancel(used.channel)
                self._consume(self._connection.channel(), 1 if self._probing else self._most())
                self._probing = False
            if self._unread[0].used:
                self._unread.popleft()
        return self._unread[0]

    @staticmethod
    def _cancel(channel: Any) -> None:
        for tag in list(channel.callbacks):
            channel.basic_cancel(tag)

    def _drain(self, timeout: float) -> bool:
        try:
            self._deliveries.drain(timeout=max(timeout, 0))
        except (TimeoutError, BlockingIOError):
            return False
        return True

    def _read_ahead(self) -> None:
        """Take what has arrived, and have the queue begin on the next window.

        What was put back before costs RabbitMQ more than us, and it prepares a window as a whole: so nobody should wait
        for the other. Where the queue decides at once who gets what, as it answers us (quorum queues: their log), small
        letters are asked for while as many are on their way; else only what is here already surely comes before what
        the next channel gets (a classic queue goes on giving to both).
        """
        while self._bytes < _AHEAD and self._drain(0):
            pass
        last = next(reversed(self._windows.values()))
        more = last.size >= PER_CHANNEL and self.seen + self.missed > self._room and self._room < CHANNELS * PER_CHANNEL
        coming = sum(window.coming for window in self._unread)
        if more and self._bytes < _AHEAD and coming <= (last.size if self._small() else 0):
            self._consume(self._connection.channel(), self._most())

    def _small(self) -> bool:
        """Whether it costs little memory to have many of them on their way."""
        came = self.seen + sum(len(window.arrived) for window in self._unread)
        wanted = self._few is None or self.seen >= self._few
        return self._whole and self._reads_ahead and wanted and self._came <= _SMALL * came

    def _most(self) -> int:
        """How many the next channel may hold."""
        return min(PER_CHANNEL * (_LARGER if self._small() else 1), CHANNELS * PER_CHANNEL - self._room)

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
            live = side.counted(self._dlq) if self._dlq else None
        self.missed = live.message_count if live is not None else 0
        self.depth += self.missed
        return self.missed > 0

    def ready(self) -> bool:
        return bool(self._unread and self._unread[0].arrived)

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
        together, alone = self._windows[channel].settle(tags)
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
            for channel in self._windows:
                if channel.is_open:
                    self._cancel(channel)

    def _put_back(self, side: SideChannel) -> None:
        """Close the channels, each when the queue has counted what the one before put back.

        The queue hears of each by itself, and under load not in the order in which they were closed.
        """
        last = next(reversed(self._windows))
        for channel, window in self._windows.items():
            waits = channel is not last and (window.open or window.arrived)
            before = self._counted(side) if waits else None
            self._deliveries.close(channel)
            deadline = monotonic() + _SETTLE
            while before is not None and monotonic() < deadline:
                live = self._counted(side)
                if live is None or live.message_count > before.message_count:
                    break
                sleep(0.002)

    def _counted(self, side: SideChannel) -> Any:
        try:
            return side.counted(self._dlq)
        except BrokerUnreachableError as exc:  # what was put back is, all the same
            logger.debug("%s", exc)
            return None

    def close(self) -> bool:
        """Put back what was not acknowledged, and wait a moment until the queue counts it so; whether it does.

        Quorum queues settle a little later than they answer: the next look would find letters missing, or still there.
        """
        open_channels = [channel for channel in self._windows if channel.is_open]
        if open_channels:
            self.stop()
        if not self._dlq or not open_channels:
            for channel in self._windows:
                self._deliveries.close(channel)
            return True
        with SideChannel(self._connection) as side:
            self._put_back(side)
            expected = self.depth - self._settled
            last, changed, begun = -1, monotonic(), monotonic()
            while live := self._counted(side):
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
