"""Brings a broker in line with a plan, and takes it back. Every step may be repeated: what was interrupted is run again."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any
from uuid import uuid4

import amqp
from amqp.exceptions import ChannelError, NotFound

from celery_dlx.brokers.rabbitmq.declare import SideChannel
from celery_dlx.brokers.rabbitmq.inspect import clear_policy, set_policy
from celery_dlx.brokers.rabbitmq.management import Management, ManagementError
from celery_dlx.errors import BrokerUnreachableError, TopologyError
from celery_dlx.policy.settings import Policy
from celery_dlx.topology.arguments import EXCHANGE_TYPE, version_tuple
from celery_dlx.topology.live import LiveBroker, LivePolicy, LiveQueue
from celery_dlx.topology.plan import REMOVE, Plan, Step
from celery_dlx.topology.policies import PREFIX, as_command, clear_command, exact_pattern, policy_name

#: Waiting for the probe message to come out at the other end, in seconds.
_PROBE_TIMEOUT = 10.0


def apply_plan(
    plan: Plan, connection: Any, policy: Policy, management: Management | None, live: LiveBroker
) -> Iterator[tuple[Step, str | None]]:
    """Take the steps of a plan in their safe order; yields each with ``None``, or with why it was not taken.

    ``connection`` is an open `kombu.Connection`. A connection that breaks ends it: run it again, it converges.
    """
    version = version_tuple(connection.connection.server_properties.get("version"))
    if version[:2] != live.version[:2]:
        raise TopologyError(
            f"the broker is a RabbitMQ {version}, the management API one of {live.version}: it is another broker's"
        )
    homeless: set[str] = set()
    with SideChannel(connection.connection) as side:
        for step in plan.ordered():
            if step.kind == "policy" and _source_of(step, policy) & homeless:
                yield step, "skipped: without its exchange, DLQ and binding the queue would dead-letter into nothing"
                continue
            try:
                if step.kind == "policy":
                    yield step, _apply_policy(step, management, live)
                else:
                    _declare(step, side, policy)
                    yield step, None
            except (ChannelError, ManagementError) as exc:
                homeless.add("" if step.kind == "exchange" else step.name)
                yield step, str(getattr(exc, "reply_text", None) or exc)


def _source_of(step: Step, policy: Policy) -> set[str]:
    """What a policy step depends on: the exchange, and the DLQ of its queue."""
    return {"", policy.dlq(step.name.removeprefix(PREFIX))}


def _declare(step: Step, side: SideChannel, policy: Policy) -> None:
    if step.kind == "exchange":
        side.channel.exchange_declare(step.name, EXCHANGE_TYPE, durable=True, auto_delete=False)
    elif step.kind == "queue":
        side.channel.queue_declare(step.name, durable=True, auto_delete=False, arguments=step.value)
    else:
        side.channel.queue_bind(step.name, policy.exchange, step.value["routing_key"])


def _apply_policy(step: Step, management: Management | None, live: LiveBroker) -> str | None:
    if management is None or live.may_set_policies is False or not live.sees_policies:
        return f"may not be set by us; run: {command_for(step, live.vhost)}"
    if step.action == REMOVE:
        clear_policy(management, step.name)
    else:
        set_policy(management, step.value)
    return None


def command_for(step: Step, vhost: str) -> str:
    """The `rabbitmqctl` line for a policy step."""
    return clear_command(step.before, vhost) if step.action == REMOVE else as_command(step.value, vhost)


def probe(connection: Any, policy: Policy, management: Management | None, live: LiveBroker) -> None:
    """Prove that the broker dead-letters: a message that dies in a private queue must come out of a private DLQ.

    Nothing of it remains. With a management API the private queue gets its settings by a policy, as live queues do.

    Raises:
        TopologyError: it did not arrive.
    """
    name = f"{PREFIX}probe.{uuid4().hex}"
    arguments: dict[str, Any] = {"x-expires": 60_000}
    settings = {"dead-letter-exchange": policy.exchange, "dead-letter-routing-key": name}
    if management is not None:
        priority = max((found.priority for found in live.policies or ()), default=0) + 1
        temporary = LivePolicy(policy_name(name), exact_pattern(name), "queues", settings, priority)
        set_policy(management, temporary)
    else:
        arguments.update({f"x-{key}": value for key, value in settings.items()})
    try:
        with SideChannel(connection.connection) as side:
            _probe(side, policy.exchange, name, arguments)
    finally:
        if management is not None:
            clear_policy(management, policy_name(name))


def _probe(side: SideChannel, exchange: str, name: str, arguments: dict[str, Any]) -> None:
    channel = side.channel
    dlq = f"{name}.dlq"
    # Exclusive: gone with this connection, whatever happens.
    channel.queue_declare(dlq, exclusive=True, auto_delete=False, durable=False)
    channel.queue_bind(dlq, exchange, name)
    channel.queue_declare(name, exclusive=True, auto_delete=False, durable=False, arguments=arguments)
    deadline = time.monotonic() + _PROBE_TIMEOUT
    try:
        while time.monotonic() < deadline:
            # Again and again: a policy that was set this moment may reach the queue after the first message.
            channel.basic_publish(amqp.Message(b"probe", expiration="1"), "", name)
            for _ in range(10):
                if channel.basic_get(dlq, no_ack=True) is not None:
                    return
                time.sleep(0.02)
        raise TopologyError(
            f"a message that died in a private queue did not come out of exchange {exchange!r} in {_PROBE_TIMEOUT:.0f}s; is "
            "the exchange a direct one, and may this user write to it?"
        )
    finally:
        if channel.is_open:
            channel.queue_delete(name)
            channel.queue_delete(dlq)


def destroy(
    connection: Any,
    policy: Policy,
    queues: Iterable[str],
    management: Management | None,
    live: LiveBroker,
    exchange_too: bool = True,
) -> Iterator[tuple[str, str, str | None]]:
    """Take the topology away, in reverse order; yields kind, name, and ``None`` or why it is still there.

    A DLQ goes only when it is empty and nothing is on its way to it.
    """
    with SideChannel(connection.connection) as side:
        for queue in queues:
            name, dlq = policy_name(queue), policy.dlq(queue)
            there = {found.name: found for found in live.policies or () if found.name in (name, policy_name(dlq))}
            reason = _cannot_go(side, queue, dlq, live)
            if live.policies is None and _may_have(live.queues.get(queue), name):
                command = clear_command(LivePolicy(name, ""), live.vhost)
                reason = reason or f"a policy of ours may be on it, which cannot be seen; run: {command}"
            if name in there:
                reason = reason or _clear(management, there[name], live)
                yield "policy", name, reason
            if dlq in live.queues:
                reason = reason or _delete_empty(side, policy.exchange, dlq, queue)
                yield "queue", dlq, reason
            if policy_name(dlq) in there:  # last: without it what is left in the DLQ might not be looked at safely
                yield "policy", policy_name(dlq), reason or _clear(management, there[policy_name(dlq)], live)
        if exchange_too and policy.exchange in live.exchanges:
            yield "exchange", policy.exchange, _delete_exchange(side, policy.exchange)


def _may_have(queue: LiveQueue | None, policy: str) -> bool:
    return queue is not None and queue.policy in (None, policy) and "x-dead-letter-exchange" not in queue.arguments


def _cannot_go(side: SideChannel, queue: str, dlq: str, live: LiveBroker) -> str | None:
    source = live.queues.get(queue)
    if source is not None and source.held:
        return f"{source.held} messages of {queue!r} wait to be dead-lettered, and would be lost; wait for messages_dlx 0"
    try:
        found = side.counted(dlq)
    except BrokerUnreachableError as exc:
        return str(exc)
    if found is None:
        return None
    # Over AMQP only those that nobody is looking at are counted.
    letters = max(found.message_count, live.queues[dlq].messages if dlq in live.queues else 0)
    if letters:
        return f"{letters} letters would be lost; replay, export or purge them first"
    if found.consumer_count:
        return f"{found.consumer_count} programs are reading {dlq!r}; wait for them"
    return None


def _clear(management: Management | None, found: LivePolicy, live: LiveBroker) -> str | None:
    if management is None or live.may_set_policies is False:
        return f"may not be removed by us; run: {clear_command(found, live.vhost)}"
    try:
        clear_policy(management, found.name)
    except ManagementError as exc:
        return str(exc)
    return None


def _delete_empty(side: SideChannel, exchange: str, dlq: str, queue: str) -> str | None:
    """Unbind, look, delete: what arrives after the look has no way in. (Quorum queues refuse `if-empty`.)

    Of a queue without a leader the broker says at once that it is empty; what it gives out, or not, it says itself.
    """
    reason = "letters came meanwhile, or somebody reads it; replay, export or purge them first"
    try:
        raw = side.channel.basic_get(dlq)
        if raw is not None:
            side.channel.basic_reject(raw.delivery_tag, requeue=True)
            return reason
        side.channel.queue_unbind(dlq, exchange, queue)
        live = side.counted(dlq, wait=0)  # what dies meanwhile is lost
        if live is None or not (live.message_count or live.consumer_count):
            side.channel.queue_delete(dlq)
            return None
    except NotFound:
        return None
    except ChannelError as exc:
        reason = str(exc.reply_text)
    except BrokerUnreachableError as exc:
        reason = str(exc)
    with suppress(ChannelError):
        side.channel.queue_bind(dlq, exchange, queue)  # it stays: then letters must find it
    return reason


def _delete_exchange(side: SideChannel, exchange: str) -> str | None:
    try:
        side.channel.exchange_delete(exchange, if_unused=True)
    except NotFound:
        return None
    except ChannelError as exc:
        return f"other queues are bound to it, or it may not be deleted: {exc.reply_text}"
    return None
