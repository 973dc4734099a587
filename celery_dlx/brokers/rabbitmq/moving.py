"""Sends letters back: published with confirms, acknowledged when the broker has their messages."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from time import monotonic
from typing import Any, NamedTuple, Protocol

from celery_dlx.brokers.base import Match, Replayed, Run
from celery_dlx.brokers.rabbitmq.deliveries import Taken, deliveries_of
from celery_dlx.brokers.rabbitmq.letters import letter_of, revived, revived_bytes
from celery_dlx.brokers.rabbitmq.pipeline import REFUSED, RETURNED, STORED, ConfirmPipeline
from celery_dlx.brokers.rabbitmq.reader import Reader
from celery_dlx.errors import ReplayError
from celery_dlx.letters import DeadLetter

#: Letters in flight while replaying.
WINDOW = 2_000
#: Bytes of bodies in flight, or at hand, after which nothing more is added before these are settled.
HELD_BYTES = 67_108_864
#: Encoded messages are handed over at this size, in bytes: the broker has work while the next ones are read.
_WRITE_BYTES = 262_144
#: How often letters that are missing are looked for again.
_LOOKS = 5
#: Waiting for confirms, in seconds.
_CONFIRM_TIMEOUT = 30.0


class Letters(Protocol):
    """Letters on their way out of a DLQ; ``reader`` holds them until they are acknowledged."""

    reader: Reader

    def __iter__(self) -> Iterator[tuple[Taken, DeadLetter, bytes | None]]:
        """With the properties that each is to be sent with, where they are known."""

    def ready(self) -> bool:
        """Whether the next one is at hand, as far as is known."""


class Reading:
    """The letters of a reader; those too that were being put back when it counted them, while some are missing."""

    def __init__(self, reader: Reader, queue: str, dlq: str, run: Run) -> None:
        self.reader, self._queue, self._dlq, self._run = reader, queue, dlq, run

    def __iter__(self) -> Iterator[tuple[Taken, DeadLetter, bytes | None]]:
        for look in range(_LOOKS + 1):
            if look and (self._run.stop() or not self._run.wanted() or not self.reader.more()):
                return
            for raw in self.reader:
                if self._run.stop():
                    return
                yield raw, letter_of(raw, self._queue, self._dlq), None

    def ready(self) -> bool:
        return self.reader.ready()


class InFlight:
    """What was published and is not settled."""

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


def move(letters: Letters, publishing: Any, dlq: str, match: Match, limit: int | None, run: Run) -> Iterator[Replayed]:
    """Send matching letters to their queues over a connection of its own; yields each once it is there.

    Raises:
        ReplayError: after all others: letters that the broker did not take; they stay.
    """
    done: deque[InFlight] = deque()
    held = 0

    def on_outcome(token: InFlight, outcome: str) -> None:
        nonlocal held
        token.outcome = outcome
        held -= len(token.raw.body)
        done.append(token)

    deliveries_of(publishing.connection)  # confirms are read in large pieces too
    pipeline = ConfirmPipeline(publishing.connection, on_outcome)
    failed: list[_Failed] = []
    user, taken, window = publishing.userid, 0, min(run.batch or WINDOW, WINDOW)
    for raw, letter, plain in letters:
        if run.stop():
            break
        if not match(letter):
            continue
        to = run.to or letter.queue
        try:
            if run.edit is not None:
                run.edit(letter)
            # Through the default exchange: the original one may fan out to queues that had no part in this death.
            if plain is not None:
                pipeline.publish_bytes(InFlight(letter, raw, [], to), plain, raw.body, "", to)
            elif (same := revived_bytes(raw, letter, user, run.replay)) is not None:
                pipeline.publish_bytes(InFlight(letter, raw, same[1], to), same[0], raw.body, "", to)
            else:
                message, changes = revived(letter, user, run.replay)
                pipeline.publish(InFlight(letter, raw, changes, to), message, "", to)
        except ReplayError as exc:
            failed.append(_Failed(letter.id, to, str(exc)))
            continue
        except Exception as exc:  # noqa: BLE001 - this one cannot be sent; the others can
            failed.append(_Failed(letter.id, to, f"it cannot be encoded ({exc})"))
            continue
        taken, held = taken + 1, held + len(raw.body)
        if pipeline.unwritten >= _WRITE_BYTES:
            pipeline.write()
        if held >= HELD_BYTES:
            confirmed(pipeline, 0)
        elif pipeline.unconfirmed >= window or not letters.ready():
            confirmed(pipeline, window * 3 // 4)  # the broker must not run out of work
        if done:
            yield from _settle(letters.reader, done, failed)
        if limit is not None and taken >= limit:
            break
    confirmed(pipeline, 0)
    yield from _settle(letters.reader, done, failed)
    if failed:
        first = failed[0]
        known = {RETURNED: f"queue {first.to!r} does not exist", REFUSED: "the broker refused it"}
        why = known.get(first.why, first.why)
        raise ReplayError(
            f"{len(failed)} letters stay in {dlq!r}, the first is {first.id}: {why}; create the queue "
            "(start its worker) and replay again"
        )


def confirmed(pipeline: ConfirmPipeline, at_most: int) -> None:
    """Write what waits, and read confirms until so many are missing at most.

    Raises:
        ReplayError: the broker is silent.
    """
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


def _settle(reader: Reader, done: deque[InFlight], failed: list[_Failed]) -> Iterator[Replayed]:
    stored = [token for token in done if token.outcome == STORED]
    failed.extend(_Failed(token.key, token.to, str(token.outcome)) for token in done if token.outcome != STORED)
    done.clear()
    if stored:
        # All of them before the first is given out: whoever stops listening must not leave them in both places.
        reader.acknowledge([(token.raw, token.key) for token in stored])
        for token in stored:
            yield Replayed(token.letter, token.to, token.changes)
