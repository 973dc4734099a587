"""The bootsteps: one looks after the topology before the worker starts, one is the worker's net.

Apps know them by name only (`TOPOLOGY`, `CAPTURE` in `celery_dlx.app`): a producer never imports this.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any
from weakref import proxy, ref

from amqp.exceptions import AMQPError
from celery import bootsteps

from celery_dlx.brokers.base import Capturer
from celery_dlx.brokers.cover import BrokerCover
from celery_dlx.brokers.queues import identity
from celery_dlx.brokers.rabbitmq.capture import RabbitMQCapturer
from celery_dlx.brokers.rabbitmq.frames import tolerant
from celery_dlx.brokers.rabbitmq.inspect import by_management
from celery_dlx.brokers.rabbitmq.management import management_of
from celery_dlx.brokers.redis.capture import RedisCapturer
from celery_dlx.brokers.redis.limits import Limits
from celery_dlx.brokers.redis.retention import Retention
from celery_dlx.errors import DeadLetterError
from celery_dlx.policy.settings import QueueSettings, management_url
from celery_dlx.topology.live import has_net
from celery_dlx.worker import remote  # noqa: F401 - registers its control command
from celery_dlx.worker.einfo import send_no_frames
from celery_dlx.worker.intake import Intake
from celery_dlx.worker.net import Net
from celery_dlx.worker.strategy import Strategies

logger = logging.getLogger("celery_dlx")

#: Time for the letters of the last tasks to be stored at shutdown, in seconds.
SHUTDOWN_TIMEOUT = 30.0
#: A worker's start does not wait longer than this for the management API, in seconds.
_MANAGEMENT_TIMEOUT = 3.0
#: Between looks at the length of source queues on Redis, in seconds.
_TRIM_EVERY = 1.0
#: Between looks at the caps of DLQs on Redis, in seconds. A death looks at those of its own.
_RETENTION_EVERY = 10.0
#: Between attempts to store letters that Redis did not take, in seconds.
_RETRY_EVERY = 5.0

#: Limits a pool does not keep (read in Celery's concurrency modules, 5.5 to 5.7).
_IGNORED_LIMITS = {
    "solo": ("time_limit", "soft_time_limit"),
    "threads": ("time_limit", "soft_time_limit"),
    "eventlet": ("time_limit", "soft_time_limit"),
    "gevent": ("soft_time_limit",),
}


def cover_of(app: Any) -> BrokerCover:
    """The cover that `DeadLetters` put over an app's queues."""
    cover: BrokerCover = app.amqp.queues_cls.dlx_cover
    return cover


class Topology(bootsteps.StartStopStep):  # type: ignore[misc]
    """Declares exchange, DLQs and bindings, and says what is not covered, before anything is consumed."""

    name = f"{__name__}.Topology"
    label = "dead-letter topology"
    requires = ("celery.worker.components:Timer",)

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        # Here and not in `start`: whether the pool has forked before that is chance.
        send_no_frames()

    def start(self, worker: Any) -> None:
        survive_frames(worker.app)
        try:
            check_worker(cover_of(worker.app), worker)
        except DeadLetterError as exc:
            logger.critical("%s", exc)
            raise SystemExit(exc.exit_code) from None


