"""The worker's net on Redis. Late-acknowledged messages are moved by their rejection; the others are stored here."""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from time import monotonic, time
from typing import Any

import redis

from celery_dlx.brokers.acks import collect
from celery_dlx.brokers.base import Delivery
from celery_dlx.brokers.redis.letters import with_body
from celery_dlx.brokers.redis.store import Capture, LetterStore
from celery_dlx.letters import DeadLetter, Death, Original, Reason, bare_letter, compose, safe_text, type_name
from celery_dlx.policy.settings import Policy
from celery_dlx.redaction import for_storage

logger = logging.getLogger("celery_dlx")

#: How long a letter may wait for company, in seconds, and how many share a round trip at most.
_LINGER, _BATCH = 0.02, 100
#: Reports that wait, at most: while Redis is away the oldest are forgotten.
_MOST_REPORTS = 10_000


class RedisCapturer:
    """See `celery_dlx.brokers.base.Capturer`. A letter that Redis does not take now waits for the next `flush`."""

    stores_on_reject = True
    eager = False

    def __init__(self, connect: Callable[[], Any], policy: Policy, worker: str | None = None) -> None:
        self._connect = connect
        self._policy = policy
        self._worker = worker
        self._lock = threading.Lock()
        self._pending: deque[tuple[DeadLetter, bytes, Callable[[bool], None]]] = deque()
        self._reports: deque[tuple[str, str]] = deque(maxlen=_MOST_REPORTS)
        self._hub: Any = None
        self._scheduled = False
        self._connection: Any = None
        self._store: LetterStore | None = None

    def compose(self, delivery: Delivery, death: Death) -> DeadLetter:
        letter = compose(death, delivery.original(), self._policy.dlq(death.queue))
        if delivery.settings.redact_stored and for_storage(letter, delivery.settings.redact):
            letter.original.raw = with_body(delivery.original().raw, letter.original)
        return letter

    def compose_bare(self, delivery: Delivery, death: Death) -> DeadLetter:
        return bare_letter(death, delivery.original(), self._policy.dlq(death.queue))

    def capture(self, letter: DeadLetter, alive: Callable[[], bool] | None, done: Callable[[bool], None]) -> None:
        self._pending.append((letter, letter.original.raw, done))
        self._soon()

    def _soon(self) -> None:
        """Store a little later, with what comes until then: a round trip for many costs as much as for one."""
        if self._hub is None or self.eager:
            self.flush(0)
        elif not self._scheduled:
            self._scheduled = True
            self._hub.call_later(_LINGER, self._turn)

    def acknowledge(self, messages: Sequence[Any]) -> None:
        for channel, tags in collect(messages).items():
            try:
                channel.qos.ack_all(tags)
            except Exception as exc:  # noqa: BLE001 - a broken connection is the consumer's to notice
                logger.warning("acknowledgements were not sent, their messages come again: %s", exc)

    def count_return(self, delivery: Delivery, alive: Callable[[], bool], done: Callable[[bool], None]) -> bool:
        return False  # our transport counts

    def report(self, replay: str, outcome: dict[str, Any]) -> None:
        self._reports.append((replay, json.dumps(outcome)))
        if self._hub is not None and not self.eager:
            self._soon()
        elif self._lock.acquire(blocking=False):  # else it is told by the flush that is under way, or by the next one
            try:
                self._tell()
            finally:
                self._lock.release()

    def garbage(self, queue: str, item: bytes, exc: Exception, store: bool) -> DeadLetter | None:
        """The letter of a list item that is no message; ``None`` if the policy wants none. ``store``: store it, too."""
        settings = self._policy.settings(queue)
        if settings is None or not settings.captures("malformed"):
            logger.error("an item of %r is no message and is dropped, as the policy says: %s", queue, exc)
            return None
        death = Death(
            reason=Reason.MALFORMED.value,
            queue=queue,
            died_at=int(time() * 1000),
            exception_type=type_name(type(exc)),
            message=safe_text(exc) or "not a kombu envelope",
            worker=self._worker,
            service=self._policy.service,
        )
        letter = compose(death, Original(body=item, raw=item), self._policy.dlq(queue))
        logger.error("an item of %r is no message: kept as dead letter %s: %s", queue, letter.id, exc)
        if store:
            self.capture(letter, None, lambda stored: None)
            self.flush(0)  # its item is in no list any more
        return letter

    def open(self) -> None:
        """Connect, and store what waited for it."""
        try:
            self._letter_store()
        except Exception as exc:  # noqa: BLE001 - the first letter tries again
            logger.warning("no connection for dead letters yet: %s", exc)
        self.flush(0)

    def attach(self, hub: Any, timer: Any, soon: Callable[[Callable[[], None]], None]) -> None:
        """The loop is running: letters may share a round trip."""
        self._hub, self._scheduled = hub, False

    def detach(self) -> None:
        """The loop ended, and with it what was scheduled."""
        self._hub = None
        self.flush(0)

    def _turn(self) -> None:
        self._scheduled = False
        self.flush(0)

    def flush(self, timeout: float) -> int:
        """Try once, and until ``timeout`` seconds are over; returns how many letters still wait."""
        deadline = monotonic() + timeout
        while True:
            with self._lock:
                stored_all = self._store_pending()
                self._tell()
            if stored_all or monotonic() >= deadline:
                return len(self._pending)
            threading.Event().wait(0.2)

    def close(self) -> None:
        connection, self._connection, self._store = self._connection, None, None
        if connection is not None:
            try:
                connection.close()
            except Exception:
                logger.debug("closing the capture connection failed", exc_info=True)

    def _store_pending(self) -> bool:
        while self._pending:
            batch = list(islice(self._pending, _BATCH))
            known = [
                Capture(letter, settings, item=item)
                for letter, item, _ in batch
                if (settings := self._policy.settings(letter.queue)) is not None
            ]
            try:
                store = self._letter_store()
                if len(known) == 1:
                    store.capture(known[0])
                elif known:
                    store.capture_all(known)
            except (redis.exceptions.RedisError, OSError) as exc:
                logger.error("%d dead letters wait to be stored: %s", len(self._pending), exc)
                if not isinstance(exc, redis.exceptions.ResponseError):
                    self.close()  # the next attempt connects anew, to whichever server is in charge then
                return False
            except Exception as exc:  # noqa: BLE001 - kombu's own words for a lost connection
                logger.error("%d dead letters wait for Redis: %s", len(self._pending), exc)
                self.close()
                return False
            for letter, _, done in batch:
                self._pending.popleft()
                try:
                    done(True)
                except Exception:
                    logger.exception("a receiver of letter %s failed", letter.id)
        return True

    def _tell(self) -> None:
        """What becomes of replayed messages: news, not data, so one attempt is enough."""
        if not self._reports:
            return
        reports = [self._reports.popleft() for _ in range(len(self._reports))]
        try:
            self._letter_store().report(reports)
        except Exception as exc:  # noqa: BLE001
            logger.warning("replays were not told of %d outcomes: %s", len(reports), exc)
            self.close()

    def _letter_store(self) -> LetterStore:
        if self._store is None:
            self._connection = self._connect()
            self._store = self._connection.default_channel.dlx_letter_store(self._policy)
        return self._store
