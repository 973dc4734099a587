"""Reading a DLQ's letters: in the order of their deaths, by cause, by what stands in their records."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from heapq import merge
from math import inf
from typing import Any, NamedTuple

from celery_dlx.brokers.redis.aside import Aside
from celery_dlx.brokers.redis.scripts import load

#: Letters read at once, for the server does nothing else meanwhile; fewer at first, for most readers want no more.
_PAGE, _FIRST_PAGE = 250, 100
#: Bytes of messages read at once, about; unless one message has more.
_BYTES = 8_000_000
#: Bytes that one script looks at, about.
_SCANNED = 2_000_000
#: Ids read at once.
_MOST_IDS = 1_000


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


def _number(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        return 0  # not ours


class Found(NamedTuple):
    """A stored letter, as it was read."""

    id: str
    score: float
    record: bytes | None
    item: bytes | None


def _unpacked(numbers: bytes, parts: bytes) -> Iterator[tuple[bytes, Found]]:
    """What pack.lua packed, with the ids as they are stored."""
    told, at = iter(numbers.split()), 0
    for id_bytes, score, record_bytes, item_bytes in zip(told, told, told, told, strict=True):
        member = parts[at : (at := at + int(id_bytes))]
        record = parts[at : (at := at + int(record_bytes))]
        item = None if item_bytes == b"-" else parts[at : (at := at + int(item_bytes))]
        yield member, Found(text_of(member), float(score), record, item)


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


class LetterReader:
    """What is in DLQs. ``keys`` gives the letters, payloads, records and stats of a queue's DLQ."""

    def __init__(self, client: Any, keys: Callable[[str], list[bytes]]) -> None:
        self.client = client
        self.keys = keys
        self._scan, self._pick = load(client, "scan"), load(client, "pick")
        #: One of all that read holds it, and is read ahead for.
        self._ahead = threading.Lock()
        #: Messages read at once: the next are taken to be as large as the last.
        self._lot = _FIRST_PAGE

    def pages(
        self, queue: str, span: Span, *, bodies: bool, causes: Sequence[str] | None = None, words: Sequence[str] = ()
    ) -> Iterator[Found]:
        """The letters of a queue, or of some of its causes, in the order of their deaths.

        ``words``: only those in whose records all of these stand.
        """
        name = self.keys(queue)[0]
        names = [name] if causes is None else [_of_cause(name, cause) for cause in causes]
        scans = [self._scanned(queue, each, span, words, bodies, len(names)) for each in names]
        if len(scans) == 1:
            yield from scans[0]
        else:
            yield from merge(*scans, key=lambda found: (found.score, bytes_of(found.id)), reverse=span.newest)

    def _scanned(
        self, queue: str, name: bytes, span: Span, words: Sequence[str], bodies: bool, beside: int = 1
    ) -> Iterator[Found]:
        """Redis looks into the records, and sends what matches only. ``beside``: as many are read side by side."""
        _, payloads, records, _ = self.keys(queue)
        done = None if span.after is None else (span.after[0], bytes_of(span.after[1]))
        looked: tuple[bytes, Any] = (b"", "") if done is None else (done[1], repr(done[0]))
        order, bodies_too, most = "1" if span.newest else "", "1" if bodies else "", _FIRST_PAGE

        def args() -> list[Any]:
            return [repr(span.first), repr(span.last), order, *looked, bodies_too, most, _SCANNED // beside, *words]

        keys = [name, records, payloads]
        with closing(Aside(self.client, self._scan, again=True, permit=self._ahead)) as aside:
            last, score, *found = self._scan(keys=keys, args=args())
            while score:
                # Not the same: where the letter looked at last left, those that died in its moment are looked at again.
                looked = last, score
                # Who wants more than the first few wants all, mostly: Redis looks for the next ones meanwhile.
                answer = aside.begin(keys, args()) if most == _PAGE and beside == 1 else None
                for member, each in _unpacked(*found):
                    if span.beyond(done, (member, each.score)):
                        done = each.score, member
                        yield each
                most = _PAGE
                last, score, *found = self._scan(keys=keys, args=args()) if answer is None else answer()

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

    def ids(self, queue: str, causes: Sequence[str]) -> Iterator[tuple[str, str, float]]:
        """Id, fingerprint and score of the letters of some causes, in the order of their deaths, without reading them."""
        name = self.keys(queue)[0]

        def walk(cause: str) -> Iterator[tuple[float, bytes, str]]:
            for page in self._scored(_of_cause(name, cause), Span(), _MOST_IDS):
                yield from ((score, member, cause) for member, score in page)

        for score, member, cause in merge(*map(walk, causes)):
            yield text_of(member), cause, score

    def some(self, queue: str, members: Sequence[tuple[bytes, float]], *, bodies: bool) -> Iterator[Found]:
        """Records and (if asked for) payloads of letters whose ids and scores are known."""
        _, payloads, records, _ = self.keys(queue)
        done = 0
        while lot := members[done : done + self._lot] if bodies else members[done:]:
            done += len(lot)
            ids = [member for member, _ in lot]
            pipe = self.client.pipeline(transaction=False)
            pipe.hmget(records, ids)
            if bodies:
                pipe.hmget(payloads, ids)
            answers = pipe.execute()
            if bodies:
                size = sum(len(item or b"") for item in answers[1])
                self._lot = min(max(_BYTES * len(lot) // max(size, 1), 1), _PAGE)
            for position, (member, score) in enumerate(lot):
                yield Found(text_of(member), score, answers[0][position], answers[1][position] if bodies else None)

    def picked(self, queue: str, ids: Sequence[str], *, bodies: bool) -> Iterator[list[Found]]:
        """Those of the ids that are there, in lots of some megabytes."""
        name, payloads, records, _ = self.keys(queue)
        done, keys = 0, [name, records, payloads]

        def args() -> list[Any]:
            return ["1" if bodies else "", *map(bytes_of, ids[done : done + _PAGE])]

        if len(ids) <= _PAGE:
            while done < len(ids):
                looked, *packed = self._pick(keys=keys, args=args())
                done += int(looked)
                yield [each for _, each in _unpacked(*packed)]
            return
        with closing(Aside(self.client, self._pick, again=True, permit=self._ahead)) as aside:
            answer: Callable[[], Any] | None = aside.begin(keys, args())
            while answer is not None:
                looked, *packed = answer()
                done += int(looked)
                answer = aside.begin(keys, args()) if done < len(ids) else None
                yield [each for _, each in _unpacked(*packed)]

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
        pipe = self.client.pipeline(transaction=False)  # a full server refuses transactions, even such as only read
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

    def count(self, queue: str) -> int:
        return int(self.client.zcard(self.keys(queue)[0]))

    def counters(self, queue: str) -> dict[str, int]:
        found: Any = self.client.hgetall(self.keys(queue)[3])
        return {text_of(key): _number(value) for key, value in sorted(found.items())}
