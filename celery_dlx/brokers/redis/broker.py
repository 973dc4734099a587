"""Reads, replays and empties the sorted sets."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from math import isfinite
from typing import Any

import redis

from celery_dlx.brokers.base import Match, QueueStats, Replayed, Run, wants_bodies
from celery_dlx.brokers.redis.letters import letter_of, parse_item, revived
from celery_dlx.brokers.redis.store import LetterStore, is_full
from celery_dlx.errors import BrokerUnreachableError, StoreFullError, UsageError
from celery_dlx.letters import DeadLetter
from celery_dlx.policy.settings import Policy
from celery_dlx.replaying import read_report

#: Letters moved or deleted by one script: the server does nothing else meanwhile.
_BATCH = 100


class RedisBroker:
    """See `celery_dlx.brokers.base.Broker`."""

    def __init__(self, connect: Callable[[], Any], policy: Policy) -> None:
        self._connect = connect
        self._policy = policy
        self._connection: Any = None
        self._opened: LetterStore | None = None
        self._reported: dict[str, int] = {}

    @property
    def _store(self) -> LetterStore:
        if self._opened is None:
            connection = self._connect()
            try:
                self._opened = connection.default_channel.dlx_letter_store(self._policy)
            except (redis.exceptions.RedisError, OSError) as exc:
                raise unreachable(connection, exc) from exc
            except Exception as exc:
                # kombu wraps connection errors into its own OperationalError
                if isinstance(exc.__cause__, (redis.exceptions.RedisError, OSError)):
                    raise unreachable(connection, exc.__cause__) from exc
                raise
            self._connection = connection
        return self._opened

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = self._opened = None

    def queues(self) -> list[str]:
        return self._store.announced()

    def browse(self, queue: str, match: Match | None = None, limit: int | None = None) -> Iterator[DeadLetter]:
        dlq = self._policy.dlq(queue)
        bodies = wants_bodies(match)
        letters = (
            self._named(letter_of(record, (item or b"") if bodies else None, score, dlq), letter_id, queue)
            for letter_id, score, record, item in self._store.pages(queue, bodies=bodies)
        )
        return islice((letter for letter in letters if match is None or match(letter)), limit)

    def get(self, queue: str, letter_id: str) -> DeadLetter | None:
        """One letter with its message, without a scan."""
        found = self._store.one(queue, letter_id)
        if found is None:
            return None
        score, record, item = found
        return self._named(letter_of(record, item or b"", score, self._policy.dlq(queue)), letter_id, queue)

    @staticmethod
    def _named(letter: DeadLetter, letter_id: str, queue: str) -> DeadLetter:
        letter.id, letter.queue = letter_id, letter.queue or queue
        return letter

    def replay(self, queue: str, match: Match, limit: int | None = None, run: Run | None = None) -> Iterator[Replayed]:
        dlq, run = self._policy.dlq(queue), run or Run()
        size = min(run.batch or _BATCH, _BATCH)
        chosen = islice(self._matching(queue, match, size), limit)
        while not run.stop() and (batch := list(islice(chosen, size))):
            found: dict[str, Replayed] = {}
            moves = []
            for letter_id, score, record, item in batch:
                letter = self._named(letter_of(record, item or b"", score, dlq), letter_id, queue)
                message, changes = revived(item or b"", letter, run.replay)
                to = run.to or letter.queue
                moves.append((letter_id, score, self._list_key(to, message), message))
                found[letter_id] = Replayed(letter, to, changes)
            try:
                moved = self._store.replay(queue, moves)
            except redis.exceptions.ResponseError as exc:
                raise _full(exc, f"{len(moves)} letters stay in {dlq!r}") from exc
            yield from (replayed for letter_id, replayed in found.items() if letter_id in moved)

    def _matching(self, queue: str, match: Match, size: int) -> Iterator[tuple[str, float, bytes | None, bytes | None]]:
        dlq = self._policy.dlq(queue)
        # All that is there now, not what replays put back meanwhile.
        if wants_bodies(match):
            ids = {letter.id for letter in self.browse(queue, match)}
            match = lambda letter: letter.id in ids  # noqa: E731
        snapshot = list(self._store.pages(queue, bodies=False))
        for start in range(0, len(snapshot), size):
            wanted = []
            for letter_id, score, record, _ in snapshot[start : start + size]:
                if match(self._named(letter_of(record, None, score, dlq), letter_id, queue)):
                    wanted.append((letter_id, score, record))
            items = self._store.payloads(queue, [letter_id for letter_id, _, _ in wanted])
            for (letter_id, score, record), item in zip(wanted, items, strict=True):
                if item is not None:  # else it left meanwhile
                    yield letter_id, score, record, item

    def _list_key(self, queue: str, message: bytes) -> str:
        return str(self._connection.default_channel.dlx_list_key(queue, parse_item(message) or {}))

    def watch(self, replay: str) -> None:
        """Nothing to prepare: workers make the list."""

    def outcomes(self, replay: str) -> list[dict[str, Any]]:
        found = self._store.reports(replay, self._reported.get(replay, 0))
        self._reported = {replay: len(found)}
        return [read_report(report) for report in found]

    def export(self, queue: str, match: Match, limit: int | None = None) -> Iterator[dict[str, Any]]:
        for letter_id, score, record, item in islice(self._matching(queue, match, _BATCH), limit):
            yield {
                "v": 1,
                "broker": "redis",
                "queue": queue,
                "id": letter_id,
                "score": repr(score),
                "record": base64.b64encode(record or b"{}").decode(),
                "body": base64.b64encode(item or b"").decode(),
            }

    def restore(self, lines: Iterable[dict[str, Any]]) -> tuple[int, int]:
        restored = present = 0
        for line in lines:
            if line["broker"] != "redis":
                raise UsageError(f"letter {line['id']} was exported from {line['broker']}, this broker is Redis")
            try:
                score = repr(float(line["score"]))
                record, item = (base64.b64decode(line[key], validate=True) for key in ("record", "body"))
                if not isfinite(float(score)) or not isinstance(json.loads(record), dict):
                    raise ValueError
            except (KeyError, ValueError, TypeError):
                raise UsageError(
                    f"letter {line['id']}: not as it was exported; {restored} were restored before it"
                ) from None
            self._store.announce(line["queue"])
            stored = self._store.restore_letter(line["queue"], line["id"], score, record, item)
            restored, present = restored + stored, present + (not stored)
        return restored, present

    def discard(self, queue: str, match: Match, limit: int | None = None) -> Iterator[DeadLetter]:
        chosen = iter(list(self.browse(queue, match, limit)))
        while batch := list(islice(chosen, _BATCH)):
            removed = self._store.discard(queue, [letter.id for letter in batch])
            yield from (letter for letter in batch if letter.id in removed)

    def purge(self, queue: str) -> int:
        return self._store.purge(queue)

    def stats(self, queues: Iterable[str]) -> Iterator[QueueStats]:
        for queue in queues:
            yield QueueStats(queue, self._policy.dlq(queue), self._store.count(queue), dict(self._store.counters(queue)))


def _full(exc: BaseException, consequence: str) -> Exception:
    if is_full(exc):
        return StoreFullError(f"Redis is full (OOM): {consequence}; raise `maxmemory` or discard letters, and try again")
    return exc if isinstance(exc, Exception) else RuntimeError(str(exc))


def unreachable(connection: Any, exc: BaseException) -> BrokerUnreachableError:
    """Say in one line what keeps us from the broker; the URL without its password."""
    uri = connection.as_uri()
    if isinstance(exc, redis.exceptions.AuthenticationError):
        return BrokerUnreachableError(f"{uri}: Redis refuses the user or password; check the broker URL")
    reason = str(exc or type(exc).__name__).splitlines()[0]
    return BrokerUnreachableError(f"{uri}: {reason}; is Redis running, and the broker URL right?")