class Capture(bootsteps.StartStopStep):  # type: ignore[misc]
    """Puts strategies and hooks in place, and keeps the net open across reconnects."""

    name = f"{__name__}.Capture"
    label = "dead-letter capture"
    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        # Here and not in `start`: Tasks.start builds strategies and hands the hooks to the task consumer.
        self.net: Net | None = None
        self._timers: list[Any] = []
        cover = cover_of(consumer.app)
        capturer = make_capturer(cover, consumer.app, consumer.hostname)
        if capturer is None:
            logger.warning("no dead letters: the broker is neither RabbitMQ nor Redis")
            return
        capturer.eager = type(consumer.pool).__module__.endswith(".solo")
        service = cover.policy.service
        self.net = Net(consumer, capturer)
        if isinstance(capturer, RedisCapturer):
            cover.on_garbage = capturer.garbage
        consumer.strategies = Strategies(consumer, self.net, service)
        Intake(consumer, self.net, service)

    def start(self, consumer: Any) -> None:
        net = self.net
        if net is None:
            return
        net.capturer.open()
        # A loop that ended took its timers with it, or did not (5.6 all, 5.7 those added since, 5.5 none): begin anew.
        for entry in self._timers:
            consumer.timer.cancel(entry)
        repeat = consumer.timer.call_repeatedly
        self._timers = []
        channel = consumer.task_consumer.channel
        if hasattr(channel, "dlx_cover"):
            # Where tasks run in the loop itself, or spawning one waits for a free place, claims must not pile up in it.
            channel.dlx_claims.one_by_one = net.capturer.eager or consumer.hub is None
            policy = cover_of(consumer.app).policy
            channel.dlx_settle = net.acks.write
            channel.dlx_limits = Limits(proxy(channel), policy, consumer.hostname)
            channel.dlx_retention = Retention(proxy(channel), policy)
            every = max(float(channel.visibility_timeout) / 3, 0.2)
            for seconds, work, failure in (
                (every, lambda held: held.qos.renew(), "held messages were not renewed"),
                (_TRIM_EVERY, lambda held: held.dlx_limits.run(), "the limits of queues were not looked after"),
                (_RETENTION_EVERY, lambda held: held.dlx_retention.run(), "the caps of DLQs were not looked after"),
            ):
                self._timers.append(repeat(seconds, partial(_tend, ref(channel), work, failure)))
        if net.capturer.stores_on_reject:
            self._timers.append(repeat(_RETRY_EVERY, lambda: net.capturer.flush(0)))

    def register_with_event_loop(self, consumer: Any, hub: Any) -> None:
        if self.net is not None:
            self.net.register(hub)

    def stop(self, consumer: Any) -> None:
        if self.net is not None:
            self.net.unregister()

    def shutdown(self, consumer: Any) -> None:
        """After the pool has drained: the last letters, then their originals."""
        if self.net is None:
            return
        left = self.net.flush(SHUTDOWN_TIMEOUT)
        if left:
            logger.critical(
                "%d dead letters could not be stored in %.0fs; late-acknowledged messages among them come again",
                left,
                SHUTDOWN_TIMEOUT,
            )
        self.net.capturer.close()


def _tend(channel_ref: Any, work: Callable[[Any], Any], failure: str) -> None:
    """Timed work on a channel that may be gone; errors are for the consumer to meet, which reads from the same server."""
    channel = channel_ref()
    if channel is None or channel.closed or channel.connection is None:
        return
    try:
        work(channel)
    except Exception as exc:  # noqa: BLE001
        logger.warning("%s: %s", failure, exc)


def survive_frames(app: Any) -> None:
    """From now on, connections of this app outlive messages that py-amqp cannot decode."""
    if app.connection_for_read().transport.driver_name == "py-amqp":
        app.conf.broker_transport_options = tolerant(app.conf.broker_transport_options)


def make_capturer(cover: BrokerCover, app: Any, hostname: str) -> Capturer | None:
    """The net for the broker the app consumes from."""
    kind = app.connection_for_read().transport.driver_type
    if kind == "amqp":
        # Without heartbeats: the thread sleeps in select while nothing dies, and notices a dead peer by its confirms.
        return RabbitMQCapturer(lambda: app.connection_for_read(heartbeat=0), cover.policy, cover.declarer)
    if kind == "redis":
        return RedisCapturer(app.connection_for_read, cover.policy, hostname)
    return None


def check_worker(cover: BrokerCover, worker: Any) -> None:
    """Declare what the worker's queues need and warn of what will not be kept.

    Raises:
        TopologyError: the broker refuses something without which letters would be lost.
    """
    app = worker.app
    managed = {
        queue: settings
        for queue in app.amqp.queues.consume_from.values()
        if (settings := cover.settings(identity(queue))) is not None
    }
    if not managed:
        logger.warning("no dead letters: the policy %s names none of this worker's queues", cover.policy.path)
        return
    _warn_of_limits(worker, managed.values())
    connection = app.connection_for_read()
    try:
        connection.connect()
        channel = connection.default_channel
    except Exception as exc:  # noqa: BLE001 - Celery connects, waits and fails in its own way right after this
        logger.debug("no topology check: %s", exc)
        return
    try:
        if connection.transport.driver_type == "amqp":
            _declare_all(app, cover, connection, managed)
        elif connection.transport.driver_type == "redis":
            _check_redis(channel)
    finally:
        connection.release()


