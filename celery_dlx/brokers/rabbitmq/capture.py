"""The worker's net on RabbitMQ: letters are published on a connection of their own, with confirms.

A connection of its own, because under a memory or disk alarm the broker stops reading from publishing connections:
acknowledgements on the same one would be stuck too.

Where the worker has an event loop, letters are written and confirms read on it, without ever waiting; only connecting,
which must wait, is a thread's work. (A thread that publishes beside the loop costs a third of the throughput: the two
take the interpreter from each other at every system call.) Under gevent and eventlet a greenlet does it all.
"""

from __future__ import annotations

import json
import logging
import selectors
import threading
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import Any

from celery_dlx.brokers.base import Delivery
from celery_dlx.brokers.rabbitmq.acks import write_acks
from celery_dlx.brokers.rabbitmq.courier import Courier, Line, Pending, Recount, reason_of
from celery_dlx.brokers.rabbitmq.declare import Declarer
from celery_dlx.letters import DeadLetter, Death, bare_letter, compose
from celery_dlx.policy.settings import Policy
from celery_dlx.redaction import for_storage
from celery_dlx.replaying import report_queue

logger = logging.getLogger("celery_dlx")

#: Between attempts to connect, in seconds.
_BACKOFF = (0.1, 0.5, 1.0, 2.0, 5.0)
#: Between looks for letters that are overdue, in seconds.
_LOOK_EVERY = 1.0
#: A socket that takes no more is tried again after this, in seconds.
_WRITE_AGAIN = 0.02
#: Where waiting is allowed, a broker that does not read for this long, in seconds, is taken to be gone.
_WRITE_TIMEOUT = 5.0
#: How long a loop that runs tasks itself waits for confirms, in seconds.
_CONFIRM_NOW = 2.0
#: How long a letter may wait for company, in seconds; and with how many unconfirmed others one may whose original waits.
_LINGER, _BUSY = 0.02, 2


