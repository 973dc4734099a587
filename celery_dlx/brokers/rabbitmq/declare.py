"""Declares what dead-lettering needs, and never declares over what is already there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import kombu
from amqp.exceptions import AccessRefused, ChannelError, NotFound, PreconditionFailed

from celery_dlx.brokers.queues import identity
from celery_dlx.brokers.rabbitmq.counting import BUSY, counted
from celery_dlx.brokers.rabbitmq.pipeline import OneShotChannel
from celery_dlx.errors import TopologyError
from celery_dlx.policy.settings import Policy, QueueSettings
from celery_dlx.topology.arguments import EXCHANGE_TYPE, MAX_NAME, dlq_arguments, version_tuple

logger = logging.getLogger("celery_dlx")

#: Channels that share the declaring of many queues.
_CHANNELS = 4


class SideChannel:
    """A channel beside the caller's, opened again after each error: the broker closes a channel it refuses (404, 406)."""

    def __init__(self, connection: Any) -> None:
        self._connection = ref(connection)
        self._channel: Any = None

    def __enter__(self) -> SideChannel:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        if self._channel is not None and self._channel.is_open:
            self._channel.close()

    @property
    def channel(self) -> Any:
        if self._channel is None or not self._channel.is_open:
            self._channel = self._connection().channel()  # type: ignore[union-attr]
        return self._channel

    def live_queue(self, name: str) -> Any:
        """The queue's name, message and consumer count; ``None`` if there is no such queue. Needs no permission.

        The counts of a quorum queue that is busy are 0: see `counted`.
        """
        try:
            return self.channel.queue_declare(name, passive=True)
        except NotFound:
            return None

    def counted(self, name: str, wait: float = BUSY) -> Any:
        """`live_queue`, with counts that the queue itself gives within ``wait`` seconds.

        Raises:
            BrokerUnreachableError: it does not say.
        """
        try:
            return counted(self.channel, name, wait)
        except NotFound:
            return None

    def has_exchange(self, name: str) -> bool:
        try:
            self.channel.exchange_declare(name, EXCHANGE_TYPE, passive=True)
        except NotFound:
            return False
        return True


