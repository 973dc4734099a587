"""A DLQ's keys and the scripts over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import redis

from celery_dlx.brokers.redis.aside import Aside
from celery_dlx.brokers.redis.deliveries import deliveries_key
from celery_dlx.brokers.redis.reader import LetterReader, bytes_of, text_of
from celery_dlx.brokers.redis.records import to_json
from celery_dlx.brokers.redis.scripts import load
from celery_dlx.letters import DeadLetter, clip
from celery_dlx.policy.settings import Policy, QueueSettings
from celery_dlx.replaying import REPORT_SECONDS, report_queue

#: Longest record stored on a full server, in characters of traceback.
_SLIM_TRACEBACK = 512
#: Reports kept of one replay: anybody can send messages that make some.
_MOST_REPORTS = 100_000
#: Reports read at once.
_MOST_READ = 500
#: Letters that one script stores, and bytes of messages after which it takes no more.
_MOST_CAPTURED, _BYTES_CAPTURED = 25, 262_144


def item_of(letter: DeadLetter) -> bytes:
    """What is stored in place of the item that a delivery holds; nothing: that is moved as it is."""
    return letter.original.raw if letter.redacted else b""


def is_full(exc: BaseException) -> bool:
    """Whether Redis refused for want of memory."""
    return isinstance(exc, redis.exceptions.OutOfMemoryError)  # type: ignore[attr-defined, unused-ignore]


class Move(NamedTuple):
    """A letter that goes back: its id, its score as read, the key of its list, and either its item or, with a priority,
    the lineage to be put into the stored item, if that has this priority and these retries."""

    id: str
    score: float
    list_key: str
    content: bytes
    priority: int | None = None
    retries: int = 0


class Moved(NamedTuple):
    """What became of moves: how many were looked at, the first ones; the ids of those that were not there any more, and
    whether the caller must write the next one's item. The rest of them moved."""

    looked: int
    stayed: set[str]
    unfit: bool


class Capture(NamedTuple):
    """A letter to store: by moving a delivery (its unacked key, index key and tag), or with its item given.

    ``own_tag``: what the delivery's counts go by, which are forgotten; ``item``: also in place of what the delivery holds.
    """

    letter: DeadLetter
    settings: QueueSettings
    delivery: tuple[str, str, str] | None = None
    own_tag: str = ""
    item: bytes = b""


class Trimmed(NamedTuple):
    """How many letters went by a step, how many there are and of how many bytes, and how many the caps cost ever."""

    gone: int
    letters: int
    size: int
    evicted: int


def _lots(letters: Sequence[Capture]) -> Iterator[list[Capture]]:
    """Letters that follow each other and that one script stores: of one DLQ and its caps, not many, for the server does
    nothing else meanwhile; and by itself what is moved from a delivery."""
    lot: list[Capture] = []
    size = 0
    for given in letters:
        same = lot and _key(given) == _key(lot[0]) and given.delivery is None and lot[0].delivery is None
        if lot and not (same and len(lot) < _MOST_CAPTURED and size < _BYTES_CAPTURED):
            yield lot
            lot, size = [], 0
        lot.append(given)
        size += len(given.item)
    if lot:
        yield lot


def _key(given: Capture) -> tuple[str, QueueSettings]:
    return given.letter.queue, given.settings


def _together(lot: Sequence[Capture]) -> list[Any]:
    """Arguments of one script; two for all letters, for redis-py handles each for itself."""
    numbers: list[str] = []
    parts: list[bytes] = []
    for letter, _, _, _, item in lot:
        told = bytes_of(letter.id), to_json(letter).encode("utf-8", "surrogatepass"), letter.reason.encode(), item
        numbers += (str(len(part)) for part in told)
        parts += told
    return [*_caps(lot[0].settings), " ".join(numbers), b"".join(parts)]


def moved_of(answer: Any) -> Moved:
    """What scripts that send letters back answer."""
    looked, stayed, unfit = answer
    return Moved(int(looked), set(map(text_of, stayed)), bool(unfit))


def _caps(settings: QueueSettings) -> list[int]:
    return [settings.dlq_max_length, int(settings.dlq_max_age * 1000), settings.dlq_max_bytes or 0]


