"""Reads, replays and empties DLQs over AMQP.

How letters are taken without being consumed is `reader`'s.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice
from time import monotonic
from typing import Any, NamedTuple

from amqp.exceptions import NotFound

from celery_dlx.brokers.base import Chosen, Match, QueueStats, Replayed, Run
from celery_dlx.brokers.rabbitmq.browse import letters_in, set_aside
from celery_dlx.brokers.rabbitmq.declare import Declarer, SideChannel
from celery_dlx.brokers.rabbitmq.deliveries import deliveries_of
from celery_dlx.brokers.rabbitmq.inspect import arguments_over_amqp, by_management
from celery_dlx.brokers.rabbitmq.letters import exported, imported, letter_of, revived, revived_bytes
from celery_dlx.brokers.rabbitmq.management import management_of
from celery_dlx.brokers.rabbitmq.pipeline import REFUSED, RETURNED, STORED, ConfirmPipeline
from celery_dlx.brokers.rabbitmq.reader import Reader
from celery_dlx.brokers.rabbitmq.reports import Reports
from celery_dlx.brokers.rabbitmq.unreachable import connected
from celery_dlx.errors import ReplayError, UnsafeQueueError, UsageError
from celery_dlx.letters import DeadLetter
from celery_dlx.policy.settings import BUILT_IN, Policy
from celery_dlx.selection import Selection
from celery_dlx.topology.arguments import dlq_arguments, version_tuple
from celery_dlx.topology.plan import finite_delivery_limit

logger = logging.getLogger("celery_dlx")

#: Letters in flight while replaying.
WINDOW = 1_000
#: Encoded messages are handed over at this size, in bytes: the broker has work while the next ones are read.
_WRITE_BYTES = 262_144
#: Bytes of bodies in flight after which nothing more is sent before these are settled.
_HELD_BYTES = 67_108_864
#: How often letters that are missing are looked for again.
_LOOKS = 5
#: Waiting for confirms, in seconds.
_CONFIRM_TIMEOUT = 30.0


class _InFlight:
    __slots__ = ("changes", "key", "letter", "outcome", "raw", "to")

    def __init__(self, letter: DeadLetter, raw: Any, changes: list[str], to: str) -> None:
        self.letter, self.raw, self.changes, self.to = letter, raw, changes, to
        self.key = letter.id
        self.outcome: str | None = None


class _Failed(NamedTuple):
    """A letter that stays: its id, the queue it was to go to, and why; not its bytes."""

    id: str
    to: str
    why: str


def _again(reader: Reader, run: Run) -> Iterator[Any]:
    """The letters of a reader; those too that were being put back when it counted them, while some are missing."""
    yield from reader
    for _ in range(_LOOKS):
        if run.stop() or not run.wanted() or not reader.more():
            return
        yield from reader


class RabbitMQBroker:
    """See `celery_dlx.brokers.base.Broker`."""

    raw_refusal = (
        "not on RabbitMQ, where a message without our header cannot be told from another when the broker returns it; leave "
        "out --raw, or move the messages by the broker's own shovel"
    )

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
        self._reports = Reports(self._connection)

    def _connection(self) -> Any:
        if self._open is not None:
            try:
                # A long-lived process may ask again after the broker was restarted: only an answer tells.
                self._open.channel().close()
            except Exception:  # noqa: BLE001 - whatever it is, a new connection settles it
                self._open.collect()
                self._open = None
        if self._open is None:
            self._open = connected(self._connect())
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
        dlq = self._policy.dlq(queue)
        page = match if isinstance(match, Selection) else Selection(match or (lambda letter: True))
        few = None if limit is None or page.newest else max(limit, 1 if match is None else WINDOW)
        return letters_in(self._reader(queue, dlq, few=few), queue, dlq, page, limit)

    def _reader(self, queue: str, dlq: str, connection: Any = None, few: int | None = None) -> Reader:
        """A reader of a DLQ that can be read without harm.

        Raises:
            UnsafeQueueError: what is put back is counted, and deleted when it was put back often enough.
        """
        connection = connection or self._connection()
        if not self.insist and dlq not in self._safe:
            self._check_safe(connection, queue, dlq)
            self._safe.add(dlq)
        return Reader(connection, dlq, few)

    def _check_safe(self, connection: Any, queue: str, dlq: str) -> None:
        version = version_tuple(connection.connection.server_properties.get("version"))
        guess = dlq_arguments(self._policy.settings(queue) or BUILT_IN, version)
        with SideChannel(connection.connection) as side:
            found = arguments_over_amqp(side, dlq, guess)
        if found is None:
            return
        if self._management_url:  # a policy may have lifted the limit: AMQP cannot tell
            with closing(management_of(connection, self._management_url)) as management:
                live = by_management(management, self._policy.exchange)
            if dlq in live.queues:
                found = live.queues[dlq]
        unknown = found.type == "unknown" and version >= (4,) and not self._management_url
        if not unknown and not finite_delivery_limit(found, version):
            return
        limit = found.setting("delivery-limit")
        raise UnsafeQueueError(
            f"{dlq!r} has a delivery limit of {'20, the default' if limit is None else limit}: letters that are looked at "
            "more often than that are deleted by the broker. Run `celery -A APP dlx topology apply` with a management API "
            "configured, or insist with --force"
        )

    def groups(self, queue: str, match: Match) -> None:
        """A queue counts nothing but its length."""

    def select(self, queue: str, match: Match) -> None:
        """A queue tells nothing of letters that are not read."""

    def get(self, queue: str, letter_id: str) -> DeadLetter | None:
        return next(self.browse(queue, lambda letter: letter.id == letter_id, 1), None)

    def replay_raw(self, queue: str, letters: Iterator[Chosen], run: Run) -> Iterator[Replayed]:
        raise UsageError(self.raw_refusal)

    def replay(self, queue: str, match: Match, limit: int | None = None, run: Run | None = None) -> Iterator[Replayed]:
        dlq = self._policy.dlq(queue)
        connection = self._connection()
        # A connection of its own for publishing: under an alarm it blocks, and the reader must still acknowledge.
        with self._connect() as publishing:
            publishing.connect()
            reader = self._reader(queue, dlq, connection)
            try:
                yield from self._replay(reader, publishing, queue, dlq, match, limit, run or Run())
            finally:
                self._finish(reader, queue, dlq)

    def _replay(
        self, reader: Reader, publishing: Any, queue: str, dlq: str, match: Match, limit: int | None, run: Run
    ) -> Iterator[Replayed]:
        done: deque[_InFlight] = deque()

        held = 0

        def on_outcome(token: _InFlight, outcome: str) -> None:
            nonlocal held
            token.outcome = outcome
            held -= len(token.raw.body)
            done.append(token)

        deliveries_of(publishing.connection)  # confirms are read in large pieces too
        pipeline = ConfirmPipeline(publishing.connection, on_outcome)
        failed: list[_Failed] = []
        user, taken, window = publishing.userid, 0, min(run.batch or WINDOW, WINDOW)
        for raw in _again(reader, run):
            if run.stop():
                break
            letter = letter_of(raw, queue, dlq)
            if not match(letter):
                continue
            to = run.to or letter.queue
            try:
                if run.edit is not None:
                    run.edit(letter)
                # Through the default exchange: the original one may fan out to queues that had no part in this death.
                if (same := revived_bytes(raw, letter, user, run.replay)) is not None:
                    pipeline.publish_bytes(_InFlight(letter, raw, same[1], to), same[0], raw.body, "", to)
                else:
                    message, changes = revived(letter, user, run.replay)
                    pipeline.publish(_InFlight(letter, raw, changes, to), message, "", to)
            except ReplayError as exc:
                failed.append(_Failed(letter.id, to, str(exc)))
                continue
            except Exception as exc:  # noqa: BLE001 - this one cannot be sent; the others can
                failed.append(_Failed(letter.id, to, f"it cannot be encoded ({exc})"))
                continue
            taken, held = taken + 1, held + len(raw.body)
            if pipeline.unwritten >= _WRITE_BYTES:
                pipeline.write()
            if held >= _HELD_BYTES:
                self._await(pipeline, 0)
            elif pipeline.unconfirmed >= window or not reader.ready():
                self._await(pipeline, window // 2)
            yield from self._settle(reader, done, failed)
            if limit is not None and taken >= limit:
                break
        self._await(pipeline, 0)
        yield from self._settle(reader, done, failed)
        if failed:
            first = failed[0]
            known = {RETURNED: f"queue {first.to!r} does not exist", REFUSED: "the broker refused it"}
            why = known.get(first.why, first.why)
            raise ReplayError(
                f"{len(failed)} letters stay in {dlq!r}, the first is {first.id}: {why}; create the queue "
                "(start its worker) and replay again"
            )

    @staticmethod
    def _await(pipeline: ConfirmPipeline, at_most: int) -> None:
        pipeline.write()
        unconfirmed, deadline = pipeline.unconfirmed, monotonic() + _CONFIRM_TIMEOUT
        while pipeline.unconfirmed > at_most:
            if pipeline.unconfirmed < unconfirmed:  # a slow broker is none that is silent
                unconfirmed, deadline = pipeline.unconfirmed, monotonic() + _CONFIRM_TIMEOUT
            if monotonic() > deadline:
                raise ReplayError(
                    f"no confirm for {_CONFIRM_TIMEOUT:.0f}s: {pipeline.unconfirmed} letters stay in their DLQ and may "
                    "also be in their queue; is the broker under a memory or disk alarm?"
                )
            pipeline.read(timeout=1.0)

    @staticmethod
    def _settle(reader: Reader, done: deque[_InFlight], failed: list[_Failed]) -> Iterator[Replayed]:
        stored = [token for token in done if token.outcome == STORED]
        failed.extend(_Failed(token.key, token.to, str(token.outcome)) for token in done if token.outcome != STORED)
        done.clear()
        if stored:
            # All of them before the first is given out: whoever stops listening must not leave them in both places.
            reader.acknowledge([(token.raw, token.key) for token in stored])
            for token in stored:
                yield Replayed(token.letter, token.to, token.changes)

    def _finish(self, reader: Reader, queue: str, dlq: str) -> None:
        """Close a reader; what it acknowledged and the queue did not take is acknowledged again."""
        ids, seen = reader.acknowledged, reader.seen
        while not reader.close() and ids:
            # What comes back takes its old place: it is among as many as were seen.
            again = Reader(self._connection(), dlq, few=seen)
            found = ((raw, letter_of(raw, queue, dlq).id) for raw in islice(again, seen))
            left = [(raw, letter_id) for raw, letter_id in found if letter_id in ids]
            if left:
                logger.warning("%d acknowledgements of %s were lost, and are sent again", len(left), dlq)
                again.acknowledge(left)
            else:
                ids = set()  # what came meanwhile is not ours
            reader = again

    def watch(self, replay: str) -> None:
        self._reports.watch(replay)

    def outcomes(self, replay: str) -> list[dict[str, Any]]:
        return self._reports.read(replay)

    def export(self, queue: str, match: Match, limit: int | None = None) -> Iterator[dict[str, Any]]:
        dlq = self._policy.dlq(queue)
        reader = self._reader(queue, dlq)
        try:
            spool = set_aside((raw for raw in reader if match(letter_of(raw, queue, dlq))), limit)
            if reader.missed and (limit is None or len(spool) < limit):
                raise ReplayError(
                    f"{reader.missed} letters of {dlq!r} were not seen: "
                    + ("more are there than can be read at once" if reader.full else "somebody else holds them, try again")
                    + "; nothing was exported, nothing removed"
                )
        finally:
            reader.close()
        for raw in spool.read():
            yield exported(raw, letter_of(raw, queue, dlq), queue)

    def restore(self, lines: Iterable[dict[str, Any]]) -> tuple[int, int]:
        there: dict[str, set[str]] = {}
        refused: list[str] = []
        restored = present = 0

        def on_outcome(token: _InFlight, outcome: str) -> None:
            if outcome != STORED:
                refused.append(f"{token.key} ({outcome})")

        with self._connect() as publishing:
            publishing.connect()
            pipeline = ConfirmPipeline(publishing.connection, on_outcome)
            for line in lines:
                message, letter = imported(line, self._policy)
                if letter.queue not in there:
                    self._make_dlq(publishing, letter.queue)
                    there[letter.queue] = self._ids(letter.queue)
                if letter.id in there[letter.queue]:
                    present += 1
                    continue
                there[letter.queue].add(letter.id)
                pipeline.publish(_InFlight(letter, None, [], letter.dlq), message, "", letter.dlq)
                restored += 1
                if pipeline.unconfirmed >= WINDOW:
                    self._await(pipeline, WINDOW // 2)
            self._await(pipeline, 0)
        if refused:
            raise ReplayError(f"{len(refused)} letters were not taken by the broker, first {refused[0]}; import again")
        return restored, present

    def _make_dlq(self, connection: Any, queue: str) -> None:
        settings = self._policy.settings(queue) or BUILT_IN
        Declarer(self._policy).dead_letter_queue(connection.connection, queue, settings)

    def _ids(self, queue: str) -> set[str]:
        ids: set[str] = set()

        def collect(letter: DeadLetter) -> bool:
            ids.add(letter.id)
            return False

        self.browse(queue, collect)
        return ids

    def discard(self, queue: str, match: Match, limit: int | None = None) -> Iterator[DeadLetter]:
        dlq = self._policy.dlq(queue)
        reader, taken, held = self._reader(queue, dlq), 0, 0
        try:
            batch: list[tuple[Any, DeadLetter]] = []
            for raw in reader:
                letter = letter_of(raw, queue, dlq)
                if not match(letter):
                    continue
                batch.append((raw, letter))
                taken, held = taken + 1, held + len(raw.body)
                if len(batch) >= WINDOW or held >= _HELD_BYTES or taken == limit:
                    yield from self._discard(reader, batch)
                    batch, held = [], 0
                if taken == limit:
                    break
            yield from self._discard(reader, batch)
        finally:
            self._finish(reader, queue, dlq)

    @staticmethod
    def _discard(reader: Reader, batch: list[tuple[Any, DeadLetter]]) -> Iterator[DeadLetter]:
        if batch:
            reader.acknowledge([(raw, letter.id) for raw, letter in batch])
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
