"""Which DLQs can be read without harm."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from celery_dlx.brokers.rabbitmq.declare import SideChannel
from celery_dlx.brokers.rabbitmq.inspect import arguments_over_amqp, by_management
from celery_dlx.brokers.rabbitmq.management import management_of
from celery_dlx.errors import UnsafeQueueError
from celery_dlx.policy.settings import BUILT_IN, Policy
from celery_dlx.topology.arguments import dlq_arguments, version_tuple
from celery_dlx.topology.plan import finite_delivery_limit


def check_safe(connection: Any, policy: Policy, queue: str, management_url: str | None) -> bool:
    """See to it that the DLQ of a queue keeps what is put back; ``connection`` is an open `kombu.Connection`.

    Returns whether it decides at once on all that a consumer gets, before it answers: a quorum queue does, by its log, and
    lets the next consumer have what comes after.

    Raises:
        UnsafeQueueError: what is put back is counted, and deleted when it was put back often enough.
    """
    dlq = policy.dlq(queue)
    version = version_tuple(connection.connection.server_properties.get("version"))
    guess = dlq_arguments(policy.settings(queue) or BUILT_IN, version)
    with SideChannel(connection.connection) as side:
        found = arguments_over_amqp(side, dlq, guess)
    if found is None:
        return False
    if management_url:  # a policy may have lifted the limit: AMQP cannot tell
        with closing(management_of(connection, management_url)) as management:
            live = by_management(management, policy.exchange)
        if dlq in live.queues:
            found = live.queues[dlq]
    unknown = found.type == "unknown" and version >= (4,) and not management_url
    if not unknown and not finite_delivery_limit(found, version):
        return found.type == "quorum" and not found.setting("single-active-consumer")
    limit = found.setting("delivery-limit")
    raise UnsafeQueueError(
        f"{dlq!r} has a delivery limit of {'20, the default' if limit is None else limit}: letters that are looked at "
        "more often than that are deleted by the broker. Run `celery -A APP dlx topology apply` with a management API "
        "configured, or insist with --force"
    )
