"""One app's cover over its queues, whichever broker they live on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import amqp
import kombu

from celery_dlx.brokers.base import DELIVERY_KEY, Delivery
from celery_dlx.brokers.queues import identity
from celery_dlx.brokers.rabbitmq.declare import Declarer
from celery_dlx.brokers.rabbitmq.letters import decode_body, original_of
from celery_dlx.brokers.rabbitmq.returns import RETURNS, count_of
from celery_dlx.letters import DeadLetter
from celery_dlx.policy.settings import Policy, QueueSettings
from celery_dlx.topology.arguments import source_arguments


class BrokerCover:
    """See `celery_dlx.brokers.queues.Cover`."""

    def __init__(self, policy: Callable[[], Policy]) -> None:
        self._policy = policy
        self._declarer: Declarer | None = None
        self._announced: set[str] = set()
        self.queue_classes: dict[type, type] = {}
        #: What becomes of a Redis list item that is no message; set by the worker.
        self.on_garbage: Callable[[str, bytes, Exception, bool], DeadLetter | None] | None = None

    @property
    def policy(self) -> Policy:
        return self._policy()

    @property
    def declarer(self) -> Declarer:
        if self._declarer is None:
            self._declarer = Declarer(self.policy)
        return self._declarer

    def settings(self, queue: str) -> QueueSettings | None:
        return self.policy.settings(queue)

    def arguments(self, queue: str, settings: QueueSettings, own: dict[str, Any]) -> dict[str, Any]:
        return source_arguments(self.policy, queue, settings, own)

    def declare(self, queue: kombu.Queue, channel: Any, plainly: Callable[[], Any]) -> Any:
        if isinstance(channel, amqp.Channel):
            return self.declarer.source(queue, channel, plainly)
        declared = plainly()
        name = identity(queue)
        if hasattr(channel, "dlx_letter_store") and name not in self._announced:
            channel.dlx_letter_store(self.policy).announce(name)
            self._announced.add(name)
        return declared

    def consumer(self, queue: kombu.Queue, channel: Any, callback: Callable[[Any], Any]) -> Callable[[Any], Any]:
        name = identity(queue)
        settings = self.policy.settings(name)
        if settings is None or (not settings.enabled and not _overrides(settings)):
            return _decoding(callback) if isinstance(channel, amqp.Channel) else callback
        if hasattr(channel, "dlx_cover"):
            if self.on_garbage is not None:  # only in a worker: other consumers of the queue get plain kombu
                channel.dlx_cover(queue.name, settings, self.policy, self.on_garbage)
            return callback
        if not isinstance(channel, amqp.Channel):
            return callback

        # py-amqp would decode bodies before anybody saw their bytes. Other consumers of this channel: see `_decoding`.
        channel.auto_decode = False

        def stamped(raw: Any) -> Any:
            exact = decode_body(raw)
            headers = raw.properties.get("application_headers") or {}
            delivery = Delivery(name, settings, partial(original_of, raw, exact))
            count = headers.get("x-delivery-count")
            if isinstance(count, int):
                delivery.deliveries = count + 1
            elif RETURNS in headers or raw.delivery_info.get("redelivered"):
                delivery.uncounted = bool(raw.delivery_info.get("redelivered")) and "x-acquired-count" not in headers
                delivery.deliveries = count_of(headers) + delivery.uncounted + 1
            raw.delivery_info[DELIVERY_KEY] = delivery
            return callback(raw)

        return stamped


def _decoding(callback: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The consumer of a queue that is not ours, on a channel that may also consume one that is."""

    def decoded(raw: Any) -> Any:
        decode_body(raw)
        return callback(raw)

    return decoded


def _overrides(settings: QueueSettings) -> bool:
    return any(
        value is not None
        for value in (
            settings.acks_late,
            settings.reject_on_worker_lost,
            settings.time_limit,
            settings.soft_time_limit,
        )
    )
