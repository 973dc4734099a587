"""Reads, replays and empties DLQs over AMQP.

AMQP has no browsing: letters are taken unacknowledged and come back, in order, when the channel closes. That is safe
on our DLQs, whose delivery limit is off (`topology.dlq_arguments`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from time import monotonic, sleep
from typing import Any

from amqp.exceptions import AMQPError, NotFound

from celery_dlx.brokers.base import Match, QueueStats, Replayed
from celery_dlx.brokers.rabbitmq.declare import SideChannel
from celery_dlx.brokers.rabbitmq.inspect import arguments_over_amqp, by_management
from celery_dlx.brokers.rabbitmq.letters import letter_of, revived
from celery_dlx.brokers.rabbitmq.management import Management
from celery_dlx.brokers.rabbitmq.pipeline import RETURNED, STORED, ConfirmPipeline
from celery_dlx.brokers.rabbitmq.unreachable import unreachable
from celery_dlx.errors import ReplayError, UnsafeQueueError
from celery_dlx.letters import DeadLetter
from celery_dlx.policy.settings import BUILT_IN, Policy
from celery_dlx.topology.arguments import dlq_arguments, version_tuple
from celery_dlx.topology.plan import finite_delivery_limit

logger = logging.getLogger("celery_dlx")

#: Letters held unacknowledged at most while browsing: the broker keeps each of them in memory.
BROWSE_LIMIT = 50_000
#: Letters in flight while replaying.
WINDOW = 1_000
#: Encoded messages are handed over at this size, in bytes: the broker has work while the next ones are read.
_WRITE_BYTES = 262_144
#: Without a delivery for this long, in seconds, what the queue counted at the start is taken to be gone or held.
_QUIET = 5.0
#: Acknowledgements sent before the broker must answer.
_ACKS = 16
#: Waiting for a queue to count what was settled, in seconds.
_SETTLE = 1.0
#: Waiting for confirms, in seconds.
_CONFIRM_TIMEOUT = 30.0


class _Reader:
    """Takes the letters that were in a DLQ when it was opened, oldest first; leaving puts back what was not settled."""

    def __init__(self, connection: Any, dlq: str, window: int) -> None:
        self._connection = connection.connection
        self._dlq = dlq
        #: Tags of letters handed out and not acknowledged, and ids of those that were.
        self._open: set[int] = set()
        self.acknowledged: set[str] = set()
        self._settled = 0
        self.take: int | None = None
        self.depth = 0
        self._buffer: deque[Any] = deque()
        self.channel = connection.channel()
        try:
            self.depth = self.channel.queue_declare(dlq, passive=True).message_count
            self.channel.basic_qos(0, max(min(self.depth, window, 65_535), 1), False)
            # Only buffer in the callback: whatever publishes there would re-enter the reading of the socket.
            self.channel.basic_consume(dlq, callback=self._buffer.append)
        except NotFound:
            self._dlq = ""

    def __iter__(self) -> Iterator[Any]:
        left = self.depth if self.take is None else self.take
        while left and (raw := self._next()) is not None:
            left -= 1
            self._open.add(raw.delivery_tag)
            yield raw

    def _next(self) -> Any:
        deadline = monotonic() + _QUIET
        while not self._buffer and (remaining := deadline - monotonic()) > 0:
            try:
                self._connection.drain_events(timeout=remaining)
            except TimeoutError:
                break
        return self._buffer.popleft() if self._buffer else None

    def ready(self) -> bool:
        return bool(self._buffer)

    def acknowledge(self, letters: Sequence[tuple[int, str]]) -> None:
        """Acknowledge letters by tag and id, and wait for the broker to have heard it.

        A quorum queue holds back what comes too fast, and forgets it when the channel closes (seen on 3.10: a tail of
        acknowledgements lost): so few commands, each answered for.
        """
        tags = sorted(tag for tag, _ in letters)
        self._open.difference_update(tags)
        self.acknowledged.update(letter_id for _, letter_id in letters)
        self._settled += len(tags)
        for start in range(0, len(tags), _ACKS):
            batch = tags[start : start + _ACKS]
            if min(self._open, default=batch[-1] + 1) > batch[-1]:
                self.channel.basic_ack(batch[-1], multiple=True)
            else:
                for tag in batch:
                    self.channel.basic_ack(tag)
            self.channel.queue_declare(self._dlq, passive=True)

    def close(self) -> bool:
        """Put back what was not acknowledged, and wait a moment until the queue counts it so; whether it does.

        Quorum queues settle a little later than they answer: the next look would find letters missing, or still there.
        """
        if not self.channel.is_open:
            return True
        self.channel.close()
        if not self._dlq:
            return True
        expected = self.depth - self._settled
        deadline = monotonic() + _SETTLE
        with SideChannel(self._connection) as side:
            while live := side.live_queue(self._dlq):
                # Others may add or take letters meanwhile: only our own part is waited for.
                if live.message_count <= expected if self._settled else live.message_count >= expected:
                    return True
                if monotonic() > deadline:
                    return False
                sleep(0.01)
        return True


class _InFlight:
    __slots__ = ("changes", "key", "letter", "outcome", "tag")

    def __init__(self, letter: DeadLetter, tag: int, changes: list[str]) -> None:
        self.letter, self.tag, self.changes = letter, tag, changes
        self.key = letter.id
        self.outcome: str | None = None


class RabbitMQBroker:
    """See `celery_dlx.brokers.base.Broker`."""

    def __init__(
        self,
        connect: Callable[[], Any],
        policy: Policy,
        known_queues: Callable[[], Iterable[str]],
        management_url: str | None = None,
    ) -> None:
        self._connect = connect
        self._policy = policy
        self._known = known_queues
        self._management_url = management_url
        self._open: Any = None
        #: Read also where reading may delete.
        self.insist = False
        self._safe: set[str] = set()

    def _connection(self) -> Any:
        if self._open is not None:
            try:
                # A long-lived process may ask again after the broker was restarted: only an answer tells.
                self._open.channel().close()
            except Exception:  # noqa: BLE001 - whatever it is, a new connection settles it
                self._open.collect()
                self._open = None
        if self._open is None:
            connection = self._connect()
            try:
                connection.connect()
            except (OSError, AMQPError) as exc:
                raise unreachable(connection, exc) from exc
            self._open = connection
        return self._open

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def queues(self) -> list[str]:
        connection = self._connection()
        with SideChannel(connection.connection) as side:
            return sorted({queue for queue in self._known() if side.live_queue(self._policy.dlq(queue)) is not None})

    def browse(self, queue: str, match: Match | None = None, limit: int | None = None) -> Iterator[DeadLetter]:
        # All are taken and put back before the first is given out: whoever acts on a letter while going through them
        # must find it in its DLQ.
        return iter(self._browse(queue, match, limit))

    def _browse(self, queue: str, match: Match | None, limit: int | None) -> list[DeadLetter]:
        dlq = self._policy.dlq(queue)
        reader = self._reader(queue, dlq)
        if reader.depth > BROWSE_LIMIT:
            logger.warning("%s holds %d letters; only the oldest %d are looked at", dlq, reader.depth, BROWSE_LIMIT)
            reader.take = BROWSE_LIMIT
        found: list[DeadLetter] = []
        try:
            for raw in reader:
                letter = letter_of(raw, queue, dlq)
                if match is None or match(letter):
                    found.append(letter)
                    if limit is not None and len(found) >= limit:
                        break
        finally:
            reader.close()
        return found

    def _reader(self, queue: str, dlq: str, connection: Any = None) -> _Reader:
        """A reader of a DLQ that can be read without harm.

        Raises:
            UnsafeQueueError: what is put back is counted, and deleted when it was put back often enough.
        """
        connection = connection or self._connection()
        if not self.insist and dlq not in self._safe:
            self._check_safe(connection, queue, dlq)
            self._safe.add(dlq)
        return _Reader(connection, dlq, BROWSE_LIMIT)

    def _check_safe(self, connection: Any, queue: str, dlq: str) -> None:
        version = version_tuple(connection.connection.server_properties.get("version"))
        guess = dlq_arguments(self._policy.settings(queue) or BUILT_IN, version)
        with SideChannel(connection.connection) as side:
            found = arguments_over_amqp(side, dlq, guess)
        if found is None or not finite_delivery_limit(found, version):
            return
        if self._management_url:  # a policy may have lifted the limit: AMQP cannot tell
            user, password = connection.userid or "guest", connection.password or "guest"
            management = Management(self._management_url, user, password, connection.virtual_host or "/")
            with closing(management):
                live = by_management(management, self._policy.exchange)
            if dlq in live.queues and not finite_delivery_limit(live.queues[dlq], version):
                return
        limit = found.setting("delivery-limit")
        raise UnsafeQueueError(
            f"{dlq!r} has a delivery limit of {'20, the default' if limit is None else limit}: letters that are looked at "
            "more often than that are deleted by the broker. Run `celery -A APP dlx topology apply` with a management API "
            "configured, or insist with --force"
        )

    def get(self, queue: str, letter_id: str) -> DeadLetter | None:
        return next(self.browse(queue, lambda letter: letter.id == letter_id, 1), None)

    def replay(self, queue: str, match: Match, limit: int | None = None) -> Iterator[Replayed]:
        dlq = self._policy.dlq(queue)
        connection = self._connection()
        # A connection of its own for publishing: under an alarm it blocks, and the reader must still acknowledge.
        with self._connect() as publishing:
            publishing.connect()
            reader = self._reader(queue, dlq, connection)
            try:
                yield from self._replay(reader, publishing, queue, dlq, match, limit)
            finally:
                self._finish(reader, queue, dlq)

    def _replay(
        self, reader: _Reader, publishing: Any, queue: str, dlq: str, match: Match, limit: int | None
    ) -> Iterator[Replayed]:
        done: deque[_InFlight] = deque()

        def on_outcome(token: _InFlight, outcome: str) -> None:
            token.outcome = outcome
            done.append(token)

        pipeline = ConfirmPipeline(publishing.connection, on_outcome)
        failed: list[_InFlight] = []
        user, taken = publishing.userid, 0
        for raw in reader:
            letter = letter_of(raw, queue, dlq)
            if not match(letter):
                continue
            message, changes = revived(letter, user)
            # Through the default exchange: the original one may fan out to queues that had no part in this death.
            pipeline.publish(_InFlight(letter, raw.delivery_tag, changes), message, "", letter.queue)
            taken += 1
            if pipeline.unwritten >= _WRITE_BYTES:
                pipeline.write()
            if pipeline.unconfirmed >= WINDOW or not reader.ready():
                self._await(pipeline, WINDOW // 2)
            yield from self._settle(reader, done, failed)
            if limit is not None and taken >= limit:
                break
        self._await(pipeline, 0)
        yield from self._settle(reader, done, failed)
        if failed:
            first = failed[0]
            why = f"queue {first.letter.queue!r} does not exist" if first.outcome == RETURNED else "the broker refused it"
            raise ReplayError(
                f"{len(failed)} letters stay in {dlq!r}, the first is {first.letter.id}: {why}; create the queue "
                "(start its worker) and replay again"
            )

    @staticmethod
    def _await(pipeline: ConfirmPipeline, at_most: int) -> None:
        deadline = monotonic() + _CONFIRM_TIMEOUT
        pipeline.write()
        while pipeline.unconfirmed > at_most:
            if monotonic() > deadline:
                raise ReplayError(
                    f"no confirm for {_CONFIRM_TIMEOUT:.0f}s: {pipeline.unconfirmed} letters stay in their DLQ and may "
                    "also be in their queue; is the broker under a memory or disk alarm?"
                )
            pipeline.read(timeout=1.0)

    @staticmethod
    def _settle(reader: _Reader, done: deque[_InFlight], failed: list[_InFlight]) -> Iterator[Replayed]:
        stored = [token for token in done if token.outcome == STORED]
        failed.extend(token for token in done if token.outcome != STORED)
        done.clear()
        if stored:
            # All of them before the first is given out: whoever stops listening must not leave them in both places.
            reader.acknowledge([(token.tag, token.key) for token in stored])
            for token in stored:
                yield Replayed(token.letter, token.letter.queue, token.changes)

    def _finish(self, reader: _Reader, queue: str, dlq: str) -> None:
        """Close a reader; what it acknowledged and the queue did not take is acknowledged again."""
        ids = reader.acknowledged
        while not reader.close() and ids:
            again = _Reader(self._connection(), dlq, BROWSE_LIMIT)
            left = [(raw.delivery_tag, letter_of(raw, queue, dlq).id) for raw in again]
            left = [(tag, letter_id) for tag, letter_id in left if letter_id in ids]
            if left:
                logger.warning("%d acknowledgements of %s were lost, and are sent again", len(left), dlq)
                again.acknowledge(left)
            else:
                ids = set()  # what came meanwhile is not ours
            reader = again

    def discard(self, queue: str, match: Match, limit: int | None = None) -> Iterator[DeadLetter]:
        dlq = self._policy.dlq(queue)
        reader, taken = self._reader(queue, dlq), 0
        try:
            batch: list[tuple[int, DeadLetter]] = []
            for raw in reader:
                letter = letter_of(raw, queue, dlq)
                if not match(letter):
                    continue
                batch.append((raw.delivery_tag, letter))
                taken += 1
                if len(batch) >= WINDOW or taken == limit:
                    yield from self._discard(reader, batch)
                    batch = []
                if taken == limit:
                    break
            yield from self._discard(reader, batch)
        finally:
            self._finish(reader, queue, dlq)

    @staticmethod
    def _discard(reader: _Reader, batch: list[tuple[int, DeadLetter]]) -> Iterator[DeadLetter]:
        if batch:
            reader.acknowledge([(tag, letter.id) for tag, letter in batch])
            for _, letter in batch:
                yield letter

    def purge(self, queue: str) -> int:
        with SideChannel(self._connection().connection) as side:
            try:
                return int(side.channel.queue_purge(self._policy.dlq(queue)) or 0)
            except NotFound:
                return 0

    def stats(self, queues: Iterable[str]) -> Iterator[QueueStats]:
        with SideChannel(self._connection().connection) as side:
            for queue in queues:
                dlq = self._policy.dlq(queue)
                live = side.live_queue(dlq)
                if live is not None:
                    yield QueueStats(queue, dlq, live.message_count, {"consumers": live.consumer_count})
                else:
                    yield QueueStats(queue, dlq, 0, {"missing": True})
