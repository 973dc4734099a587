"""Finds out what a broker has: by the management API, or by what AMQP alone gives away."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from amqp.exceptions import AccessRefused, PreconditionFailed, ResourceLocked

from celery_dlx.brokers.rabbitmq.declare import SideChannel
from celery_dlx.brokers.rabbitmq.management import Management, ManagementDeniedError, ManagementError
from celery_dlx.policy.settings import Policy
from celery_dlx.topology.arguments import EXCHANGE_TYPE, dlq_arguments, source_arguments, version_tuple
from celery_dlx.topology.live import LiveBroker, LivePolicy, LiveQueue

#: Fresh (a queue's own page lags seconds behind after a policy changed), and small.
_FRESH = "disable_stats=true&enable_queue_totals=true"
#: The broker names one argument that differs per refusal; more than this many do not occur.
_MOST_ARGUMENTS = 20
_DIFFERS = re.compile(r"inequivalent arg '(?P<name>[^']+)' for queue .* but current is (?P<current>.*)$", re.DOTALL)
_VALUE = re.compile(r"(?:the value )?'(?P<value>.*?)'(?: of type '(?P<type>\w+)')?$", re.DOTALL)


def by_management(management: Management, exchange: str) -> LiveBroker:
    """Look at a whole virtual host, in a number of requests that does not grow with its queues.

    Raises:
        BrokerUnreachableError: the API does not answer.
        ManagementDeniedError: not for this user.
    """
    vhost = management.vhost
    overview = management.get("overview") or {}
    if not overview.get("rabbitmq_version"):
        raise ManagementError(f"{management.url}: no version of RabbitMQ in its answer; is this its management API?")
    listed = management.get("queues", vhost, query=_FRESH)
    if listed is None:
        raise ManagementError(f"{management.url}: there is no virtual host {vhost!r}; check the broker URL")
    tags = (management.get("whoami") or {}).get("tags", [])
    tags = tags.split(",") if isinstance(tags, str) else list(tags)
    policies, limits = _policies(management, "policies"), _policies(management, "operator-policies")
    queues = {found["name"]: _queue(found) for found in listed}
    for queue in queues.values():
        queue.given, queue.above = _definition(policies, queue.policy), _definition(limits, queue.operator_policy)
    if policies is None or any(queue.setting("dead-letter-strategy") == "at-least-once" for queue in queues.values()):
        # Only the (older, larger) listing with statistics tells how many messages are held back, and what policies say
        # to a user who may not see them.
        for found in management.get("queues", vhost) or ():
            if found["name"] in queues:
                queues[found["name"]].held = found.get("messages_dlx") or 0
                if policies is None:
                    queues[found["name"]].given = found.get("effective_policy_definition") or {}
    bindings = management.get("exchanges", vhost, exchange, "bindings", "source") or ()
    return LiveBroker(
        version=version_tuple(overview.get("rabbitmq_version")),
        vhost=vhost,
        exchanges={x["name"]: (x["type"], bool(x["durable"])) for x in management.get("exchanges", vhost) or ()},
        queues=queues,
        bindings={(b["destination"], b["routing_key"]) for b in bindings if b["destination_type"] == "queue"},
        policies=policies,
        may_set_policies=bool({"policymaker", "administrator"} & set(tags)),
        user=management.user,
    )


def _queue(found: dict[str, Any]) -> LiveQueue:
    arguments = found.get("arguments") or {}
    return LiveQueue(
        name=found["name"],
        type=str(found.get("type") or arguments.get("x-queue-type") or "classic").rsplit("_", 1)[-1],
        arguments=arguments,
        durable=bool(found.get("durable", True)),
        auto_delete=bool(found.get("auto_delete")),
        exclusive=bool(found.get("exclusive") or found.get("owner_pid_details")),
        policy=found.get("policy") or None,
        operator_policy=found.get("operator_policy") or None,
        messages=found.get("messages") or 0,
    )


def _definition(policies: list[LivePolicy] | None, name: str | None) -> Mapping[str, Any]:
    """What a policy says (the fresh listing of queues names it and leaves its definition out)."""
    return next((policy.definition for policy in policies or () if policy.name == name), {})


def _policies(management: Management, kind: str) -> list[LivePolicy] | None:
    try:
        found = management.get(kind, management.vhost)
    except ManagementDeniedError:  # the tag management alone does not show policies
        return None
    return [
        LivePolicy(p["name"], p["pattern"], p.get("apply-to", "all"), p.get("definition") or {}, int(p.get("priority") or 0))
        for p in found or ()
    ]


def set_policy(management: Management, policy: LivePolicy) -> None:
    body = {
        "pattern": policy.pattern,
        "definition": dict(policy.definition),
        "priority": policy.priority,
        "apply-to": policy.apply_to,
    }
    management.put("policies", management.vhost, policy.name, body=body)


def clear_policy(management: Management, name: str) -> None:
    management.delete("policies", management.vhost, name)


def by_amqp(connection: Any, policy: Policy, queues: Iterable[str]) -> LiveBroker:
    """Look at the queues that are named, and at nothing else; ``connection`` is an open `kombu.Connection`."""
    amqp = connection.connection
    version = version_tuple(amqp.server_properties.get("version"))
    live = LiveBroker(version, connection.virtual_host or "/", {}, {}, user=connection.userid or "")
    with SideChannel(amqp) as side:
        if (exchange := _exchange(side, policy.exchange)) is not None:
            live.exchanges[policy.exchange] = exchange
        for queue in queues:
            settings = policy.settings(queue)
            if settings is None:
                continue
            for name, guess in (
                (queue, source_arguments(policy, queue, settings)),
                (policy.dlq(queue), dlq_arguments(settings, version)),
            ):
                found = arguments_over_amqp(side, name, guess)
                if found is not None:
                    live.queues[name] = found
    return live


def _exchange(side: SideChannel, name: str) -> tuple[str, bool] | None:
    if not side.has_exchange(name):
        return None
    try:
        side.channel.exchange_declare(name, EXCHANGE_TYPE, durable=True, auto_delete=False)
    except PreconditionFailed as exc:
        current = str(exc).rsplit("'", 2)[-2:-1]
        return (current[0], True) if "'type'" in str(exc) and current else (EXCHANGE_TYPE, False)
    except AccessRefused:
        pass  # it is there; what it is like cannot be asked
    return EXCHANGE_TYPE, True


def arguments_over_amqp(side: SideChannel, name: str, guess: dict[str, Any]) -> LiveQueue | None:
    """A live queue's arguments, found by declaring it as guessed: each refusal (406) names one that differs, and its value.

    Nothing is created: the queue is looked for first. ``None``: there is none.
    """
    try:
        live = side.live_queue(name)
    except ResourceLocked:
        return LiveQueue(name, "unknown", exclusive=True)
    if live is None:
        return None
    arguments, durable, auto_delete = dict(guess), True, False
    for _ in range(_MOST_ARGUMENTS):
        try:
            side.channel.queue_declare(name, durable=durable, auto_delete=auto_delete, arguments=arguments)
        except PreconditionFailed as exc:
            match = _DIFFERS.search(str(exc.reply_text))
            if match is None:
                break
            argument = match["name"]
            value = _value(match["current"], isinstance(arguments.get(argument), int))
            if argument == "durable":
                durable = value in (True, "true")
            elif argument == "auto_delete":
                auto_delete = value in (True, "true")
            elif value is None:
                if arguments.pop(argument, None) is None:
                    break
            elif arguments.get(argument) == value:
                break
            else:
                arguments[argument] = value
        except (AccessRefused, ResourceLocked):
            break
        else:
            kind = str(arguments.get("x-queue-type") or "classic")
            return LiveQueue(name, kind, arguments, durable, auto_delete, messages=live.message_count)
    return LiveQueue(name, "unknown", {}, durable, auto_delete, messages=live.message_count)


def _value(text: str, numeric: bool) -> Any:
    """What the broker says of one argument; where both sides have it, it leaves out the type: then it is ours."""
    text = text.strip()
    if text.startswith("none"):
        return None
    match = _VALUE.search(text)
    value = match["value"] if match else text.strip("'")
    if match and match["type"]:
        numeric = match["type"] not in ("longstr", "bool")
    try:
        return int(value) if numeric else value
    except ValueError:
        return value
