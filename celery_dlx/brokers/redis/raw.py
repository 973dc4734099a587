"""Sends letters back as they are: Redis moves their messages, which need not be read here, in lots."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import redis

from celery_dlx.brokers.base import Chosen, Replayed, Run
from celery_dlx.brokers.redis.aside import Aside
from celery_dlx.brokers.redis.letters import parse_item
from celery_dlx.brokers.redis.moving import explained, first_lot
from celery_dlx.brokers.redis.reader import Found, bytes_of
from celery_dlx.brokers.redis.scripts import load
from celery_dlx.brokers.redis.store import LetterStore, Move, moved_of
from celery_dlx.brokers.redis.stored import Stored, letter_of, millisecond
from celery_dlx.errors import DeadLetterError
from celery_dlx.lazy import unread
from celery_dlx.letters import DeadLetter

logger = logging.getLogger("celery_dlx")

#: Letters moved by one script, which tells their causes apart by a byte; fewer where they are read before. More are not
#: faster, and after a fork, when each page is copied as it is changed, they hold others up for more than 10 ms.
_LOT, _READ = 80, 64
_PRIORITIES = range(10)
#: Lots that may have been sent when what became of one is read.
_AHEAD = 2


class _Sent:
    """A lot; ``began`` waits for what its first script says."""

    def __init__(self, lot: list[Chosen], began: Callable[[], Any], read: dict[str, DeadLetter]) -> None:
        self.lot, self.began, self.read = lot, began, read


class RawMover:
    """Letters of one DLQ. ``list_key`` gives the key of the list that a message of a queue goes to."""

    def __init__(
        self, store: LetterStore, queue: str, dlq: str, list_key: Callable[[str, dict[str, Any]], str], run: Run
    ) -> None:
        self._store, self._queue, self._dlq, self._list_key, self._run = store, queue, dlq, list_key, run
        self._to = run.to or queue
        most = _READ if run.bodies else _LOT
        self.size = min(run.batch or most, most)
        self._waits = self.size < most
        keys = [list_key(self._to, {"properties": {"priority": priority}}) for priority in _PRIORITIES]
        keys.append(list_key(self._to, {"properties": {}}))
        lists = {key: number for number, key in enumerate(dict.fromkeys(keys), 1)}
        self._lists = json.dumps([lists[key] for key in keys])
        self._keys = [*store.keys(queue), *(bytes_of(store.prefix + key) for key in lists)]
        self._script = load(store.client, "raw")
        self._aside = Aside(store.client, self._script)
        #: Of letters that nobody reads.
        self._nothing = Stored(None, None, queue)
        self._sent: deque[_Sent] = deque()
        self._moved: list[Replayed] = []

    def send(self, letters: list[Chosen]) -> Iterator[Replayed]:
        """Move letters, in their order; yields those that moved, if they are not to be yielded later.

        Raises:
            StoreFullError, ReplayError: nothing of what is not yielded has moved, but for letters sent before.
        """
        lot = list({each.id: each for each in letters}.values())  # a message must not be pushed twice
        # Where Redis waits, nothing is gained by another call at once; and its connection may be closed by now.
        while self._sent and self._aside.answers():
            self._settle()
        args = self._args(lot, self._sent[-1].lot[-1] if self._sent else None)
        read = self._read(lot) if self._run.bodies else {}
        begin = partial(self._script, keys=self._keys, args=args) if self._waits else self._aside.begin(self._keys, args)
        self._sent.append(_Sent(lot, begin, read))
        # Redis goes on with a lot while what became of the one before is told, and the next one prepared.
        while len(self._sent) > (0 if self._waits else _AHEAD):
            self._settle()
        yield from self._tell()

    def finish(self) -> Iterator[Replayed]:
        """What was sent before comes to its end; yields what moved, and then says what did not come to one."""
        failed: Exception | None = None
        while self._sent:
            try:
                self._settle()
            except (redis.exceptions.RedisError, DeadLetterError, OSError) as exc:
                failed = failed or exc
        yield from self._tell()
        if failed is not None:
            raise failed

    def close(self) -> None:
        """Nobody wants to know any more what becomes of letters that were sent."""
        self._sent.clear()
        self._aside.close()

    def _tell(self) -> Iterator[Replayed]:
        moved, self._moved = self._moved, []
        yield from moved

    def _args(self, lot: list[Chosen], after: Chosen | None = None) -> list[Any]:
        ids = [bytes_of(each.id) for each in lot]
        causes: dict[str, int] = {}
        of_cause = bytes(causes.setdefault(each.fingerprint, len(causes) + 1) for each in lot)
        numbers = json.dumps([number for id_, each in zip(ids, lot, strict=True) for number in (len(id_), each.died_at)])
        span = lot[0].died_at, f"({lot[-1].died_at + 1}"
        before = (b"", "") if after is None else (bytes_of(after.id), after.died_at)
        return [self._lists, of_cause, b" ".join(ids), numbers, *span, *before, *map(bytes_of, causes)]

    def _read(self, lot: list[Chosen]) -> dict[str, DeadLetter]:
        """Letters by their ids, for somebody listens."""
        return {
            each.id: letter_of(each.record, each.item or b"", each.score, self._dlq, each.id, self._queue)
            for page in self._found(lot)
            for each in page
        }

    def _found(self, lot: list[Chosen]) -> Iterator[list[Found]]:
        """Those that are there as they were chosen, with their messages."""
        died_at = {each.id: each.died_at for each in lot}
        for page in self._store.reader.picked(self._queue, list(died_at), bodies=True):
            yield [each for each in page if millisecond(each.score) == died_at[each.id]]

    def _settle(self) -> None:
        """Wait for what becomes of the first lot that was sent, and send what is left of it."""
        sent = self._sent.popleft()
        lot, step = sent.lot, sent.began
        while lot:
            with self._explained(len(lot)):
                done = moved_of(step())
            self._note([each for each in lot[: done.looked] if each.id not in done.stayed], sent.read)
            lot = lot[done.looked :]
            if done.unfit:  # then all that come after it, too: they must not overtake it
                self._push(lot, sent.read)
                return
            step = partial(self._script, keys=self._keys, args=self._args(lot)) if lot else step

    def _push(self, lot: list[Chosen], read: dict[str, DeadLetter]) -> None:
        """Move letters of whose messages some must be read here, to tell their lists."""
        chosen = {each.id: each for each in lot}
        for page in self._found(lot):
            moves: list[Move] = []
            for found in page:
                if (item := found.item) is None:
                    logger.warning("letter %s of %r has no message to replay: somebody deleted it", found.id, self._dlq)
                    continue
                moves.append(Move(found.id, found.score, self._list_key(self._to, parse_item(item) or {}), item))
            while moves:
                some = first_lot(moves)
                with self._explained(len(some)):
                    done = self._store.replay(self._queue, some)
                self._note([chosen[move.id] for move in some[: done.looked] if move.id not in done.stayed], read)
                del moves[: done.looked]

    @contextmanager
    def _explained(self, count: int) -> Iterator[None]:
        try:
            yield
        except redis.exceptions.ResponseError as exc:
            raise explained(exc, f"{count} letters stay in {self._dlq!r}") from exc

    def _note(self, moved: list[Chosen], read: dict[str, DeadLetter]) -> None:
        self._moved += [Replayed(read.get(each.id) or self._unread(each), self._to, []) for each in moved]

    def _unread(self, each: Chosen) -> DeadLetter:
        letter_id, fingerprint, died_at = each
        known = {"id": letter_id, "fingerprint": fingerprint, "died_at": died_at, "dlq": self._dlq, "edited": None}
        return unread(DeadLetter, self._nothing, known)
