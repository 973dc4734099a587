"""Every exception celery-dlx raises: what was found, what was expected, and what to do."""

from __future__ import annotations

from dataclasses import dataclass

EXIT_FINDINGS = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 69  # EX_UNAVAILABLE of sysexits.h


class DeadLetterError(Exception):
    """Base of all errors; ``exit_code`` is what the command line exits with."""

    exit_code = EXIT_FINDINGS


class UsageError(DeadLetterError):
    """The call itself is wrong: nothing was attempted."""

    exit_code = EXIT_USAGE


class AlreadyInstalledError(UsageError):
    """DeadLetters was constructed twice for one app."""


class NotInstalledError(UsageError):
    """The app has no DeadLetters."""


class BrokerUrlError(UsageError):
    """The broker URL makes no sense. What was found in it is not shown: it may be a piece of the password."""

    def __init__(self) -> None:
        super().__init__(
            "the broker URL cannot be used: expected transport://user:password@host:port/database?options; quote what is "
            "special in the password (# is %23, / is %2F, ? is %3F, @ is %40)"
        )


class UnsupportedBrokerError(UsageError):
    """The broker's transport is neither RabbitMQ nor Redis."""


class UnknownLetterError(DeadLetterError):
    """No dead letter has the id that was asked for."""


class BrokerUnreachableError(DeadLetterError):
    """The broker does not answer, or refuses the credentials."""

    exit_code = EXIT_UNREACHABLE


class TopologyError(DeadLetterError):
    """The broker refuses an exchange, queue or binding that dead-lettering needs."""


class UnsafeQueueError(DeadLetterError):
    """Reading this dead-letter queue would delete letters."""


class StoreFullError(DeadLetterError):
    """The broker has no memory left for what was asked (Redis: OOM)."""


class ReplayError(DeadLetterError):
    """A letter could not be replayed; it is still in its dead-letter queue."""


class SpoolError(DeadLetterError):
    """Letters cannot be set aside while their dead-letter queue is read; all are still in it."""


class SpoiltIndexError(DeadLetterError):
    """What was kept of a dead-letter queue cannot be read any more, and is forgotten; the letters are where they were."""


class JournalError(DeadLetterError):
    """A replay's journal cannot be written."""


@dataclass(frozen=True, order=True)
class Problem:
    """One thing wrong with a policy file. ``line`` and ``column`` count from 1."""

    line: int
    column: int
    message: str


class PolicyError(UsageError):
    """A policy that cannot be used; carries every problem found, never only the first."""

    def __init__(self, path: str, problems: list[Problem]) -> None:
        self.path = path
        self.problems = sorted(problems)
        super().__init__("\n".join(f"{path}:{p.line}:{p.column}: {p.message}" for p in self.problems))
