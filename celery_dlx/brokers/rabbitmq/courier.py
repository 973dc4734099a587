"""Letters on their way: published, confirmed, published again when a connection breaks, given up when there is a better way.

No threads and no event loop in here: `capture` drives it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

from amqp.exceptions import AccessRefused, ChannelError, NotFound

from celery_dlx.brokers.rabbitmq.declare import Declarer
from celery_dlx.brokers.rabbitmq.framing import HeadersTooLargeError
from celery_dlx.brokers.rabbitmq.letters import at_rest, bare
from celery_dlx.brokers.rabbitmq.pipeline import REFUSED, RETURNED, STORED, ConfirmPipeline
from celery_dlx.brokers.rabbitmq.returns import copy_of
from celery_dlx.errors import TopologyError
from celery_dlx.letters import DeadLetter, Original
from celery_dlx.policy.settings import Policy

logger = logging.getLogger("celery_dlx")

#: Without a confirm for this long, in seconds, an original that can still be settled is left to the broker's own net.
GIVE_UP_AFTER = 30.0
#: A message that came back and could not be counted for so long, in seconds, is used as it is.
_RECOUNT_WITHIN = 5.0
#: Notes kept while there is no line.
_MAX_NOTES = 10_000
#: The same publish is tried this often when the broker answers and refuses (no route, nack).
MAX_REFUSALS = 3


class Pending:
    """One letter on its way to its DLQ. See `celery_dlx.brokers.base.Capturer.capture` for ``alive`` and ``done``.

    ``fallback``: if all else fails the original may be rejected, for its queue dead-letters by itself.
    """

    __slots__ = ("alive", "done", "fallback", "key", "letter", "refusals", "sent", "since")

    def __init__(
        self, letter: DeadLetter, alive: Callable[[], bool] | None, done: Callable[[bool], None], fallback: bool
    ) -> None:
        self.letter = letter
        self.alive = alive
        self.done = done
        self.fallback = fallback and alive is not None
        self.key = letter.id
        self.refusals = 0
        self.since = self.sent = monotonic()


class Recount:
    """A message of a classic queue that came back, on its way there once more, with its count.

    ``done(False)``, on any doubt: then the original is used, uncounted.
    """

    __slots__ = ("alive", "done", "key", "original", "queue", "returns", "sent")

    def __init__(
        self, queue: str, original: Original, returns: int, alive: Callable[[], bool], done: Callable[[bool], None]
    ) -> None:
        self.queue, self.original, self.returns = queue, original, returns
        self.alive, self.done = alive, done
        self.key = ""
        self.sent = monotonic()


class Line:
    """An open connection to the broker, ready to publish on."""

    def __init__(self, connection: Any, on_outcome: Callable[[Any, str], None]) -> None:
        self.connection = connection
        self.pipeline = ConfirmPipeline(connection.connection, on_outcome, notes=True)
        self.sock = connection.connection.sock
        self.user: str | None = connection.userid
        self.frame_max: int = connection.connection.frame_max

    def close(self) -> None:
        try:
            self.connection.collect()
        except Exception:
            logger.debug("closing the capture connection failed", exc_info=True)


class Courier:
    """Carries letters over one line after another. Used by one thread at a time, but for `add` and `open_line`."""

    def __init__(self, connect: Callable[[], Any], policy: Policy, declarer: Declarer) -> None:
        self._connect = connect
        self._policy = policy
        self._declarer = declarer
        self._waiting: deque[Pending] = deque()
        self._recounts: deque[Recount] = deque()
        #: Sent over a line that broke, and when that was.
        self._lost: list[tuple[float, Recount]] = []
        #: Until the broker refuses it.
        self.counts_returns = True
        self.notes: deque[tuple[str, bytes]] = deque(maxlen=_MAX_NOTES)
        self.line: Line | None = None
        #: Attempts in a row after which nothing was stored.
        self.failures = 0
        #: Queues whose dead-letter topology must be declared again before the next line is used.
        self._suspect: set[str] = set()

    def add(self, pending: Pending | Recount) -> None:
        if isinstance(pending, Recount):
            self._recounts.append(pending)
        else:
            self._waiting.append(pending)

    def forget_recounts(self) -> None:
        """The worker stops: what was not sent stays with the broker."""
        self._recounts.clear()
        self._lost.clear()

    def note(self, queue: str, body: bytes) -> None:
        """Something to tell, published with the letters: lost if the line breaks, or if nobody listens any more."""
        self.notes.append((queue, body))

    @property
    def open_letters(self) -> int:
        """Letters that are neither stored nor given up."""
        recounts = len(self._recounts) + len(self._lost)
        return len(self._waiting) + recounts + (self.line.pipeline.unconfirmed if self.line else 0)

    @property
    def busy(self) -> bool:
        """Whether there is anything to publish or to wait for."""
        return bool(self.notes) or self.open_letters > 0

    def open_line(self) -> Line:
        """Connect (this blocks) and return a line; `use` makes it the one in use.

        Raises:
            Exception: whatever keeps us from the broker.
        """
        connection = self._connect()
        try:
            connection.connect()
            for queue in list(self._suspect):
                self._declare(queue, connection)
            return Line(connection, self._on_outcome)
        except BaseException:
            connection.collect()
            raise

    def use(self, line: Line) -> None:
        self.line = line

    def drop_line(self, exc: BaseException) -> None:
        """The line is broken: what it had not confirmed goes again, over the next one, under the same id."""
        line, self.line = self.line, None
        self.failures += 1
        logger.error("dead letters cannot be published, trying again: %s", reason_of(exc))
        if line is None:
            return
        unconfirmed = line.pipeline.waiting()
        self._waiting.extend(each for each in unconfirmed if isinstance(each, Pending))
        recounts = [each for each in unconfirmed if isinstance(each, Recount)]
        line.close()
        if isinstance(exc, AccessRefused) and recounts:
            logger.warning("what comes back to classic queues is not counted: %s", reason_of(exc))
            self.counts_returns = False
        # They may have arrived. Their originals are not used at once: often their own connection ended, too, which is not
        # known yet, and the broker has them back.
        self._lost += [(monotonic(), recount) for recount in recounts]
        if isinstance(exc, ChannelError):
            # The broker closed the channel: no such exchange, no permission to publish to it, or one bad letter.
            for pending in self._waiting:
                pending.refusals += 1
                # No exchange: the broker's net would lose the original just the same.
                pending.fallback = pending.fallback and not isinstance(exc, NotFound)
                self._suspect.add(pending.letter.queue)

    def publish(self) -> None:
        """Encode all that waits onto the line; nothing is written yet."""
        assert self.line is not None
        now = monotonic()
        while self.notes:
            queue, body = self.notes.popleft()
            try:
                self.line.pipeline.tell(queue, body)
            except Exception:
                logger.exception("an outcome was not told")
        while self._recounts:
            self._send_again(self.line, self._recounts.popleft())
        while self._waiting:
            pending = self._waiting.popleft()
            if pending.alive is not None and not pending.alive():
                # The channel of the original is gone: it is delivered again, and lives or dies there.
                self._finish(pending, False)
            elif pending.fallback and (pending.refusals >= MAX_REFUSALS or now - pending.since > GIVE_UP_AFTER):
                self._finish(pending, False)  # the broker's net takes the original
            else:
                pending.sent = now
                self._encode(self.line, pending)

    def expire(self) -> None:
        """Give up on letters whose original the broker can still take; the others have no second copy.

        Raises:
            TimeoutError: the broker has not confirmed for too long: the line is to be dropped.
        """
        now = monotonic()
        if self.line is not None and any(now - pending.sent > GIVE_UP_AFTER for pending in self.line.pipeline.oldest()):
            raise TimeoutError(f"no confirm for {GIVE_UP_AFTER:.0f}s; is the broker under a memory or disk alarm?")
        while self._recounts and now - self._recounts[0].sent > _RECOUNT_WITHIN:
            self._finish(self._recounts.popleft(), False)
        while self._lost and now - self._lost[0][0] > _RECOUNT_WITHIN:
            self._finish(self._lost.pop(0)[1], False)
        for _ in range(len(self._waiting)):
            pending = self._waiting.popleft()
            if pending.fallback and now - pending.since > GIVE_UP_AFTER:
                self._finish(pending, False)
            else:
                self._waiting.append(pending)

    def _send_again(self, line: Line, recount: Recount) -> None:
        copied = copy_of(recount.original, recount.returns, line.user) if recount.alive() else None
        if copied is None:
            self._finish(recount, False)
            return
        message, recount.key = copied
        recount.sent = monotonic()
        try:
            line.pipeline.publish(recount, message, "", recount.queue)
        except Exception as exc:  # noqa: BLE001 - headers that py-amqp cannot write, or too many for one frame
            logger.info("a message of %r that came back is not counted: %s", recount.queue, reason_of(exc))
            self._finish(recount, False)

    def _encode(self, line: Line, pending: Pending) -> None:
        letter, exchange = pending.letter, self._policy.exchange
        try:
            try:
                line.pipeline.publish(pending, at_rest(letter, line.user), exchange, letter.queue)
            except HeadersTooLargeError:
                line.pipeline.publish(pending, at_rest(letter, line.user, line.frame_max), exchange, letter.queue)
            return
        except Exception as exc:  # noqa: BLE001 - this letter cannot be encoded; the next one can
            logger.error("letter %s of queue %r cannot be annotated: %s", pending.key, letter.queue, reason_of(exc))
        if pending.fallback:
            self._finish(pending, False)  # the broker's net takes the original as it is
            return
        try:
            line.pipeline.publish(pending, bare(letter), exchange, letter.queue)
        except Exception as exc:  # noqa: BLE001
            # An original that is not settled yet stays so, and comes again; one that was acknowledged early has no copy.
            logger.critical("letter %s of queue %r cannot be encoded: %s", pending.key, letter.queue, reason_of(exc))

    def _on_outcome(self, pending: Pending | Recount, outcome: str) -> None:
        if isinstance(pending, Recount):
            self._finish(pending, outcome == STORED)
            return
        if outcome == STORED:
            self.failures = 0
            self._finish(pending, True)
            return
        pending.refusals += 1
        self.failures += 1  # what cannot be declared must not be tried without a pause
        logger.warning("letter %s of queue %r was %s by the broker", pending.key, pending.letter.queue, outcome)
        if outcome == RETURNED:
            # Nothing was bound: someone deleted the DLQ or its binding. Declaring waits for answers, so the next line
            # does it before it is used.
            self._suspect.add(pending.letter.queue)
            pending.fallback = False  # by the broker's net the original would go nowhere just the same
        if pending.refusals == MAX_REFUSALS and outcome == REFUSED and not pending.fallback:
            logger.critical(
                "DLQ %r refuses letters; the broker's log says why. Trying until it does not", pending.letter.dlq
            )
        self._waiting.append(pending)

    @property
    def needs_new_line(self) -> bool:
        """Whether something must be declared before waiting letters can be published."""
        return bool(self._suspect)

    def _declare(self, queue: str, connection: Any) -> None:
        settings = self._policy.settings(queue)
        try:
            if settings is not None:
                self._declarer.dead_letter_queue(connection.connection, queue, settings)
            self._suspect.discard(queue)
        except (TopologyError, ChannelError) as exc:
            logger.error("%s", reason_of(exc))  # not permitted: the publish is tried in any case
            self._suspect.discard(queue)

    @staticmethod
    def _finish(pending: Pending | Recount, stored: bool) -> None:
        try:
            pending.done(stored)
        except Exception:
            logger.exception("settling %s failed", pending.key)


def reason_of(exc: BaseException) -> str:
    """One line for a log: the broker's sentence where it has one."""
    return str(getattr(exc, "reply_text", None) or str(exc) or type(exc).__name__).splitlines()[0]
