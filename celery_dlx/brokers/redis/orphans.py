"""Messages that are, or may be, unacknowledged and nobody's: the connection ended before they were answered or settled.

They outlive their channel: the next one to the same server puts them back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import groupby
from operator import itemgetter
from typing import Any

import redis

from celery_dlx.brokers.redis.deliveries import lost_master

#: By server: the tag of each, and whether it had been delivered.
_orphans: dict[str, deque[tuple[str, bool]]] = {}


def add(home: str, tags: Iterable[str], delivered: bool) -> None:
    _orphans.setdefault(home, deque()).extend((tag, delivered) for tag in tags)


def put_back(home: str, qos: Any) -> None:
    """Put back those of a server; those that are gone already are forgotten.

    Raises:
        redis.RedisError: some are left, for the next attempt.
    """
    found = _orphans.get(home)
    if not found:
        return
    for delivered, group in groupby(list(found), key=itemgetter(1)):
        tags = [tag for tag, _ in group]
        try:
            qos.put_back(tags, counted=delivered)
        except redis.exceptions.ReadOnlyError as exc:
            raise lost_master(exc) from exc
        for _ in tags:
            found.popleft()
