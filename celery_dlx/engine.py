"""The replay engine: canaries, pace, stopping, and a journal to go on from.

A letter is journaled as replayed after the broker has its message; killed in between, it is found gone when the replay
is resumed, and counted so. On RabbitMQ a batch that was published and not yet acknowledged is replayed again then:
duplicates of at most one window, recognisable by their lineage.
"""

from __future__ import annotations

import base64
import time
from array import array
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from amqp.exceptions import AMQPError
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from celery_dlx.brokers.base import Broker, Match, Replayed, Run
from celery_dlx.entries import LEFT, Entries
from celery_dlx.errors import DeadLetterError, ReplayError
from celery_dlx.journal import Journal, Record
from celery_dlx.letters import DeadLetter
from celery_dlx.pace import Pace
from celery_dlx.raw import RawSending
from celery_dlx.selection import Selection, match
from celery_dlx.signals import dead_letter_replayed, heard

#: Letters in one line of the journal, and between two looks at what workers report; in flight on RabbitMQ at most.
BATCH = 2_000
#: Letters that the journal says are being sent before the first of them leaves.
_AHEAD = 1_000
#: A paced replay reads its DLQ anew after this long, in seconds.
_LOOK_ANEW = 300
#: Between looks at what workers report, in seconds.
_LOOK_EVERY = 0.1
#: What a killed run held is back as soon as the broker notices: at once, or when heartbeats are missed. Waited for so many
#: seconds; what comes later is found by the next resumption.
_GIVEN_BACK = 10.0
#: What a run knows of a letter: it left in this run, for what is heard of earlier ones stops nothing; it may have left with
#: an earlier one that was killed; it is to leave; the journal says so.
_SENT, _BEFORE, _WANTED, _ANNOUNCED = 1, 2, 4, 8
#: Canaries have this long to come to an end after the last news of them, in seconds.
CANARY_PATIENCE = 60.0


