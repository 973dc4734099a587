"""The replay engine: canaries, pace, stopping, and a journal to go on from.

A letter is journaled as replayed after the broker has its message; killed in between, it is found gone when the replay
is resumed, and counted so. On RabbitMQ a batch that was published and not yet acknowledged is replayed again then:
duplicates of at most one window, recognisable by their lineage.
"""

from __future__ import annotations

import base64
import getpass
import json
import socket
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from amqp.exceptions import AMQPError
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from celery_dlx.brokers.base import Broker, Chosen, Match, Replayed, Run
from celery_dlx.choice import Choice
from celery_dlx.errors import DeadLetterError, ReplayError, UsageError
from celery_dlx.journal import Entry, Journal, QueueLocks, Record, read_record
from celery_dlx.letters import DeadLetter
from celery_dlx.raw import RawSending, check
from celery_dlx.selection import Selection, match
from celery_dlx.signals import dead_letter_replayed, heard

#: Letters in one line of the journal, and between two looks at what workers report; in flight on RabbitMQ at most.
_BATCH = 2_000
#: Letters that the journal says are being sent before the first of them leaves.
_AHEAD = 1_000
#: What a paced replay may make up for, in seconds.
_BATCH_SECONDS = 0.1
#: A paced replay reads its DLQ anew after this long, in seconds.
_LOOK_ANEW = 300
#: Between looks at what workers report, in seconds.
_LOOK_EVERY = 0.1
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
    _next_at: float = 0.0
    #: Letters that left in this run: what is heard of earlier ones stops nothing.
    _sent: set[str] = field(default_factory=set)
    #: Letters that an earlier run was sending when it was killed.
    _sending_before: frozenset[str] = frozenset()
    #: What its letters were chosen by, in this run.
    _chosen_by: Match | None = None

    @property
    def record(self) -> Record:
        return self.journal.record

    def run(self) -> Generator[Replayed, None, None]:
        """Replay what is selected and has not left yet; yields each letter that left. What breaks it off is in `error`."""
        clean = False
        try:
            self.broker.watch(self.record.replay)
            self._look()  # old news
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
            if not self._in_state("selected"):
                break
            yield from self._send_canaries(self.options.canary)
            self.broker.release()  # nobody knows how long they take
            self._await_canaries()
        if self._stop is None:
            yield from self._send([entry for entry in self.record.entries.values() if entry.state in ("selected", "gone")])
        self.broker.release()
        self._await_rest()

    def _in_state(self, state: str) -> bool:
        return any(entry.state == state for entry in self.record.entries.values())

    def _tidy(self) -> None:
        """Letters that were executed, and still lie in their DLQ because we were killed before we could take them out."""
        over: dict[str, set[str]] = {}
        for entry in self.record.entries.values():
            if entry.sending and not entry.settled and entry.state in ("succeeded", "failed"):
                over.setdefault(entry.queue, set()).add(entry.id)
        for queue, ids in over.items():
            for _ in self.broker.discard(queue, match(ids=ids), len(ids)):
                pass

    def _send_canaries(self, count: int) -> Iterator[Replayed]:
        # New ones each time: the cause of the last ones' failure may be fixed.
        waiting = [i for i in self.record.canaries if self.record.entries[i].state in ("replayed", "succeeded")]
        missing = count - len(waiting)
        fresh = [entry for entry in self.record.entries.values() if entry.state == "selected"][: max(missing, 0)]
        self.journal.write("canaries", letters=[*waiting, *(entry.id for entry in fresh)])
        yield from self._send(fresh)

    def _send(self, entries: list[Entry]) -> Iterator[Replayed]:
        wanted: dict[str, list[Entry]] = {}
        for entry in entries:
            wanted.setdefault(entry.queue, []).append(entry)
        refused: ReplayError | None = None
        for queue, chosen in wanted.items():
            if self._over():
                break
            try:
                yield from self._send_raw(queue, chosen) if self.options.raw else self._send_queue(queue, chosen)
            except ReplayError as exc:  # letters that cannot go must not hold up other queues, now and at each resume
                refused = refused or exc
        if refused is not None:
            raise refused

    def _send_raw(self, queue: str, entries: list[Entry]) -> Iterator[Replayed]:
        pace = self._paced if self.options.rate else None
        sending = RawSending(self.journal, entries, pace, lambda: self.on_progress(self.record))
        run = Run(to=self.options.to, batch=self._batch, bodies=heard(), stop=self._over)
        for replayed in sending.through(self.broker, queue, run):
            if run.bodies:
                dead_letter_replayed.send(sender=None, letter=replayed.letter, queue=replayed.queue)
            yield replayed
        if not self._over():
            self._gone(sending.left)

    @property
    def _batch(self) -> int:
        return max(1, min(_BATCH, int(self.options.rate / 10))) if self.options.rate else _BATCH

    def _send_queue(self, queue: str, entries: list[Entry]) -> Iterator[Replayed]:
        all_ids, ids = [entry.id for entry in entries], set[str]()
        announced: set[str] = set()
        coming: Iterator[str] = iter(())

        def announce(letter_id: str) -> None:
            # Only what may be under way when we are killed is taken for gone with us: a few ahead, not all.
            lot = [letter_id, *islice(coming, _AHEAD)]
            self.journal.write("sending", letters=lot)
            announced.update(lot)

        def match(letter: DeadLetter) -> bool:
            if letter.id not in ids or not self._paced():
                return False
            if letter.id not in announced:
                announce(letter.id)
            ids.discard(letter.id)  # a duplicate with the same id stays where it is
            return True

        rate, batch = self.options.rate, self._batch
        if rate:
            self.broker.release()  # it may take hours
        run = Run(self.record.replay, self.options.to, batch, lambda: bool(ids), self._editor(), heard())
        run.held, run.stop = self._chosen_by, self._over
        # A paced replay looks anew now and then: RabbitMQ takes letters back that are held for half an hour.
        size = max(1, int(rate * _LOOK_ANEW)) if rate else len(all_ids)
        moved: list[str] = []
        try:
            for start in range(0, len(all_ids), size):
                if self._over():
                    return
                ids.update(all_ids[start : start + size])
                coming = iter(all_ids[start : start + size])
                chosen = Selection(match, ids=all_ids[start : start + size])
                for replayed in self.broker.replay(queue, chosen, len(ids), run):
                    moved.append(replayed.letter.id)
                    self._sent.add(replayed.letter.id)
                    dead_letter_replayed.send(sender=None, letter=replayed.letter, queue=replayed.queue)
                    if len(moved) >= batch:
                        self._moved(moved)
                    yield replayed
                if not self._over():
                    self._gone(ids)
                ids.clear()
        finally:
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

    def _gone(self, ids: set[str]) -> None:
        """Letters that were selected, and are not seen in their DLQ any more.

        An earlier run of this replay was sending them, and was killed before it could say that they left; or somebody
        else replayed, discarded or holds them. The latter are looked for again when the replay is resumed.
        """
        before = {i for i in ids if i in self._sending_before}
        for state, letters in (("replayed", before), ("gone", ids - before)):
            if letters:
                self.journal.write("state", state=state, letters=sorted(letters))

    def _moved(self, moved: list[str]) -> None:
        if moved:
            self.journal.write("state", state="replayed", letters=list(moved))
            moved.clear()
            self._heard = time.monotonic()
            self.on_progress(self.record)

    def _paced(self) -> bool:
        """Wait for this letter's turn; whether it may go."""
        if self.options.rate:
            now = time.monotonic()
            # What waiting for the broker cost is made up for, but not the time before the first letter.
            earliest = now - max(_BATCH_SECONDS, 1 / self.options.rate)
            self._next_at = max(self._next_at + 1 / self.options.rate, earliest) if self._next_at else now
            while (left := self._next_at - time.monotonic()) > 0:
                if self._over():
                    return False
                time.sleep(min(left, _LOOK_EVERY))
        return not self._over()

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
            entry = self.record.entries.get(str(report.get("of")))
            if entry is None or report.get("state") not in ("succeeded", "failed"):
                continue
            by_state.setdefault(report["state"], []).append(entry.id)
            same = report.get("fingerprint") == entry.fingerprint
            if report["state"] == "failed" and not same:
                differently.append(entry.id)
            again = report["state"] == "failed" and same and entry.id in self._sent
            if again and self.options.stop_on_repeat and self._stop is None and self._in_state("selected"):
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
            states = [self.record.entries[letter_id].state for letter_id in self.record.canaries]
            if "failed" in states:
                self._stop = "a canary failed again"
            elif "replayed" in states and time.monotonic() - self._heard > self.options.patience:
                self._stop = (
                    f"no news of {states.count('replayed')} canaries in {self.options.patience:.0f}s; does a worker with "
                    "celery-dlx consume the queue?"
                )
            elif "replayed" not in states:
                # Those that were gone prove nothing: others take their place.
                if states.count("succeeded") >= (self.options.canary or 0) or not self._in_state("selected"):
                    self.journal.write("proven")
                return
            else:
                time.sleep(_LOOK_EVERY)

    def _await_rest(self) -> None:
        """Hear what becomes of the others, as long as there is news."""
        while not self.options.raw and not self.interrupted():
            self._look()
            if not self._in_state("replayed") or time.monotonic() - self._heard > self.options.wait:
                return
            time.sleep(_LOOK_EVERY)


