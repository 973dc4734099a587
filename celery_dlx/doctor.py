"""Is everything in place? Each check says what it found, how bad it is, and what to run next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from amqp.exceptions import AMQPError
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from celery_dlx.app import DeadLetters
from celery_dlx.errors import BrokerUnreachableError, DeadLetterError, PolicyError, UsageError
from celery_dlx.policy.settings import NEARLY_FULL, fill
from celery_dlx.topology.findings import CRITICAL, INFO, WARNING

OK = "ok"
#: Clocks that differ by more make `expires` and times of death lie, in seconds.
MAX_SKEW = 5.0
#: RabbitMQ closes the channel of a consumer that holds a message for longer, in seconds
#: (https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout).
CONSUMER_TIMEOUT = 1800.0
#: Waiting for workers to answer, in seconds.
_ANSWER = 1.5


@dataclass(frozen=True)
class Check:
    """One line: ``status`` is ok, warning or critical; ``next`` the command to run, or what to change."""

    name: str
    status: str
    message: str
    next: str = ""

    def as_dict(self) -> dict[str, str]:
        return {"check": self.name, "status": self.status, "message": self.message, "next": self.next}


def examine(dead: DeadLetters) -> Iterator[Check]:
    """Run all checks; one that cannot be made says so and does not keep the others from running."""
    policy_ok = True
    for check in _guarded("policy", lambda: _policy(dead)):
        policy_ok = policy_ok and check.status != CRITICAL
        yield check
    if not policy_ok:
        return
    try:
        kind = dead.driver
    except UsageError as exc:
        yield Check("broker", CRITICAL, str(exc), "correct the broker URL")
        return
    except Exception as exc:  # noqa: BLE001 - kombu looks the transport's name up in many ways
        yield Check("broker", CRITICAL, f"the broker URL cannot be used: {exc}", "correct the broker URL")
        return
    reachable = True
    broker = {"amqp": _rabbitmq, "redis": _redis}.get(kind)
    if broker is None:
        yield Check("broker", CRITICAL, f"transport {kind!r}", "use RabbitMQ (amqp://) or Redis (redis://)")
        return
    for check in _guarded("broker", lambda: broker(dead)):
        reachable = reachable and not (check.name == "broker" and check.status == CRITICAL)
        yield check
    yield from _guarded("settings", lambda: _settings(dead, kind))
    if reachable:
        yield from _guarded("retention", lambda: _retention(dead))
        yield from _guarded("workers", lambda: _workers(dead))


def _guarded(name: str, checks: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from checks()
    except BrokerUnreachableError as exc:
        yield Check(name, CRITICAL, str(exc), "start the broker, or correct the broker URL")
    except (DeadLetterError, RedisError, AMQPError, KombuError, OSError) as exc:
        yield Check(name, CRITICAL, (str(exc) or type(exc).__name__).splitlines()[0])


def _policy(dead: DeadLetters) -> Iterator[Check]:
    try:
        policy = dead.policy
    except PolicyError as exc:
        first = str(exc).splitlines()[0]
        more = f" (and {len(exc.problems) - 1} more)" if len(exc.problems) > 1 else ""
        yield Check("policy", CRITICAL, first + more, f"celery -A APP dlx policy check {exc.path}")
        return
    entries = "every queue" if policy.queues is None else f"{len(policy.queues)} entries"
    yield Check("policy", OK, f"{policy.path or 'built-in'}: {entries}")


def _rabbitmq(dead: DeadLetters) -> Iterator[Check]:
    with closing(dead.topology) as topology:
        version = topology.connection.connection.server_properties.get("version", "?")
        yield Check("broker", OK, f"RabbitMQ {version} at {topology.connection.as_uri()}")
        if topology.management is None:
            yield Check(
                "management",
                WARNING,
                "no management API configured: policies, bindings and clocks cannot be checked",
                "set topology.management_url or CELERY_DLX_MANAGEMENT_URL",
            )
        try:
            plan, _, names = topology.plan()
        except DeadLetterError as exc:
            yield Check("management", CRITICAL, str(exc), "correct topology.management_url, or the user's tags")
            return
        serious = [finding for finding in plan.findings if finding.severity != INFO]
        if plan.steps or serious:
            what = [f"{len(plan.steps)} changes to make"] * bool(plan.steps)
            what += [f"{finding.code} {finding.subject}: {finding.message}" for finding in serious]
            yield Check("topology", CRITICAL, "; ".join(what), "celery -A APP dlx topology plan")
        else:
            yield Check("topology", OK, f"{len(names)} queues in line")
        if topology.management is not None:
            skew = topology.management.clock_skew
            if skew is not None:
                yield _clock(skew, "the management API's")


def _redis(dead: DeadLetters) -> Iterator[Check]:
    from celery_dlx.brokers.redis.broker import misconfigured  # its client is imported only where it is used

    with dead.app.connection_for_read() as connection:
        try:
            channel = connection.default_channel
            with channel.conn_or_acquire() as client:
                before = time.time()
                seconds, microseconds = client.time()
                skew = seconds + microseconds / 1e6 - (before + time.time()) / 2
                server = _info(client, "server")
                yield Check("broker", OK, f"Redis {server.get('redis_version', '?')} at {connection.as_uri()}")
                yield from _redis_memory(_info(client, "memory"))
                yield from _redis_persistence(client, _info(client, "persistence"))
                if _info(client, "replication").get("role") in ("slave", "replica"):
                    yield Check(
                        "role", CRITICAL, "this is a replica: it takes no letters", "point the broker URL at the primary"
                    )
        except (ValueError, TypeError) as exc:
            yield Check("broker", CRITICAL, str(misconfigured(exc)), "correct the broker URL, or broker_transport_options")
            return
        except (KombuError, *connection.connection_errors) as exc:
            reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
            yield Check(
                "broker", CRITICAL, f"{connection.as_uri()}: {reason}", "start the broker, or correct the broker URL"
            )
            return
    yield _clock(skew, "Redis's")


def _info(client: Any, section: str) -> dict[str, Any]:
    try:
        return dict(client.info(section))
    except RedisError:  # managed services may forbid INFO
        return {}


def _redis_memory(memory: dict[str, Any]) -> Iterator[Check]:
    eviction = memory.get("maxmemory_policy")
    if eviction is None:
        yield Check("eviction", WARNING, "INFO memory is not permitted: the eviction policy cannot be seen")
    elif eviction != "noeviction":
        yield Check(
            "eviction",
            CRITICAL,
            f"maxmemory-policy {eviction}: waiting messages and letters may be dropped",
            "CONFIG SET maxmemory-policy noeviction",
        )
    else:
        yield Check("eviction", OK, "noeviction")


def _redis_persistence(client: Any, persistence: dict[str, Any]) -> Iterator[Check]:
    if not persistence:
        yield Check("persistence", WARNING, "INFO persistence is not permitted: it cannot be seen")
        return
    if persistence.get("aof_enabled"):
        yield Check("persistence", OK, "append-only file")
        return
    try:
        saves = bool(client.config_get("save").get("save"))
    except RedisError:
        saves = True
    if saves:
        yield Check(
            "persistence", WARNING, "snapshots only: a crash loses what came after the last", "CONFIG SET appendonly yes"
        )
    else:
        yield Check("persistence", WARNING, "none: a restart loses all messages and letters", "CONFIG SET appendonly yes")


def _clock(skew: float, whose: str) -> Check:
    if abs(skew) > MAX_SKEW:
        return Check(
            "clock", WARNING, f"{whose} clock differs by {skew:+.0f} s from this machine's", "synchronise clocks (NTP)"
        )
    return Check("clock", OK, f"{whose} clock agrees within {MAX_SKEW:.0f} s")


def _settings(dead: DeadLetters, kind: str) -> Iterator[Check]:
    conf, found = dead.app.conf, False
    late_anywhere = bool(conf.task_acks_late)
    for queue in dead.known_queues():
        settings = dead.policy.settings(queue)
        if settings is None:
            continue
        late = settings.acks_late if settings.acks_late is not None else bool(conf.task_acks_late)
        late_anywhere = late_anywhere or late
        limit = settings.time_limit or conf.task_time_limit
        if settings.reject_on_worker_lost and not late:
            found = True
            yield Check(
                "settings", WARNING, f"{queue}: reject_on_worker_lost without acks_late does nothing", "set acks_late: true"
            )
        if kind == "amqp" and late and limit and limit > CONSUMER_TIMEOUT:
            found = True
            yield Check(
                "settings",
                WARNING,
                f"{queue}: time_limit {limit:.0f} s with acks_late: RabbitMQ redelivers after its consumer_timeout (1800 s)",
                "raise consumer_timeout in rabbitmq.conf, or lower time_limit",
            )
        soft = settings.soft_time_limit or conf.task_soft_time_limit
        if limit and soft and soft >= limit:
            found = True
            yield Check(
                "settings", WARNING, f"{queue}: soft limit {soft:g} s is not below the hard one {limit:g} s", "lower it"
            )
    if late_anywhere and conf.worker_prefetch_multiplier == 0:
        found = True
        yield Check(
            "prefetch",
            WARNING,
            "worker_prefetch_multiplier 0 with late acknowledgement: one worker holds the whole queue",
            "set worker_prefetch_multiplier to 1 or more",
        )
    if not found:
        yield Check("settings", OK, "limits, acknowledgement and prefetch do not contradict each other")


def _retention(dead: DeadLetters) -> Iterator[Check]:
    nearly = False
    for row in dead.stats():
        settings = dead.policy.settings(row.queue)
        full = fill(settings, row.letters, row.extra.get("bytes")) if settings is not None else 0.0
        if full >= NEARLY_FULL:
            nearly = True
            message = f"{row.dlq} holds {row.letters} letters, {full:.0%} of what it may: soon each new one costs the oldest"
            yield Check("retention", WARNING, message, f"celery -A APP dlx export {row.queue} FILE")
    if not nearly:
        yield Check("retention", OK, f"no DLQ is fuller than {NEARLY_FULL:.0%} of its caps")


def _workers(dead: DeadLetters) -> Iterator[Check]:
    control = dead.app.control
    queues = control.inspect(timeout=_ANSWER).active_queues() or {}
    if not queues:
        yield Check("workers", WARNING, "no worker answers", "celery -A APP worker")
        return
    # A worker without the bootstep does not know the question, and answers with an error.
    found = control.broadcast("dlx_status", reply=True, timeout=_ANSWER) or []
    answers = {name: answer for reply in found for name, answer in reply.items()}
    for name in sorted(queues):
        consumed = [str(queue.get("name")) for queue in queues[name]]
        managed = [queue for queue in consumed if (settings := dead.policy.settings(queue)) is not None and settings.enabled]
        answer = answers.get(name)
        if isinstance(answer, dict) and "queues" in answer:
            missing = sorted(set(managed) - set(answer["queues"]))
            if missing:
                message = f"{name} runs another policy ({answer.get('policy')}), which leaves out {', '.join(missing)}"
                yield Check("workers", CRITICAL, message, "restart it with this policy")
            else:
                yield Check("workers", OK, f"{name} captures {', '.join(sorted(answer['queues'])) or 'nothing'}")
        elif managed and answer is None:
            yield Check("workers", WARNING, f"{name} did not answer in time", "run it again")
        elif managed:
            message = f"{name} consumes {', '.join(managed)} without the bootstep: what dies there is lost"
            yield Check("workers", CRITICAL, message, "restart it with an app that has DeadLetters(app, …)")
        else:
            yield Check("workers", OK, f"{name} consumes no managed queue")
