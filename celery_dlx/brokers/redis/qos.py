"""What a channel holds: registered, settled, renewed and restored by script."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Any

import redis
from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads

from celery_dlx.brokers.base import Delivery
from celery_dlx.brokers.redis.deliveries import Return, lost_master, own_tag_text
from celery_dlx.brokers.redis.letters import original_of
from celery_dlx.brokers.redis.store import Capture, item_of
from celery_dlx.letters import DeadLetter
from celery_dlx.policy.settings import BUILT_IN

logger = logging.getLogger("celery_dlx")

#: Our delivery tags start so; any other in `unacked` is a stock worker's.
TAG = "dlx-"
#: Deliveries that were never started count as one.
_WITHOUT_START = 4
#: Deliveries that one script puts back at most.
_MOST = 100
#: Time spent on it in one turn of the event loop, and where there is none to come again, in seconds.
_AT_ONCE, _SPENT = 0.05, 0.5
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
        queue, item, own_tag, tag = inbound.queue, inbound.item, own_tag_text(delivery_tag), inbound.tag
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
        if delivery_tag in self._held:
            self.ack_all([delivery_tag])
        elif not self._gone(delivery_tag):
            super().ack(delivery_tag)

    def ack_all(self, tags: Iterable[Any]) -> None:
        """Acknowledge deliveries, ours in one round trip."""
        ours, others = [], []
        for tag in tags:
            if (delivery := self._held.get(tag)) is not None:
                ours.append((tag, delivery.queue, delivery.own_tag if delivery.redelivered else ""))
            else:
                others.append(tag)
        with self._or_orphaned([tag for tag, _, _ in ours]):
            gone = self.channel.dlx_deliveries.ack(self.unacked_key, self.unacked_index_key, ours)
            if gone:
                logger.info("%d messages were restored while they ran: they will run again", gone)
        for tag, _, _ in ours:
            self._settled(tag)
        for tag in others:
            self.ack(tag)

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        delivery = self._held.get(delivery_tag)
        if delivery is None:
            if not self._gone(delivery_tag):
                super().reject(delivery_tag, requeue)
            return
        letter = delivery.letter
        if not requeue and letter is None:
            self.ack(delivery_tag)
            return
        with self._or_orphaned([delivery_tag]):
            if requeue:
                self.restore_by_tag(delivery_tag, leftmost=True)
            elif letter is not None:
                self._capture(delivery_tag, delivery, letter)
        self._settled(delivery_tag)

    @contextmanager
    def _or_orphaned(self, tags: list[Any]) -> Iterator[None]:
        """What the connection's end, or a server that takes no writes, kept from being settled is nobody's, and is put back
        with the next claim.

        Celery only logs such an error. Still held, the message would be renewed for ever and use up credit; and without any
        credit nothing is read from Redis, not even that the connection ended: the worker would wait for good.
        """
        try:
            yield
        except (*self.channel.connection_errors, redis.exceptions.RedisError) as exc:
            for tag in tags:
                self._settled(tag)
            self.channel.dlx_claims.orphaned(tags, delivered=True)
            if isinstance(exc, redis.exceptions.ReadOnlyError):
                raise lost_master(exc) from exc
            raise

    @staticmethod
    def _gone(tag: Any) -> bool:
        """Ours, and put back when its channel closed: the task ended after the connection did, and will run again.

        kombu would use the closed channel, whose errors nobody expects: they end the worker.
        """
        return str(bytes_to_str(tag)).startswith(TAG)

    def _settled(self, tag: str) -> None:
        self._held.pop(tag, None)
        virtual.QoS.ack(self, tag)

    def _capture(self, tag: Any, delivery: RedisDelivery, letter: DeadLetter) -> None:
        """Move a delivery into its DLQ. Connection errors are the caller's."""
        own_tag = delivery.own_tag if delivery.redelivered else ""
        try:
            stored = self.channel.dlx_store.capture(
                Capture(letter, delivery.settings, self.entry(tag), own_tag, item_of(letter))
            )
        except redis.exceptions.ReadOnlyError:
            raise
        except redis.exceptions.ResponseError as exc:
            # It stays unacknowledged, and comes again after the visibility timeout, for nobody renews it any more.
            logger.critical("Redis does not store letter %s of queue %r: %s", letter.id, letter.queue, exc)
            return
        if not stored:
            logger.info("a dying message of %r was restored meanwhile: it will run again", delivery.queue)
        elif delivery.on_stored is not None:
            delivery.on_stored()

    def entry(self, tag: str) -> tuple[str, str, str]:
        """Where a delivery is noted."""
        return self.unacked_key, self.unacked_index_key, tag

    def drop(self, tag: str, queue: str) -> None:
        """Forget an item that was claimed and is no message."""
        self.channel.dlx_deliveries.ack(self.unacked_key, self.unacked_index_key, [(tag, queue, "")])

    def renew(self) -> None:
        """Tell Redis that our deliveries are still held, so that nobody restores them for their age.

        Without this a task that runs or waits for its ETA longer than the visibility timeout is delivered again and
        again, and would count as poison in the end.
        """
        held = [*self._held, *self.channel.dlx_claims.tags()]
        if held:
            self.channel.dlx_deliveries.renew(self.unacked_index_key, held)

    def restore_unacked(self, client: Any = None) -> None:
        """At shutdown: one that cannot be restored comes after the visibility timeout."""
        # The last one put back is taken first.
        ours = [tag for tag in reversed(self._delivered) if tag in self._held]
        try:
            for tag in [tag for tag in self._delivered if tag not in self._held]:
                self.restore_by_tag(tag)
            self.put_back(ours)
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as exc:
            logger.warning("up to %d messages are put back over the next connection: %s", len(self._delivered), exc)
            self.channel.dlx_claims.orphaned(ours, delivered=True)
        except Exception as exc:  # noqa: BLE001
            logger.error("messages that were not restored come after the visibility timeout: %s", exc)
        self._delivered.clear()
        self._held.clear()

    def restore_visible(self, start: int = 0, num: int | None = 10, interval: int = 10) -> Any:
        """Take overdue deliveries back; arguments as kombu's, but that no call keeps the event loop for long.

        kombu does this first on a new connection, too, where nobody expects its refusal.
        """
        self._vrestore_count += 1
        if (self._vrestore_count - 1) % (interval or 1):
            return
        try:
            self._restore_overdue(num, monotonic() + (_SPENT if self.channel.connection.cycle.loop is None else _AT_ONCE))
        except redis.exceptions.ReadOnlyError as exc:
            raise lost_master(exc) from exc

    def _restore_overdue(self, num: int | None, until: float) -> None:
        """Put some back ``until`` that time, and come again in the loop's next turn for more.

        Without kombu's mutex: each script looks for itself whether a delivery is still overdue; and who was killed while
        it held the mutex kept everybody from restoring for minutes.
        """
        keys, timeout = (self.unacked_key, self.unacked_index_key), float(self.visibility_timeout)
        most = _MOST if num is None else min(num, _MOST)
        while True:
            entries, more = self.channel.dlx_deliveries.overdue(*keys, timeout, most)
            ours = [(tag, entry) for tag, entry in entries if tag.startswith(TAG)]
            restored = self._put_back(ours, older=timeout)
            if len(ours) < len(entries):
                super().restore_visible(
                    num=num, interval=1
                )  # a stock worker's: they name exchanges, whose queues kombu knows
            if not (restored and more):
                return
            if num is not None or monotonic() >= until:
                break
        loop = self.channel.connection.cycle.loop
        if loop is not None:
            loop.call_soon(self._restore_more, num)

    def _restore_more(self, num: int | None) -> None:
        if self.channel.closed:
            return
        try:
            self._restore_overdue(num, monotonic() + _AT_ONCE)
        except (*self.channel.connection_errors, redis.exceptions.RedisError) as exc:
            logger.debug("overdue messages are looked for later: %s", exc)

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> Any:
        name = bytes_to_str(tag)
        if not name.startswith(TAG):
            return super().restore_by_tag(tag, client=client, leftmost=leftmost)
        # Any connection may do it, one that covers no queue and knows no policy too: Celery's own for remote control, a
        # tool's. A return that is not counted would let poison be executed once more.
        # kombu gives a client when it looks for overdue ones: what was renewed since is not overdue any more.
        older = float(self.visibility_timeout) if client is not None else None
        return bool(self.put_back([name], leftmost=leftmost, older=older))

    def put_back(
        self, tags: Sequence[str], *, leftmost: bool = False, counted: bool = True, older: float | None = None
    ) -> int:
        """Put some of our deliveries back into their lists, in this order; how many were still there.

        ``counted``: it counts as a return; not if nobody was given it. ``older``: see `Deliveries.restore`.
        """
        restored = 0
        for first in range(0, len(tags), _MOST):
            entries = self.channel.dlx_deliveries.held(self.unacked_key, self.unacked_index_key, tags[first : first + _MOST])
            restored += self._put_back(entries, leftmost=leftmost, counted=counted, older=older)
        return restored

    def _put_back(
        self,
        entries: Iterable[tuple[str, bytes]],
        *,
        leftmost: bool = False,
        counted: bool = True,
        older: float | None = None,
    ) -> int:
        returns = []
        for tag, entry in entries:
            try:
                queue, payload = parse_entry(entry) if entry else ("", None)
            except ValueError:
                logger.error("what %r holds as delivery %s is none: %r…", self.unacked_key, tag, entry[:100])
                continue
            properties = payload.get("properties") if payload and counted else None
            own_tag = own_tag_text(properties.get("delivery_tag")) if isinstance(properties, dict) else ""
            returns.append(Return(tag, queue, self.channel.dlx_list_key(queue, payload), own_tag))
        return int(
            self.channel.dlx_deliveries.restore(
                self.unacked_key, self.unacked_index_key, returns, leftmost=leftmost, older=older
            )
        )


def parse_entry(entry: bytes) -> tuple[str, dict[str, Any] | None]:
    """Queue and envelope of an unacknowledged delivery; no envelope if the item is none."""
    queue = loads(bytes_to_str(entry[entry.rindex(_SEPARATOR) + len(_SEPARATOR) - 1 : -1]))
    try:
        payload = loads(bytes_to_str(entry[1 : entry.rindex(_SEPARATOR)]))
    except Exception:  # noqa: BLE001 - garbage, claimed and not yet captured
        payload = None
    return str(queue), payload if isinstance(payload, dict) else None
