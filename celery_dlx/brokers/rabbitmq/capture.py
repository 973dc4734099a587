"""The worker's net on RabbitMQ: a thread with a connection of its own that publishes letters and awaits confirms.

A connection of its own, because under a memory or disk alarm the broker stops reading from publishing connections:
acknowledgements on the same one would be stuck too. A thread, because writing to such a connection blocks.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

from amqp.exceptions import AccessRefused, AMQPError, NotFound

from celery_dlx.brokers.base import Delivery
from celery_dlx.brokers.rabbitmq.declare import Declarer
from celery_dlx.brokers.rabbitmq.letters import at_rest
from celery_dlx.brokers.rabbitmq.pipeline import REFUSED, RETURNED, STORED, ConfirmPipeline
from celery_dlx.letters import DeadLetter, Death, compose
from celery_dlx.policy.settings import Policy

logger = logging.getLogger("celery_dlx")

#: Without a confirm for this long, in seconds, an original that can still be settled is left to the broker's own net.
GIVE_UP_AFTER = 30.0
#: The same publish is tried this often when the broker answers and refuses (no route, nack).
MAX_REFUSALS = 3
#: Between attempts to connect, in seconds.
_BACKOFF = (0.2, 0.5, 1.0, 2.0, 5.0)
#: A batch is allowed to grow for this long, in seconds, while letters keep coming: one switch to this thread per batch
#: instead of one per letter.
_LINGER = 0.004


class _Pending:
    """One letter on its way to its DLQ."""

    __slots__ = ("alive", "done", "key", "letter", "refusals", "sent", "since")

    def __init__(self, letter: DeadLetter, alive: Callable[[], bool] | None, done: Callable[[bool], None]) -> None:
        self.letter = letter
        self.alive = alive
        self.done = done
        self.key = letter.id
        self.refusals = 0
        self.since = self.sent = monotonic()


class RabbitMQCapturer:
    """See `celery_dlx.brokers.base.Capturer`."""

    stores_on_reject = False

    def __init__(self, connect: Callable[[], Any], policy: Policy, declarer: Declarer) -> None:
        """``connect`` returns an unconnected `kombu.Connection` to the broker the worker consumes from."""
        self._connect = connect
        self._policy = policy
        self._declarer = declarer
        self._incoming: deque[_Pending] = deque()
        self._retry: deque[_Pending] = deque()
        self._open = 0  # letters not yet done
        self._count = threading.Lock()
        self._idle = threading.Condition(self._count)
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._sleeping = False
        self._closing = False
        self._pause = threading.Event()
        self._selector: Any = None
        self._thread: threading.Thread | None = None
        self._connection: Any = None
        self._pipeline: ConfirmPipeline | None = None
        self._user: str | None = None
        self._frame_max = 131_072

    # -- called from any thread

    def compose(self, delivery: Delivery, death: Death) -> DeadLetter:
        return compose(death, delivery.original(), self._policy.dlq(death.queue))

    def capture(self, letter: DeadLetter, alive: Callable[[], bool] | None, done: Callable[[bool], None]) -> None:
        with self._count:
            self._open += 1
            if self._thread is None:
                # Started at the first letter, in the process that runs the event loop, never before a fork.
                self._thread = threading.Thread(target=self._run, name="celery-dlx-capture", daemon=True)
                self._thread.start()
        self._incoming.append(_Pending(letter, alive, done))
        if self._sleeping:
            self._wake()

    def flush(self, timeout: float) -> int:
        deadline = monotonic() + timeout
        with self._idle:
            while self._open and (left := deadline - monotonic()) > 0:
                self._wake()
                self._idle.wait(min(left, 0.2))
            return self._open

    def close(self) -> None:
        self._closing = True
        self._pause.set()
        self._wake()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _wake(self) -> None:
        try:
            self._wake_write.send(b"\0")
        except OSError:
            pass  # full: it will wake anyhow; closed: nobody is left to wake

    # -- the thread

    def _run(self) -> None:
        failures = 0
        while not self._closing:
            try:
                if self._pipeline is None:
                    self._open_pipeline()
                self._work()
                failures = 0
            except Exception as exc:  # noqa: BLE001 - the net must outlive every error
                if not self._closing:
                    logger.error("dead letters cannot be published, trying again: %s", _reason(exc))
                self._drop_connection()
                if isinstance(exc, (AccessRefused, NotFound)):
                    self._count_refusal()
                self._expire()
                self._sleep(_BACKOFF[min(failures, len(_BACKOFF) - 1)])
                failures += 1
        self._drop_connection()

    def _open_pipeline(self) -> None:
        connection = self._connect()
        try:
            connection.connect()
            for queue in {pending.letter.queue for pending in self._retry}:
                self._redeclare(queue, connection)  # what an earlier connection relied on may be gone
            channel = connection.channel()
            self._frame_max = connection.connection.frame_max
            self._user = connection.userid
            self._pipeline = ConfirmPipeline(channel, self._on_outcome)
            self._connection = connection
            self._selector = selectors.DefaultSelector()
            self._selector.register(self._wake_read, selectors.EVENT_READ)
            self._selector.register(connection.connection.sock, selectors.EVENT_READ)
        except BaseException:
            connection.collect()
            raise

    def _drop_connection(self) -> None:
        pipeline, connection = self._pipeline, self._connection
        self._pipeline = self._connection = None
        if pipeline is not None:
            # Whether these were stored is not known: they are published again, and carry the same id.
            self._retry.extend(pipeline.waiting())
        if connection is not None:
            self._selector.close()
            try:
                connection.collect()
            except Exception:
                logger.debug("closing the capture connection failed", exc_info=True)

    def _work(self) -> None:
        pipeline = self._pipeline
        assert pipeline is not None
        while self._retry:
            self._publish(pipeline, self._retry.popleft())
        while self._incoming:
            self._publish(pipeline, self._incoming.popleft())
        pipeline.write()
        if self._ready(pipeline):
            pipeline.read()
        self._expire()

    def _ready(self, pipeline: ConfirmPipeline) -> bool:
        """Sleep until confirms or letters come; whether there is something to read."""
        sock = self._connection.connection.sock
        self._sleeping = True
        try:
            if self._incoming:
                return False
            readable = {key.fileobj for key, _ in self._selector.select(1.0)}
        finally:
            self._sleeping = False
        if self._wake_read in readable:
            self._drain_wakes()
            if sock not in readable and pipeline.unconfirmed:
                return any(key.fileobj is sock for key, _ in self._selector.select(_LINGER))
        return sock in readable

    def _drain_wakes(self) -> None:
        try:
            while self._wake_read.recv(4096):
                pass
        except BlockingIOError:
            pass

    def _sleep(self, seconds: float) -> None:
        deadline = monotonic() + seconds
        while not self._closing and (left := deadline - monotonic()) > 0:
            self._pause.wait(min(left, 0.2))

    def _publish(self, pipeline: ConfirmPipeline, pending: _Pending) -> None:
        if pending.alive is not None and not pending.alive():
            # The channel of the original is gone: the broker delivers it again, and it lives or dies there.
            self._finish(pending, False)
            return
        try:
            message = at_rest(pending.letter, self._user, self._frame_max)
            pending.sent = monotonic()
            pipeline.publish(pending, message, self._policy.exchange, pending.letter.queue)
        except (AMQPError, OSError):
            self._retry.append(pending)
            raise
        except Exception as exc:  # noqa: BLE001 - this letter cannot be encoded; the next one can
            logger.error("letter %s of queue %r cannot be annotated: %s", pending.key, pending.letter.queue, _reason(exc))
            self._unannotated(pipeline, pending)

    def _unannotated(self, pipeline: ConfirmPipeline, pending: _Pending) -> None:
        if pending.alive is not None:
            self._finish(pending, False)  # the broker's net takes the original as it is
            return
        try:
            original = pending.letter.original
            message = at_rest(_bare(pending.letter), self._user, self._frame_max)
            message.properties["application_headers"] = {
                "x-celery-dlx": {"id": pending.key, "reason": pending.letter.reason, "queue": pending.letter.queue}
            }
            message.body = original.body
            pipeline.publish(pending, message, self._policy.exchange, pending.letter.queue)
        except (AMQPError, OSError):
            self._retry.append(pending)
            raise
        except Exception as exc:  # noqa: BLE001
            logger.critical("letter %s of queue %r is lost: %s", pending.key, pending.letter.queue, _reason(exc))
            self._finish(pending, False)

    def _on_outcome(self, pending: _Pending, outcome: str) -> None:
        if outcome == STORED:
            self._finish(pending, True)
            return
        pending.refusals += 1
        logger.warning("letter %s of queue %r was %s by the broker", pending.key, pending.letter.queue, outcome)
        if outcome == RETURNED:
            # Nothing was bound: someone deleted the DLQ or its binding. On a connection of its own, for this one is
            # being read right now.
            self._redeclare(pending.letter.queue)
        if pending.refusals >= MAX_REFUSALS and pending.alive is not None:
            self._finish(pending, False)
            return
        if pending.refusals >= MAX_REFUSALS and outcome == REFUSED:
            logger.critical(
                "DLQ %r refuses letters; the broker's log says why. Trying again until it does not", pending.letter.dlq
            )
        self._retry.append(pending)

    def _redeclare(self, queue: str, connection: Any = None) -> None:
        settings = self._policy.settings(queue)
        if settings is None:
            return
        try:
            if connection is not None:
                self._declarer.dead_letter_queue(connection.connection, queue, settings)
                return
            with self._connect() as connection:
                connection.connect()
                self._declarer.dead_letter_queue(connection.connection, queue, settings)
        except Exception as exc:  # noqa: BLE001 - the publish is tried again in any case
            logger.error("%s", _reason(exc))

    def _count_refusal(self) -> None:
        """The broker closed the channel: no exchange, or no permission to publish to it."""
        for _ in range(len(self._retry)):
            pending = self._retry.popleft()
            pending.refusals += 1
            if pending.refusals >= MAX_REFUSALS and pending.alive is not None:
                self._finish(pending, False)
            else:
                self._retry.append(pending)

    def _expire(self) -> None:
        """Give up on letters whose original the broker can still take; the others have no second copy."""
        now = monotonic()
        waiting = self._pipeline.waiting() if self._pipeline is not None else []
        overdue = [pending for pending in waiting if now - pending.sent > GIVE_UP_AFTER]
        if overdue:
            raise TimeoutError(f"no confirm for {GIVE_UP_AFTER:.0f}s; is the broker under a memory or disk alarm?")
        for _ in range(len(self._retry)):
            pending = self._retry.popleft()
            if pending.alive is not None and now - pending.since > GIVE_UP_AFTER:
                self._finish(pending, False)
            else:
                self._retry.append(pending)
        while self._pipeline is None and self._incoming:
            self._retry.append(self._incoming.popleft())

    def _finish(self, pending: _Pending, stored: bool) -> None:
        try:
            pending.done(stored)
        except Exception:
            logger.exception("settling letter %s failed", pending.key)
        with self._idle:
            self._open -= 1
            if not self._open:
                self._idle.notify_all()


def _bare(letter: DeadLetter) -> DeadLetter:
    bare = DeadLetter(letter.id, letter.queue, letter.dlq, letter.reason, letter.died_at, letter.original)
    bare.original.headers = {}
    return bare


def _reason(exc: BaseException) -> str:
    """One line for a log: the broker's sentence where it has one."""
    return str(getattr(exc, "reply_text", None) or exc or type(exc).__name__).splitlines()[0]