class LetterStore:
    """Scripts over one Redis database. ``client`` must not prefix keys: this does, for scripts prefix only the first."""

    NAMES = ("capture", "captures", "discard", "import", "purge", "replay", "trim")

    def __init__(self, client: Any, prefix: str, policy: Policy) -> None:
        self.client = client
        self.prefix = prefix
        self._policy = policy
        self._scripts = {name: load(client, name) for name in self.NAMES}
        self._keys: dict[str, list[bytes]] = {}
        self.reader = LetterReader(client, self.keys)

    def keys(self, queue: str) -> list[bytes]:
        """letters, payloads, records, stats of a queue's DLQ."""
        keys = self._keys.get(queue)
        if keys is None:
            base = bytes_of(f"{self.prefix}dlx:{{{self._policy.dlq(queue)}}}")
            keys = [base, *(base + part for part in (b":payloads", b":records", b":stats"))]
            self._keys[queue] = keys
        return keys

    # -- letters

    def _call(self, given: Capture, force: str = "", client: Any = None) -> Any:
        letter, settings = given.letter, given.settings
        unacked, index, tag = given.delivery or ("", "", "")
        deliveries = deliveries_key(self.prefix, letter.queue)
        keys = [*self.keys(letter.queue), self.prefix + unacked, self.prefix + index, deliveries]
        args = [letter.id, to_json(letter), letter.reason, *_caps(settings), force, tag, given.own_tag, given.item]
        return self._scripts["capture"](keys=keys, args=args, client=client)

    def capture(self, given: Capture) -> bool:
        """Store a letter. A full server gets a slim record by force: the payload is in its memory already, or has no
        other copy.

        Returns False if the delivery is not there any more.
        """
        try:
            return bool(self._call(given))
        except redis.exceptions.ResponseError as exc:
            if not is_full(exc):
                raise
        letter = given.letter
        if letter.exception:
            letter.exception = {key: clip(value, _SLIM_TRACEBACK, keep="tail") for key, value in letter.exception.items()}
        return bool(self._call(given, force="1"))

    def capture_all(self, letters: Sequence[Capture]) -> None:
        """Store letters in one round trip, as `capture` does: those that no delivery holds by few scripts.

        Raises:
            redis.exceptions.RedisError: some were not stored. All may be tried again: the ids are the same.
        """
        lots = list(_lots(letters))
        pipe = self.client.pipeline(transaction=False)
        for lot in lots:
            if lot[0].delivery is not None:
                self._call(lot[0], client=pipe)
            else:
                self._scripts["captures"](keys=self.keys(lot[0].letter.queue), args=_together(lot), client=pipe)
        for lot, answer in zip(lots, pipe.execute(raise_on_error=False), strict=True):
            if isinstance(answer, Exception):
                for given in lot:
                    self.capture(given)  # by itself: it may have to be forced

    def trim(self, queue: str, settings: QueueSettings) -> Trimmed:
        """Keep a DLQ within its caps, by a bounded step."""
        return Trimmed(*map(int, self._scripts["trim"](keys=self.keys(queue), args=_caps(settings))))

    def replay(self, queue: str, moves: Sequence[Move]) -> Moved:
        """Move letters back, all in one step, as many as the script takes at once."""
        keys, args = self._replaying(queue, moves)
        return moved_of(self._scripts["replay"](keys=keys, args=args))

    def begin_replay(self, aside: Aside, queue: str, moves: Sequence[Move]) -> Callable[[], Moved]:
        """As `replay`, without waiting: the caller can do something else meanwhile."""
        finish = aside.begin(*self._replaying(queue, moves))
        return lambda: moved_of(finish())

    def aside(self) -> Aside:
        """For `begin_replay`; its user closes it."""
        return Aside(self.client, self._scripts["replay"])

    def _replaying(self, queue: str, moves: Sequence[Move]) -> tuple[list[bytes], list[Any]]:
        lists = {key: number for number, key in enumerate(dict.fromkeys(move.list_key for move in moves), 1)}
        # Two arguments for all of them: redis-py handles each for itself, and sends a few thousand bytes at once at most.
        numbers, parts = [], []
        for letter_id, score, list_key, content, priority, retries in moves:
            member = bytes_of(letter_id)
            kind = "-" if priority is None else priority
            numbers.append(f"{score!r} {lists[list_key]} {len(member)} {len(content)} {kind} {retries}")
            parts += [member, content]
        return [*self.keys(queue), *(bytes_of(self.prefix + key) for key in lists)], [" ".join(numbers), b"".join(parts)]

    def restore_letter(self, queue: str, letter_id: str, score: str, record: bytes, item: bytes) -> bool:
        """Put a letter back as it was; ``False`` if it is there."""
        return bool(self._scripts["import"](keys=self.keys(queue), args=[bytes_of(letter_id), score, record, item]))

    def discard(self, queue: str, ids: Sequence[str]) -> set[str]:
        """Delete letters; returns the ids that were there."""
        return {text_of(member) for member in self._scripts["discard"](keys=self.keys(queue), args=list(map(bytes_of, ids)))}

    def purge(self, queue: str) -> int:
        return int(self._scripts["purge"](keys=self.keys(queue)))

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
        pipe = self.client.pipeline(transaction=False)  # a full server refuses transactions
        pipe.ltrim(key, forget, -1)
        pipe.lrange(key, 0, _MOST_READ - 1)
        return list(pipe.execute()[1])

    # -- which DLQs there are

    def announce(self, queue: str) -> None:
        self.client.hset(f"{self.prefix}dlx:queues", bytes_of(queue), bytes_of(self._policy.dlq(queue)))

    def announced(self) -> list[str]:
        found: Any = self.client.hkeys(f"{self.prefix}dlx:queues")
        return sorted(text_of(member) for member in found)
