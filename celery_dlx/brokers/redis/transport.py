"""kombu's Redis transport, with deliveries that know their queue and deaths that leave a letter.

Installed by replacing the aliases in `TRANSPORT_ALIASES`: an explicit `broker_transport` would be lost on failover, for
`Connection.switch()` takes the transport from the URL again. Every connection of the process gets these classes; they
do nothing new until a covered queue is consumed (`Channel.dlx_cover`). Control, event and result queues never are.
"""

from __future__ import annotations

import logging
import uuid
from collections import deque
from collections.abc import Callable
from functools import cached_property
from typing import Any

import redis
from kombu.transport import redis as stock
from kombu.utils.encoding import bytes_to_str

from celery_dlx.brokers.redis.claims import Claims
from celery_dlx.brokers.redis.deliveries import Deliveries
from celery_dlx.brokers.redis.letters import parse_item
from celery_dlx.brokers.redis.qos import TAG, Inbound, QoS
from celery_dlx.brokers.redis.sentinel import SentinelConnection, SentinelSSLConnection
from celery_dlx.brokers.redis.store import Capture, LetterStore
from celery_dlx.brokers.redis.waiting import Poller
from celery_dlx.letters import DeadLetter
from celery_dlx.policy.settings import Policy, QueueSettings

logger = logging.getLogger("celery_dlx")

#: Makes the letter of an item that is no message, if the policy wants one; stores it too, if nothing else holds the item.
OnGarbage = Callable[[str, bytes, Exception, bool], DeadLetter | None]


class _RecordsReplies:
    """Mixin over a redis client: keeps the last BRPOP reply, so that an item kombu cannot read is not lost with it."""

    dlx_channel: Any = None

    def parse_response(self, connection: Any, command_name: str, **options: Any) -> Any:
        reply = super().parse_response(connection, command_name, **options)  # type: ignore[misc]
        if command_name == "BRPOP" and self.dlx_channel is not None and reply:
            channel = self.dlx_channel
            channel.dlx_inbound = Inbound(channel.dlx_queue_of(bytes_to_str(reply[0])), reply[1])
        return reply


#: Queues and items of messages that Redis gave out and whose registration it did not take.
_homeless: deque[tuple[str, bytes]] = deque()
_recording_classes: dict[type, type] = {}


def _recording(client_class: type) -> type:
    if client_class not in _recording_classes:
        _recording_classes[client_class] = type("RecordingRedis", (_RecordsReplies, client_class), {})
    return _recording_classes[client_class]


