"""A DLQ's keys and the scripts over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from heapq import merge
from itertools import islice
from math import inf
from typing import Any, NamedTuple

import redis

from celery_dlx.brokers.redis.deliveries import deliveries_key
from celery_dlx.brokers.redis.letters import to_json
from celery_dlx.brokers.redis.scripts import load
from celery_dlx.letters import DeadLetter, clip
from celery_dlx.policy.settings import Policy, QueueSettings
from celery_dlx.replaying import REPORT_SECONDS, report_queue

#: Longest record stored on a full server, in characters of traceback.
_SLIM_TRACEBACK = 512
#: Letters read at once; fewer at first, for most readers want no more.
_PAGE, _FIRST_PAGE = 500, 100
#: Ids read at once.
_MOST_IDS = 1_000
#: Reports kept of one replay: anybody can send messages that make some.
_MOST_REPORTS = 100_000
#: Reports read at once.
_MOST_READ = 500


def text_of(name: bytes) -> str:
    """A name that Redis holds, as text: it may be any bytes."""
    return name.decode("utf-8", "surrogateescape")


def bytes_of(name: str) -> bytes:
    """What `text_of` read; a surrogate that no byte stood for is encoded as itself."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogatepass")


def _of_cause(letters: bytes, fingerprint: str) -> bytes:
    """The key of one cause's letters."""
    return letters + b":cause:" + bytes_of(fingerprint)


def item_of(letter: DeadLetter) -> bytes:
    """What is stored in place of the item that a delivery holds; nothing: that is moved as it is."""
    return letter.original.raw if letter.redacted else b""


