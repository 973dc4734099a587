"""Sends letters back to their queues, in lots."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import redis

from celery_dlx.brokers.base import Replayed, Run
from celery_dlx.brokers.redis.reader import Found
from celery_dlx.brokers.redis.revival import revived, told
from celery_dlx.brokers.redis.store import LetterStore, Move, Moved, is_full
from celery_dlx.brokers.redis.stored import letter_of
from celery_dlx.errors import ReplayError, StoreFullError
from celery_dlx.letters import DeadLetter

logger = logging.getLogger("celery_dlx")

#: Letters moved by one script: the server does nothing else meanwhile.
_BATCH = 64
#: Bytes of messages that are sent to one script, unless one message has more.
_BYTES = 1_000_000

#: Moves by the ids of their letters, with what is said of each that moved.
_Chosen = dict[str, tuple[Move, Replayed]]


@dataclass
class _Pending:
    """A batch whose first lot may have been sent (``began`` waits for the answer)."""

    batch: list[tuple[Found, DeadLetter]]
    easy: _Chosen
    by_hand: list[tuple[Found, DeadLetter]]
    lot: list[Move]
    began: Callable[[], Moved] | None


class Mover:
    """Letters of one DLQ. Most messages need not be read for it: Redis puts the lineage into them, and says which ones have
    to be written here. ``list_key`` gives the key of the list that a message of a queue goes to."""

    def __init__(
        self, store: LetterStore, queue: str, dlq: str, list_key: Callable[[str, dict[str, Any]], str], run: Run
    ) -> None:
        self._store, self._queue, self._dlq, self._list_key, self._run = store, queue, dlq, list_key, run
        self.size = min(run.batch or _BATCH, _BATCH)
        self._unfit: list[str] = []
        self._pending: _Pending | None = None
        #: Of the same few queues and priorities again and again.
        self._easy_key = cache(lambda to, priority: list_key(to, {"properties": {"priority": priority}}))

    def check(self) -> None:
        """Raises:
        ReplayError: letters that could not go as they were to.
        """
        if self._unfit:
            more = f" (and {len(self._unfit) - 1} more)" * (len(self._unfit) > 1)
            raise ReplayError(f"{self._unfit[0]}{more}")

    def send(self, batch: list[tuple[Found, DeadLetter]]) -> Iterator[Replayed]:
        """Move letters; yields those that moved, if they are not to be yielded later.

        Raises:
            StoreFullError, ReplayError: nothing of what was not yielded has moved, but for letters sent before.
        """
        easy: _Chosen = {}
        by_hand = []
        for found, letter in batch:
            if self._run.edit is None and (known := told(letter, self._run.replay)) is not None:
                lineage, priority, retries = known
                to = self._run.to or letter.queue
                list_key = self._easy_key(to, priority)
                changes = [f"retries {retries} → 0"] if retries else []
                move = Move(found.id, found.score, list_key, lineage, priority, retries)
                easy[found.id] = (move, Replayed(letter, to, changes))
            else:
                by_hand.append((found, letter))
        yield from self.finish()
        lot = _lot([move for move, _ in easy.values()])
        # Redis is at work while the next letters are read, unless they have to wait for their turn.
        began = self._store.begin_replay(self._queue, lot) if lot and self.size == _BATCH else None
        self._pending = _Pending(batch, easy, by_hand, lot, began)
        if began is None:
            yield from self.finish()

    def finish(self) -> Iterator[Replayed]:
        """What was sent before comes to its end; yields what moved."""
        if (pending := self._pending) is None:
            return
        unfit: set[str] = set()
        moves = [move for move, _ in pending.easy.values()]
        if pending.began is not None:
            began, pending.began = pending.began, None
            yield from self._done(began, pending.lot, pending.easy, moves, unfit)
        self._pending = None
        yield from self._move(moves, pending.easy, unfit)
        by_hand = pending.by_hand + [pair for pair in pending.batch if pair[0].id in unfit]
        yield from self._write([pair for pair in by_hand if pair[0].item is not None])
        missing = [found.id for found, _ in by_hand if found.item is None]
        for lot in self._store.reader.picked(self._queue, missing, bodies=True):
            yield from self._write(
                [(each, letter_of(each.record, each.item, each.score, self._dlq, each.id, self._queue)) for each in lot]
            )

    def close(self) -> None:
        """Nobody wants to know any more what becomes of letters that were sent."""
        self._pending = None
        self._store.abandon()

    def _write(self, batch: list[tuple[Found, DeadLetter]]) -> Iterator[Replayed]:
        written = self._written(batch)
        yield from self._move([move for move, _ in written.values()], written, set())

    def _written(self, batch: list[tuple[Found, DeadLetter]]) -> _Chosen:
        """The messages of letters, written anew."""
        written = {}
        for found, letter in batch:
            if (item := found.item) is None:
                logger.warning("letter %s of %r has no message to replay: somebody deleted it", found.id, self._dlq)
                continue
            try:
                if self._run.edit is not None:
                    self._run.edit(letter)
            except ReplayError as exc:
                self._unfit.append(str(exc))
                continue
            message, changes, parsed = revived(item, letter, self._run.replay)
            to = self._run.to or letter.queue
            move = Move(found.id, found.score, self._list_key(to, parsed or {}), message)
            written[found.id] = (move, Replayed(letter, to, changes))
        return written

    def _move(self, moves: list[Move], chosen: _Chosen, unfit: set[str]) -> Iterator[Replayed]:
        """Move letters in lots; ``unfit`` takes the ids of those whose messages have to be written."""
        while moves:
            lot = _lot(moves)
            yield from self._done(partial(self._store.replay, self._queue, lot), lot, chosen, moves, unfit)

    def _done(
        self, step: Callable[[], Moved], lot: list[Move], chosen: _Chosen, moves: list[Move], unfit: set[str]
    ) -> Iterator[Replayed]:
        """Yields what of a lot moved; what was looked at leaves the moves, of which the lot is the beginning."""
        try:
            done = step()
        except redis.exceptions.ResponseError as exc:
            raise _full(exc, f"{len(lot)} letters stay in {self._dlq!r}") from exc
        unfit |= done.unfit
        del moves[: done.looked]
        for move in lot[: done.looked]:
            if move.id not in done.stayed and move.id not in done.unfit:
                yield chosen[move.id][1]


def _lot(moves: list[Move]) -> list[Move]:
    """The first moves, of so many bytes."""
    size = 0
    for number, move in enumerate(moves):
        size += len(move.content)
        if size > _BYTES and number:
            return moves[:number]
    return moves[:]


def _full(exc: BaseException, consequence: str) -> Exception:
    if is_full(exc):
        return StoreFullError(f"Redis is full (OOM): {consequence}; raise `maxmemory` or discard letters, and try again")
    if "WRONGTYPE" in str(exc):
        return ReplayError(f"{consequence}: {exc}")
    return exc if isinstance(exc, Exception) else RuntimeError(str(exc))
