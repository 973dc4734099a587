"""Keeps DLQs within their caps also when nothing dies, and says so before and when letters go."""

from __future__ import annotations

import logging
from time import monotonic
from typing import Any

import redis

from celery_dlx.brokers.redis.store import Trimmed
from celery_dlx.policy.settings import NEARLY_FULL, Policy, QueueSettings, fill

logger = logging.getLogger("celery_dlx")

#: Time spent at once, in seconds: the loop has other work.
_SPENT = 0.05
#: Part of a cap below which a warning may come again.
_AGAIN = 0.7


class Retention:
    """Of the DLQs of one channel's queues."""

    def __init__(self, channel: Any, policy: Policy) -> None:
        self._channel, self._policy = channel, policy
        self._first = 0
        self._warned: set[str] = set()
        self._evicted: dict[str, int] = {}

    def run(self) -> int:
        """Look at every DLQ, as many as there is time for; returns how many letters went.

        Raises:
            redis.exceptions.ConnectionError: Redis is not there.
        """
        gone, deadline = 0, monotonic() + _SPENT
        queues = [(queue, settings) for queue, settings in self._channel.dlx_queues.items() if settings.enabled]
        for _ in range(len(queues)):
            queue, settings = queues[self._first % len(queues)]
            self._first += 1
            try:
                gone += self._trim(queue, settings, deadline)
            except redis.exceptions.ResponseError as exc:
                logger.warning("the caps of %r were not looked after: %s", self._policy.dlq(queue), exc)
            if monotonic() >= deadline:
                break  # the next look goes on from here
        return gone

    def _trim(self, queue: str, settings: QueueSettings, deadline: float) -> int:
        gone = 0
        while True:
            trimmed: Trimmed = self._channel.dlx_store.trim(queue, settings)
            gone += trimmed.gone
            if not trimmed.gone or monotonic() >= deadline:
                break
        dlq = self._policy.dlq(queue)
        lost = trimmed.evicted - self._evicted.get(queue, trimmed.evicted - gone)
        self._evicted[queue] = trimmed.evicted
        if lost > 0:
            logger.warning(
                "%d letters of %r are gone by its caps; which ones: celery -A APP dlx stats %s --json", lost, dlq, queue
            )
        full = fill(settings, trimmed.letters, trimmed.size)
        if full < _AGAIN:
            self._warned.discard(queue)
        elif full >= NEARLY_FULL and queue not in self._warned:
            self._warned.add(queue)
            logger.warning(
                "%r holds %d letters of %d bytes, %.0f %% of what it may: soon each new one costs the oldest. Keep them: "
                "celery -A APP dlx export %s FILE", dlq, trimmed.letters, trimmed.size, full * 100, queue,
            )  # fmt: skip
        return gone
