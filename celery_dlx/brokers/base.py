"""What the rest of celery-dlx asks of a broker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from celery_dlx.groups import Group
from celery_dlx.letters import DeadLetter, Death, Original
from celery_dlx.policy.settings import QueueSettings

#: Under this key a delivery travels in ``message.delivery_info`` from the consumer's callback to the worker (RabbitMQ).
DELIVERY_KEY = "celery-dlx"


@dataclass
class Delivery:
    """One delivery of a message from a managed queue: where it came from and what its producer sent."""

    queue: str
    settings: QueueSettings
    original: Callable[[], Original]
    #: How often the message was delivered, this time included.
    deliveries: int = 1
    #: How many of them count against it, where that is known better: a message that was only held by a worker that died is
    #: not to blame for its death.
    blamed: int | None = None
    #: It came back, and the broker did not count that (classic queues).
    uncounted: bool = False
    #: Called when its task starts, if the broker wants to know.
    on_started: Callable[[], None] | None = None
    #: Set just before the message is rejected; on Redis the rejection stores the letter.
    letter: DeadLetter | None = None
    #: Called when a rejection stored the letter.
    on_stored: Callable[[], None] | None = None
    #: The message's final disposition is decided: nothing may capture it a second time.
    settled: bool = False

    @property
    def is_spent(self) -> bool:
        """Whether it was delivered as often as the policy allows, this time included."""
        return (self.deliveries if self.blamed is None else self.blamed) >= self.settings.max_deliveries

    @property
    def is_poison(self) -> bool:
        """Whether it was delivered more often than that."""
        return (self.deliveries if self.blamed is None else self.blamed) > self.settings.max_deliveries

    def __repr__(self) -> str:
        return f"<delivery from {self.queue!r}>"  # stock Celery logs delivery_info


def delivery_of(message: Any) -> Delivery | None:
    """The delivery a kombu message is of; ``None`` if its queue is not managed."""
    delivery: Delivery | None = getattr(message, "dlx", None)
    if delivery is None:
        delivery = (message.delivery_info or {}).pop(DELIVERY_KEY, None)
        if delivery is not None:
            message.dlx = delivery
    return delivery


class Capturer(Protocol):
    """The worker's net: stores letters. Called from any thread; never blocks, never raises."""

    #: Rejecting the original stores the letter (Redis): one atomic move.
    stores_on_reject: bool
    #: Tasks run on the event loop itself (the solo pool) and hold it up: letters must not wait for company.
    eager: bool

    def compose(self, delivery: Delivery, death: Death) -> DeadLetter: ...

    def compose_bare(self, delivery: Delivery, death: Death) -> DeadLetter:
        """The letter of a message that `compose` could not describe: its bytes, under a random id."""

    def capture(self, letter: DeadLetter, alive: Callable[[], bool] | None, done: Callable[[bool], None]) -> None:
        """Store a letter; then call ``done(True)``, or ``done(False)`` if that proved impossible.

        ``alive`` tells whether the original can still be settled; ``None``: there is no original to fall back on, so
        never give up while the process lives.
        """

    def count_return(self, delivery: Delivery, alive: Callable[[], bool], done: Callable[[bool], None]) -> bool:
        """Send an uncounted delivery to its queue again, with its count; then call ``done``: whether its original may go.

        Returns whether ``done`` will be called.
        """

    def open(self) -> None:
        """Connect, where waiting is allowed."""

    def attach(self, hub: Any, timer: Any, soon: Callable[[Callable[[], None]], None]) -> None:
        """The worker's event loop is running from now on; ``soon`` runs a function on it, from any thread."""

    def detach(self) -> None:
        """The event loop does not run any more."""

    def acknowledge(self, messages: Sequence[Any]) -> None:
        """Acknowledge kombu messages together. What a broken connection keeps from it comes again."""

    def report(self, replay: str, outcome: dict[str, Any]) -> None:
        """Tell a replay what became of one of its messages; best effort."""

    def flush(self, timeout: float) -> int:
        """Wait at most ``timeout`` seconds until all letters are stored; returns how many are not."""

    def close(self) -> None: ...


@dataclass
class QueueStats:
    """What is known of one DLQ."""

    queue: str
    dlq: str
    letters: int
    extra: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"queue": self.queue, "dlq": self.dlq, "letters": self.letters, **self.extra}


@dataclass
class Replayed:
    """A letter that went back to its queue, and what had to change in its message."""

    letter: DeadLetter
    queue: str
    changes: list[str]


class Chosen(NamedTuple):
    """What is remembered of a letter that was selected; when it died in milliseconds since the epoch."""

    id: str
    fingerprint: str
    died_at: int

    @staticmethod
    def of(letter: DeadLetter) -> Chosen:
        return Chosen(letter.id, letter.fingerprint, letter.died_at)


