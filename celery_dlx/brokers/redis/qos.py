"""What a channel holds: registered, settled, renewed and restored by script."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import redis
from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads

from celery_dlx.brokers.base import Delivery
from celery_dlx.brokers.redis.letters import original_of
from celery_dlx.letters import DeadLetter
from celery_dlx.policy.settings import BUILT_IN

logger = logging.getLogger("celery_dlx")

#: Our delivery tags start so; any other in `unacked` is a stock worker's.
TAG = "dlx-"
#: Deliveries that were never started count as one.
_WITHOUT_START = 4
#: Between the item and the queue of an entry. The queue's own quotes are escaped, so the last one in an entry is this.
_SEPARATOR = b', "", "'


class RedisDelivery(Delivery):
    """A delivery of a list item; ``own_tag`` is the tag its producer gave it."""

    own_tag: str = ""
    redelivered: bool = False


class Inbound:
    """A list item on its way to becoming a delivery. ``tag``: it is registered already."""

    __slots__ = ("item", "queue", "returns", "started", "tag")

    def __init__(self, queue: str, item: bytes, tag: str | None = None) -> None:
        self.queue, self.item, self.tag = queue, item, tag
        #: How often it came back before, and how often of these it had been started.
        self.returns = self.started = 0


class QoS(stock.QoS):  # type: ignore[misc]
    """Deliveries of covered channels are ours; all others are left to kombu."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: dict[str, RedisDelivery] = {}

    def append(self, message: Any, delivery_tag: Any) -> None:
        inbound: Inbound | None = self.channel.dlx_inbound
        settings = self.channel.dlx_queues.get(inbound.queue) if inbound else None
        if inbound is None or (settings is None and inbound.tag is None):
            super().append(message, delivery_tag)
            return
        if not isinstance(message.delivery_info, dict):
            message.delivery_info = {}  # whatever a producer put there; kombu and Celery expect a mapping
        queue, item, own_tag, tag = inbound.queue, inbound.item, str(delivery_tag), inbound.tag
        if tag is None:
            tag = self.channel.dlx_next_tag()
            if self.channel.dlx_deliveries.register(self.unacked_key, self.unacked_index_key, tag, item, queue, own_tag):
                ((inbound.returns, inbound.started),) = self.channel.dlx_deliveries.counts(queue, [own_tag])
        returns = inbound.returns
        flagged = bool(message.headers.get("redelivered"))
        delivery = RedisDelivery(queue=queue, settings=settings or BUILT_IN, original=partial(original_of, item))
        delivery.own_tag, delivery.redelivered = own_tag, bool(returns) or flagged
        # A stock worker that put the message back flagged it and did not count.
        delivery.deliveries = max(returns, int(flagged)) + 1
        if returns > 1:
            # Of the first return nobody knows whether it had been started; noting every start would cost every task.
            # What kills a worker before the start can be noted is poison all the same, a little later.
            delivery.blamed = max(min(returns, inbound.started + 1) + 1, (returns + 1) // _WITHOUT_START)
        if returns:
            delivery.on_started = partial(self._note_start, delivery)
        if delivery.redelivered:
            message.delivery_info["redelivered"] = True
        if settings is not None:
            message.dlx = delivery
        message.delivery_tag = tag
        message._raw = None  # kombu keeps it to write it back; we keep the exact bytes
        self.channel.dlx_inbound = None
        self._held[tag] = delivery
        virtual.QoS.append(self, message, tag)

    def _note_start(self, delivery: RedisDelivery) -> None:
        try:
            self.channel.dlx_deliveries.started(delivery.queue, delivery.own_tag)
        except Exception as exc:  # noqa: BLE001 - then it counts once less
            logger.warning("the start of a message of %r was not noted: %s", delivery.queue, exc)

    def ack(self, delivery_tag: Any) -> None:
        delivery = self._held.get(delivery_tag)
        if delivery is None:
            if not self._gone(delivery_tag):
                super().ack(delivery_tag)
            return
        own_tag = delivery.own_tag if delivery.redelivered else ""
        keys = self.unacked_key, self.unacked_index_key
        if not self.channel.dlx_deliveries.ack(*keys, delivery_tag, delivery.queue, own_tag):
            logger.info("a message of %r was restored while it ran: it will run again", delivery.queue)
        self._settled(delivery_tag)

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        delivery = self._held.get(delivery_tag)
        if delivery is None:
            if not self._gone(delivery_tag):
                super().reject(delivery_tag, requeue)
            return
        if requeue:
            self.restore_by_tag(delivery_tag, leftmost=True)
        elif delivery.letter is None:
            self.ack(delivery_tag)
            return
        elif not self._capture(delivery_tag, delivery, delivery.letter):
            return
        self._settled(delivery_tag)

    @staticmethod
    def _gone(tag: Any) -> bool:
        """Ours, and put back when its channel closed: the task ended after the connection did, and will run again.

        kombu would use the closed channel, whose errors nobody expects: they end the worker.
        """
        return str(bytes_to_str(tag)).startswith(TAG)

    def _settled(self, tag: str) -> None:
        self._held.pop(tag, None)
        virtual.QoS.ack(self, tag)

    def _capture(self, tag: Any, delivery: RedisDelivery, letter: DeadLetter) -> bool:
        """Move a delivery into its DLQ; whether it is settled. Connection errors are the caller's."""
        own_tag = delivery.own_tag if delivery.redelivered else ""
        try:
            stored = self.channel.dlx_store.capture(letter, delivery.settings, delivery=self.entry(tag), own_tag=own_tag)
        except redis.exceptions.ResponseError as exc:
            # It stays unacknowledged, and comes again.
            logger.critical("Redis does not store letter %s of queue %r: %s", letter.id, letter.queue, exc)
            return False
        if not stored:
            logger.info("a dying message of %r was restored meanwhile: it will run again", delivery.queue)
        elif delivery.on_stored is not None:
            delivery.on_stored()
        return True

    def entry(self, tag: str) -> tuple[str, str, str]:
        """Where a delivery is noted."""
        return self.unacked_key, self.unacked_index_key, tag

    def drop(self, tag: str, queue: str) -> None:
        """Forget an item that was claimed and is no message."""
        self.channel.dlx_deliveries.ack(self.unacked_key, self.unacked_index_key, tag, queue, "")

    def renew(self) -> None:
        """Tell Redis that our deliveries are still held, so that nobody restores them for their age.

        Without this a task that runs or waits for its ETA longer than the visibility timeout is delivered again and
        again, and would count as poison in the end.
        """
        held = [*self._held, *self.channel.dlx_claims.tags()]
        if held:
            self.channel.dlx_deliveries.renew(self.unacked_index_key, held)

    def restore_unacked(self, client: Any = None) -> None:
        """At shutdown: every message for itself; one that cannot be restored comes after the visibility timeout."""
        tags = list(self._delivered)
        for position, tag in enumerate(tags):
            try:
                self.restore_by_tag(tag)
            except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as exc:
                logger.warning("%d messages are put back over the next connection: %s", len(tags) - position, exc)
                self.channel.dlx_claims.orphaned((t for t in tags[position:] if t in self._held), delivered=True)
                break
            except Exception as exc:  # noqa: BLE001
                logger.error("a message was not restored and comes after the visibility timeout: %s", exc)
        self._delivered.clear()
        self._held.clear()

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> Any:
        name = bytes_to_str(tag)
        if not name.startswith(TAG):
            return super().restore_by_tag(tag, client=client, leftmost=leftmost)
        # Any connection may do it, one that covers no queue and knows no policy too: Celery's own for remote control, a
        # tool's. A return that is not counted would let poison be executed once more.
        # kombu gives a client when it looks for overdue ones: what was renewed since is not overdue any more.
        older = float(self.visibility_timeout) if client is not None else None
        return self.put_back(name, leftmost=leftmost, older=older)

    def put_back(self, tag: str, *, leftmost: bool = False, counted: bool = True, older: float | None = None) -> bool:
        """Put one of our deliveries back into its list.

        ``counted``: it counts as a return; not if nobody was given it. ``older``: see `Deliveries.restore`.
        """
        deliveries = self.channel.dlx_deliveries
        found = deliveries.held(self.unacked_key, self.unacked_index_key, tag)
        if found is None:
            return False
        queue, payload = parse_entry(found)
        own_tag = str((payload.get("properties") or {}).get("delivery_tag") or "") if payload and counted else ""
        list_key = self.channel.dlx_list_key(queue, payload)
        return bool(deliveries.restore(*self.entry(tag), queue, list_key, own_tag, leftmost, older))


def parse_entry(entry: bytes) -> tuple[str, dict[str, Any] | None]:
    """Queue and envelope of an unacknowledged delivery; no envelope if the item is none."""
    queue = loads(bytes_to_str(entry[entry.rindex(_SEPARATOR) + len(_SEPARATOR) - 1 : -1]))
    try:
        payload = loads(bytes_to_str(entry[1 : entry.rindex(_SEPARATOR)]))
    except Exception:  # noqa: BLE001 - garbage, claimed and not yet captured
        payload = None
    return str(queue), payload if isinstance(payload, dict) else None
