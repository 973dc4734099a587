"""What workers hold unacknowledged, and how often each message came back. Needs no policy: any connection can do it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from celery_dlx.brokers.redis.scripts import load

#: How long a message's delivery count is remembered after its last return, in milliseconds (a week).
_COUNT_MEMORY = 604_800_000


def deliveries_key(prefix: str, queue: str) -> str:
    """A queue's delivery counts."""
    return f"{prefix}dlx:{{{queue}}}:deliveries"


class Deliveries:
    """Scripts over one Redis database. ``client`` must not prefix keys; ``unacked`` and ``index`` are kombu's keys."""

    NAMES = ("ack", "register", "restore")

    def __init__(self, client: Any, prefix: str) -> None:
        self.client = client
        self.prefix = prefix
        self._scripts = {name: load(client, name) for name in self.NAMES}

    def _keys(self, unacked: str, index: str, queue: str) -> list[str]:
        return [self.prefix + unacked, self.prefix + index, deliveries_key(self.prefix, queue)]

    def register(self, unacked: str, index: str, tag: str, item: bytes, queue: str, own_tag: str) -> int:
        """Note that an item is held; returns how often it was put back before."""
        return int(self._scripts["register"](self._keys(unacked, index, queue), [tag, item, json.dumps(queue), own_tag]))

    def ack(self, unacked: str, index: str, tag: str, queue: str, own_tag: str) -> bool:
        """Forget a delivery; ``own_tag`` only if its count must be forgotten too."""
        return bool(self._scripts["ack"](self._keys(unacked, index, queue), [tag, own_tag]))

    def held(self, unacked: str, index: str, tag: str) -> bytes | None:
        """The entry of a delivery, if it is still unacknowledged."""
        entry: bytes | None = self.client.hget(self.prefix + unacked, tag)
        if entry is None:
            self.client.zrem(self.prefix + index, tag)
        return entry

    def renew(self, index: str, tags: Sequence[str]) -> None:
        """Give deliveries a new age; those that are not unacknowledged any more stay gone."""
        now, micros = self.client.time()
        self.client.zadd(self.prefix + index, dict.fromkeys(tags, now + micros / 1e6), xx=True)

    def restore(
        self,
        unacked: str,
        index: str,
        tag: str,
        queue: str,
        list_key: str,
        own_tag: str,
        leftmost: bool,
        older: float | None = None,
    ) -> bool:
        """Put a delivery back into its list, and count it; ``False`` if somebody else did.

        ``older``: only if it was not renewed for so long, in seconds by the server's clock.
        """
        keys = [*self._keys(unacked, index, queue), self.prefix + list_key]
        arguments = [tag, "L" if leftmost else "R", own_tag, _COUNT_MEMORY, "" if older is None else older]
        return bool(self._scripts["restore"](keys, arguments))

    def present(self, unacked: str, tags: Sequence[str]) -> set[str]:
        """Those that are still unacknowledged."""
        found = self.client.hmget(self.prefix + unacked, list(tags)) if tags else []
        return {tag for tag, entry in zip(tags, found, strict=True) if entry is not None}

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
