"""Taking messages so that there is no moment in which Redis holds them nowhere.

Stock kombu takes a message out of its list with BRPOP and registers it afterwards: whoever is killed in between, or whose
credit is used up meanwhile, has the only copy. Here a script does both. Busy, it claims as many messages as there is
credit. Idle, a connection per list waits with BLMOVE of the list onto itself, which wakes it and removes nothing, so
that stock workers and ours can wait for the same list (https://redis.io/docs/latest/commands/blmove/).
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Collection, Iterable
from queue import Empty
from time import monotonic
from typing import Any

import redis

from celery_dlx.brokers.redis import orphans
from celery_dlx.brokers.redis.deliveries import deliveries_key, envelope_of, lost_master, own_tag_of
from celery_dlx.brokers.redis.qos import Inbound
from celery_dlx.brokers.redis.scripts import source
from celery_dlx.brokers.redis.sentinel import sentinels_of
from celery_dlx.brokers.redis.waiting import Backlog, Poller, Waiter

logger = logging.getLogger("celery_dlx")

#: Messages claimed by one call at most: it blocks the server for well under a millisecond.
_MOST = 100
#: With more lists than this (four a queue, one for each priority), waiting is BRPOP's: a connection each would be too many.
MOST_WAITERS = 64
#: A claim is sent this often even if no waiter was woken, in seconds: servers close connections that are silent for long.
_CLAIM_ANYHOW = 15.0
#: Where waiters cannot be had, waiting is BRPOP's for so long, in seconds.
_WITHOUT = 60.0


class Claims:
    """How one channel takes its messages. Off until `open`: then the channel is stock."""

    def __init__(self, channel: Any, nonce: str) -> None:
        self.channel = channel
        self.nonce = nonce
        self.on = False
        #: One message per turn of the loop: what runs in the loop itself must be settled before the next one runs.
        self.one_by_one = False
        self._may_have_more = True
        self._last = 0.0
        self._plain = False
        self._number = 0
        self._sha: str | None = None
        #: Queues and credit of the claim that is not answered yet.
        self._asked: tuple[list[str], int] | None = None
        self._claimed: deque[Inbound] = deque()
        self._backlog = Backlog(self)
        self._pool: Any = None
        self._waiters: dict[str, Waiter] = {}
        #: Until when there are no waiters, or none for one key.
        self._without = 0.0
        self._skipped: dict[str, float] = {}
        self._home = ""

    def open(self) -> None:
        """Claim from now on."""
        self.on = bool(self.channel.ack_emulation) and not self._plain
        self._home = self.channel.dlx_home

    def look(self) -> None:
        """There may be something to claim."""
        self._may_have_more = True

    def forbid(self) -> None:
        """The channel also consumes without acknowledgement: it stays stock."""
        self._plain, self.on = True, False

    def tags(self) -> list[str]:
        """What is, or may be, held and is no delivery yet."""
        asked = self._asked[1] if self._asked else 0
        claimed = [inbound.tag for inbound in self._claimed if inbound.tag is not None]
        return claimed + [self._tag(self._number + n) for n in range(1, asked + 1)]

    def _tag(self, number: int) -> str:
        return f"{self.nonce}{number}"

    def next_tag(self) -> str:
        self._number += 1
        return self._tag(self._number)

    # -- idle

    @property
    def waiting(self) -> bool:
        return (
            self.on
            and not self._may_have_more
            and not self._claimed
            and len(self._keys_now()) <= MOST_WAITERS
            and monotonic() >= self._without
        )

    def _keys_now(self) -> list[str]:
        return self._keys(sorted(self.channel.active_queues))

    def _keys(self, queues: list[str]) -> list[str]:
        channel = self.channel
        return [
            channel.global_keyprefix + channel._q_for_pri(queue, priority)
            for priority in channel.priority_steps
            for queue in queues
        ]

    def wait(self, poller: Poller) -> None:
        now = monotonic()
        if now - self._last > _CLAIM_ANYHOW:
            self._may_have_more = True
        keys = self._keys_now()
        for key in self._waiters.keys() - set(keys):
            self._drop(self._waiters.pop(key))
        try:
            for key in keys:
                if self._skipped.get(key, now) <= now:
                    self._wait_for(key, poller)
        except self.channel.connection_errors as exc:
            # Is Redis gone, BRPOP will say so; has it no connections left for us, BRPOP does without.
            logger.warning("waiting with BRPOP for %.0fs, for want of more connections: %s", _WITHOUT, exc)
            self._wait_without(_WITHOUT)

    def _wait_for(self, key: str, poller: Poller) -> None:
        seconds = getattr(self.channel, "brpop_timeout", 1) or 1
        waiter = self._waiters.get(key)
        if waiter is None:
            waiter = self._waiters[key] = Waiter(self, self._waiters_pool(), key)
        if waiter.overdue(seconds):
            logger.warning("Redis does not answer: connecting anew")
            self._drop(waiter)
        if waiter.since is None:
            if not poller._client_registered(self.channel, waiter, waiter):
                poller._register(self.channel, waiter, waiter)
            waiter.wait(seconds)

    def _wait_without(self, seconds: float) -> None:
        self._drop_waiters()
        self._without = monotonic() + seconds
        self._may_have_more = True

    def _waiters_pool(self) -> Any:
        if self._pool is None:
            # kombu 5.7 closes at the end what the attribute names: that of the channel's own pool.
            manager = getattr(self.channel, "_sentinel_manager", None)
            # Not the asynchronous kind: kombu 5.5 stops polling when one of those is disconnected.
            self._pool = self.channel._get_pool(asynchronous=False)
            self._pool.max_connections = MOST_WAITERS + 1
            if manager is not None:
                self.channel._sentinel_manager = manager
        return self._pool

    def _drop(self, waiter: Waiter) -> None:
        self.channel.connection.cycle.forget(self.channel, waiter)
        waiter.close()

    def woken(self, waiter: Waiter) -> Any:
        """A waiter has an answer.

        Raises:
            Empty: nothing came, or what came is yet to be claimed.
        """
        idle = waiter.since is None
        try:
            if waiter.read():
                self._may_have_more = True  # the claim is sent at the next turn of the loop
        except redis.exceptions.ReadOnlyError as exc:
            self._drop(waiter)
            raise lost_master(exc) from exc
        except redis.exceptions.ResponseError as exc:
            if "WRONGTYPE" in str(exc):
                logger.warning("%s is no list, and not waited for: %s", waiter.key, exc)
                self._skipped[waiter.key] = monotonic() + _WITHOUT
                self._drop(self._waiters.pop(waiter.key))
            else:  # full, busy, not permitted, unknown to an old server
                logger.warning("waiting with BRPOP for %.0fs, since Redis does not take BLMOVE: %s", _WITHOUT, exc)
                self._wait_without(_WITHOUT)
        except self.channel.connection_errors:
            self._drop(waiter)
            if not idle:
                raise
            # Nothing is expected while there is no credit: the server closed what was silent for long.
        raise Empty()

    # -- busy

    @property
    def wanted(self) -> bool:
        """Whether the next command is ours rather than BRPOP."""
        return self.on and self._may_have_more

    @property
    def backlog(self) -> bool:
        """Whether messages are claimed, and not given out yet."""
        return bool(self._claimed)

    def offer(self, poller: Poller) -> None:
        """Give out the next of the backlog when the loop comes to its readable files."""
        if not poller._client_registered(self.channel, self._backlog, self._backlog):
            poller._register(self.channel, self._backlog, self._backlog)

    def give(self) -> bool:
        """Deliver from the backlog.

        Raises:
            Empty: nothing is left, or there is no credit for it now.
        """
        try:
            if not self._claimed or not self.channel.qos.can_consume():
                raise Empty()
            self._deliver()
        finally:
            if not self._claimed or not self.channel.qos.can_consume():
                self._withdraw()
        return True

    def _withdraw(self) -> None:
        if self.channel.connection is not None:  # else it is closed for the second time
            self.channel.connection.cycle.forget(self.channel, self._backlog)

    def start(self) -> None:
        """Send a claim, if there is credit."""
        channel, connection = self.channel, self.channel.client.connection
        self._sweep()
        credit = self._credit()
        queues = channel._queue_cycle.consume(len(channel.active_queues))
        if not queues or credit <= 0:
            return
        prefix = channel.global_keyprefix
        keys = [prefix + channel.unacked_key, prefix + channel.unacked_index_key]
        keys += [deliveries_key(prefix, queue) for queue in queues] + self._keys(queues)
        turns = "1" if channel.queue_order_strategy == "round_robin" else ""
        arguments = [credit, self.nonce, self._number, len(queues), turns, *map(json.dumps, queues)]
        if self._sha is None:
            self._sha = channel.dlx_deliveries.client.script_load(source("claim"))
        channel._in_poll, self._asked = connection, (list(queues), credit)
        channel._brpop_sent_at = self._last = monotonic()
        connection.send_command("EVALSHA", self._sha, len(keys), *keys, *arguments)

    def _credit(self) -> int:
        qos = self.channel.qos
        if "can_consume" in vars(qos):
            return 1  # Celery's worker_disable_prefetch decides message by message
        estimate = qos.can_consume_max_estimate()
        return _MOST if estimate is None else min(estimate, _MOST)

    @property
    def asked(self) -> bool:
        """Whether the answer that comes is to a command of ours."""
        return self._asked is not None

    def read(self) -> bool:
        """Take the answer, and deliver.

        Raises:
            Empty: there was nothing.
        """
        assert self._asked is not None
        channel, (queues, credit) = self.channel, self._asked
        try:
            counted, found, full = self._answer()
        except redis.exceptions.NoScriptError:
            self._asked = self._sha = None  # flushed, or another server
            raise Empty() from None
        self._asked = None
        items = [(queues[found[at] - 1], found[at + 1]) for at in range(0, len(found), 2)]
        self._claimed.extend(Inbound(queue, item, self.next_tag()) for queue, item in items)
        self._number += credit - len(items)
        self._may_have_more = bool(full)
        self._count_returns([queues[number - 1] for number in counted])
        if channel._closing:
            self.restore()
            return True
        if not self._claimed:
            raise Empty()
        self._deliver()
        return True

    def _answer(self) -> Any:
        client = self.channel.client
        try:
            return client.parse_response(client.connection, "EVALSHA")
        except redis.exceptions.NoScriptError:
            raise
        except redis.exceptions.ReadOnlyError as exc:
            self.unanswered()
            client.connection.disconnect()
            raise lost_master(exc) from exc
        except redis.exceptions.ResponseError:
            self.unanswered()
            raise
        except self.channel.connection_errors:
            self.unanswered()
            client.connection.disconnect()
            raise

    def _count_returns(self, queues: list[str]) -> None:
        """Learn how often claimed messages came back before; of queues whose messages never did, nothing is asked."""
        for queue in set(queues):
            inbound = [each for each in self._claimed if each.queue == queue]
            own_tags = [own_tag_of(each.item) for each in inbound]
            for each, counts in zip(inbound, self.channel.dlx_deliveries.counts(queue, own_tags), strict=True):
                each.returns, each.started = counts

    def _deliver(self) -> None:
        channel = self.channel
        while self._claimed:
            inbound = self._claimed[0]
            channel._queue_cycle.rotate(inbound.queue)
            if inbound.queue not in channel.active_queues:  # cancelled meanwhile
                channel.qos.put_back([inbound.tag], counted=False)
                self._claimed.popleft()
                continue
            channel.dlx_inbound = inbound
            try:
                payload = envelope_of(inbound.item)
            except Exception as exc:  # noqa: BLE001 - not JSON, not UTF-8, no mapping, no properties, …
                channel.dlx_inbound = None
                channel.dlx_garbage(inbound, exc)
                self._claimed.popleft()
            else:
                try:
                    channel.connection._deliver(payload, inbound.queue)
                except Exception as exc:
                    if channel.dlx_inbound is not None:  # it did not become a delivery
                        channel.dlx_inbound = None
                        if not isinstance(exc, (redis.exceptions.RedisError, OSError)):
                            channel.dlx_garbage(inbound, exc)
                            self._claimed.popleft()
                            continue
                    else:
                        self._claimed.popleft()
                    raise
                self._claimed.popleft()
            if self.one_by_one:
                return

    # -- after an end

    def unanswered(self) -> None:
        """The answer to a claim will not come: what it claimed is looked for over the next connection."""
        if self._asked is not None:
            credit = self._asked[1]
            self.orphaned((self._tag(self._number + n) for n in range(1, credit + 1)), delivered=False)
            self._number += credit
        self._asked = None
        self._may_have_more = True

    def _sweep(self) -> None:
        if self._asked is not None:
            self.unanswered()  # its connection was dropped without our reading from it
        orphans.put_back(self._home, self.channel.qos)

    def orphaned(self, tags: Iterable[str], *, delivered: bool) -> None:
        """Nobody will settle these any more: the next channel to the same server puts them back."""
        orphans.add(self._home, tags, delivered)
        self.look()  # a claim looks after them first

    def restore(self, active: Collection[str] = ()) -> None:
        """Put back what was claimed and not delivered, but for queues that are still consumed."""
        back = [each for each in self._claimed if each.queue not in active]
        self._claimed = deque(each for each in self._claimed if each.queue in active)
        tags = [each.tag for each in reversed(back) if each.tag is not None]  # the last one put back is taken first
        try:
            self.channel.qos.put_back(tags, counted=False)
        except Exception as exc:  # noqa: BLE001
            logger.info("claimed messages are put back later: %s", exc)
            self.orphaned(tags, delivered=False)

    def close(self) -> None:
        """Before the channel closes, over a connection that may be gone: what waits removes nothing, and may simply end."""
        if self.asked:
            try:
                self.channel._brpop_read()
            except Exception as exc:  # noqa: BLE001 - Empty, too
                logger.debug("a claim was not answered before its channel closed: %s", exc)
            if self.asked:
                self.unanswered()
        self.restore()
        self._withdraw()
        self._backlog.close()
        self._drop_waiters()
        if self._pool is not None:
            self._pool.disconnect()
            for each in sentinels_of(self._pool):
                each.close()
            self._pool = None

    def _drop_waiters(self) -> None:
        for waiter in self._waiters.values():
            self._drop(waiter)
        self._waiters.clear()