class ChannelMixin:
    """Over kombu's Redis channels."""

    QoS = QoS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: The item being handled, until it is a delivery.
        self.dlx_inbound: Inbound | None = None
        self.dlx_queues: dict[str, QueueSettings] = {}
        self.dlx_store: LetterStore | None = None
        self.dlx_on_garbage: OnGarbage | None = None
        #: Sends the acknowledgements that wait for company.
        self.dlx_settle: Callable[[], None] | None = None
        self.dlx_claims = Claims(self, f"{TAG}{uuid.uuid4().hex[:20]}:")
        super().__init__(*args, **kwargs)

    def dlx_cover(self, queue: str, settings: QueueSettings, policy: Policy, on_garbage: OnGarbage) -> None:
        """From now on, deliveries of this queue are ours."""
        if self.dlx_store is None:
            self.dlx_store = self.dlx_letter_store(policy)
        self.dlx_rehome()
        self.dlx_queues[queue] = settings
        self.dlx_on_garbage = on_garbage
        self.dlx_claims.open()

    def basic_consume(self, queue: str, no_ack: bool = False, *args: Any, **kwargs: Any) -> Any:
        if no_ack and queue not in self._fanout_queues:  # type: ignore[attr-defined]
            self.dlx_claims.forbid()
        return super().basic_consume(queue, no_ack, *args, **kwargs)  # type: ignore[misc]

    def dlx_letter_store(self, policy: Policy) -> LetterStore:
        client = redis.Redis(connection_pool=self.pool)  # type: ignore[attr-defined]
        return LetterStore(client, self.global_keyprefix, policy)  # type: ignore[attr-defined]

    @cached_property
    def dlx_deliveries(self) -> Deliveries:
        client = redis.Redis(connection_pool=self.pool)  # type: ignore[attr-defined]
        return Deliveries(client, self.global_keyprefix)  # type: ignore[attr-defined]

    @property
    def dlx_home(self) -> str:
        """What a later channel has in common with this one if it finds the same messages."""
        return str(self.connection.client.as_uri())  # type: ignore[attr-defined]

    def dlx_next_tag(self) -> str:
        return self.dlx_claims.next_tag()

    def dlx_queue_of(self, key: str) -> str:
        """The queue of a list: priorities have lists of their own."""
        return key.rsplit(self.sep, 1)[0]  # type: ignore[attr-defined]

    def dlx_list_key(self, queue: str, payload: Any) -> str:
        """The list a message of a queue lies in: its priority's own; the default one's if that is no number."""
        try:
            priority = self._get_message_priority(payload, reverse=False)  # type: ignore[attr-defined]
        except Exception:  # noqa: BLE001 - kombu does not expect `Infinity`
            priority = self.default_priority  # type: ignore[attr-defined]
        return str(self._q_for_pri(queue, priority))  # type: ignore[attr-defined]

    def dlx_rehome(self) -> None:
        """Push back what was taken from its list and could not be registered."""
        while _homeless and self.dlx_store is not None:
            queue, item = _homeless[0]
            self.dlx_store.client.rpush(self.dlx_store.prefix + self.dlx_list_key(queue, parse_item(item)), item)
            _homeless.popleft()

    def dlx_garbage(self, inbound: Inbound, exc: Exception) -> None:
        """An item that is no message becomes a letter, where its queue is covered; else the worker ends, as it does stock.

        Raises:
            Exception: ``exc``, or that of the connection.
        """
        settings = self.dlx_queues.get(inbound.queue)
        tag, qos = inbound.tag, self.qos  # type: ignore[attr-defined]
        if settings is None or self.dlx_on_garbage is None or self.dlx_store is None:
            if tag is not None:
                qos.drop(tag, inbound.queue)
            raise exc
        letter = self.dlx_on_garbage(inbound.queue, inbound.item, exc, tag is None)
        if tag is None:
            return
        try:
            if letter is None:
                qos.drop(tag, inbound.queue)
            else:
                self.dlx_store.capture(Capture(letter, settings, qos.entry(tag)))
        except redis.exceptions.ResponseError as refusal:
            logger.critical("Redis does not store letter of queue %r, it comes again: %s", inbound.queue, refusal)

    def _create_client(self, asynchronous: bool = False) -> Any:
        client = super()._create_client(asynchronous)  # type: ignore[misc]
        if asynchronous:
            client.__class__ = _recording(type(client))
            client.dlx_channel = self
        return client

    def _brpop_start(self, *args: Any, **kwargs: Any) -> None:
        if self.dlx_claims.wanted:
            self.dlx_claims.start()
        else:
            super()._brpop_start(*args, **kwargs)  # type: ignore[misc]

    def _brpop_read(self, **options: Any) -> Any:
        if not self.dlx_claims.asked:
            return self._dlx_popped(**options)
        try:
            return self.dlx_claims.read()
        finally:
            self._in_poll = None
            if hasattr(self, "_flush_brpop_reauth"):  # kombu 5.7
                self._flush_brpop_reauth()

    def _dlx_popped(self, **options: Any) -> Any:
        """The answer to a BRPOP: the item is in no list any more, and not registered yet."""
        self.dlx_inbound = None
        self.dlx_claims.look()
        try:
            return super()._brpop_read(**options)  # type: ignore[misc]
        except Exception as exc:
            # Still set: the item never became a delivery. kombu would end the worker, and the item is in no list any more.
            inbound: Any = self.dlx_inbound
            if inbound is None:
                raise
            if isinstance(exc, (redis.exceptions.RedisError, OSError)):
                if inbound.queue in self.dlx_queues:
                    _homeless.append((inbound.queue, inbound.item))  # the only copy: it goes back over the next connection
                raise
            self.dlx_garbage(inbound, exc)
            return True
        finally:
            self.dlx_inbound = None

    def _basic_cancel(self, consumer_tag: str) -> Any:
        cancelled = super()._basic_cancel(consumer_tag)  # type: ignore[misc]
        self.dlx_claims.restore(self.active_queues)  # type: ignore[attr-defined]
        return cancelled

    def close(self) -> None:
        if self.dlx_settle is not None:
            try:
                self.dlx_settle()  # or it would be put back
            except Exception as exc:  # noqa: BLE001
                logger.warning("acknowledgements were not sent before their channel closed: %s", exc)
        self._closing = True
        self.dlx_claims.close()
        super().close()  # type: ignore[misc]


class Channel(ChannelMixin, stock.Channel):  # type: ignore[misc]
    pass


class SentinelChannel(ChannelMixin, stock.SentinelChannel):  # type: ignore[misc]
    connection_class = SentinelConnection
    connection_class_ssl = SentinelSSLConnection

    @property
    def dlx_home(self) -> str:
        # Whichever Sentinel is being asked, and whoever is the master: the messages are the same.
        client = self.connection.client
        return f"{self.master_name}/{client.virtual_host}@{';'.join(sorted(client.alt)) or client.as_uri()}"


class TransportMixin:
    """Over kombu's Redis transports."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> Any:
        self.cycle.loop = loop
        return super().register_with_event_loop(connection, loop)  # type: ignore[misc]


class Transport(TransportMixin, stock.Transport):  # type: ignore[misc]
    Channel = Channel


class SentinelTransport(TransportMixin, stock.SentinelTransport):  # type: ignore[misc]
    Channel = SentinelChannel
