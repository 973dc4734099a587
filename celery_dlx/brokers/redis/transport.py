"""kombu's Redis transport, with deliveries that know their queue and deaths that leave a letter.

Installed by replacing the aliases in `TRANSPORT_ALIASES`: an explicit `broker_transport` would be lost on failover, for
`Connection.switch()` takes the transport from the URL again. Every connection of the process gets these classes; they
do nothing new until a covered queue is consumed (`Channel.dlx_cover`). Control, event and result queues never are.
"""

from __future__ import annotations

import itertools
import logging
import uuid
from collections import deque
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import redis
from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads

from celery_dlx.brokers.base import Delivery
from celery_dlx.brokers.redis.deliveries import Deliveries
from celery_dlx.brokers.redis.letters import original_of
from celery_dlx.brokers.redis.store import LetterStore
from celery_dlx.letters import DeadLetter
from celery_dlx.policy.settings import Policy, QueueSettings

logger = logging.getLogger("celery_dlx")

#: Our delivery tags start so; any other in `unacked` is a stock worker's.
_TAG = "dlx-"


class RedisDelivery(Delivery):
    """A delivery of a list item; ``own_tag`` is the tag its producer gave it."""

    own_tag: str = ""
    redelivered: bool = False


class QoS(stock.QoS):  # type: ignore[misc]
    """Registers, settles and restores covered deliveries by script; leaves all others to kombu."""

    def append(self, message: Any, delivery_tag: Any) -> None:
        inbound = self.channel.dlx_inbound
        queue = inbound and self.channel.dlx_queue_of(inbound[0])
        settings = self.channel.dlx_queues.get(queue) if queue else None
        if settings is None:
            super().append(message, delivery_tag)
            return
        if not isinstance(message.delivery_info, dict):
            message.delivery_info = {}  # whatever a producer put there; kombu and Celery expect a mapping
        item, own_tag = inbound[1], str(delivery_tag)
        tag = self.channel.dlx_next_tag()
        restored = self.channel.dlx_deliveries.register(self.unacked_key, self.unacked_index_key, tag, item, queue, own_tag)
        flagged = bool(message.headers.get("redelivered"))
        delivery = RedisDelivery(queue=queue, settings=settings, original=partial(original_of, item))
        delivery.own_tag, delivery.redelivered = own_tag, bool(restored) or flagged
        # A stock worker that put the message back flagged it and did not count.
        delivery.deliveries = max(restored, int(flagged)) + 1
        if delivery.redelivered:
            message.delivery_info["redelivered"] = True
        message.dlx = delivery
        message.delivery_tag = tag
        message._raw = None  # kombu keeps it to write it back; we keep the exact bytes
        self.channel.dlx_inbound = None
        virtual.QoS.append(self, message, tag)

    def _covered(self, tag: Any) -> tuple[Any, RedisDelivery] | None:
        message = self._delivered.get(tag)
        delivery = getattr(message, "dlx", None)
        return (message, delivery) if isinstance(delivery, RedisDelivery) else None

    def ack(self, delivery_tag: Any) -> None:
        covered = self._covered(delivery_tag)
        if covered is None:
            super().ack(delivery_tag)
            return
        delivery = covered[1]
        own_tag = delivery.own_tag if delivery.redelivered else ""
        if not self.channel.dlx_deliveries.ack(
            self.unacked_key, self.unacked_index_key, delivery_tag, delivery.queue, own_tag
        ):
            logger.info("a message of %r was restored while it ran: it will run again", delivery.queue)
        virtual.QoS.ack(self, delivery_tag)

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        covered = self._covered(delivery_tag)
        if covered is None:
            super().reject(delivery_tag, requeue)
            return
        _, delivery = covered
        if requeue:
            self.restore_by_tag(delivery_tag, leftmost=True)
        elif delivery.letter is None:
            self.ack(delivery_tag)
            return
        elif not self._capture(delivery_tag, delivery, delivery.letter):
            return
        virtual.QoS.ack(self, delivery_tag)

    def _capture(self, tag: Any, delivery: RedisDelivery, letter: DeadLetter) -> bool:
        """Move a delivery into its DLQ; whether it is settled. Connection errors are the caller's."""
        try:
            stored = self.channel.dlx_store.capture(
                letter,
                delivery.settings,
                delivery=(self.unacked_key, self.unacked_index_key, tag),
                own_tag=delivery.own_tag if delivery.redelivered else "",
            )
        except redis.exceptions.ResponseError as exc:
            # It stays unacknowledged, and comes again.
            logger.critical("Redis does not store letter %s of queue %r: %s", letter.id, letter.queue, exc)
            return False
        if not stored:
            logger.info("a dying message of %r was restored meanwhile: it will run again", delivery.queue)
        elif delivery.on_stored is not None:
            delivery.on_stored()
        return True

    def renew(self) -> None:
        """Tell Redis that the covered deliveries are still held, so that nobody restores them for their age.

        Without this a task that runs or waits for its ETA longer than the visibility timeout is delivered again and
        again, and would count as poison in the end.
        """
        held = [tag for tag in list(self._delivered) if tag not in self._dirty and self._covered(tag)]
        if held:
            self.channel.dlx_deliveries.renew(self.unacked_index_key, held)

    def restore_unacked(self, client: Any = None) -> None:
        """At shutdown: every message for itself; one that cannot be restored comes after the visibility timeout."""
        for tag in list(self._delivered):
            try:
                self.restore_by_tag(tag)
            except Exception as exc:  # noqa: BLE001
                logger.error("a message was not restored and comes after the visibility timeout: %s", exc)
        self._delivered.clear()

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> Any:
        name = bytes_to_str(tag)
        if not name.startswith(_TAG):
            return super().restore_by_tag(tag, client=client, leftmost=leftmost)
        # Any connection may do it, one that covers no queue and knows no policy too: Celery's own for remote control, a
        # tool's. A return that is not counted would let poison be executed once more.
        deliveries = self.channel.dlx_deliveries
        found = deliveries.held(self.unacked_key, self.unacked_index_key, name)
        if found is None:
            return False
        payload, _, queue = loads(bytes_to_str(found))
        own_tag = str((payload.get("properties") or {}).get("delivery_tag") or "")
        list_key = self.channel.dlx_list_key(queue, payload)
        return deliveries.restore(self.unacked_key, self.unacked_index_key, name, queue, list_key, own_tag, leftmost)