@dataclass
class Options:
    """``canary``: that many first, the rest only if all of them succeed. ``rate``: letters per second. ``wait``: seconds
    without news after which letters that nobody reported on are left as waiting."""

    canary: int | None = None
    rate: float | None = None
    to: str | None = None
    stop_on_repeat: bool = False
    wait: float = 2.0
    patience: float = CANARY_PATIENCE
    #: A JSON Patch over the arguments; see `celery_dlx.editing.Edit`.
    edit: str | None = None
    #: Messages go back as they are; see `celery_dlx.raw`.
    raw: bool = False

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class Engine:
    """One replay over a broker. ``interrupted`` is asked often; then what was begun is finished, and no more."""

    broker: Broker
    journal: Journal
    options: Options
    interrupted: Callable[[], bool] = lambda: False
    on_progress: Callable[[Record], None] = lambda record: None
    #: What broke it off; the summary says so too.
    error: Exception | None = None
    _stop: str | None = None
    _looked: float = 0.0
    _heard: float = field(default_factory=time.monotonic)
    #: By the numbers of letters: what this run knows of them, see `_SENT`.
    _marks: bytearray = field(default_factory=bytearray)
    #: Queues whose letters somebody else held when this run began.
    _doubtful: set[str] = field(default_factory=set)
    #: What its letters were chosen by, in this run.
    _chosen_by: Match | None = None

    def __post_init__(self) -> None:
        self._marks = bytearray(len(self._entries))
        self._pace = Pace(self.options.rate)
        self._batch = self._pace.batch(BATCH)

    @property
    def record(self) -> Record:
        return self.journal.record

    @property
    def _entries(self) -> Entries:
        return self.journal.record.entries

    def was_killed(self) -> None:
        """Letters that are under way by the journal may have left with the run before this one."""
        for number in self._entries.under_way():
            self._marks[number] |= _BEFORE

    def run(self) -> Generator[Replayed, None, None]:
        """Replay what is selected and has not left yet; yields each letter that left. What breaks it off is in `error`."""
        clean = False
        try:
            self.broker.watch(self.record.replay)
            self._look()  # old news
            self._await_others()
            self._tidy()
            yield from self._run()
            clean = True
        except (DeadLetterError, AMQPError, KombuError, RedisError, OSError) as exc:
            self.error = exc
            self._stop = (str(exc) or type(exc).__name__).splitlines()[0]
        finally:
            if self._stop is None and self.interrupted():
                self._stop = "interrupted"
            try:
                self.journal.write("end", stopped=self._stop, clean=clean)
            finally:
                self.broker.release()

    def _run(self) -> Iterator[Replayed]:
        while self.options.canary and not self.record.proven and not self._over():
            if not self._entries.count("selected"):
                break
            yield from self._send_canaries(self.options.canary)
            self.broker.release()  # nobody knows how long they take
            self._await_canaries()
        if self._stop is None:
            yield from self._send(lambda queue: self._entries.numbers(LEFT, queue))
            self._tidy()  # again: RabbitMQ may have noticed only now that whoever held them was killed
        self.broker.release()
        self._await_rest()

    def _await_others(self) -> None:
        """Have the broker notice that whoever held our letters was killed: until then they are not seen in their DLQs."""
        killed = {self._entries.at(number).queue for number in self._entries.under_way()}
        deadline = time.monotonic() + _GIVEN_BACK
        while held := {queue for queue in killed if self.broker.held_by_others(queue)}:
            if time.monotonic() >= deadline or self._over():
                break
            time.sleep(_LOOK_EVERY)
        self._doubtful = held

    def _may_come_back(self, queue: str) -> bool:
        """Whether letters that were looked for and not seen may be in their DLQ soon; asked after they were looked for."""
        return queue in self._doubtful or self.broker.held_by_others(queue)

    def _tidy(self) -> None:
        """Letters that were executed, and still lie in their DLQ because we were killed before we could take them out."""
        over: dict[str, set[str]] = {}
        for entry in map(self._entries.at, self._entries.under_way()):
            if entry.state in ("succeeded", "failed"):
                over.setdefault(entry.queue, set()).add(entry.id)
        for queue, ids in over.items():
            found = {letter.id for letter in self.broker.discard(queue, match(ids=ids), len(ids))}
            # The others are gone; or held, and looked for once more, by the next resumption if need be.
            done = list(found if self._may_come_back(queue) else ids)
            for start in range(0, len(done), BATCH):
                self.journal.write("state", state="replayed", letters=done[start : start + BATCH])

    def _send_canaries(self, count: int) -> Iterator[Replayed]:
        # New ones each time: the cause of the last ones' failure may be fixed.
        waiting = [i for i in self.record.canaries if self._entries[i].state in ("replayed", "succeeded")]
        missing = count - len(waiting)
        fresh = [self._entries.at(number) for number in self._entries.numbers(("selected",))[: max(missing, 0)]]
        self.journal.write("canaries", letters=[*waiting, *(entry.id for entry in fresh)])
        yield from self._send(lambda queue: array("I", (entry.number for entry in fresh if entry.queue == queue)))

    def _send(self, numbers: Callable[[str], array[int]]) -> Iterator[Replayed]:
        """Send letters of each queue: those that ``numbers`` says when its turn comes."""
        refused: ReplayError | None = None
        for queue in self._entries.queues():
            if self._over():
                break
            if not (chosen := numbers(queue)):
                continue
            try:
                yield from self._send_raw(queue, chosen) if self.options.raw else self._send_queue(queue, chosen)
            except ReplayError as exc:  # letters that cannot go must not hold up other queues, now and at each resume
                refused = refused or exc
        if refused is not None:
            raise refused

    def _send_raw(self, queue: str, numbers: array[int]) -> Iterator[Replayed]:
        pace = self._paced if self.options.rate else None
        sending = RawSending(self.journal, numbers, pace, lambda: self.on_progress(self.record))
        run = Run(to=self.options.to, batch=self._batch, bodies=heard(), stop=self._over)
        for replayed in sending.through(self.broker, queue, run):
            if run.bodies:
                dead_letter_replayed.send(sender=None, letter=replayed.letter, queue=replayed.queue)
            yield replayed
        if not self._over():
            self._gone(queue, self._entries.numbers(LEFT, queue))

    def _send_queue(self, queue: str, numbers: array[int]) -> Iterator[Replayed]:
        marks, find = self._marks, self._entries.ids.find
        coming: Iterator[int] = iter(())
        wanted = 0

        def announce(number: int) -> None:
            # Only what may be under way when we are killed is taken for gone with us: a few ahead, not all.
            lot = [number, *islice(coming, _AHEAD)]
            self.journal.write("sending", letters=[self._entries.ids[each] for each in lot])
            for each in lot:
                marks[each] |= _ANNOUNCED

        def match(letter: DeadLetter) -> bool:
            nonlocal wanted
            number = find(letter.id)
            if number is None or not marks[number] & _WANTED or not self._paced():
                return False
            if not marks[number] & _ANNOUNCED:
                announce(number)
            marks[number] &= ~_WANTED  # a duplicate with the same id stays where it is
            wanted -= 1
            return True

        rate, batch = self.options.rate, self._batch
        if rate:
            self.broker.release()  # it may take hours
        run = Run(self.record.replay, self.options.to, batch, lambda: wanted > 0, self._editor(), heard())
        run.held, run.stop = self._chosen_by, self._over
        # A paced replay looks anew now and then: RabbitMQ takes letters back that are held for half an hour.
        size = max(1, int(rate * _LOOK_ANEW)) if rate else len(numbers)
        moved: list[str] = []
        try:
            for start in range(0, len(numbers), size):
                if self._over():
                    return
                some = numbers[start : start + size]
                for number in some:
                    marks[number] = marks[number] & ~_ANNOUNCED | _WANTED
                coming, wanted = iter(some), len(some)
                chosen = Selection(match, ids=self._entries.some_ids(some))
                for replayed in self.broker.replay(queue, chosen, wanted, run):
                    moved.append(replayed.letter.id)
                    if (left := find(replayed.letter.id)) is not None:
                        marks[left] |= _SENT
                    dead_letter_replayed.send(sender=None, letter=replayed.letter, queue=replayed.queue)
                    if len(moved) >= batch:
                        self._moved(moved)
                    yield replayed
                if not self._over():
                    self._gone(queue, [number for number in some if marks[number] & _WANTED])
        finally:
            for number in numbers:
                marks[number] &= ~_WANTED
            self._moved(moved)

    def _editor(self) -> Callable[[DeadLetter], None] | None:
        if self.options.edit is None:
            return None
        from celery_dlx.editing import Edit  # few replays edit

        edit = Edit(self.options.edit)

        def change(letter: DeadLetter) -> None:
            edit.apply(letter)
            # Before it leaves: whatever happens, what the producer sent can be read here.
            self.journal.write("edited", letter=letter.id, body=base64.b64encode(letter.edited or b"").decode())

        return change

    def _gone(self, queue: str, numbers: Sequence[int]) -> None:
        """Letters that were selected, and are not seen in their DLQ any more.

        An earlier run of this replay was sending them, and was killed before it could say that they left; or somebody
        else replayed, discarded or holds them. The latter are looked for again when the replay is resumed.
        """
        sent = [number for number in numbers if self._marks[number] & _BEFORE]
        unseen = bool(sent) and self._may_come_back(queue)  # perhaps from a run that is dead, which nobody noticed yet
        others = (number for number in numbers if not self._marks[number] & _BEFORE)
        for state, those in (("unseen" if unseen else "replayed", iter(sent)), ("gone", others)):
            while ids := [self._entries.ids[number] for number in islice(those, BATCH)]:
                self.journal.write("state", state=state, letters=ids)

    def _moved(self, moved: list[str]) -> None:
        if moved:
            self.journal.write("state", state="replayed", letters=list(moved))
            moved.clear()
            self._heard = time.monotonic()
            self.on_progress(self.record)

    def _paced(self) -> bool:
        """Wait for this letter's turn; whether it may go."""
        return self._pace.wait(self._over)

    def _over(self) -> bool:
        """Whether to stop; takes in what workers report, now and then."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_EVERY:
            self._look()
            self._looked = time.monotonic()
        return self._stop is not None or self.interrupted()

    def _look(self) -> None:
        """Take in what workers reported, a page of it."""
        if self.options.raw:
            return  # nobody does
        reports = self.broker.outcomes(self.record.replay)
        by_state: dict[str, list[str]] = {}
        differently: list[str] = []
        for report in reports:
            entry = self._entries.get(str(report.get("of")))
            if entry is None or report.get("state") not in ("succeeded", "failed"):
                continue
            by_state.setdefault(report["state"], []).append(entry.id)
            same = report.get("fingerprint") == entry.fingerprint
            if report["state"] == "failed" and not same:
                differently.append(entry.id)
            again = report["state"] == "failed" and same and self._marks[entry.number] & _SENT
            if again and self.options.stop_on_repeat and self._stop is None and self._entries.count("selected"):
                self._stop = f"the same failure came back (letter {entry.id})"
        for state, ids in by_state.items():
            self.journal.write(
                "state", state=state, letters=ids, **({"differently": differently} if state == "failed" else {})
            )
        if reports:
            self._heard = time.monotonic()
            self.on_progress(self.record)

    def _await_canaries(self) -> None:
        self._heard = time.monotonic()
        while not self._over():
            states = [self._entries[letter_id].state for letter_id in self.record.canaries]
            if "failed" in states:
                self._stop = "a canary failed again"
            elif "replayed" in states and time.monotonic() - self._heard > self.options.patience:
                self._stop = (
                    f"no news of {states.count('replayed')} canaries in {self.options.patience:.0f}s; does a worker with "
                    "celery-dlx consume the queue?"
                )
            elif "replayed" not in states:
                # Those that were gone prove nothing: others take their place.
                if states.count("succeeded") >= (self.options.canary or 0) or not self._entries.count("selected"):
                    self.journal.write("proven")
                return
            else:
                time.sleep(_LOOK_EVERY)

    def _await_rest(self) -> None:
        """Hear what becomes of the others, as long as there is news."""
        while not self.options.raw and not self.interrupted():
            self._look()
            if not self._entries.count("replayed") or time.monotonic() - self._heard > self.options.wait:
                return
            time.sleep(_LOOK_EVERY)
