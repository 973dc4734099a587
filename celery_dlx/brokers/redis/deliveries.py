"""What workers hold unacknowledged, and how often each message came back. Needs no policy: any connection can do it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import redis
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads

from celery_dlx.brokers.redis.scripts import load

#: How long a message's delivery count is remembered after its last return, in milliseconds (a week).
_COUNT_MEMORY = 604_800_000


def deliveries_key(prefix: str, queue: str) -> str:
    """A queue's delivery counts."""
    return f"{prefix}dlx:{{{queue}}}:deliveries"


def marks_key(prefix: str, queue: str, list_key: str) -> str:
    """Which message was the newest of one of a queue's lists, at some times."""
    return f"{prefix}dlx:{{{queue}}}:marks:{list_key}"


def own_tag_text(tag: object) -> str:
    """The tag a producer gave its message, as text that Redis can hold: a producer may have put anything there."""
    return "" if tag is None else str(tag).encode("utf-8", "replace").decode()


def envelope_of(item: bytes) -> dict[str, Any]:
    """What kombu reads of a list item.

    Raises:
        Exception: it is none: not JSON, not UTF-8, no mapping, no properties, …
    """
    payload: dict[str, Any] = loads(bytes_to_str(item))
    payload["properties"]["delivery_tag"]  # what kombu reads first
    return payload


def own_tag_of(item: bytes) -> str:
    try:
        return own_tag_text(envelope_of(item)["properties"]["delivery_tag"])
    except Exception:  # noqa: BLE001 - garbage
        return ""


class Return(NamedTuple):
    """A delivery on its way back. ``own_tag``: empty if this is not to be counted."""

    tag: str
    queue: str
    list_key: str
    own_tag: str


class Deliveries:
    """Scripts over one Redis database. ``client`` must not prefix keys; ``unacked`` and ``index`` are kombu's keys."""

    NAMES = ("ack", "overdue", "register", "restore")

    def __init__(self, client: Any, prefix: str) -> None:
        self.client = client
        self.prefix = prefix
        self._scripts = {name: load(client, name) for name in self.NAMES}

    def _keys(self, unacked: str, index: str, queue: str) -> list[str]:
        return [self.prefix + unacked, self.prefix + index, deliveries_key(self.prefix, queue)]

    def register(self, unacked: str, index: str, tag: str, item: bytes, queue: str, own_tag: str) -> int:
        """Note that an item is held; returns how often it was put back before."""
        return int(self._scripts["register"](self._keys(unacked, index, queue), [tag, item, json.dumps(queue), own_tag]))

    def ack(self, unacked: str, index: str, settled: Sequence[tuple[str, str, str]]) -> int:
        """Forget deliveries (tag, queue, own tag: only if its count must be forgotten too); how many were gone already."""
        numbers = {queue: at for at, queue in enumerate(dict.fromkeys(queue for _, queue, _ in settled), 1)}
        keys = [self.prefix + unacked, self.prefix + index, *(deliveries_key(self.prefix, queue) for queue in numbers)]
        arguments = [text for tag, queue, own_tag in settled for text in (tag, numbers[queue], own_tag)]
        return int(self._scripts["ack"](keys, arguments)) if settled else 0

    def held(self, unacked: str, index: str, tags: Sequence[str]) -> list[tuple[str, bytes]]:
        """Tags and entries of those that are still unacknowledged."""
        found = self.client.hmget(self.prefix + unacked, list(tags)) if tags else []
        entries = list(zip(tags, found, strict=True))
        gone = [tag for tag, entry in entries if entry is None]
        if gone:
            self.client.zrem(self.prefix + index, *gone)
        return [(tag, entry) for tag, entry in entries if entry is not None]

    def overdue(self, unacked: str, index: str, seconds: float, most: int) -> tuple[list[tuple[str, bytes]], bool]:
        """Tags and entries (empty: gone) that were not renewed for so long, newest first; whether there may be more."""
        keys = [self.prefix + unacked, self.prefix + index]
        found, more = self._scripts["overdue"](keys, [seconds, most])
        tags = [tag.decode("utf-8", "replace") for tag in found[::2]]
        return list(zip(tags, found[1::2], strict=True)), bool(more)

    def renew(self, index: str, tags: Sequence[str]) -> None:
        """Give deliveries a new age; those that are not unacknowledged any more stay gone."""
        now, micros = self.client.time()
        self.client.zadd(self.prefix + index, dict.fromkeys(tags, now + micros / 1e6), xx=True)

    def restore(
        self, unacked: str, index: str, returns: Sequence[Return], *, leftmost: bool = False, older: float | None = None
    ) -> int:
        """Put deliveries back into their lists, in this order; how many were still there.

        ``older``: only those that were not renewed for so long, in seconds by the server's clock.
        """
        pairs = {pair: at for at, pair in enumerate(dict.fromkeys((each.queue, each.list_key) for each in returns), 1)}
        keys = [self.prefix + unacked, self.prefix + index]
        for queue, list_key in pairs:
            keys += [deliveries_key(self.prefix, queue), self.prefix + list_key, marks_key(self.prefix, queue, list_key)]
        arguments: list[Any] = ["L" if leftmost else "R", _COUNT_MEMORY, "" if older is None else older]
        for each in returns:
            arguments += [each.tag, pairs[each.queue, each.list_key], each.own_tag]
        return int(self._scripts["restore"](keys, arguments)) if returns else 0

    def counts(self, queue: str, own_tags: Sequence[str]) -> list[tuple[int, int]]:
        """How often messages came back, and were started since the first time, by the tags their producers gave them."""
        if not own_tags:
            return []
        fields = [field for tag in own_tags for field in (tag, f"{tag}:started")]
        found = [int(count or 0) for count in self.client.hmget(deliveries_key(self.prefix, queue), fields)]
        return list(zip(found[::2], found[1::2], strict=True))

    def started(self, queue: str, own_tag: str) -> None:
        """Note that the task of a message that had come back was started."""
        pipe = self.client.pipeline()
        pipe.hincrby(deliveries_key(self.prefix, queue), f"{own_tag}:started", 1)
        pipe.pexpire(deliveries_key(self.prefix, queue), _COUNT_MEMORY)
        pipe.execute()


def lost_master(exc: Exception) -> Exception:
    """A failover made our server a replica: whoever connects anew finds the new master."""
    lost: Exception = redis.exceptions.ConnectionError(f"the server became a read-only replica: {exc}")
    return lost