class _RecordsReplies:
    """Mixin over a redis client: keeps the last BRPOP reply, so that an item kombu cannot read is not lost with it."""

    dlx_channel: Any = None

    def parse_response(self, connection: Any, command_name: str, **options: Any) -> Any:
        reply = super().parse_response(connection, command_name, **options)  # type: ignore[misc]
        if command_name == "BRPOP" and self.dlx_channel is not None and reply:
            self.dlx_channel.dlx_inbound = (bytes_to_str(reply[0]), reply[1])
        return reply


#: Lists and items of messages that Redis gave out and whose registration it did not take.
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
        #: The list and item of the BRPOP reply being handled, until it is registered.
        self.dlx_inbound: tuple[str, bytes] | None = None
        self.dlx_queues: dict[str, QueueSettings] = {}
        self.dlx_store: LetterStore | None = None
        self.dlx_on_garbage: Callable[[str, bytes, Exception], None] | None = None
        self._dlx_nonce = f"{_TAG}{uuid.uuid4().hex[:20]}:"
        self._dlx_sequence = itertools.count(1)
        super().__init__(*args, **kwargs)

    def dlx_cover(
        self, queue: str, settings: QueueSettings, policy: Policy, on_garbage: Callable[[str, bytes, Exception], None]
    ) -> None:
        """From now on, deliveries of this queue are ours."""
        if self.dlx_store is None:
            self.dlx_store = self.dlx_letter_store(policy)
        self.dlx_rehome()
        self.dlx_queues[queue] = settings
        self.dlx_on_garbage = on_garbage

    def dlx_letter_store(self, policy: Policy) -> LetterStore:
        client = redis.Redis(connection_pool=self.pool)  # type: ignore[attr-defined]
        return LetterStore(client, self.global_keyprefix, policy)  # type: ignore[attr-defined]

    @cached_property
    def dlx_deliveries(self) -> Deliveries:
        client = redis.Redis(connection_pool=self.pool)  # type: ignore[attr-defined]
        return Deliveries(client, self.global_keyprefix)  # type: ignore[attr-defined]

    def dlx_next_tag(self) -> str:
        return f"{self._dlx_nonce}{next(self._dlx_sequence)}"

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
            key, item = _homeless[0]
            self.dlx_store.client.rpush(self.dlx_store.prefix + key, item)
            _homeless.popleft()

    def _create_client(self, asynchronous: bool = False) -> Any:
        client = super()._create_client(asynchronous)  # type: ignore[misc]
        if asynchronous:
            client.__class__ = _recording(type(client))
            client.dlx_channel = self
        return client

    def _brpop_read(self, **options: Any) -> Any:
        self.dlx_inbound = None
        try:
            return super()._brpop_read(**options)  # type: ignore[misc]
        except Exception as exc:
            # Still set: the item never became a delivery. kombu would end the worker, and the item is in no list any more.
            inbound: Any = self.dlx_inbound
            if inbound is None:
                raise
            if isinstance(exc, (redis.exceptions.RedisError, OSError)):
                if self.dlx_queue_of(inbound[0]) in self.dlx_queues:
                    _homeless.append(inbound)  # the only copy: it goes back over the next connection
                raise
            queue = self.dlx_queue_of(inbound[0])
            if queue not in self.dlx_queues or self.dlx_on_garbage is None:
                raise
            self.dlx_on_garbage(queue, inbound[1], exc)
            return True
        finally:
            self.dlx_inbound = None


class Channel(ChannelMixin, stock.Channel):  # type: ignore[misc]
    pass


class SentinelChannel(ChannelMixin, stock.SentinelChannel):  # type: ignore[misc]
    pass


class Transport(stock.Transport):  # type: ignore[misc]
    Channel = Channel


class SentinelTransport(stock.SentinelTransport):  # type: ignore[misc]
    Channel = SentinelChannel
