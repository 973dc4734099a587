"""The replay engine: canaries, pace, stopping, and a journal to go on from.

A letter is journaled as replayed after the broker has its message; killed in between, it is found gone when the replay
is resumed, and counted so. On RabbitMQ a batch that was published and not yet acknowledged is replayed again then:
duplicates of at most one window, recognisable by their lineage.
"""

from __future__ import annotations

import getpass
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from celery_dlx.brokers.base import Broker, Replayed, Run
from celery_dlx.errors import ReplayError, UsageError
from celery_dlx.journal import Entry, Journal, QueueLocks, Record, read_record
from celery_dlx.letters import DeadLetter
from celery_dlx.signals import dead_letter_replayed

#: Letters in one line of the journal, and between two looks at what workers report.
_BATCH = 500
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
    _stop: str | None = None
    _looked: float = 0.0
    _heard: float = field(default_factory=time.monotonic)
    _next_at: float = 0.0
    _failed_before: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self._failed_before = frozenset(e.id for e in self.record.entries.values() if e.state == "failed")

    @property
    def record(self) -> Record:
        return self.journal.record

    def run(self) -> Iterator[Replayed]:
        """Replay what is selected and has not left yet; yields each letter that left."""
        try:
            self.broker.watch(self.record.replay)
            yield from self._run()
        except ReplayError as exc:
            self._stop = str(exc)
        finally:
            if self._stop is None and self.interrupted():
                self._stop = "interrupted"
            self.journal.write("end", stopped=self._stop)

    def _run(self) -> Iterator[Replayed]:
        canary = self.options.canary
        if canary:
            # After a failure new canaries are sent: the cause may be fixed meanwhile.
            sent = [entry for entry in self.record.entries.values() if entry.state in ("replayed", "succeeded")]
            if self._failed_before or len(sent) < canary:
                yield from self._send(canary if self._failed_before else canary - len(sent))
            if self._stop is None:
                self._await_canaries()
        if self._stop is None:
            yield from self._send(None)
        self._await_rest()

    def _send(self, limit: int | None) -> Iterator[Replayed]:
        wanted: dict[str, list[Entry]] = {}
        for entry in self.record.entries.values():
            if entry.state == "selected":
                wanted.setdefault(entry.queue, []).append(entry)
        for queue, entries in wanted.items():
            if self._over() or limit == 0:
                return
            chosen = entries if limit is None else entries[:limit]
            limit = None if limit is None else limit - len(chosen)
            yield from self._send_queue(queue, {entry.id for entry in chosen})

    def _send_queue(self, queue: str, ids: set[str]) -> Iterator[Replayed]:
        def match(letter: DeadLetter) -> bool:
            if letter.id not in ids:
                return False
            ids.discard(letter.id)  # a duplicate with the same id stays where it is
            self._pace()
            return True

        rate = self.options.rate
        batch = max(1, min(_BATCH, int(rate / 10))) if rate else _BATCH
        run = Run(self.record.replay, self.options.to, batch, self._over)
        moved: list[str] = []
        try:
            while ids and not self._over():
                # A paced replay looks anew now and then: RabbitMQ takes letters back that are held for half an hour.
                size = min(len(ids), max(1, int(rate * _LOOK_ANEW))) if rate else len(ids)
                expected = len(ids) - size
                for replayed in self.broker.replay(queue, match, size, run):
                    moved.append(replayed.letter.id)
                    dead_letter_replayed.send(sender=None, letter=replayed.letter, queue=replayed.queue)
                    if len(moved) >= batch:
                        self._moved(moved)
                    yield replayed
                if len(ids) > expected and not self._over():
                    self._gone(ids)
                    return
        except ReplayError as exc:
            self._stop = str(exc)
        finally:
            self._moved(moved)

    def _gone(self, ids: set[str]) -> None:
        """Letters that were selected, and are not in their DLQ any more.

        An earlier run of this replay moved them, and was killed before it could say so; or somebody else replayed or
        discarded them.
        """
        resumed = bool(self.record.options.get("resumed"))
        self.journal.write("state", state="replayed" if resumed else "gone", letters=sorted(ids))

    def _moved(self, moved: list[str]) -> None:
        if moved:
            self.journal.write("state", state="replayed", letters=list(moved))
            moved.clear()
            self._heard = time.monotonic()
            self.on_progress(self.record)

    def _pace(self) -> None:
        if not self.options.rate:
            return
        now = time.monotonic()
        self._next_at = max(self._next_at, now - 0.5) + 1 / self.options.rate
        while (left := self._next_at - time.monotonic()) > 0 and not self._over():
            time.sleep(min(left, _LOOK_EVERY))

    def _over(self) -> bool:
        """Whether to stop; takes in what workers report, now and then."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_EVERY:
            self._look()
            self._looked = time.monotonic()
        return self._stop is not None or self.interrupted()

    def _look(self) -> bool:
        """Take in what workers reported; whether there was any."""
        any_news = False
        while reports := self.broker.outcomes(self.record.replay):
            by_state: dict[tuple[str, bool], list[str]] = {}
            for report in reports:
                entry = self.record.entries.get(str(report.get("of")))
                if entry is not None and report.get("state") in ("succeeded", "failed"):
                    same = report.get("fingerprint") == entry.fingerprint
                    by_state.setdefault((report["state"], same), []).append(entry.id)
            for (state, same), ids in by_state.items():
                self.journal.write("state", state=state, same=same, letters=ids)
                if state == "failed" and same and self.options.stop_on_repeat and self._stop is None:
                    self._stop = f"the same failure came back (letter {ids[0]})"
            any_news = any_news or bool(by_state)
        if any_news:
            self._heard = time.monotonic()
            self.on_progress(self.record)
        return any_news

    def _await_canaries(self) -> None:
        while not self._over():
            states = [entry.state for entry in self.record.entries.values() if entry.id not in self._failed_before]
            if "failed" in states:
                self._stop = "a canary failed again"
                return
            if "replayed" not in states:
                return
            if time.monotonic() - self._heard > self.options.patience:
                self._stop = (
                    f"no news of {states.count('replayed')} canaries in {self.options.patience:.0f}s; does a worker with "
                    "celery-dlx consume the queue?"
                )
                return
            time.sleep(_LOOK_EVERY)

    def _await_rest(self) -> None:
        """Hear what becomes of the others, as long as there is news."""
        while not self.interrupted():
            self._look()
            waiting = any(entry.state == "replayed" for entry in self.record.entries.values())
            if not waiting or time.monotonic() - self._heard > self.options.wait:
                return
            time.sleep(_LOOK_EVERY)


def start(
    broker: Broker, url: str, letters: Iterator[DeadLetter], selection: str, options: Options, **hooks: Any
) -> tuple[Engine, QueueLocks]:
    """Begin a replay: the selection is journaled before anything leaves.

    Raises:
        UsageError: another replay is at the same queues.
    """
    record = Record(uuid4().hex[:12])
    found = [(letter.id, letter.queue, letter.fingerprint) for letter in letters]
    locks = QueueLocks(url, {queue for _, queue, _ in found}, record.replay)
    journal = Journal(record)
    by = f"{_user()}@{socket.gethostname()}"
    journal.write(
        "start", started=int(time.time() * 1000), selection=selection, by=by, broker=url, options=options.as_dict()
    )
    for at in range(0, len(found), _BATCH):
        journal.write("select", letters=found[at : at + _BATCH])
    return Engine(broker, journal, options, **hooks), locks


def resume(broker: Broker, url: str, replay: str, **hooks: Any) -> tuple[Engine, QueueLocks]:
    """Go on with a replay that was stopped, interrupted or killed.

    Raises:
        UsageError: there is none, it is running, or it was on another broker.
    """
    record = read_record(replay)
    if record.broker != url:
        raise UsageError(f"replay {replay} was on {record.broker}, this app's broker is {url}")
    known = {key: value for key, value in record.options.items() if key in Options.__dataclass_fields__}
    locks = QueueLocks(url, {entry.queue for entry in record.entries.values()}, replay)
    journal = Journal(record)
    journal.write("go")
    record.options["resumed"] = True
    return Engine(broker, journal, Options(**known), **hooks), locks


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "?"


def describe(queue: str | None, ids: Any, selected: dict[str, Any]) -> str:
    """A selection in words, for the journal."""
    what = f"{len(ids)} ids" if ids else json.dumps(selected, default=str) if selected else "all"
    return f"{queue or 'every queue'}: {what}"
