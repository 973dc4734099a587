"""Sends letters back to their queues, in lots."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
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

#: A letter as it was read.
_Read = tuple[Found, DeadLetter]


@dataclass
class _Pending:
    """A batch whose first lot may have been sent (``began`` waits for the answer)."""

    batch: list[_Read]
    moves: list[Move]
    replayed: dict[str, Replayed]
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
        self._aside = store.aside()
        self._pending: _Pending | None = None
        #: Of the same few queues and priorities again and again.
        self._easy_key = lru_cache(256)(lambda to, priority: list_key(to, {"properties": {"priority": priority}}))

    def check(self) -> None:
        """Raises:
        ReplayError: letters that could not go as they were to.
        """
        if self._unfit:
            more = f" (and {len(self._unfit) - 1} more)" * (len(self._unfit) > 1)
            raise ReplayError(f"{self._unfit[0]}{more}")

    def send(self, batch: list[_Read]) -> Iterator[Replayed]:
        """Move letters, in their order; yields those that moved, if they are not to be yielded later.

        Raises:
            StoreFullError, ReplayError: nothing of what was not yielded has moved, but for letters sent before.
        """
        moves: list[Move] = []
        replayed = {}
        for found, letter in batch:
            if self._run.edit is not None or (known := told(letter, self._run.replay)) is None:
                moves.clear()  # one that is written here must not be overtaken
                break
            lineage, priority, retries = known
            to = self._run.to or letter.queue
            changes = [f"retries {retries} → 0"] if retries else []
            moves.append(Move(found.id, found.score, self._easy_key(to, priority), lineage, priority, retries))
            replayed[found.id] = Replayed(letter, to, changes)
        yield from self.finish()
        if not moves:
            yield from self._write(batch)
            return
        lot = first_lot(moves)
        # Redis is at work while the next letters are read, unless they have to wait for their turn.
        began = self._store.begin_replay(self._aside, self._queue, lot) if self.size == _BATCH else None
        self._pending = _Pending(batch, moves, replayed, lot, began)
        if began is None:
            yield from self.finish()

    def finish(self) -> Iterator[Replayed]:
        """What was sent before comes to its end; yields what moved."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        lot, step = pending.lot, pending.began
        while pending.moves:
            done = self._done(step or partial(self._store.replay, self._queue, lot), lot)
            yield from _moved(lot, done, pending.replayed)
            del pending.moves[: done.looked]
            if done.unfit:  # then all that come after it, too
                left = {move.id for move in pending.moves}
                yield from self._write([pair for pair in pending.batch if pair[0].id in left])
                return
            lot, step = first_lot(pending.moves), None

    def close(self) -> None:
        """Nobody wants to know any more what becomes of letters that were sent."""
        self._pending = None
        self._aside.close()

    def _write(self, batch: list[_Read]) -> Iterator[Replayed]:
        """Move letters whose messages are written here."""
        if all(found.item is not None for found, _ in batch):
            yield from self._move_written(batch)
            return
        meant = {found.id: found.score for found, _ in batch}
        for lot in self._store.reader.picked(self._queue, list(meant), bodies=True):
            yield from self._move_written(
                [
                    (each, letter_of(each.record, each.item, each.score, self._dlq, each.id, self._queue))
                    for each in lot
                    if each.score == meant[each.id]  # else it was captured anew
                ]
            )

    def _move_written(self, batch: list[_Read]) -> Iterator[Replayed]:
        moves: list[Move] = []
        replayed = {}
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
            moves.append(Move(found.id, found.score, self._list_key(to, parsed or {}), message))
            replayed[found.id] = Replayed(letter, to, changes)
        while moves:
            lot = first_lot(moves)
            done = self._done(partial(self._store.replay, self._queue, lot), lot)
            yield from _moved(lot, done, replayed)
            del moves[: done.looked]

    def _done(self, step: Callable[[], Moved], lot: list[Move]) -> Moved:
        try:
            return step()
        except redis.exceptions.ResponseError as exc:
            raise explained(exc, f"{len(lot)} letters stay in {self._dlq!r}") from exc


def _moved(lot: list[Move], done: Moved, replayed: dict[str, Replayed]) -> Iterator[Replayed]:
    """What became of a lot; of two moves of one letter the first one counts."""
    for letter_id in dict.fromkeys(move.id for move in lot[: done.looked]):
        if letter_id not in done.stayed:
            yield replayed[letter_id]


def first_lot(moves: list[Move]) -> list[Move]:
    """The first moves, of so many bytes."""
    size = 0
    for number, move in enumerate(moves):
        size += len(move.content)
        if size > _BYTES and number:
            return moves[:number]
    return moves[:]


def explained(exc: BaseException, consequence: str) -> Exception:
    """What Redis refused, in words that help."""
    if is_full(exc):
        return StoreFullError(f"Redis is full (OOM): {consequence}; raise `maxmemory` or discard letters, and try again")
    if "WRONGTYPE" in str(exc):
        return ReplayError(f"{consequence}: {exc}")
    return exc if isinstance(exc, Exception) else RuntimeError(str(exc))
