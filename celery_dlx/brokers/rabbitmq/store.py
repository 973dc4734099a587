"""Reads, replays and empties DLQs over AMQP.

How letters are taken without being consumed is `reader`'s.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from amqp.exceptions import AMQPError, NotFound

from celery_dlx.brokers.base import Chosen, Looking, Match, QueueStats, Replayed, Run
from celery_dlx.brokers.rabbitmq import index, indexing
from celery_dlx.brokers.rabbitmq.browse import letters_in, set_aside
from celery_dlx.brokers.rabbitmq.declare import Declarer, SideChannel
from celery_dlx.brokers.rabbitmq.held import Held
from celery_dlx.brokers.rabbitmq.letters import exported, imported, letter_of
from celery_dlx.brokers.rabbitmq.moving import HELD_BYTES, WINDOW, InFlight, Reading, confirmed, move
from celery_dlx.brokers.rabbitmq.pipeline import STORED, ConfirmPipeline
from celery_dlx.brokers.rabbitmq.reader import CHANNELS, PER_CHANNEL, Reader
from celery_dlx.brokers.rabbitmq.reports import Reports
from celery_dlx.brokers.rabbitmq.safety import check_safe
from celery_dlx.brokers.rabbitmq.unreachable import connected
from celery_dlx.errors import ReplayError, SpoolError, UsageError
from celery_dlx.groups import Group
from celery_dlx.ids import IdSet
from celery_dlx.letters import DeadLetter, iso_time
from celery_dlx.policy.settings import BUILT_IN, Policy
from celery_dlx.selection import Selection

logger = logging.getLogger("celery_dlx")

#: Queues whose letters are held at most: each takes channels of the connection.
_MOST_HELD = 10
#: A channel of our own that was closed just now may be counted for a moment, in seconds.
_OURS = 0.5


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
        #: By DLQ that was checked: whether it decides at once on what a consumer gets.
        self._safe: dict[str, bool] = {}
        #: DLQs of which was said when they were read.
        self._said: set[tuple[str, str]] = set()
        #: By source queue: letters that were selected for a replay.
        self._held: dict[str, Held] = {}
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
        self.release()
        if self._open is not None:
            self._open.close()
            self._open = None

    def queues(self) -> list[str]:
        connection = self._connection()
        with SideChannel(connection.connection) as side:
            return sorted({queue for queue in self._known() if side.live_queue(self._policy.dlq(queue)) is not None})

    def browse(
        self, queue: str, match: Match | None = None, limit: int | None = None, looking: Looking | None = None
    ) -> Iterator[DeadLetter]:
        if looking is None or not isinstance(match, Selection) or match.bodies:
            return self._read(queue, match, limit)
        known = self._index(queue, looking)
        found = None if known is None else known.letters(match)
        if known is None or found is None:
            return self._read(queue, match, limit, note=True)
        self._say(queue, known, looking)
        letter = partial(letter_of, queue=queue, dlq=self._policy.dlq(queue))
        return islice(filter(match, map(letter, found)), limit)

    def _read(
        self, queue: str, match: Match | None = None, limit: int | None = None, *, note: bool = False
    ) -> Iterator[DeadLetter]:
        """`browse`, of what is there now. ``note``: an index may be written of it."""
        dlq = self._policy.dlq(queue)
        page = match if isinstance(match, Selection) else Selection(match or (lambda letter: True))
        few = None if page.newest else max(limit, 1) if match is None and limit is not None else _few(limit)
        reader, letter = self._reader(queue, dlq, few=few, ahead=True), partial(letter_of, queue=queue, dlq=dlq)
        place = self._place(dlq) if note and reader.depth >= indexing.AT_LEAST else None
        if place is None:
            return letters_in(reader, letter, page, limit)
        with indexing.IndexWriter(place, reader, letter) as writer:
            return letters_in(reader, writer.letter, page, limit)

    def _place(self, dlq: str) -> Path | None:
        """Where the index of a DLQ is."""
        return index.place_of(str(self._connect().as_uri()), dlq)

    def _index(self, queue: str, looking: Looking) -> index.Index | None:
        """The index of a queue's DLQ, if it may be believed."""
        dlq, settings = self._policy.dlq(queue), self._policy.settings(queue) or BUILT_IN
        place = self._place(dlq)
        if place is None:
            return None
        index.sweep(place.parent)
        if looking.fresh or not os.path.exists(place):  # it asks no folder that may not be searched
            return None
        with SideChannel(self._connection().connection) as side:
            live = side.counted(dlq)
        if live is None:
            return None
        return index.open_index(place, live.message_count, settings.dlq_max_length, settings.dlq_max_bytes)

    def _say(self, queue: str, known: index.Index, looking: Looking) -> None:
        told = self._policy.dlq(queue), iso_time(int(known.read_at * 1000))
        if told not in self._said:
            self._said.add(told)
            looking.say(f"{told[0]}: {known.depth} letters as read at {told[1]}; --fresh reads them again")

    @contextmanager
    def _changing(self, dlq: str) -> Iterator[None]:
        """What is known of a DLQ is not true any more; nor is what somebody reads of it meanwhile."""
        place = self._place(dlq)
        index.forget(place)
        try:
            yield
        finally:
            index.forget(place)

    def _reader(
        self, queue: str, dlq: str, connection: Any = None, few: int | None = None, *, ahead: bool = False
    ) -> Reader:
        """A reader of a DLQ that can be read without harm.

        Raises:
            UnsafeQueueError: what is put back is counted, and deleted when it was put back often enough.
        """
        connection = connection or self._connection()
        if not self.insist and dlq not in self._safe:
            self._safe[dlq] = check_safe(connection, self._policy, queue, self._management_url)
        return Reader(connection, dlq, few, ahead=ahead, whole=self._safe.get(dlq, False))

    def groups(self, queue: str, match: Match, looking: Looking | None = None) -> list[Group] | None:
        """A queue counts nothing but its length."""
        if looking is None or not isinstance(match, Selection) or not match.causes_only:
            return None
        known = self._index(queue, looking)
        found = None if known is None else known.groups(match.cause)
        if known is not None and found is not None:
            self._say(queue, known, looking)
        return found

    def select(self, queue: str, match: Match) -> None:
        """A queue tells nothing of letters that are not read."""

    def get(self, queue: str, letter_id: str) -> DeadLetter | None:
        return next(self._read(queue, lambda letter: letter.id == letter_id, 1), None)

    def hold(self, queue: str, match: Match, replay: str, limit: int | None = None) -> Held | None:
        held = self._held.get(queue)
        if held is not None and held.match is match and held.limit == limit:
            return held
        if held is not None:
            self.release()
        if len(self._held) >= _MOST_HELD or sum(each.reader.seen for each in self._held.values()) >= CHANNELS * PER_CHANNEL:
            return None
        dlq = self._policy.dlq(queue)
        connection = self._connection()
        reader = self._reader(queue, dlq, connection, few=_few(limit), ahead=True)
        try:
            self._held[queue] = held = Held(reader, queue, dlq, match, limit, replay, connection.userid)
        except (SpoolError, AMQPError) as exc:  # no room to set them aside; or so many channels are not to be had
            logger.debug("letters of %s are read twice: %s", dlq, exc)
            with suppress(AMQPError, OSError):
                reader.close()
            return None
        except BaseException:
            reader.close()
            raise
        return held

    def release(self) -> None:
        while self._held:
            _, held = self._held.popitem()
            held.forget()
            with suppress(AMQPError, OSError):  # whose connection is broken puts everything back anyhow
                held.reader.close()

    def held_by_others(self, queue: str) -> bool:
        """A quorum queue counts a consumer until all it held is settled or given back, also if its channel is cancelled."""
        deadline = monotonic() + _OURS
        with SideChannel(self._connection().connection) as side:
            while (live := side.counted(self._policy.dlq(queue))) is not None and live.consumer_count:
                if monotonic() > deadline:
                    return True
                sleep(0.01)
        return False

    def replay_raw(self, queue: str, letters: Iterator[Chosen], run: Run) -> Iterator[Replayed]:
        raise UsageError(self.raw_refusal)

    def replay(self, queue: str, match: Match, limit: int | None = None, run: Run | None = None) -> Iterator[Replayed]:
        dlq, run = self._policy.dlq(queue), run or Run()
        with self._changing(dlq):
            connection = self._connection()
            held = self._taken_out(queue, run, connection)
            reader = held.reader if held is not None else self._reader(queue, dlq, connection)
            try:
                # A connection of its own for publishing: under an alarm it blocks, and the reader must still acknowledge.
                with self._connect() as publishing:
                    publishing.connect()
                    if held is not None:
                        held.prepare(run, publishing.userid)
                    yield from move(held or Reading(reader, queue, dlq, run), publishing, dlq, match, limit, run)
            finally:
                if held is not None:
                    held.forget()
                self._finish(reader, queue, dlq)

    def _taken_out(self, queue: str, run: Run, connection: Any) -> Held | None:
        """What is held for this replay, from now on its own."""
        held = self._held.get(queue)
        if held is None or run.held is None or held.match is not run.held:
            return None
        del self._held[queue]
        if held.reader.is_on(connection):
            return held
        held.forget()  # its connection broke: all of them are in their DLQ
        return None

    def _finish(self, reader: Reader, queue: str, dlq: str) -> None:
        """Close a reader; what it acknowledged and the queue did not take is acknowledged again."""
        ids, seen = reader.acknowledged, reader.seen
        while not reader.close() and ids:
            # What comes back takes its old place: it is among as many as were seen.
            reader, known = Reader(self._connection(), dlq, few=seen), IdSet(ids)
            found = ((raw, letter_of(raw, queue, dlq).id) for raw in islice(reader, seen))
            left = [(raw, letter_id) for raw, letter_id in found if letter_id in known]
            if not left:
                reader.close()
                return  # what came meanwhile is not ours
            logger.warning("%d acknowledgements of %s were lost, and are sent again", len(left), dlq)
            reader.acknowledge(left)

    def watch(self, replay: str) -> None:
        self._reports.watch(replay)

    def outcomes(self, replay: str) -> list[dict[str, Any]]:
        return self._reports.read(replay)

    def export(self, queue: str, match: Match, limit: int | None = None) -> Iterator[dict[str, Any]]:
        dlq = self._policy.dlq(queue)
        reader = self._reader(queue, dlq, few=_few(limit), ahead=True)
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

        def on_outcome(token: InFlight, outcome: str) -> None:
            if outcome != STORED:
                refused.append(f"{token.key} ({outcome})")

        with self._connect() as publishing, ExitStack() as changing:
            publishing.connect()
            pipeline = ConfirmPipeline(publishing.connection, on_outcome)
            for line in lines:
                message, letter = imported(line, self._policy)
                if letter.queue not in there:
                    self._make_dlq(publishing, letter.queue)
                    changing.enter_context(self._changing(letter.dlq))
                    there[letter.queue] = self._ids(letter.queue)
                if letter.id in there[letter.queue]:
                    present += 1
                    continue
                there[letter.queue].add(letter.id)
                pipeline.publish(InFlight(letter, None, [], letter.dlq), message, "", letter.dlq)
                restored += 1
                if pipeline.unconfirmed >= WINDOW:
                    confirmed(pipeline, WINDOW // 2)
            confirmed(pipeline, 0)
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

        self._read(queue, collect)
        return ids

    def discard(self, queue: str, match: Match, limit: int | None = None) -> Iterator[DeadLetter]:
        dlq = self._policy.dlq(queue)
        with self._changing(dlq):
            reader, taken, held = self._reader(queue, dlq), 0, 0
            try:
                batch: list[tuple[Any, DeadLetter]] = []
                for raw in reader:
                    letter = letter_of(raw, queue, dlq)
                    if not match(letter):
                        continue
                    batch.append((raw, letter))
                    taken, held = taken + 1, held + len(raw.body)
                    if len(batch) >= WINDOW or held >= HELD_BYTES or taken == limit:
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
        with self._changing(self._policy.dlq(queue)), SideChannel(self._connection().connection) as side:
            try:
                return int(side.channel.queue_purge(self._policy.dlq(queue)) or 0)
            except NotFound:
                return 0

    def stats(self, queues: Iterable[str]) -> Iterator[QueueStats]:
        with SideChannel(self._connection().connection) as side:
            for queue in queues:
                dlq = self._policy.dlq(queue)
                live = side.counted(dlq)
                if live is not None:
                    yield QueueStats(queue, dlq, live.message_count, {"consumers": live.consumer_count})
                else:
                    yield QueueStats(queue, dlq, 0, {"missing": True})


def _few(limit: int | None) -> int | None:
    """How many letters are probably enough for so many that match."""
    return None if limit is None else max(limit, WINDOW)
