"""Keeps source queues within ``max_length`` and ``message_ttl``: the oldest become letters."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from time import monotonic, time
from typing import Any

import redis

from celery_dlx.brokers.redis.deliveries import marks_key, own_tag_of
from celery_dlx.brokers.redis.letters import original_of, with_body
from celery_dlx.brokers.redis.scripts import load
from celery_dlx.brokers.redis.store import Capture, item_of
from celery_dlx.letters import Death, Reason, compose
from celery_dlx.policy.settings import Policy, QueueSettings
from celery_dlx.redaction import for_storage

logger = logging.getLogger("celery_dlx")

#: Messages moved by one script at most, and time spent on it at once, in seconds: the loop has other work.
_BATCH, _SPENT = 100, 0.05
#: Times in a queue's `message_ttl` at which is noted what waits: a message may wait longer by such a part of it.
_MARKS = 10


class Limits:
    """Of one channel that consumes. Killed half-way, what was taken comes back after the visibility timeout."""

    def __init__(self, channel: Any, policy: Policy, worker: str | None = None) -> None:
        self._channel, self._policy, self._worker = channel, policy, worker
        self._nonce = f"{channel.dlx_claims.nonce[:-1]}-over:"
        self._number = self._first = 0
        self._overflow, self._expire = (load(channel.dlx_deliveries.client, name) for name in ("overflow", "expire"))

    def run(self) -> int:
        """Look at every queue that has a limit; returns how many messages became letters.

        Raises:
            redis.exceptions.ConnectionError: what was taken and not stored yet is put back over the next connection.
        """
        moved, deadline = 0, monotonic() + _SPENT
        queues = list(self._channel.dlx_queues.items())
        self._first += 1  # each in turn: the first may take all the time there is
        for queue, settings in queues[self._first % max(len(queues), 1) :] + queues[: self._first % max(len(queues), 1)]:
            for name, move in self._moves(queue, settings):
                try:
                    while monotonic() < deadline:
                        found = move()
                        moved += found
                        if found < _BATCH:
                            break
                except redis.exceptions.ResponseError as exc:
                    logger.warning("%s of %r was not looked after: %s", name, queue, exc)
        return moved

    def _moves(self, queue: str, settings: QueueSettings) -> Iterator[tuple[str, Callable[[], int]]]:
        lists = [self._channel._q_for_pri(queue, priority) for priority in self._channel.priority_steps]
        if settings.max_length is not None:
            yield "max_length", partial(self._too_many, queue, settings, lists)
        if settings.message_ttl is not None:
            for list_key in lists:
                yield "message_ttl", partial(self._too_old, queue, settings, list_key)

    def _too_many(self, queue: str, settings: QueueSettings, lists: list[str]) -> int:
        found = self._move(
            queue,
            settings,
            Reason.MAXLEN,
            lambda first: self._overflow(
                self._keys(*lists), [settings.max_length, _BATCH, self._nonce, first, json.dumps(queue)]
            ),
        )
        if found:
            logger.warning("%d messages of %r became dead letters: it may hold %s", found, queue, settings.max_length)
        return found

    def _too_old(self, queue: str, settings: QueueSettings, list_key: str) -> int:
        ttl = int((settings.message_ttl or 0) * 1000)
        found = self._move(
            queue,
            settings,
            Reason.EXPIRED,
            lambda first: self._expire(
                self._keys(marks_key("", queue, list_key), list_key),
                [_BATCH, self._nonce, first, json.dumps(queue), ttl, ttl // _MARKS],
            ),
        )
        if found:
            logger.warning("%d messages of %r became dead letters: they waited for more than %g s", found, queue, ttl / 1000)
        return found

    def _keys(self, *names: str) -> list[str]:
        prefix, qos = self._channel.global_keyprefix, self._channel.qos
        return [prefix + name for name in (qos.unacked_key, qos.unacked_index_key, *names)]

    def _move(self, queue: str, settings: QueueSettings, reason: Reason, take: Callable[[int], list[bytes]]) -> int:
        channel, qos = self._channel, self._channel.qos
        first = self._number
        self._number += _BATCH
        tags = [f"{self._nonce}{first + n}" for n in range(1, _BATCH + 1)]
        try:
            items = take(first)
            letters = [
                Capture(letter, settings, qos.entry(tag), own_tag_of(item), item_of(letter))
                for item, tag in zip(items, tags, strict=False)
                for letter in [self._letter(queue, item, settings, reason)]
            ]
            channel.dlx_store.capture_all(letters)
        except Exception:
            channel.dlx_claims.orphaned(tags, delivered=False)
            raise
        return len(items)

    def _letter(self, queue: str, item: bytes, settings: QueueSettings, reason: Reason) -> Any:
        death = Death(
            reason=reason.value,
            queue=queue,
            died_at=int(time() * 1000),
            worker=self._worker,
            service=self._policy.service,
        )
        letter = compose(death, original_of(item), self._policy.dlq(queue))
        if settings.redact_stored and for_storage(letter, settings.redact):
            letter.original.raw = with_body(item, letter.original)
        return letter