class Declarer:
    """Keeps, per connection, what was already declared on it: a reconnect declares again."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        #: Queues that dead-letter by themselves, as far as is known: those we created, or found just as we would.
        self._covered: set[str] = set()
        self._warned: set[str] = set()
        self._known: WeakKeyDictionary[Any, tuple[set[str], SideChannel]] = WeakKeyDictionary()

    def _state(self, connection: Any) -> tuple[set[str], SideChannel]:
        state = self._known.get(connection)
        if state is None:
            state = self._known[connection] = (set(), SideChannel(connection))
        return state

    def source(self, queue: kombu.Queue, channel: Any, plainly: Callable[[], Any]) -> Any:
        """Declare a source queue unless it lives; its dead-letter queue first, for a message may die at once."""
        name, settings = identity(queue), self._policy.settings(identity(queue))
        connection = channel.connection
        if settings is not None and settings.enabled:
            try:
                self.dead_letter_queue(connection, name, settings)
            except (TopologyError, ChannelError) as exc:
                # A worker looks first, and does not start. A producer must be able to send what it could send before.
                if name not in self._warned:
                    self._warned.add(name)
                    logger.warning("no dead-letter queue for %r: %s", name, _text(exc))
        if queue.exclusive or not queue.name:
            return plainly()  # ours alone by definition: nobody else can have declared it differently
        _, side = self._state(connection)
        live = side.live_queue(queue.name)
        if live is None:
            try:
                # On the side channel too: should another process win the race, only that one is closed.
                live = queue(side.channel).queue_declare_here()
                self._covered.add(name)
            except PreconditionFailed:
                live = side.live_queue(queue.name)
                if live is None:  # not a race: the broker dislikes the arguments themselves
                    raise
        return live

    def dead_letter_queue(self, connection: Any, queue: str, settings: QueueSettings) -> None:
        """Declare exchange → DLQ → binding, in the order that never leaves a letter without a home.

        Raises:
            TopologyError: the broker refuses; says which permission is missing.
        """
        done, side = self._state(connection)
        if queue in done:
            return
        dlq = self._policy.dlq(queue)
        if len(dlq.encode()) > MAX_NAME:
            raise TopologyError(f"queue {dlq!r}: expected a name of at most {MAX_NAME} bytes; shorten `topology.queue`")
        version = version_tuple(connection.server_properties.get("version"))
        if "" not in done:
            self._exchange(side)
            done.add("")
        live = side.live_queue(dlq) is not None
        if not live:
            self._create(side, dlq, dlq_arguments(settings, version))
        self._bind(side, dlq, queue, live)
        done.add(queue)

    def declare_at_once(self, connection: Any, queues: Mapping[kombu.Queue, QueueSettings]) -> set[str]:
        """Declare many source queues and their DLQs without waiting for each; returns the names of those that were.

        For a new deployment, or one that is just as we would declare it. Where anything differs or is refused, the
        broker closes the channel at that point; what it did before is what would have been done anyhow. The queues that
        are not returned are to be declared one by one, on another ``connection``: this one may still hear of refusals.
        """
        done, side = self._state(connection)
        if "" not in done:
            self._exchange(side)
            done.add("")
        version = version_tuple(connection.server_properties.get("version"))
        # What is unusual waits for its own answer.
        everything = [
            (queue, settings)
            for queue, settings in queues.items()
            if not (queue.exclusive or queue.no_declare or queue.on_declared or not queue.name)
            and len(self._policy.dlq(identity(queue)).encode()) <= MAX_NAME
        ]
        # Creating a quorum queue takes the broker milliseconds: a few channels share the waiting.
        shares = [share for number in range(_CHANNELS) if (share := everything[number::_CHANNELS])]
        lines = [(share, OneShotChannel(connection)) for share in shares]
        for _, channel in lines:  # all of them first: opening waits, and would meet another one's refusal
            channel.open()
        for share, channel in lines:
            for queue, settings in share:
                name = identity(queue)
                dlq = self._policy.dlq(name)
                arguments = dlq_arguments(settings, version)
                channel.queue_declare(dlq, durable=True, auto_delete=False, arguments=arguments, nowait=True)
                channel.queue_bind(dlq, self._policy.exchange, name, nowait=True)
                queue(channel).queue_declare_here(nowait=True)
        declared = {
            identity(queue)
            for share, channel in lines
            if _accepted(channel, self._policy.dlq(identity(share[-1][0])))
            for queue, _ in share
        }
        done |= declared
        self._covered |= declared
        return declared

    def is_covered(self, queue: str) -> bool:
        """Whether a message of this queue that is rejected goes to the DLQ."""
        return queue in self._covered and self._policy.via == "arguments"

    def uncovered(self, connection: Any, queue: kombu.Queue) -> str | None:
        """Why a live queue does not have the arguments we would give it; ``None`` if it has them, or nobody can tell."""
        with SideChannel(connection) as side:
            try:
                queue(side.channel).queue_declare_here()
            except PreconditionFailed as exc:
                return _text(exc)
            except AccessRefused:
                return None
        self._covered.add(identity(queue))
        return None

    def _exchange(self, side: SideChannel) -> None:
        exchange = self._policy.exchange
        if side.has_exchange(exchange):
            return
        try:
            side.channel.exchange_declare(exchange, EXCHANGE_TYPE, durable=True, auto_delete=False)
        except AccessRefused as exc:
            raise self._refused(f"exchange {exchange!r}", exc) from exc
        except PreconditionFailed as exc:
            raise TopologyError(
                f"exchange {exchange!r}: expected a {EXCHANGE_TYPE} exchange, the broker has another: {_text(exc)}; "
                "name another one in `topology.exchange`"
            ) from exc

    def _create(self, side: SideChannel, dlq: str, arguments: dict[str, Any]) -> None:
        try:
            side.channel.queue_declare(dlq, durable=True, auto_delete=False, arguments=arguments)
        except AccessRefused as exc:
            raise self._refused(f"queue {dlq!r}", exc) from exc
        except PreconditionFailed:
            if side.live_queue(dlq) is None:  # lost a race against nobody: the broker dislikes the arguments
                raise

    def _bind(self, side: SideChannel, dlq: str, queue: str, live: bool) -> None:
        try:
            side.channel.queue_bind(dlq, self._policy.exchange, queue)
        except AccessRefused as exc:
            if live:  # an administrator made the queue, and so probably the binding: AMQP cannot tell
                logger.warning("cannot see whether %r is bound to %r: %s", dlq, self._policy.exchange, _text(exc))
                return
            raise self._refused(f"binding of {dlq!r} to {self._policy.exchange!r}", exc) from exc

    def _refused(self, what: str, exc: Exception) -> TopologyError:
        return TopologyError(
            f"{what}: the broker user may not declare it ({_text(exc)}); let an administrator declare it, or grant "
            f"configure, write and read on {self._policy.exchange!r} and on the queues {self._policy.queue_template!r}"
        )


def _accepted(channel: OneShotChannel, queue: str) -> bool:
    """Whether the broker did all it was told on a channel: it answers there, and has not closed it."""
    try:
        if channel.is_open:
            channel.queue_declare(queue, passive=True)
            return bool(channel.is_open)
    except ChannelError as exc:  # of this channel, or of another one that is being closed meanwhile
        logger.debug("declaring queues one by one: %s", _text(exc))
    return False


def _text(exc: Exception) -> str:
    """The broker's own sentence out of an AMQP error."""
    return str(getattr(exc, "reply_text", None) or exc)
