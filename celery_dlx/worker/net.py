"""The worker's net: takes a death, has the letter stored, and settles the original only then."""

from __future__ import annotations

import logging
import socket
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from celery.bootsteps import RUN

from celery_dlx.brokers.base import Capturer, Delivery
from celery_dlx.letters import DeadLetter, Death
from celery_dlx.replaying import lineage_of, replay_of
from celery_dlx.signals import task_dead_lettered
from celery_dlx.worker.acks import Acks

logger = logging.getLogger("celery_dlx")

#: Messages whose returns to a classic queue are remembered, oldest forgotten first.
_REMEMBERED = 10_000


class Net:
    """One per worker process. `bury` may be called from any thread; settling happens on the event loop's."""

    def __init__(self, consumer: Any, capturer: Capturer) -> None:
        self._consumer = consumer
        self.capturer = capturer
        self.acks = Acks(consumer, capturer)
        self._outcomes: deque[Callable[[], None]] = deque()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._awake = False
        self._thread = threading.get_ident()
        self.looping = False
        self._returns: OrderedDict[str, int] = OrderedDict()

    def bury(
        self,
        delivery: Delivery,
        death: Death,
        *,
        message: Any,
        owned: bool,
        task: Any = None,
        ack: Callable[[], None] | None = None,
        reject: Callable[[], None] | None = None,
    ) -> None:
        """Make a dead letter of a delivery, once.

        ``owned``: the original is not settled yet; ``ack`` and ``reject`` are Celery's own ways to do it on its loop.
        """
        if delivery.settled:
            return
        delivery.settled = True
        self.acks.give_back(message)
        if owned and self.capturer.stores_on_reject:
            delivery.letter = letter = self._compose(delivery, death)
            delivery.on_stored = lambda: self._announce(letter, task)
            (reject or (lambda: self._direct(message, "reject")))()
            return

        def store() -> None:
            letter = self._compose(delivery, death)

            def settle(stored: bool) -> None:
                if stored:
                    self._announce(letter, task)
                elif owned and _channel_open(message):
                    logger.error("letter %s goes to %r by the broker, without its annotations", letter.id, letter.dlq)
                if not owned or not _channel_open(message):
                    return
                if stored and self.looping and self.acks.add(message):
                    return
                marshalled = (ack if stored else reject) if self.looping else None
                (marshalled or (lambda: self._direct(message, "ack" if stored else "reject")))()

            def done(stored: bool) -> None:
                if self._on_loop():
                    settle(stored)
                else:
                    self._soon(lambda: settle(stored))

            self.capturer.capture(letter, (lambda: _channel_open(message)) if owned else None, done)

        if self._on_loop() or not self.looping:
            store()
        else:
            self._soon(store)

    def _compose(self, delivery: Delivery, death: Death) -> DeadLetter:
        try:
            return self.capturer.compose(delivery, death)
        except Exception:
            logger.exception("a letter of queue %r is stored without its details", delivery.queue)
            return self.capturer.compose_bare(delivery, death)

    def _direct(self, message: Any, verb: str) -> None:
        if not message.acknowledged:
            getattr(message, f"{verb}_log_error")(logger, self._consumer.connection_errors)

    def _announce(self, letter: DeadLetter, task: Any) -> None:
        if (replay := replay_of(letter.original.headers)) is not None:
            failed = {"reason": letter.reason, "fingerprint": letter.fingerprint, "letter": letter.id}
            self.report(replay, {"of": lineage_of(letter.original.headers), "state": "failed", **failed})
        self._send_event(letter)
        if task_dead_lettered.receivers:
            task_dead_lettered.send(sender=task, letter=letter)

    def _send_event(self, letter: DeadLetter) -> None:
        """For monitors, where the worker sends events at all (`-E`)."""
        dispatcher = getattr(self._consumer, "event_dispatcher", None)
        if dispatcher is None or not dispatcher.enabled:
            return
        kind = (letter.exception or {}).get("type")
        try:
            dispatcher.send(
                "task-dead-lettered", uuid=letter.task_id, letter=letter.id, queue=letter.queue, reason=letter.reason,
                name=letter.task, exception=kind, fingerprint=letter.fingerprint,
            )  # fmt: skip
        except Exception:
            logger.exception("the event of letter %s was not sent", letter.id)

    def report(self, replay: str, outcome: dict[str, Any]) -> None:
        """Tell a replay what became of a message. It is news, not data: an error is only logged."""
        try:
            if self._on_loop() or not self.looping:
                self.capturer.report(replay, outcome)
            else:
                self._soon(lambda: self.capturer.report(replay, outcome))
        except Exception:
            logger.exception("replay %s was not told of an outcome", replay)

    def _stopping(self) -> bool:
        """Whether the pool may take no more."""
        return not self.looping if self._consumer.hub is not None else self._consumer.blueprint.state != RUN

    def acknowledge(self, message: Any, errors: Any) -> bool:
        """Acknowledge a message that need not die, soon or at once; ``False`` if Celery has to.

        Celery leaves it to the loop's next turn, which never comes if the worker stops: then the message would be put back
        (Redis) after its task was done, and run again.
        """
        consumer = self._consumer
        if consumer.hub is None or not self._on_loop() or (self.looping and consumer.restart_count):
            return False  # After a reconnect Celery restores the prefetch count with each of its acknowledgements.
        if not (self.looping and self.acks.add(message)):
            message.ack_log_error(logger, errors)
        return True

    # -- back onto the event loop

    def _on_loop(self) -> bool:
        """Whether this is the thread of the event loop; under gevent and eventlet, which have none, any greenlet will do."""
        return self._consumer.hub is None or threading.get_ident() == self._thread

    def _soon(self, outcome: Callable[[], None]) -> None:
        self._outcomes.append(outcome)
        if not self._awake:
            # kombu's own `call_soon` does not interrupt the poller from another thread before 5.7.
            self._awake = True
            try:
                self._wake_write.send(b"\0")
            except OSError:
                pass  # full: the loop is about to look anyhow

    def register(self, hub: Any) -> None:
        """Called each time the event loop starts."""
        self._thread = threading.get_ident()
        hub.add_reader(self._wake_read, self.run_outcomes)
        self.looping = True
        self.acks.attach(hub)
        self.capturer.attach(hub, self._consumer.timer, self._soon)

    def unregister(self) -> None:
        """The loop ended: for good, or to start anew after a reconnect."""
        self.looping = False
        self.acks.detach()
        self.capturer.detach()

    def run_outcomes(self) -> None:
        try:
            self._wake_read.recv(4096)
        except OSError:
            pass
        # After reading: a byte sent in between would be read here, and nobody would send another.
        self._awake = False
        while self._outcomes:
            self._run(self._outcomes.popleft())

    def _run(self, outcome: Callable[[], None]) -> None:
        try:
            outcome()
        except Exception:
            logger.exception("settling a dead letter failed; its message comes again, and so may its letter")

    def flush(self, timeout: float) -> int:
        """At shutdown, on the main thread: wait for what is being stored, and settle it."""
        self.unregister()
        self._thread = threading.get_ident()
        self.run_outcomes()
        left = self.capturer.flush(timeout)
        self.run_outcomes()
        return left

    # -- classic queues tell only that a message came again, not how often

    def note_return(self, message: Any, delivery: Delivery) -> None:
        key = _key(message)
        if key:
            self._returns[key] = delivery.deliveries
            self._returns.move_to_end(key)
            while len(self._returns) > _REMEMBERED:
                self._returns.popitem(last=False)

    def count_return(self, message: Any, delivery: Delivery, use: Callable[[], None]) -> bool:
        """Have a return counted that the broker did not: the message is sent again, and this one goes; or is used, if
        that proves impossible. ``False``: nothing is done.
        """

        def settle(sent: bool) -> None:
            if not _channel_open(message):
                return
            if not sent:
                if not self._stopping():  # else the broker has it back soon
                    use()
            elif not (self.looping and self.acks.add(message)):
                self._direct(message, "ack")

        def done(sent: bool) -> None:
            if self._on_loop():
                settle(sent)
            else:
                self._soon(lambda: settle(sent))

        return self.capturer.count_return(delivery, lambda: _channel_open(message), done)

    def count_deliveries(self, message: Any, delivery: Delivery) -> None:
        if delivery.uncounted:
            # This worker remembers too, for messages that cannot be sent again.
            delivery.deliveries = max(delivery.deliveries, self._returns.get(_key(message), 1) + 1)


def _key(message: Any) -> str:
    headers = message.headers
    return str(headers.get("id") or "") if isinstance(headers, dict) else ""


def _channel_open(message: Any) -> bool:
    channel = message.channel
    return channel is not None and getattr(channel, "connection", None) is not None and not message.acknowledged
