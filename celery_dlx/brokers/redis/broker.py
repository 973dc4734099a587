"""Reads, replays and empties the sorted sets."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from math import inf, isfinite
from typing import Any

import redis
from redis.sentinel import MasterNotFoundError

from celery_dlx.brokers.base import Chosen, Looking, Match, QueueStats, Replayed, Run, wants_bodies
from celery_dlx.brokers.redis.moving import Mover
from celery_dlx.brokers.redis.raw import RawMover
from celery_dlx.brokers.redis.reader import Cause, Found, Span, bytes_of
from celery_dlx.brokers.redis.records import read_fields
from celery_dlx.brokers.redis.store import LetterStore
from celery_dlx.brokers.redis.stored import letter_of, millisecond
from celery_dlx.errors import (
    BrokerUnreachableError,
    BrokerUrlError,
    UnknownLetterError,
    UsageError,
)
from celery_dlx.groups import TREND, Group, Groups, group_of
from celery_dlx.letters import DeadLetter
from celery_dlx.policy.settings import Policy
from celery_dlx.replaying import read_report
from celery_dlx.selection import Selection

#: Letters deleted by one script: the server does nothing else meanwhile.
_BATCH = 100
#: Letters read at once by their ids.
_PAGE = 500
#: Fingerprints that are read side by side.
_MOST_CAUSES = 50


class RedisBroker:
    """See `celery_dlx.brokers.base.Broker`."""

    raw_refusal = ""

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
                if isinstance(exc, (ValueError, TypeError)):
                    raise misconfigured(exc) from exc
                raise
            self._connection = connection
        return self._opened

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = self._opened = None

    def queues(self) -> list[str]:
        return self._store.announced()

    def browse(
        self, queue: str, match: Match | None = None, limit: int | None = None, looking: Looking | None = None
    ) -> Iterator[DeadLetter]:
        found = self._search(queue, match, bodies=wants_bodies(match))
        return islice((letter for _, letter in found), limit)

    def _search(
        self, queue: str, match: Match | None, *, bodies: bool, last: float = inf
    ) -> Iterator[tuple[Found, DeadLetter]]:
        """Matching letters; of those that cannot match as few are read as the test allows."""
        dlq = self._policy.dlq(queue)
        for found in self._candidates(queue, match, bodies, last):
            item = (found.item or b"") if bodies else None
            letter = letter_of(found.record, item, found.score, dlq, found.id, queue)
            if match is None or match(letter):
                yield found, letter

    def select(self, queue: str, match: Match) -> Iterator[Chosen] | None:
        if not isinstance(match, Selection) or not match.causes_only:
            return None
        known = self._store.reader.causes(queue)
        if known is None or any(not cause.fingerprint for cause in known):
            return None
        wanted = known
        if match.cause is not None:
            examples = self._examples(queue, known)
            if len(examples) < len(known):
                return None  # one left meanwhile: nobody knows whether the others of its cause match
            wanted = [cause for cause in known if match.cause(examples[cause])]
        if len(wanted) > _MOST_CAUSES:
            return None
        found = self._store.reader.ids(queue, [cause.fingerprint for cause in wanted])
        return (Chosen(letter_id, cause, millisecond(score)) for letter_id, cause, score in found)

    def hold(self, queue: str, match: Match, replay: str, limit: int | None = None) -> None:
        """What is read is not taken, and costs little."""

    def release(self) -> None:
        """Nothing is held."""

    def held_by_others(self, queue: str) -> bool:
        """Nor by anybody else: what is moved is moved at once."""
        return False

    def _candidates(self, queue: str, match: Match | None, bodies: bool, last: float) -> Iterator[Found]:
        selected = match if isinstance(match, Selection) else Selection(lambda letter: True)
        if selected.ids is None:
            first = -inf if selected.first is None else selected.first
            # The fraction of a millisecond is not looked at.
            last = last if selected.last is None else min(last, selected.last + 0.9999)
            span = Span(first, last, selected.newest, self._position(queue, selected.after))
            causes = self._causes(queue, selected)
            yield from self._store.reader.pages(queue, span, bodies=bodies, causes=causes, words=selected.words)
            return
        ids = selected.ids
        # A sequence is in the order of their deaths already.
        if isinstance(ids, Sequence) and not selected.newest and selected.after is None:
            for lot in self._store.reader.picked(queue, ids, bodies=bodies):
                yield from lot
            return
        scores = self._scores(queue, selected, ids)
        for start in range(0, len(scores), _PAGE):
            yield from self._store.reader.some(queue, scores[start : start + _PAGE], bodies=bodies)

    def _position(self, queue: str, letter_id: str | None) -> tuple[float, str] | None:
        if letter_id is None:
            return None
        score = dict(self._store.reader.scores(queue, [letter_id])).get(bytes_of(letter_id))
        if score is None:
            raise UnknownLetterError(f"letter {letter_id} left its DLQ: what comes after it cannot be told")
        return score, letter_id

    def _scores(self, queue: str, selected: Selection, ids: Iterable[str]) -> list[tuple[bytes, float]]:
        """Which of the ids are there, in the order of their deaths."""
        chosen, found = iter(ids), list[tuple[bytes, float]]()
        while chunk := list(islice(chosen, _PAGE)):
            found += self._store.reader.scores(queue, chunk)
        span = Span(newest=selected.newest, after=self._position(queue, selected.after))
        found.sort(key=lambda pair: (pair[1], pair[0]), reverse=span.newest)
        position = None if span.after is None else (span.after[0], bytes_of(span.after[1]))
        return [each for each in found if span.beyond(position, each)]

    def _causes(self, queue: str, selected: Selection) -> list[str] | None:
        """Fingerprints whose letters may match; ``None``: look at all letters."""
        known = self._store.reader.causes(queue) if selected.cause is not None else None
        if known is None or selected.cause is None:
            return None
        examples = self._examples(queue, known)
        chosen = [
            cause.fingerprint
            for cause in known
            # Letters without one have nothing in common.
            if not cause.fingerprint or (example := examples.get(cause)) is None or selected.cause(example)
        ]
        return chosen if len(chosen) <= _MOST_CAUSES else None

    def _examples(self, queue: str, causes: list[Cause]) -> dict[Cause, DeadLetter]:
        """The newest letter of each cause, if it did not leave meanwhile."""
        found: dict[Cause, DeadLetter] = {}
        for start in range(0, len(causes), _PAGE):
            page = causes[start : start + _PAGE]
            read = self._store.reader.some(queue, [cause.newest for cause in page], bodies=False)
            for cause, each in zip(page, read, strict=True):
                if each.record is not None:
                    found[cause] = letter_of(each.record, None, each.score, self._policy.dlq(queue), each.id)
        return found

    def groups(self, queue: str, match: Match, looking: Looking | None = None) -> list[Group] | None:
        if not isinstance(match, Selection) or not match.causes_only:
            return None
        known = self._store.reader.causes(queue)
        if known is None:
            return None
        examples = self._examples(queue, known)
        if len(examples) < len(known):
            return None
        recent = self._store.reader.recent(queue, [cause.fingerprint for cause in known], TREND)
        groups = Groups()
        for cause, (last_hour, hour_before) in zip(known, recent, strict=True):
            example = examples[cause]
            if cause.fingerprint and match.cause is not None and not match.cause(example):
                continue
            if not cause.fingerprint:  # nothing in common
                for found in self._store.reader.pages(queue, Span(), bodies=False, causes=[""]):
                    letter = letter_of(found.record, None, found.score, self._policy.dlq(queue), found.id)
                    if match(letter):
                        groups.add(letter)
                continue
            group = group_of(example)
            group.count, group.first_seen, group.last_seen = cause.letters, int(cause.oldest), int(cause.newest[1])
            group.example, group.message = example.id, (example.exception or {}).get("message", "")[:200]
            group.last_hour, group.hour_before = last_hour, hour_before
            groups.merge([group])
        return groups.sorted()

    def get(self, queue: str, letter_id: str) -> DeadLetter | None:
        """One letter with its message, without a scan."""
        found = self._store.reader.one(queue, letter_id)
        if found is None:
            return None
        score, record, item = found
        return letter_of(record, item or b"", score, self._policy.dlq(queue), letter_id, queue)

    def replay(self, queue: str, match: Match, limit: int | None = None, run: Run | None = None) -> Iterator[Replayed]:
        run = run or Run()
        newest = self._store.reader.newest(queue)  # not what dies again meanwhile
        if newest is None:
            return
        mover = Mover(self._store, queue, self._policy.dlq(queue), self._list_key, run)
        bodies = run.bodies or run.edit is not None or wants_bodies(match)
        yield from _through(mover, islice(self._search(queue, match, bodies=bodies, last=newest), limit), run)
        mover.check()

    def replay_raw(self, queue: str, letters: Iterator[Chosen], run: Run) -> Iterator[Replayed]:
        return _through(RawMover(self._store, queue, self._policy.dlq(queue), self._list_key, run), letters, run)

    def _with_messages(self, queue: str, match: Match, size: int) -> Iterator[tuple[Found, DeadLetter]]:
        """Matching letters with what their producers sent; those that lie there now, not what dies again meanwhile."""
        newest = self._store.reader.newest(queue)
        if newest is None:
            return
        # Where nearly all that is read will match, messages are read with it.
        every = isinstance(match, Selection) and (match.ids is not None or match.causes_only)
        if every or wants_bodies(match):
            for found, letter in self._search(queue, match, bodies=True, last=newest):
                if found.item is not None or self._store.reader.scores(queue, [found.id]):
                    yield found, letter
            return
        chosen = self._search(queue, match, bodies=False, last=newest)
        while batch := list(islice(chosen, size)):
            items = self._store.reader.payloads(queue, [found.id for found, _ in batch])
            for (found, letter), item in zip(batch, items, strict=True):
                if item is not None or self._store.reader.scores(queue, [found.id]):  # else it left meanwhile
                    whole = letter_of(found.record, item or b"", found.score, letter.dlq, found.id, queue)
                    yield found._replace(item=item), whole

    def _list_key(self, queue: str, payload: dict[str, Any]) -> str:
        return str(self._connection.default_channel.dlx_list_key(queue, payload))

    def watch(self, replay: str) -> None:
        """Nothing to prepare: workers make the list."""

    def outcomes(self, replay: str) -> list[dict[str, Any]]:
        found = self._store.reports(replay, self._reported.get(replay, 0))
        self._reported = {replay: len(found)}
        return [read_report(report) for report in found]

    def export(self, queue: str, match: Match, limit: int | None = None) -> Iterator[dict[str, Any]]:
        for found, _ in islice(self._with_messages(queue, match, _BATCH), limit):
            yield {
                "v": 1,
                "broker": "redis",
                "queue": queue,
                "id": found.id,
                # What cannot be read tells nothing, and importing would refuse it.
                "score": repr(found.score if isfinite(found.score) else 0.0),
                "record": base64.b64encode(
                    b"{}" if not found.record or read_fields(found.record) is None else found.record
                ).decode(),
                "body": base64.b64encode(found.item or b"").decode(),
            }

    def restore(self, lines: Iterable[dict[str, Any]]) -> tuple[int, int]:
        restored = present = 0
        for line in lines:
            if line["broker"] != "redis":
                raise UsageError(f"letter {line['id']} was exported from {line['broker']}, this broker is Redis")
            try:
                score = repr(float(line["score"]))
                record, item = (base64.b64decode(line[key], validate=True) for key in ("record", "body"))
                if not isfinite(float(score)) or read_fields(record or b"-") is None:
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
        newest = self._store.reader.newest(queue)  # what dies meanwhile was not meant
        found = self._search(queue, match, bodies=wants_bodies(match), last=-inf if newest is None else newest)
        chosen = islice((letter for _, letter in found), limit)
        while batch := list(islice(chosen, _BATCH)):
            removed = self._store.discard(queue, [letter.id for letter in batch])
            yield from (letter for letter in batch if letter.id in removed)

    def purge(self, queue: str) -> int:
        return self._store.purge(queue)

    def stats(self, queues: Iterable[str]) -> Iterator[QueueStats]:
        for queue in queues:
            extra: dict[str, Any] = dict(self._store.reader.counters(queue))
            if (evicted := self._store.reader.evicted(queue)) and any(key.startswith("evicted_") for key in extra):
                extra["evicted"] = evicted
            yield QueueStats(queue, self._policy.dlq(queue), self._store.reader.count(queue), extra)


def _through(mover: Any, letters: Iterator[Any], run: Run) -> Iterator[Replayed]:
    """Letters go by the lots of a mover."""
    try:
        while not run.stop() and (batch := list(islice(letters, mover.size))):
            yield from mover.send(batch)
        yield from mover.finish()
    except GeneratorExit:
        raise
    except BaseException:
        yield from mover.finish()  # what was under way when the next letters could not be read, or at Ctrl-C
        raise
    finally:
        mover.close()


def misconfigured(exc: Exception) -> UsageError:
    """No name for Sentinel's master; or no number for the database, an option that there is not."""
    if "master_name" in str(exc):
        return UsageError(f"{exc} Name it in broker_transport_options")
    return BrokerUrlError()


def unreachable(connection: Any, exc: BaseException) -> BrokerUnreachableError:
    """Say in one line what keeps us from the broker; the URL without its password."""
    uri = connection.as_uri()
    if isinstance(exc, redis.exceptions.AuthenticationError):
        return BrokerUnreachableError(f"{uri}: Redis refuses the user or password; check the broker URL")
    reason = str(exc or type(exc).__name__).splitlines()[0]
    if isinstance(exc, MasterNotFoundError):
        return BrokerUnreachableError(f"{uri}: {reason}; are these running, and is the transport option master_name right?")
    return BrokerUnreachableError(f"{uri}: {reason}; is Redis running, and the broker URL right?")