class RabbitMQCapturer:
    """See `celery_dlx.brokers.base.Capturer`."""

    stores_on_reject = False
    eager = False

    def __init__(self, connect: Callable[[], Any], policy: Policy, declarer: Declarer) -> None:
        """``connect`` returns an unconnected `kombu.Connection` to the broker the worker consumes from."""
        self._policy = policy
        self._declarer = declarer
        self._courier = Courier(connect, policy, declarer)
        self._lock = threading.RLock()
        self._hub: Any = None
        self._soon: Callable[[Callable[[], None]], None] | None = None
        self._timer_entry: Any = None
        self._scheduled = False
        self._writing = False
        self._connecting = False
        self._closing = threading.Event()
        self._arrived = threading.Event()
        self._server: threading.Thread | None = None

    def compose(self, delivery: Delivery, death: Death) -> DeadLetter:
        letter = compose(death, delivery.original(), self._policy.dlq(death.queue))
        if delivery.settings.redact_stored:
            for_storage(letter, delivery.settings.redact)
        return letter

    def compose_bare(self, delivery: Delivery, death: Death) -> DeadLetter:
        return bare_letter(death, delivery.original(), self._policy.dlq(death.queue))

    def capture(self, letter: DeadLetter, alive: Callable[[], bool] | None, done: Callable[[bool], None]) -> None:
        self._courier.add(Pending(letter, alive, done, self._declarer.is_covered(letter.queue)))
        if self._hub is not None:
            self._schedule(waited_for=alive is not None)
            return
        self._serve_aside()

    def count_return(self, delivery: Delivery, alive: Callable[[], bool], done: Callable[[bool], None]) -> bool:
        if not self._courier.counts_returns:
            return False
        self._courier.add(Recount(delivery.queue, delivery.original(), delivery.deliveries - 1, alive, done))
        if self._hub is None:
            self._serve_aside()
        elif not self.eager or not self._confirm_now():
            self._schedule()
        return True

    def _confirm_now(self) -> bool:
        """Wait a moment for confirms; whether all came. Where tasks run on this loop, a copy must not run before its
        original went: whoever kills the worker then would leave two of them.
        """
        line, deadline = self._courier.line, monotonic() + _CONFIRM_NOW
        if line is None or self._courier.needs_new_line or self._writing or line.pipeline.waiting():
            return False  # what the broker did not confirm in time is not waited for again, message by message
        self._guarded(self._publish)
        while self._courier.line is line and line.pipeline.unconfirmed and (left := deadline - monotonic()) > 0:
            with selectors.DefaultSelector() as selector:
                selector.register(line.sock, selectors.EVENT_READ)
                if selector.select(left):
                    self._guarded(line.pipeline.read_some)
        return not self._courier.busy

    def _serve_aside(self) -> None:
        """No loop, now (the pool drains at shutdown; a reconnect) or ever (gevent, eventlet): somebody else must do it."""
        self._arrived.set()
        if self._server is None or not self._server.is_alive():
            self._server = threading.Thread(target=self._serve, name="celery-dlx-capture", daemon=True)
            self._server.start()

    def acknowledge(self, messages: Sequence[Any]) -> None:
        write_acks(messages)

    def report(self, replay: str, outcome: dict[str, Any]) -> None:
        self._courier.note(report_queue(replay), json.dumps(outcome).encode())
        if self._hub is not None:
            self._schedule()
        else:
            self._serve_aside()

    # -- on the event loop

    def attach(self, hub: Any, timer: Any, soon: Callable[[Callable[[], None]], None]) -> None:
        """From now on the loop is running; ``soon`` runs a function on it, from any thread.

        Called again each time the loop starts anew, for a loop that ended has forgotten its readers.
        """
        self._soon = soon
        self._hub = hub  # `_serve` sees it and leaves
        with self._lock:
            # Whatever was scheduled went with the loop that ended; 5.6 clears its timer, 5.7 cancels what was added.
            self._writing = self._scheduled = False
            if self._timer_entry is not None:
                timer.cancel(self._timer_entry)
            self._timer_entry = timer.call_repeatedly(_LOOK_EVERY, self._look)
            if self._courier.line is not None:
                self._watch(self._courier.line)
            self._schedule()

    def detach(self) -> None:
        """The loop is over, or about to start anew: letters wait for `attach` or `flush`."""
        self._hub = None

    def _schedule(self, *, waited_for: bool = False) -> None:
        """Publish a little later, with what comes until then.

        Letters that share a system call, a frame of confirms and a turn of the loop cost a third less.
        ``waited_for``: an original waits to be settled, and with a small prefetch the worker for it.
        """
        if not self._scheduled:
            self._scheduled = True
            line = self._courier.line
            if self.eager:
                self._hub.call_soon(self._turn)
            elif not waited_for:
                self._hub.call_later(_LINGER, self._turn)
            elif line is not None and line.pipeline.unconfirmed >= _BUSY:
                self._hub.call_later(_LINGER / 4, self._turn)
            else:
                self._hub.call_soon(self._turn)

    def _turn(self) -> None:
        self._scheduled = False
        courier = self._courier
        if self._hub is None or not courier.busy:
            return
        if courier.line is None or courier.needs_new_line:
            self._connect_aside()
            return
        self._guarded(self._publish)

    def _publish(self) -> None:
        line = self._courier.line
        assert line is not None
        self._courier.publish()
        if not self._writing:
            self._write(line)

    def _write(self, line: Line) -> None:
        self._writing = not line.pipeline.write_some()
        if self._writing:
            # Not by the hub's writers: kombu keeps one registration per socket, and this one is the reader's.
            self._hub.call_later(_WRITE_AGAIN, partial(self._write_more, line))

    def _write_more(self, line: Line) -> None:
        if line is self._courier.line and self._hub is not None:
            self._guarded(partial(self._write, line))

    def _on_readable(self) -> None:
        line = self._courier.line
        if line is not None:
            self._guarded(partial(line.pipeline.read_some, once=True))
            if self._courier.needs_new_line:
                self._schedule()

    def _look(self) -> None:
        if self._hub is not None and self._courier.open_letters:
            self._guarded(self._courier.expire)
            self._schedule()

    def _guarded(self, step: Callable[[], Any]) -> Any:
        """Run a step; a broken line is dropped, and another one asked for."""
        try:
            return step()
        except Exception as exc:  # noqa: BLE001 - the net must outlive every error
            self._drop(exc)
            return False

    def _drop(self, exc: BaseException) -> None:
        line = self._courier.line
        if line is not None and self._hub is not None:
            try:
                self._hub.remove(line.sock.fileno())
            except Exception:
                logger.debug("the capture connection was not watched", exc_info=True)
        self._writing = False
        self._courier.drop_line(exc)
        if self._hub is not None and self._courier.open_letters:
            self._connect_aside()

    def _watch(self, line: Line) -> None:
        line.sock.settimeout(0)
        self._hub.add_reader(line.sock, self._on_readable)

    def _connect_aside(self) -> None:
        if self._connecting:
            return
        self._connecting = True
        threading.Thread(target=self._connect_until_done, name="celery-dlx-connect", daemon=True).start()

    def _connect_until_done(self) -> None:
        """In a thread: connecting waits. The line is handed to the loop."""
        while not self._closing.wait(self._backoff()):
            try:
                line = self._courier.open_line()
            except Exception as exc:  # noqa: BLE001
                self._courier.failures += 1
                logger.error("dead letters wait for the broker: %s", reason_of(exc))
            else:
                assert self._soon is not None
                self._soon(partial(self._adopt, line))
                return
        self._connecting = False

    def _adopt(self, line: Line) -> None:
        self._connecting = False
        if self._courier.line is not None:
            line.close()  # it was needed to declare something, or another one was faster
        else:
            self._courier.use(line)
            if self._hub is not None:
                self._watch(line)
        if self._hub is not None:
            self._schedule()

    # -- without one

    def open(self) -> None:
        """Connect now, where waiting is allowed (at start); a failure is only noted: the first letter tries again."""
        with self._lock:
            if self._courier.line is None:
                try:
                    self._courier.use(self._courier.open_line())
                except Exception as exc:  # noqa: BLE001
                    logger.warning("no connection for dead letters yet: %s", reason_of(exc))

    def _serve(self) -> None:
        """In a thread (under gevent and eventlet, a greenlet) while there is no loop."""
        while self._hub is None and not self._closing.is_set():
            if not self._courier.busy:
                self._arrived.clear()
                if not self._courier.busy:
                    self._arrived.wait(_LOOK_EVERY)
            elif not self._pump(0.1):
                self._closing.wait(self._backoff())

    def _backoff(self) -> float:
        failures = self._courier.failures
        return _BACKOFF[min(failures, len(_BACKOFF)) - 1] if failures else 0.0

    def _pump(self, timeout: float) -> bool:
        """Publish what waits and take confirms, waiting at most ``timeout`` seconds for them; whether it worked."""
        with self._lock:
            if self._hub is not None:
                return True  # the loop took over
            courier = self._courier
            try:
                if courier.line is None:
                    courier.use(courier.open_line())
                elif courier.needs_new_line:
                    courier.open_line().close()  # having declared what was missing
                assert courier.line is not None
                courier.line.sock.settimeout(_WRITE_TIMEOUT)
                courier.publish()
                courier.line.pipeline.write()
                with selectors.DefaultSelector() as selector:
                    selector.register(courier.line.sock, selectors.EVENT_READ)
                    if selector.select(timeout):
                        courier.line.pipeline.read_some()
                courier.expire()
                return True
            except Exception as exc:  # noqa: BLE001 - the net must outlive every error
                courier.drop_line(exc)
                return False

    def flush(self, timeout: float) -> int:
        """On the thread that ran the loop, now ended: publish and wait. Returns how many letters are not stored."""
        deadline = monotonic() + timeout
        courier = self._courier
        courier.forget_recounts()
        # Notes are worth one try, letters all the time there is.
        while (courier.open_letters or (courier.notes and courier.line)) and (left := deadline - monotonic()) > 0:
            if not self._pump(min(left, 0.5)):
                self._closing.wait(min(left, self._backoff()))
        return self._courier.open_letters

    def close(self) -> None:
        self._closing.set()
        self._arrived.set()
        with self._lock:
            line, self._courier.line = self._courier.line, None
            if line is not None:
                line.close()
