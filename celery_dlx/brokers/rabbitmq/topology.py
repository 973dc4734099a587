"""Plan, apply, verify, destroy: a policy file's topology on one RabbitMQ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from amqp.exceptions import AMQPError

from celery_dlx.brokers.rabbitmq import apply as applying
from celery_dlx.brokers.rabbitmq.inspect import by_amqp, by_management
from celery_dlx.brokers.rabbitmq.management import Management, ManagementDeniedError, management_of
from celery_dlx.brokers.rabbitmq.unreachable import connected
from celery_dlx.errors import TopologyError
from celery_dlx.policy.settings import Policy
from celery_dlx.topology.findings import Finding
from celery_dlx.topology.live import LiveBroker
from celery_dlx.topology.plan import Plan, Step, make_plan
from celery_dlx.topology.scope import conflicts, queues_in_scope


class RabbitMQTopology:
    """What `DeadLetters.topology` returns. Connects when first asked for something."""

    def __init__(
        self,
        connect: Callable[[], Any],
        policy: Policy,
        known_queues: Callable[[], Iterable[str]],
        management_url: str | None,
    ) -> None:
        self._connect = connect
        self._policy = policy
        self._known = known_queues
        self._url = management_url
        self._open: Any = None
        self._management: Management | None = None

    @property
    def connection(self) -> Any:
        """An open `kombu.Connection`.

        Raises:
            BrokerUnreachableError: there is none to be had.
        """
        if self._open is None:
            self._open = connected(self._connect())
        return self._open

    @property
    def management(self) -> Management | None:
        """The management API, if one is configured; credentials and virtual host are the broker URL's."""
        if self._management is None and self._url:
            self._management = management_of(self._connect(), self._url)
        return self._management

    def close(self) -> None:
        if self._open is not None:
            self._open.collect()
            self._open = None
        if self._management is not None:
            self._management.close()

    def look(self, queues: Iterable[str] = ()) -> LiveBroker:
        """What the broker has; over AMQP alone, of the queues that are named and known."""
        if self.management is not None:
            return by_management(self.management, self._policy.exchange)
        names = sorted({*self._known(), *queues})
        return by_amqp(self.connection, self._policy, names)

    def scope(self, live: LiveBroker, queues: Iterable[str] = ()) -> list[str]:
        """The queues a plan is about; those named by the caller alone, if any are.

        Raises:
            TopologyError: one that the policy does not manage.
        """
        named = sorted(set(queues))
        if not named:
            return queues_in_scope(self._policy, self._known(), live)
        for queue in named:
            if self._policy.settings(queue) is None:
                raise TopologyError(f"queue {queue!r}: no entry of {self._policy.path or 'the policy'} is about it; add one")
        return named

    def plan(self, queues: Iterable[str] = (), others: Iterable[Policy] = ()) -> tuple[Plan, LiveBroker, list[str]]:
        """The plan, what it was made from, and the queues it is about. ``others``: policies of other services."""
        queues = list(queues)
        live = self.look(queues)
        names = self.scope(live, queues)
        plan = make_plan(self._policy, names, live)
        plan.findings += self._conflicts(others, live)
        return plan, live, names

    def _conflicts(self, others: Iterable[Policy], live: LiveBroker) -> list[Finding]:
        others = list(others)
        return conflicts([self._policy, *others], live.queues) if others else []

    def apply(self, plan: Plan, live: LiveBroker) -> Iterator[tuple[Step, str | None]]:
        """Take a plan's steps; yields each with ``None`` or why it was not taken."""
        return applying.apply_plan(plan, self.connection, self._policy, self.management, live)

    def probe(self, live: LiveBroker) -> str | None:
        """Send a message to its death and see it arrive; returns why that could not be tried.

        Raises:
            TopologyError: it did not arrive.
        """
        management = self.management if live.may_set_policies and live.sees_policies else None
        try:
            applying.probe(self.connection, self._policy, management, live)
        except ManagementDeniedError as exc:
            return str(exc)
        except AMQPError as exc:
            return f"not permitted: {getattr(exc, 'reply_text', None) or exc}"
        return None

    def destroy(
        self, queues: Iterable[str], live: LiveBroker, exchange_too: bool = True
    ) -> Iterator[tuple[str, str, str | None]]:
        """Take everything of ours away; yields kind, name, and ``None`` or why it stays."""
        return applying.destroy(self.connection, self._policy, queues, self.management, live, exchange_too)
