"""Begins replays, and goes on with those that were stopped, interrupted or killed."""

from __future__ import annotations

import getpass
import socket
import time
from itertools import islice
from typing import Any

from celery_dlx.brokers.base import Broker, Chosen
from celery_dlx.choice import Choice
from celery_dlx.engine import BATCH, Engine, Options
from celery_dlx.errors import UsageError
from celery_dlx.journal import Journal, QueueLocks, Record, read_record
from celery_dlx.raw import check

__all__ = ["Engine", "Options", "resume", "start"]


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
        while batch := list(islice(found, BATCH)):
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
    locks = QueueLocks(url, record.entries.queues(), replay)
    try:
        journal = Journal(record)
        record = journal.record = read_record(replay)  # again, now that nobody else writes it
        record.running = False
        known = {key: value for key, value in record.options.items() if key in Options.__dataclass_fields__}
        options = Options(**known)
        options.rate, options.wait = rate or options.rate, options.wait if wait is None else wait
        engine = Engine(broker, journal, options, **hooks)
        engine.was_killed()
        journal.write("go")
    except BaseException:
        locks.release()
        raise
    return engine, locks


def _line(queue: str, letter: Chosen, options: Options) -> list[Any]:
    return [letter.id, queue, letter.fingerprint, *([letter.died_at] if options.raw else ())]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "?"