Match = Callable[[DeadLetter], bool]


def wants_bodies(match: Match | None) -> bool:
    """Whether a test looks into messages (see `celery_dlx.selection.Selection`)."""
    return bool(getattr(match, "bodies", False))


@dataclass
class Run:
    """How a replay goes about it. ``replay`` is the id under which workers report; ``to`` another queue than its own."""

    replay: str | None = None
    to: str | None = None
    #: Letters moved at once at most.
    batch: int | None = None
    #: Whether some are still wanted that were not seen; then what came meanwhile is looked at too.
    wanted: Callable[[], bool] = lambda: False
    #: Changes a letter's message before it goes; what it raises keeps that letter where it is.
    edit: Callable[[DeadLetter], None] | None = None
    #: Whether replayed letters are given with their messages, on Redis too.
    bodies: bool = False
    #: What was chosen by: letters that `Broker.hold` holds for this very test need not be read.
    held: Match | None = None
    #: Asked before each letter: no more of them, but finish what was begun.
    stop: Callable[[], bool] = lambda: False


@dataclass
class Looking:
    """Large DLQs that cannot be asked for pages (RabbitMQ) are read, and what was read is kept for a while.

    ``say`` is told of which moment something is; ``fresh``: read them in any case.
    """

    say: Callable[[str], None]
    fresh: bool = False


class Holding(Protocol):
    """Letters that are held for a replay."""

    def chosen(self) -> Iterator[Chosen]:
        """What is to be remembered of them, oldest first; may be asked for more than once."""

    def letters(self) -> Iterator[DeadLetter]:
        """The letters, with their messages; may be asked for more than once."""


class Broker(Protocol):
    """Reads and empties dead-letter queues."""

    #: Why `replay_raw` is not to be had here; "" where it is.
    raw_refusal: str

    def queues(self) -> list[str]:
        """Source queues that have a DLQ here, sorted."""

    def browse(
        self, queue: str, match: Match | None = None, limit: int | None = None, looking: Looking | None = None
    ) -> Iterator[DeadLetter]:
        """The (matching) letters of a queue's DLQ, oldest first, without removing or changing any.

        ``looking``: for eyes only, and may be some minutes old; else it is acted on, and no older than the call.
        """

    def groups(self, queue: str, match: Match, looking: Looking | None = None) -> Iterable[Group] | None:
        """The groups of matching letters, where they are known without reading all; ``None``: browse, and count."""

    def select(self, queue: str, match: Match) -> Iterator[Chosen] | None:
        """Matching letters, where they can be told without being read; ``None``: browse."""

    def get(self, queue: str, letter_id: str) -> DeadLetter | None:
        """One letter with its message; ``None`` if the queue's DLQ does not hold it."""

    def hold(self, queue: str, match: Match, replay: str, limit: int | None = None) -> Holding | None:
        """Take matching letters aside for a replay (its id), where that spares reading them again: nobody else sees them.

        Asked again by the same test, the same ones; by another one, those before are put back. They are held until that
        replay ends, or `release`; ``None``: nothing is held.
        """

    def release(self) -> None:
        """Put back what is held."""

    def held_by_others(self, queue: str) -> bool:
        """Whether somebody else, be it somebody who was killed just now, may hold letters of a DLQ and give them back."""

    def replay(self, queue: str, match: Match, limit: int | None = None, run: Run | None = None) -> Iterator[Replayed]:
        """Move matching letters back to their source queue, each at-least-once."""

    def replay_raw(self, queue: str, letters: Iterator[Chosen], run: Run) -> Iterator[Replayed]:
        """Move letters back to their source queue with the very bytes of their messages, each exactly once.

        They are taken from ``letters`` as they are about to leave. One that died again since it was chosen stays. Letters
        that are yielded know no more than was chosen, unless ``run.bodies``; ``run.edit`` and ``run.wanted`` are not asked.
        """

    def watch(self, replay: str) -> None:
        """From now on keep what workers report of this replay's messages, for a day."""

    def outcomes(self, replay: str) -> list[dict[str, Any]]:
        """What workers reported since; what was returned before is forgotten only now, for the caller may have died."""

    def export(self, queue: str, match: Match, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Matching letters as JSON-ready objects that `restore` takes back exactly; none is removed."""

    def restore(self, lines: Iterable[dict[str, Any]]) -> tuple[int, int]:
        """Store exported letters again; returns how many, and how many were there already.

        Raises:
            UsageError: a line of another kind of broker, or one that cannot be read.
        """

    def discard(self, queue: str, match: Match, limit: int | None = None) -> Iterator[DeadLetter]:
        """Delete matching letters for good."""

    def purge(self, queue: str) -> int:
        """Delete all letters of a queue; returns how many."""

    def stats(self, queues: Iterable[str]) -> Iterator[QueueStats]: ...

    def close(self) -> None: ...
