"""The journal of a replay: what was selected, what left, what became of it. One file each, appended to, never rewritten.

A replay that was killed at any point goes on from its journal; `dlx history` reads them all.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from celery_dlx.entries import LEFT, Entries
from celery_dlx.errors import JournalError, UsageError
from celery_dlx.letters import iso_time

STATE_VARIABLE = "CELERY_DLX_STATE"
#: What reading a line raises that was being written when the power went, or that somebody else wrote.
_CUT = (ValueError, KeyError, TypeError, AttributeError, OverflowError, StopIteration)


def state_folder() -> Path:
    """Where journals are: ``CELERY_DLX_STATE``, else ``celery-dlx`` in the user's state folder (XDG Base Directory)."""
    named = os.environ.get(STATE_VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(base) / "celery-dlx"


@dataclass
class Record:
    """A whole replay, as its journal tells it."""

    replay: str
    started: int = 0
    selection: str = ""
    by: str = ""
    broker: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    entries: Entries = field(default_factory=Entries)
    #: ``None`` while nothing was said: then it runs, or was killed.
    stopped: str | None = None
    ended: bool = False
    #: Whether the whole selection is in the journal.
    complete: bool = False
    canaries: list[str] = field(default_factory=list)
    proven: bool = False
    running: bool = False

    def summary(self) -> dict[str, Any]:
        """The object that `dlx replay --json` ends with."""
        count = self.entries.count
        # What was not found any more was not replayed either: somebody holds it, or somebody else took it.
        left = sum(map(count, LEFT))
        return {
            "replay": self.replay,
            "selected": len(self.entries),
            "replayed": len(self.entries) - left,
            "succeeded": count("succeeded"),
            "failed_again": count("failed"),
            "waiting": count("replayed"),
            "left": left,
            "stopped": self.stopped if self.ended else "running" if self.running else "killed",
        }

    def apply(self, line: dict[str, Any]) -> None:
        """Take in one line of the journal."""
        kind = line.get("kind")
        if kind == "start":
            self.started, self.selection, self.by = line["started"], line["selection"], line["by"]
            self.broker, self.options = line["broker"], line["options"]
        elif kind == "select":
            for letter in line["letters"]:
                self.entries.add(*letter)
        elif kind == "state":
            self.entries.became(line["letters"], line["state"], line.get("differently", ()))
        elif kind == "sending":
            self.entries.sending(line["letters"])
        elif kind == "selected":
            self.complete = True
        elif kind == "canaries":
            self.canaries, self.proven = line["letters"], False
        elif kind == "proven":
            self.proven = True
        elif kind == "go":
            self.ended, self.stopped = False, None
        elif kind == "end":
            self.ended, self.stopped = True, line["stopped"]
            if line.get("clean"):
                self.entries.at_rest()


class Journal:
    """An open journal; locked, so that no two processes run the same replay."""

    def __init__(self, record: Record, folder: Path | None = None) -> None:
        folder = (folder or state_folder()) / "replays"
        self.record = record
        with _explained(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Ids of letters and queues' names are somebody's data: for the owner's eyes.
            descriptor = os.open(folder / f"{record.replay}.jsonl", os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o600)
        self._file = os.fdopen(descriptor, "a", encoding="utf-8")
        _lock(self._file, f"replay {record.replay} is running already")
        self._file.write("\n")  # the last line may have been cut short: what comes now must not be part of it

    def write(self, kind: str, **line: Any) -> None:
        """Append a line; it is on disk when this returns, and so is what was noted before."""
        self._append(kind, line, os.fsync)

    def note(self, kind: str, **line: Any) -> None:
        """Append a line that is of no use without a later one."""
        self._append(kind, line, lambda descriptor: None)

    def _append(self, kind: str, line: dict[str, Any], sync: Callable[[int], None]) -> None:
        line = {"kind": kind, "at": int(time.time() * 1000), **line}
        with _explained(self._file.name):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            sync(self._file.fileno())
        self.record.apply(line)

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()


class QueueLocks:
    """Keeps other replays on this machine off the same queues."""

    def __init__(self, broker: str, queues: Iterable[str], replay: str) -> None:
        folder = state_folder() / "locks"
        with _explained(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._files = []
        for queue in sorted(set(queues)):
            name = blake2b(f"{broker}\0{queue}".encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
            with _explained(folder):
                file = os.fdopen(os.open(folder / name, os.O_CREAT | os.O_RDWR, 0o600), "r+", encoding="utf-8")
            self._files.append(file)
            holder = file.read().strip()
            try:
                _lock(file, f"queue {queue!r} is being replayed already, by replay {holder or '?'}; wait for it, or stop it")
            except UsageError:
                self.release()
                raise
            file.seek(0)
            file.truncate()
            file.write(replay)
            file.flush()

    def release(self) -> None:
        for file in self._files:
            file.close()


@contextmanager
def _explained(place: object) -> Iterator[None]:
    """A full disk, or a folder that may not be written, in words that help."""
    try:
        yield
    except OSError as exc:
        raise JournalError(
            f"{place}: the journal cannot be written: {exc.strerror or exc}; free some space, or name another folder in "
            f"{STATE_VARIABLE}. What has left its DLQ is in its queue, all else is where it was"
        ) from exc


def _lock(file: Any, refusal: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(refusal) from None


def read_record(replay: str, folder: Path | None = None) -> Record:
    """A replay by its id.

    Raises:
        UsageError: there is no such journal on this machine.
    """
    path = (folder or state_folder()) / "replays" / f"{replay}.jsonl"
    if not replay.isalnum() or not path.exists():
        raise UsageError(f"replay {replay!r}: no journal in {path.parent}; `dlx history` lists those there are")
    record = Record(replay)
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                record.apply(json.loads(text))
            except _CUT:
                continue
        try:
            _lock(file, "")
        except UsageError:
            record.running = True
    return record


def history(broker: str | None = None, folder: Path | None = None) -> Iterator[Record]:
    """All replays of this machine's user, oldest first; of one broker, if named. One is read after the other."""
    place = (folder or state_folder()) / "replays"
    begun = [_beginning(path) for path in place.glob("*.jsonl") if path.stem.isalnum()] if place.is_dir() else []
    for record in sorted(begun, key=lambda record: record.started):
        if broker is None or record.broker == broker:
            yield read_record(record.replay, folder)


def _beginning(path: Path) -> Record:
    """Of a replay: what its journal begins with, which says when and where it was."""
    record = Record(path.stem)
    with open(path, encoding="utf-8", errors="replace") as file, suppress(*_CUT):
        record.apply(json.loads(next(text for text in file if text.strip())))
    return record


def as_history(record: Record) -> dict[str, Any]:
    return {**record.summary(), "started": iso_time(record.started), "selection": record.selection, "by": record.by}