def start(broker: Broker, url: str, choice: Choice, options: Options, **hooks: Any) -> tuple[Engine, QueueLocks]:
    """Begin a replay: the selection (queue and letter) is journaled before anything leaves.

    Raises:
        UsageError: another replay is at the same queues; or the options exclude each other, or are not to be had here.
        JournalError: the journal cannot be written.
    """
    record = Record(choice.replay)
    try:
        check(options, broker)
        choice.lock()
        journal = Journal(record)
        by = f"{_user()}@{socket.gethostname()}"
        now = int(time.time() * 1000)
        journal.write("start", started=now, selection=choice.text, by=by, broker=url, options=options.as_dict())
        found = (_line(queue, letter, options) for queue, letter in choice.chosen())
        while batch := list(islice(found, _BATCH)):
            journal.note("select", letters=batch)  # "selected" makes sure of all of them
        journal.write("selected")
    except BaseException:
        choice.release()
        raise
    return Engine(broker, journal, options, _chosen_by=choice.match, **hooks), choice.hand_over()


def resume(
    broker: Broker, url: str, replay: str, *, rate: float | None = None, wait: float | None = None, **hooks: Any
) -> tuple[Engine, QueueLocks]:
    """Go on with a replay that was stopped, interrupted or killed; ``rate`` and ``wait`` replace those it had.

    Raises:
        UsageError: there is none, it is running, it was on another broker, or nothing of it had left.
    """
    broker.release()  # an earlier choice that nobody sent
    record = read_record(replay)
    if record.broker != url:
        raise UsageError(f"replay {replay} was on {record.broker}, this app's broker is {url}")
    if not record.complete:
        raise UsageError(f"replay {replay} was killed while it selected letters, and none had left: start it again")
    locks = QueueLocks(url, {entry.queue for entry in record.entries.values()}, replay)
    try:
        journal = Journal(record)
        record = journal.record = read_record(replay)  # again, now that nobody else writes it
        record.running = False
        known = {key: value for key, value in record.options.items() if key in Options.__dataclass_fields__}
        options = Options(**known)
        options.rate, options.wait = rate or options.rate, options.wait if wait is None else wait
        before = frozenset(entry.id for entry in record.entries.values() if entry.sending and not entry.settled)
        journal.write("go")
    except BaseException:
        locks.release()
        raise
    return Engine(broker, journal, options, _sending_before=before, **hooks), locks


def _line(queue: str, letter: Chosen, options: Options) -> list[Any]:
    return [letter.id, queue, letter.fingerprint, *([letter.died_at] if options.raw else ())]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "?"


def describe(queue: str | None, ids: Any, selected: dict[str, Any]) -> str:
    """A selection in words, for the journal."""
    what = f"{len(ids)} ids" if ids else json.dumps(selected, default=str) if selected else "all"
    return f"{queue or 'every queue'}: {what}"
