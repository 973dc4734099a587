"""What the tests of raw replays share: a whole replay, and what lies where after it."""

from __future__ import annotations

from contextlib import closing

import redis

from celery_dlx.brokers.redis.letters import parse_item
from celery_dlx.brokers.redis.store import Capture
from celery_dlx.journal import Record
from celery_dlx.replay import Options


def run(dead, queue: str | None = None, options: Options | None = None, **selected) -> tuple[list, Record, Exception | None]:
    """A whole raw replay; what it yielded, its record and what broke it off."""
    engine, locks = dead.start_replay(queue=queue, options=options or Options(raw=True), **selected)
    with closing(engine.journal):
        try:
            return list(engine.run()), engine.record, engine.error
        finally:
            locks.release()


def by_list(client: redis.Redis, queue: str) -> dict[bytes, list[bytes]]:
    """What lies in each of a queue's lists, the first to be taken first."""
    return {key: client.lrange(key, 0, -1)[::-1] for key in client.scan_iter(f"{queue}*")}


def expected(dead, queue: str, items: list[bytes]) -> dict[bytes, list[bytes]]:
    """What should lie there: kombu tells which list a message is of."""
    dead.broker.queues()  # it is connected
    found: dict[bytes, list[bytes]] = {}
    for item in items:
        found.setdefault(dead.broker._list_key(queue, parse_item(item) or {}).encode(), []).append(item)
    return found


def emptied(client: redis.Redis, queue: str) -> bool:
    """Whether no key of a DLQ is left but its counters, and no message is counted as held."""
    name = f"dlx:{{{queue}.dlq}}"
    return list(client.scan_iter(f"{name}*")) == [f"{name}:stats".encode()] and client.hget(f"{name}:stats", "bytes") == b"0"


def capture(dead, queue: str, letters: list) -> list:
    store, settings = dead.broker._store, dead.policy.settings(queue)
    store.capture_all([Capture(letter, settings, item=letter.original.raw) for letter in letters])
    return letters
