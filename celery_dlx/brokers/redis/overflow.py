"""Keeps source queues within their ``max_length``: what overflows becomes a letter, oldest first, as on RabbitMQ."""

from __future__ import annotations

import json
import logging
from time import monotonic, time
from typing import Any

import redis

from celery_dlx.brokers.redis.claims import own_tag_of
from celery_dlx.brokers.redis.letters import original_of
from celery_dlx.brokers.redis.scripts import load
from celery_dlx.letters import Death, Reason, compose
from celery_dlx.policy.settings import Policy, QueueSettings

logger = logging.getLogger("celery_dlx")

#: Messages moved by one script at most, and time spent on it at once, in seconds: the loop has other work.
_BATCH, _SPENT = 100, 0.05


class Overflow:
    """Of one channel that consumes. Killed half-way, what was taken comes back after the visibility timeout."""

    def __init__(self, channel: Any, policy: Policy, worker: str | None = None) -> None:
        self._channel, self._policy, self._worker = channel, policy, worker
        self._nonce = f"{channel.dlx_claims.nonce[:-1]}-over:"
        self._number = self._first = 0
        self._script = load(channel.dlx_deliveries.client, "overflow")

    def run(self) -> int:
        """Look at every queue with a ``max_length``; returns how many messages became letters.

        Raises:
            redis.exceptions.ConnectionError: what was taken and not stored yet is put back over the next connection.
        """
        moved, deadline = 0, monotonic() + _SPENT
        queues = list(self._channel.dlx_queues.items())
        self._first += 1  # each in turn: the first may take all the time there is
        for queue, settings in queues[self._first % max(len(queues), 1) :] + queues[: self._first % max(len(queues), 1)]:
            try:
                while settings.max_length is not None and monotonic() < deadline:
                    found = self._move(queue, settings)
                    moved += found
                    if found < _BATCH:
                        break
            except redis.exceptions.ResponseError as exc:
                logger.warning("max_length of %r was not looked after: %s", queue, exc)
        return moved

    def _move(self, queue: str, settings: QueueSettings) -> int:
        channel, qos = self._channel, self._channel.qos
        prefix = channel.global_keyprefix
        lists = [prefix + channel._q_for_pri(queue, priority) for priority in channel.priority_steps]
        first = self._number
        self._number += _BATCH
        tags = [f"{self._nonce}{first + n}" for n in range(1, _BATCH + 1)]
        try:
            items = self._script(
                [prefix + qos.unacked_key, prefix + qos.unacked_index_key, *lists],
                [settings.max_length, _BATCH, self._nonce, first, json.dumps(queue)],
            )
            letters = [
                (self._letter(queue, item), settings, qos.entry(tag), own_tag_of(item))
                for item, tag in zip(items, tags, strict=False)
            ]
            channel.dlx_store.capture_deliveries(letters)
        except Exception:
            channel.dlx_claims.orphaned(tags, delivered=False)
            raise
        if items:
            logger.warning("%d messages of %r became dead letters: it may hold %s", len(items), queue, settings.max_length)
        return len(items)

    def _letter(self, queue: str, item: bytes) -> Any:
        death = Death(
            reason=Reason.MAXLEN.value,
            queue=queue,
            died_at=int(time() * 1000),
            worker=self._worker,
            service=self._policy.service,
        )
        return compose(death, original_of(item), self._policy.dlq(queue))
