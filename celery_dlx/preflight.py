"""What will go wrong again, said before anything leaves: by what the workers that run now answer.

Nobody's answer is no finding: a replay may well be started before its workers are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from celery_dlx.app import DeadLetters
from celery_dlx.arguments import arguments_of
from celery_dlx.letters import DeadLetter
from celery_dlx.redaction import BLANK, is_blank

logger = logging.getLogger("celery_dlx")

#: Kinds of findings that are kept: some name what each letter has for itself.
_MOST_KINDS = 1_000
#: Waiting for workers to answer, in seconds.
_ANSWER = 1.0


@dataclass(frozen=True)
class Doubt:
    """Why a letter's message will not be executed, or not as it was. ``sure``: it will die again."""

    letter: str
    queue: str
    message: str
    sure: bool

    def as_dict(self) -> dict[str, Any]:
        return {"doubt": self.message, "id": self.letter, "queue": self.queue, "sure": self.sure}


@dataclass
class Finding:
    """The first letter with a doubt, and how many have it."""

    letter: str
    letters: int = 0


class Findings:
    """Doubts by what they say; as many as there may be take no more memory than a few."""

    def __init__(self) -> None:
        self.kinds: dict[str, Finding] = {}
        #: Letters that will surely die again.
        self.sure = 0
        self._last: str | None = None

    def add(self, doubt: Doubt) -> None:
        """Doubts about the same letter come one after the other."""
        finding = self.kinds.get(doubt.message)
        if finding is None and len(self.kinds) < _MOST_KINDS:
            finding = self.kinds[doubt.message] = Finding(doubt.letter)
        if finding is not None:
            finding.letters += 1
        if doubt.sure and doubt.letter != self._last:
            self.sure += 1
            self._last = doubt.letter


class Fleet:
    """The workers with celery-dlx that answer: which queues they consume, which tasks they know."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.consumers: dict[str, set[str]] = {}
        self.tasks: dict[str, frozenset[str]] = {}
        try:
            found = self._ask("dlx_status")
        except Exception as exc:  # noqa: BLE001 - advice only: what keeps the replay itself from the broker, it will say
            logger.debug("no worker could be asked: %s", exc)
            found = []
        for worker, answer in (pair for reply in found for pair in reply.items()):
            if isinstance(answer, Mapping) and "tasks" in answer:
                self.tasks[worker] = frozenset(answer["tasks"])
                for queue in answer.get("consumes") or ():
                    self.consumers.setdefault(str(queue), set()).add(worker)

    def _ask(self, question: str) -> list[dict[str, Any]]:
        # Not over one of the pool: it may have been silent for hours, and the server have closed it.
        with self._app.connection_for_write() as connection:
            return self._app.control.broadcast(question, reply=True, timeout=_ANSWER, connection=connection) or []

    @cached_property
    def complete(self) -> bool:
        """Whether no other worker runs: one without celery-dlx, or one that is too busy to tell, may know the task."""
        try:
            return {next(iter(reply)) for reply in self._ask("ping")} <= set(self.tasks)
        except Exception as exc:  # noqa: BLE001
            logger.debug("no worker could be asked: %s", exc)
            return False


def doubts(dead: DeadLetters, letters: Iterable[DeadLetter], to: str | None = None) -> Iterator[Doubt]:
    """Look at letters before a replay, with their messages. ``to``: the queue they go to, if not their own."""
    fleet = Fleet(dead.app)
    if not fleet.tasks:
        for letter in letters:
            yield from (Doubt(letter.id, to or letter.queue, message, sure) for message, sure in _redacted(letter))
            # What was edited is ours to check: nobody sent such a message yet.
            if letter.edited is not None and (problem := _unbound(dead.app, letter)) is not None:
                yield Doubt(letter.id, to or letter.queue, problem, True)
        return
    for letter in letters:
        queue = to or letter.queue
        try:
            found = list(_of_letter(dead.app, fleet, letter, queue))
        except Exception as exc:  # noqa: BLE001 - a letter may hold anything; that it is odd is no reason to stop
            logger.debug("letter %s cannot be looked into: %s", letter.id, exc)
            continue
        for message, sure in found:
            yield Doubt(letter.id, queue, message, sure)


def _of_letter(app: Any, fleet: Fleet, letter: DeadLetter, queue: str) -> Iterator[tuple[str, bool]]:
    yield from _redacted(letter)
    consumers = fleet.consumers.get(queue, set())
    ignorant = {worker for worker in consumers if letter.task and letter.task not in fleet.tasks[worker]}
    if not consumers:
        yield f"no worker that answers consumes queue {queue!r}", False
    if ignorant:
        sure = ignorant == consumers and fleet.complete
        yield f"task {letter.task!r} is not registered on {', '.join(sorted(ignorant))}", sure
    content_type = letter.original.properties.get("content_type")
    if isinstance(content_type, str) and content_type not in _accepted(app):
        yield f"content type {content_type!r} is not accepted (accept_content)", True
    if (problem := _unbound(app, letter)) is not None:
        yield problem, True
    eta = letter.original.headers.get("eta")
    if isinstance(eta, str) and eta > time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()):
        yield f"it waits for its eta, {eta}", False


def _redacted(letter: DeadLetter) -> Iterator[tuple[str, bool]]:
    if is_blank(letter):
        paths = ", ".join(letter.redacted)
        yield f"{paths} were blanked when it was stored, its task would get {BLANK!r}; give them with --edit", True


def _accepted(app: Any) -> set[str]:
    from kombu.serialization import prepare_accept_content

    return set(prepare_accept_content(app.conf.accept_content) or ())


def _unbound(app: Any, letter: DeadLetter) -> str | None:
    """Why the arguments do not fit the task as this app knows it; its workers may run other code."""
    task = app.tasks.get(letter.task) if letter.task else None
    arguments = arguments_of(letter.original)
    if task is None or arguments is None or not getattr(task, "typing", False):
        return None
    args, kwargs = arguments
    if not isinstance(args, list) or not isinstance(kwargs, Mapping):
        return "its arguments are no list and mapping"
    try:
        task.__header__(*args, **kwargs)  # the check that Celery makes when it publishes; it runs nothing of the task
    except TypeError as exc:
        return f"its arguments do not fit {letter.task}: {exc}"
    except AttributeError:
        return None
    return None
