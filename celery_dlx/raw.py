"""Raw replays: messages go back as they are, so that nobody can tell of them what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from celery_dlx.brokers.base import Broker, Chosen, Replayed, Run
from celery_dlx.errors import UsageError
from celery_dlx.journal import Journal

if TYPE_CHECKING:
    from celery_dlx.engine import Options

#: What a raw replay means, in words for people.
MEANING = (
    "raw: messages go back as they are. Nobody reports what becomes of them, so they count as waiting. Retries and expires "
    "stay: a message whose retries are spent dies at its first failure, one that has expired at once. The replay is not "
    "counted: the next death looks like the first one, and has its id"
)
#: Letters that the journal says are being sent before the first of them leaves, and that left in one of its lines. So many
#: are written down before Redis is through with what was sent to it.
AHEAD = 2_000


def check(options: Options, broker: Broker) -> None:
    """Raises:
    UsageError: a raw replay with what needs reports or changes, or on a broker that cannot do it.
    """
    if not options.raw:
        return
    # Canaries bring stopping along: who gave the one alone must not read of the other.
    stop = options.stop_on_repeat and not options.canary
    needs = {"--canary": options.canary, "--stop-on-repeat": stop, "--edit": options.edit}
    if given := [name for name, value in needs.items() if value]:
        raise UsageError(
            f"--raw with {', '.join(given)}: messages that go back as they are cannot be changed, and nobody reports what "
            "becomes of them; leave out --raw, or the other"
        )
    if broker.raw_refusal:
        raise UsageError(f"--raw: {broker.raw_refusal}")


class RawSending:
    """Selected letters of one queue, by their numbers, on their way: the journal says so before they leave, and after.

    ``may_go`` is asked before each, if somebody sets the pace; ``noted`` is called when the journal says that some left.
    """

    def __init__(
        self, journal: Journal, numbers: Sequence[int], may_go: Callable[[], bool] | None, noted: Callable[[], None]
    ) -> None:
        self._journal, self._numbers, self._may_go, self._noted = journal, numbers, may_go, noted
        self._moved: list[str] = []

    def through(self, broker: Broker, queue: str, run: Run) -> Iterator[Replayed]:
        """Send them; yields each letter that left."""
        try:
            for replayed in broker.replay_raw(queue, self._leaving(), run):
                self._moved.append(replayed.letter.id)
                if len(self._moved) >= AHEAD:
                    self._note()
                yield replayed
        finally:
            self._note()

    def _leaving(self) -> Iterator[Chosen]:
        for start in range(0, len(self._numbers), AHEAD):
            numbers, entries = self._numbers[start : start + AHEAD], self._journal.record.entries
            self._journal.write("sending", letters=entries.some_ids(numbers)[:])
            for each in map(Chosen._make, entries.remembered(numbers)):
                if self._may_go is not None and not self._may_go():
                    return
                yield each

    def _note(self) -> None:
        if self._moved:
            # What was being sent, is on disk, and is not in its DLQ any more, left: this line may be lost with the machine.
            self._journal.note("state", state="replayed", letters=self._moved)
            self._moved = []
            self._noted()