def _number(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        return 0  # not ours


def is_full(exc: BaseException) -> bool:
    """Whether Redis refused for want of memory."""
    return isinstance(exc, redis.exceptions.OutOfMemoryError)  # type: ignore[attr-defined, unused-ignore]


class Found(NamedTuple):
    """A stored letter, as it was read."""

    id: str
    score: float
    record: bytes | None
    item: bytes | None


class Span(NamedTuple):
    """Which part of a DLQ is read: what died between two times; the newest first; what comes after a score and id."""

    first: float = -inf
    last: float = inf
    newest: bool = False
    after: tuple[float, str] | None = None

    def beyond(self, position: tuple[float, bytes] | None, each: tuple[bytes, float]) -> bool:
        if position is None:
            return True
        here = (each[1], each[0])
        return here < position if self.newest else here > position


class Cause(NamedTuple):
    """Letters of one fingerprint; the newest by its id and score."""

    fingerprint: str
    letters: int
    oldest: float
    newest: tuple[bytes, float]


class Trimmed(NamedTuple):
    """How many letters went by a step, how many there are and of how many bytes, and how many the caps cost ever."""

    gone: int
    letters: int
    size: int
    evicted: int


def _caps(settings: QueueSettings) -> list[int]:
    return [settings.dlq_max_length, int(settings.dlq_max_age * 1000), settings.dlq_max_bytes or 0]


class LetterStore:
    """Scripts over one Redis database. ``client`` must not prefix keys: this does, for scripts prefix only the first."""

    NAMES = ("capture", "discard", "import", "purge", "replay", "trim")

    def __init__(self, client: Any, prefix: str, policy: Policy) -> None:
        self.client = client
        self.prefix = prefix
        self._policy = policy
        self._scripts = {name: load(client, name) for name in self.NAMES}
        self._keys: dict[str, list[bytes]] = {}

    def keys(self, queue: str) -> list[bytes]:
        """letters, payloads, records, stats of a queue's DLQ."""
        keys = self._keys.get(queue)
        if keys is None:
            base = bytes_of(f"{self.prefix}dlx:{{{self._policy.dlq(queue)}}}")
            keys = [base, *(base + part for part in (b":payloads", b":records", b":stats"))]
            self._keys[queue] = keys
        return keys

    # -- letters

    def _call(
        self,
        letter: DeadLetter,
        settings: QueueSettings,
        *,
        delivery: tuple[str, str, str] | None = None,
        own_tag: str = "",
        item: bytes = b"",
        force: str = "",
        client: Any = None,
    ) -> Any:
        unacked, index, tag = delivery or ("", "", "")
        deliveries = deliveries_key(self.prefix, letter.queue)
        keys = [*self.keys(letter.queue), self.prefix + unacked, self.prefix + index, deliveries]
        args = [letter.id, to_json(letter), letter.reason, *_caps(settings), force, tag, own_tag, item]
        return self._scripts["capture"](keys=keys, args=args, client=client)

    def capture(
        self,
        letter: DeadLetter,
        settings: QueueSettings,
        *,
        delivery: tuple[str, str, str] | None = None,
        own_tag: str = "",
        item: bytes = b"",
    ) -> bool:
        """Store a letter: by moving a delivery (its unacked key, index key and tag), or with its item given.

        A full server gets a slim record by force: the payload is in its memory already, or has no other copy.
        Returns False if the delivery is not there any more.
        """
        try:
            return bool(self._call(letter, settings, delivery=delivery, own_tag=own_tag, item=item))
        except redis.exceptions.ResponseError as exc:
            if not is_full(exc):
                raise
        if letter.exception:
            letter.exception = {key: clip(value, _SLIM_TRACEBACK, keep="tail") for key, value in letter.exception.items()}
        return bool(self._call(letter, settings, delivery=delivery, own_tag=own_tag, item=item, force="1"))

    def capture_items(self, letters: Sequence[tuple[DeadLetter, QueueSettings, bytes]]) -> None:
        """Store letters whose items are given, in one round trip; each by a script of its own, as `capture` does.

        Raises:
            redis.exceptions.RedisError: at least the first was not stored. All may be tried again: the ids are the same.
        """
        pipe = self.client.pipeline(transaction=False)
        for letter, settings, item in letters:
            self._call(letter, settings, item=item, client=pipe)
        answers = pipe.execute(raise_on_error=False)
        for (letter, settings, item), answer in zip(letters, answers, strict=True):
            if isinstance(answer, Exception):
                self.capture(letter, settings, item=item)  # by itself: it may have to be forced

    def capture_deliveries(self, letters: Sequence[tuple[DeadLetter, QueueSettings, tuple[str, str, str], str]]) -> None:
        """Store letters by moving their deliveries (unacked key, index key and tag; own tag), in one round trip."""
        pipe = self.client.pipeline(transaction=False)
        for letter, settings, delivery, own_tag in letters:
            self._call(letter, settings, delivery=delivery, own_tag=own_tag, item=item_of(letter), client=pipe)
        for (letter, settings, delivery, own_tag), answer in zip(letters, pipe.execute(raise_on_error=False), strict=True):
            if isinstance(answer, Exception):
                # by itself: it may have to be forced
                self.capture(letter, settings, delivery=delivery, own_tag=own_tag, item=item_of(letter))

    def trim(self, queue: str, settings: QueueSettings) -> Trimmed:
        """Keep a DLQ within its caps, by a bounded step."""
        return Trimmed(*map(int, self._scripts["trim"](keys=self.keys(queue), args=_caps(settings))))

    def pages(self, queue: str, span: Span, *, bodies: bool, causes: Sequence[str] | None = None) -> Iterator[Found]:
        """The letters of a queue, or of some of its causes, in the order of their deaths."""
        name = self.keys(queue)[0]
        if causes is None:
            yield from self._walk(queue, name, span, bodies)
            return

        def walk(cause: str) -> Iterator[tuple[float, bytes]]:
            for page in self._scored(_of_cause(name, cause), span, _PAGE):
                yield from ((score, member) for member, score in page)

        merged, size = merge(*map(walk, causes), reverse=span.newest), _FIRST_PAGE
        while page := [(member, score) for score, member in islice(merged, size)]:
            yield from self.some(queue, page, bodies=bodies)
            size = _PAGE

    def _walk(self, queue: str, name: bytes, span: Span, bodies: bool) -> Iterator[Found]:
        for page in self._scored(name, span, _PAGE):
            yield from self.some(queue, page, bodies=bodies)

    def _scored(self, name: bytes, span: Span, most: int) -> Iterator[list[tuple[bytes, float]]]:
        """Ids and scores of a sorted set, in pages."""
        # Pages go by score and id, not by rank: letters that leave meanwhile do not make others be skipped.
        first, last, seen, size = span.first, span.last, set[bytes](), _FIRST_PAGE
        position = None
        if span.after is not None:
            position = span.after[0], bytes_of(span.after[1])
            first, last = (first, min(last, position[0])) if span.newest else (max(first, position[0]), last)
        while True:
            ends = (repr(last), repr(first)) if span.newest else (repr(first), repr(last))
            found = self.client.zrange(
                name, *ends, desc=span.newest, byscore=True, offset=0, num=size + len(seen), withscores=True
            )
            fresh = [(member, score) for member, score in found if member not in seen]
            if not fresh:
                return
            yield [each for each in fresh if span.beyond(position, each)]
            end = fresh[-1][1]
            seen = {member for member, score in found if score == end}
            first, last, size = (first, end, most) if span.newest else (end, last, most)

    def ids(self, queue: str, causes: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Id and fingerprint of the letters of some causes, in the order of their deaths, without reading them."""
        name = self.keys(queue)[0]

        def walk(cause: str) -> Iterator[tuple[float, bytes, str]]:
            for page in self._scored(_of_cause(name, cause), Span(), _MOST_IDS):
                yield from ((score, member, cause) for member, score in page)

        for _, member, cause in merge(*map(walk, causes)):
            yield text_of(member), cause

    def some(self, queue: str, members: Sequence[tuple[bytes, float]], *, bodies: bool) -> Iterator[Found]:
        """Records and (if asked for) payloads of letters whose ids and scores are known."""
        _, payloads, records, _ = self.keys(queue)
        if not members:
            return
        ids = [member for member, _ in members]
        pipe = self.client.pipeline(transaction=False)
        pipe.hmget(records, ids)
        if bodies:
            pipe.hmget(payloads, ids)
        answers = pipe.execute()
        for position, (member, score) in enumerate(members):
            yield Found(text_of(member), score, answers[0][position], answers[1][position] if bodies else None)

    def scores(self, queue: str, ids: Sequence[str]) -> list[tuple[bytes, float]]:
        """Those of the ids that are there, and when they died."""
        members = list(map(bytes_of, ids))
        found: Any = self.client.zmscore(self.keys(queue)[0], members) if members else []
        return [(each, score) for each, score in zip(members, found, strict=True) if score is not None]

    def causes(self, queue: str) -> list[Cause] | None:
        """How many letters of each fingerprint there are, the most frequent first, with the oldest and the newest.

        ``None`` where the counts do not add up: letters were stored by somebody else's hand.
        """
        name = self.keys(queue)[0]
        pipe = self.client.pipeline()
        pipe.zcard(name)
        pipe.zrevrange(name + b":causes", 0, -1, withscores=True)
        total, counts = pipe.execute()
        if total != sum(int(count) for _, count in counts):
            return None
        pipe = self.client.pipeline(transaction=False)
        for fingerprint, _ in counts:
            key = _of_cause(name, text_of(fingerprint))
            pipe.zrange(key, 0, 0, withscores=True)
            pipe.zrange(key, -1, -1, withscores=True)
        ends = pipe.execute()
        causes = []
        for (fingerprint, count), oldest, newest in zip(counts, ends[::2], ends[1::2], strict=True):
            if oldest and newest:  # else the last of them left meanwhile
                causes.append(Cause(text_of(fingerprint), int(count), oldest[0][1], newest[0]))
        return causes

    def recent(self, queue: str, causes: Sequence[str], span: int) -> list[tuple[int, int]]:
        """How many letters of each cause died in the last ``span`` milliseconds, and in as many before."""
        seconds, micros = self.client.time()
        now = seconds * 1000 + micros / 1000
        pipe = self.client.pipeline(transaction=False)
        for cause in causes:
            key = _of_cause(self.keys(queue)[0], cause)
            pipe.zcount(key, now - span, "+inf")
            pipe.zcount(key, now - 2 * span, f"({now - span}")
        counts = pipe.execute()
        return list(zip(counts[::2], counts[1::2], strict=True))

    def newest(self, queue: str) -> float | None:
        """The score of the newest letter; ``None`` if there is none."""
        found: Any = self.client.zrange(self.keys(queue)[0], -1, -1, withscores=True)
        return float(found[0][1]) if found else None

    def evicted(self, queue: str) -> dict[str, int]:
        """How many letters the caps cost, by fingerprint, reason and task."""
        found: Any = self.client.zrevrange(self.keys(queue)[0] + b":evicted", 0, -1, withscores=True)
        return {label.decode("utf-8", "replace"): int(count) for label, count in found}

    def payloads(self, queue: str, ids: Sequence[str]) -> list[bytes | None]:
        found: Any = self.client.hmget(self.keys(queue)[1], list(map(bytes_of, ids))) if ids else []
        return list(found)

    def one(self, queue: str, letter_id: str) -> tuple[float, bytes | None, bytes | None] | None:
        """Score, record and payload of a letter."""
        name, payloads, records = self.keys(queue)[:3]
        pipe = self.client.pipeline()
        member: Any = bytes_of(letter_id)
        pipe.zscore(name, member)
        pipe.hget(records, member)
        pipe.hget(payloads, member)
        score, record, item = pipe.execute()
        return None if score is None else (score, record, item)

    def replay(self, queue: str, moves: Sequence[tuple[str, float, str, bytes]]) -> set[str]:
        """Move letters (id, score as read, list key, item) back, all in one step; returns the ids that moved."""
        lists = list(dict.fromkeys(move[2] for move in moves))
        args: list[Any] = []
        for letter_id, score, list_key, item in moves:
            args += [bytes_of(letter_id), repr(score), lists.index(list_key) + 1, item]
        keys = [*self.keys(queue), *(bytes_of(self.prefix + key) for key in lists)]
        return {text_of(member) for member in self._scripts["replay"](keys=keys, args=args)}

    def restore_letter(self, queue: str, letter_id: str, score: str, record: bytes, item: bytes) -> bool:
        """Put a letter back as it was; ``False`` if it is there."""
        return bool(self._scripts["import"](keys=self.keys(queue), args=[bytes_of(letter_id), score, record, item]))

    def discard(self, queue: str, ids: Sequence[str]) -> set[str]:
        """Delete letters; returns the ids that were there."""
        return {text_of(member) for member in self._scripts["discard"](keys=self.keys(queue), args=list(map(bytes_of, ids)))}

    def purge(self, queue: str) -> int:
        return int(self._scripts["purge"](keys=self.keys(queue)))

    def count(self, queue: str) -> int:
        return int(self.client.zcard(self.keys(queue)[0]))

    def counters(self, queue: str) -> dict[str, int]:
        found: Any = self.client.hgetall(self.keys(queue)[3])
        return {text_of(key): _number(value) for key, value in sorted(found.items())}

    # -- what becomes of replayed messages

    def report(self, reports: Iterable[tuple[str, str]]) -> None:
        """Tell replays, by id, what became of their letters, in one round trip."""
        by_replay: dict[str, list[str]] = {}
        for replay, report in reports:
            by_replay.setdefault(replay, []).append(report)
        pipe = self.client.pipeline()
        for replay, told in by_replay.items():
            key = f"{self.prefix}{report_queue(replay)}"
            pipe.rpush(key, *told)
            pipe.ltrim(key, -_MOST_REPORTS, -1)
            pipe.expire(key, REPORT_SECONDS)
        pipe.execute()

    def reports(self, replay: str, forget: int) -> list[bytes]:
        """The next reports, having forgotten as many that were read before."""
        key = f"{self.prefix}{report_queue(replay)}"
        pipe = self.client.pipeline()
        pipe.ltrim(key, forget, -1)
        pipe.lrange(key, 0, _MOST_READ - 1)
        return list(pipe.execute()[1])

    # -- which DLQs there are

    def announce(self, queue: str) -> None:
        self.client.hset(f"{self.prefix}dlx:queues", bytes_of(queue), bytes_of(self._policy.dlq(queue)))

    def announced(self) -> list[str]:
        found: Any = self.client.hkeys(f"{self.prefix}dlx:queues")
        return sorted(text_of(member) for member in found)
