"""A DLQ's keys and the scripts over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import redis

from celery_dlx.brokers.redis.deliveries import deliveries_key
from celery_dlx.brokers.redis.letters import to_json
from celery_dlx.brokers.redis.scripts import load
from celery_dlx.letters import DeadLetter, clip
from celery_dlx.policy.settings import Policy, QueueSettings
from celery_dlx.replaying import REPORT_SECONDS, report_queue

#: Longest record stored on a full server, in characters of traceback.
_SLIM_TRACEBACK = 512
_PAGE = 500
#: Reports kept of one replay: anybody can send messages that make some.
_MOST_REPORTS = 100_000


def is_full(exc: BaseException) -> bool:
    """Whether Redis refused for want of memory."""
    return isinstance(exc, redis.exceptions.OutOfMemoryError)  # type: ignore[attr-defined, unused-ignore]


class LetterStore:
    """Scripts over one Redis database. ``client`` must not prefix keys: this does, for scripts prefix only the first."""

    NAMES = ("capture", "discard", "import", "purge", "replay")

    def __init__(self, client: Any, prefix: str, policy: Policy) -> None:
        self.client = client
        self.prefix = prefix
        self._policy = policy
        self._scripts = {name: load(client, name) for name in self.NAMES}
        self._keys: dict[str, list[str]] = {}

    def keys(self, queue: str) -> list[str]:
        """letters, payloads, records, stats of a queue's DLQ."""
        keys = self._keys.get(queue)
        if keys is None:
            base = f"{self.prefix}dlx:{{{self._policy.dlq(queue)}}}"
            keys = [base, *(f"{base}:{part}" for part in ("payloads", "records", "stats"))]
            self._keys[queue] = keys
        return keys

    # -- letters

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
        unacked, index, tag = delivery or ("", "", "")
        deliveries = deliveries_key(self.prefix, letter.queue)
        keys = [*self.keys(letter.queue), self.prefix + unacked, self.prefix + index, deliveries]

        def run(record: str, force: str) -> bool:
            caps = [settings.dlq_max_length, int(settings.dlq_max_age * 1000), settings.dlq_max_bytes or 0]
            args = [letter.id, record, letter.reason, *caps, force, tag, own_tag, item]
            return bool(self._scripts["capture"](keys=keys, args=args))

        try:
            return run(to_json(letter), "")
        except redis.exceptions.ResponseError as exc:
            if not is_full(exc):
                raise
        if letter.exception:
            letter.exception = {key: clip(value, _SLIM_TRACEBACK, keep="tail") for key, value in letter.exception.items()}
        return run(to_json(letter), "1")

    def capture_items(self, letters: Sequence[tuple[DeadLetter, QueueSettings, bytes]]) -> None:
        """Store letters whose items are given, in one round trip; each by a script of its own, as `capture` does.

        Raises:
            redis.exceptions.RedisError: at least the first was not stored. All may be tried again: the ids are the same.
        """
        pipe = self.client.pipeline(transaction=False)
        for letter, settings, item in letters:
            keys = [*self.keys(letter.queue), self.prefix, self.prefix, deliveries_key(self.prefix, letter.queue)]
            caps = [settings.dlq_max_length, int(settings.dlq_max_age * 1000), settings.dlq_max_bytes or 0]
            args = [letter.id, to_json(letter), letter.reason, *caps, "", "", "", item]
            self._scripts["capture"](keys=keys, args=args, client=pipe)
        answers = pipe.execute(raise_on_error=False)
        for (letter, settings, item), answer in zip(letters, answers, strict=True):
            if isinstance(answer, Exception):
                self.capture(letter, settings, item=item)  # by itself: it may have to be forced

    def capture_deliveries(self, letters: Sequence[tuple[DeadLetter, QueueSettings, tuple[str, str, str], str]]) -> None:
        """Store letters by moving their deliveries (unacked key, index key and tag; own tag), in one round trip."""
        pipe = self.client.pipeline(transaction=False)
        for letter, settings, (unacked, index, tag), own_tag in letters:
            keys = [*self.keys(letter.queue), self.prefix + unacked, self.prefix + index]
            keys.append(deliveries_key(self.prefix, letter.queue))
            caps = [settings.dlq_max_length, int(settings.dlq_max_age * 1000), settings.dlq_max_bytes or 0]
            self._scripts["capture"](
                keys=keys, args=[letter.id, to_json(letter), letter.reason, *caps, "", tag, own_tag], client=pipe
            )
        for (letter, settings, delivery, own_tag), answer in zip(letters, pipe.execute(raise_on_error=False), strict=True):
            if isinstance(answer, Exception):
                self.capture(letter, settings, delivery=delivery, own_tag=own_tag)  # by itself: it may have to be forced

    def pages(self, queue: str, *, bodies: bool) -> Iterator[tuple[str, float, bytes | None, bytes | None]]:
        """Id, score, record and (if asked for) payload of each letter, oldest first.

        Pages go by score and id, not by rank: letters that leave meanwhile do not make others be skipped.
        """
        name, payloads, records = self.keys(queue)[:3]
        low, seen = "-inf", set[bytes]()
        while True:
            found = self.client.zrange(name, low, "+inf", byscore=True, offset=0, num=_PAGE + len(seen), withscores=True)
            fresh = [(member, score) for member, score in found if member not in seen]
            if not fresh:
                return
            ids = [member for member, _ in fresh]
            pipe = self.client.pipeline(transaction=False)
            pipe.hmget(records, ids)
            if bodies:
                pipe.hmget(payloads, ids)
            answers = pipe.execute()
            for position, (member, score) in enumerate(fresh):
                yield member.decode(), score, answers[0][position], answers[1][position] if bodies else None
            last = fresh[-1][1]
            seen = {member for member, score in found if score == last}
            low = repr(last)

    def payloads(self, queue: str, ids: Sequence[str]) -> list[bytes | None]:
        found: Any = self.client.hmget(self.keys(queue)[1], list(ids)) if ids else []
        return list(found)

    def one(self, queue: str, letter_id: str) -> tuple[float, bytes | None, bytes | None] | None:
        """Score, record and payload of a letter."""
        name, payloads, records = self.keys(queue)[:3]
        pipe = self.client.pipeline()
        pipe.zscore(name, letter_id)
        pipe.hget(records, letter_id)
        pipe.hget(payloads, letter_id)
        score, record, item = pipe.execute()
        return None if score is None else (score, record, item)

    def replay(self, queue: str, moves: Sequence[tuple[str, float, str, bytes]]) -> set[str]:
        """Move letters (id, score as read, list key, item) back, all in one step; returns the ids that moved."""
        lists = list(dict.fromkeys(move[2] for move in moves))
        args: list[Any] = []
        for letter_id, score, list_key, item in moves:
            args += [letter_id, repr(score), lists.index(list_key) + 1, item]
        keys = [*self.keys(queue), *(self.prefix + key for key in lists)]
        return {member.decode() for member in self._scripts["replay"](keys=keys, args=args)}

    def restore_letter(self, queue: str, letter_id: str, score: str, record: bytes, item: bytes) -> bool:
        """Put a letter back as it was; ``False`` if it is there."""
        return bool(self._scripts["import"](keys=self.keys(queue), args=[letter_id, score, record, item]))

    def discard(self, queue: str, ids: Sequence[str]) -> set[str]:
        """Delete letters; returns the ids that were there."""
        return {member.decode() for member in self._scripts["discard"](keys=self.keys(queue), args=list(ids))}

    def purge(self, queue: str) -> int:
        return int(self._scripts["purge"](keys=self.keys(queue)))

    def count(self, queue: str) -> int:
        return int(self.client.zcard(self.keys(queue)[0]))

    def counters(self, queue: str) -> dict[str, int]:
        found: Any = self.client.hgetall(self.keys(queue)[3])
        return {key.decode(): int(value) for key, value in sorted(found.items())}

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
        pipe.lrange(key, 0, _PAGE - 1)
        return list(pipe.execute()[1])

    # -- which DLQs there are

    def announce(self, queue: str) -> None:
        self.client.hset(f"{self.prefix}dlx:queues", queue, self._policy.dlq(queue))

    def announced(self) -> list[str]:
        found: Any = self.client.hkeys(f"{self.prefix}dlx:queues")
        return sorted(member.decode() for member in found)