def _declare_all(app: Any, cover: BrokerCover, connection: Any, managed: dict[Any, QueueSettings]) -> None:
    plain = []
    try:
        covered = {queue: settings for queue, settings in managed.items() if settings.enabled}
        declared = _declare_at_once(app, cover, covered) if covered else set()
        rest = {queue: settings for queue, settings in managed.items() if identity(queue) not in declared}
        for queue, settings in rest.items():
            if settings.enabled:
                cover.declarer.dead_letter_queue(connection.connection, identity(queue), settings)
        for queue, settings in rest.items():
            queue(connection.default_channel).declare()
            if (
                settings.enabled
                and not (queue.exclusive or queue.no_declare)
                and (why := cover.declarer.uncovered(connection.connection, queue))
            ):
                plain.append((identity(queue), why))
    except DeadLetterError:
        raise
    except (AMQPError, OSError) as exc:
        logger.debug("no topology check: %s", exc)  # Celery meets the same error, and reports it
        return
    if cover.policy.via == "policy":
        plain = [(identity(queue), "attached by a RabbitMQ policy, or not at all") for queue in covered]
    if plain and (uncovered := _without_net(cover, connection, [name for name, _ in plain])):
        logger.warning(
            "queues %s live without the dead-lettering the policy asks for and stay as they are (%s). Tasks that fail are "
            "captured all the same; messages that only the broker sees die (TTL, overflow, delivery limit) are not. "
            "To cover those too, while everything runs: celery -A %s dlx topology apply (docs/rabbitmq.md)",
            ", ".join(map(repr, uncovered)),
            dict(plain)[uncovered[0]],
            app.main or "APP",
        )


def _declare_at_once(app: Any, cover: BrokerCover, queues: dict[Any, QueueSettings]) -> set[str]:
    connection = app.connection_for_read()
    try:
        connection.connect()
        return cover.declarer.declare_at_once(connection.connection, queues)
    except (AMQPError, OSError) as exc:
        logger.debug("declaring queues one by one: %s", exc)
        return set()
    finally:
        connection.collect()


def _without_net(cover: BrokerCover, connection: Any, queues: list[str]) -> list[str]:
    """Which of these queues no RabbitMQ policy covers; all of them where policies cannot be seen."""
    url = management_url(cover.policy)
    if url is None:
        return queues
    try:
        with closing(management_of(connection, url, timeout=_MANAGEMENT_TIMEOUT)) as management:
            live = by_management(management, cover.policy.exchange)
    except Exception as exc:  # noqa: BLE001 - advice only: whatever it is, the worker starts
        logger.warning("RabbitMQ policies cannot be seen: %s", exc)
        return queues
    return [queue for queue in queues if not has_net(live.queues.get(queue), cover.policy.exchange)]


def _check_redis(channel: Any) -> None:
    try:
        with channel.conn_or_acquire() as client:
            eviction = client.info("memory").get("maxmemory_policy", "noeviction")
    except Exception as exc:  # noqa: BLE001 - managed services may forbid INFO
        logger.debug("the eviction policy cannot be read: %s", exc)
        return
    if eviction != "noeviction":
        logger.warning(
            "Redis evicts keys when memory runs out (maxmemory-policy %s): it may drop waiting messages and dead letters "
            "whole; set it to noeviction",
            eviction,
        )


def _warn_of_limits(worker: Any, managed: Any) -> None:
    pool = worker.pool_cls.__module__.rsplit(".", 1)[-1].replace("thread", "threads")
    for limit in _IGNORED_LIMITS.get(pool, ()):
        names = sorted({settings.entry or "defaults" for settings in managed if getattr(settings, limit) is not None})
        if names:
            logger.warning("the %s pool does not keep %s, set for %s; use prefork", pool, limit, ", ".join(names))
