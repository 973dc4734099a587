"""What became of each letter of a replay, of a million in little memory (pure)."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple, overload

from celery_dlx.ids import IdSet

#: ``gone``: it was no letter any more when its turn came; ``unseen``: nor when it was looked for, but an earlier run may
#: have sent it, or the broker may not have given back what that run held.
_STATES = ("selected", "gone", "replayed", "succeeded", "failed", "unseen")
_NUMBERS = {state: number for number, state in enumerate(_STATES)}
_SELECTED, _GONE, _REPLAYED, _SUCCEEDED, _FAILED, _UNSEEN = range(6)
#: States of letters that were not replayed, as far as is known.
LEFT = ("selected", "gone", "unseen")
#: A letter's facts are one byte: its state, and these flags.
_STATE, _SENDING, _SETTLED, _DIFFERENTLY = 0x07, 0x08, 0x10, 0x20
#: Facts, if nothing is under way: what did not leave is not being sent. But what was executed and not seen to leave
#: may come back, as may what was not seen.
_KEPT = (_SUCCEEDED, _FAILED, _UNSEEN)
_AT_REST = bytes(facts if facts & _SETTLED or facts & _STATE in _KEPT else facts & ~_SENDING for facts in range(256))


class Entry(NamedTuple):
    """One selected letter, as it stood when this was asked for."""

    number: int
    id: str
    queue: str
    fingerprint: str
    #: In milliseconds since the epoch; noted of raw replays only, after which a letter may come back under its id.
    died_at: int
    state: str
    #: Said to be about to leave; said to have left.
    sending: bool
    settled: bool
    #: It failed of something else than before.
    differently: bool

    @property
    def outcome(self) -> str:
        """What became of it: succeeded, failed the same way or differently, waiting (no news), left."""
        if self.state == "failed":
            return "failed_differently" if self.differently else "failed_the_same"
        return {"replayed": "waiting", "succeeded": "succeeded"}.get(self.state, "left")


class Entries:
    """The selected letters, numbered from 0 in the order of their selection."""

    def __init__(self) -> None:
        self.ids = IdSet()
        self._facts = bytearray()
        self._counts = [0] * len(_STATES)
        #: Queue and fingerprint, of which there are few; their numbers; by letter, its number.
        self._causes: list[tuple[str, str]] = []
        self._cause_numbers: dict[tuple[str, str], int] = {}
        self._cause_of = array("I")
        #: By number, if it was noted, and nothing but zeros up to there; Redis's scores are such numbers.
        self._died_at = array("d")

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Entry]:
        return map(self.at, range(len(self)))

    def __contains__(self, letter_id: str) -> bool:
        return letter_id in self.ids

    def __getitem__(self, letter_id: str) -> Entry:
        found = self.get(letter_id)
        if found is None:
            raise KeyError(letter_id)
        return found

    def get(self, letter_id: str) -> Entry | None:
        number = self.ids.find(letter_id)
        return None if number is None else self.at(number)

    def at(self, number: int) -> Entry:
        letter_id, fingerprint, died_at = next(self.remembered([number]))
        queue, facts = self._causes[self._cause_of[number]][0], self._facts[number]
        flags = [bool(facts & flag) for flag in (_SENDING, _SETTLED, _DIFFERENTLY)]
        return Entry(number, letter_id, queue, fingerprint, died_at, _STATES[facts & _STATE], *flags)

    def remembered(self, numbers: Iterable[int]) -> Iterator[tuple[str, str, int]]:
        """Id, fingerprint and time of death of some."""
        ids, causes, cause_of, died_at = self.ids, self._causes, self._cause_of, self._died_at
        noted = len(died_at)
        for number in numbers:
            yield ids[number], causes[cause_of[number]][1], int(died_at[number]) if number < noted else 0

    def queues(self) -> list[str]:
        """Whose letters these are, in the order in which they came."""
        return list(dict.fromkeys(queue for queue, _ in self._causes))

    def count(self, state: str) -> int:
        return self._counts[_NUMBERS[state]]

    def numbers(self, states: Collection[str], queue: str | None = None) -> array[int]:
        """Those in one of some states, of one queue if it is named, in their order."""
        wanted = {_NUMBERS[state] for state in states}
        causes = {number for number, (each, _) in enumerate(self._causes) if queue in (None, each)}
        each = zip(self._facts, self._cause_of, strict=True)
        return array("I", (n for n, (facts, cause) in enumerate(each) if facts & _STATE in wanted and cause in causes))

    def under_way(self) -> array[int]:
        """Those that were said to be about to leave, and not that they left."""
        return array("I", (n for n, facts in enumerate(self._facts) if facts & (_SENDING | _SETTLED) == _SENDING))

    def some_ids(self, numbers: Sequence[int]) -> Sequence[str]:
        """Ids of some, in their order, each made when it is asked for."""
        return _Some(self.ids, numbers)

    # -- what the journal says

    def add(self, letter_id: str, queue: str, fingerprint: str, died_at: int = 0) -> None:
        """Select a letter; of two under one id the last is meant."""
        at = float(died_at)
        cause = self._cause_numbers.setdefault((queue, fingerprint), len(self._causes))
        if cause == len(self._causes):
            self._causes.append((queue, fingerprint))
        number = self.ids.add(letter_id)
        if number == len(self._facts):
            self._facts.append(_SELECTED)
            self._cause_of.append(cause)
        else:
            self._counts[self._facts[number] & _STATE] -= 1
            self._facts[number], self._cause_of[number] = _SELECTED, cause
        if at or number < len(self._died_at):
            self._died_at.extend(0.0 for _ in range(len(self._died_at), number + 1))
            self._died_at[number] = at
        self._counts[_SELECTED] += 1

    def sending(self, letter_ids: Iterable[str]) -> None:
        """They are about to leave."""
        for letter_id in letter_ids:
            if (number := self.ids.find(letter_id)) is not None:
                self._facts[number] |= _SENDING

    def became(self, letter_ids: Iterable[str], state: str, differently: Collection[str] = ()) -> None:
        """They are in a state now; those of ``differently`` failed of something else than before.

        Raises:
            KeyError: there is no such state.
        """
        new, others = _NUMBERS[state], frozenset(differently)
        find, all_facts, counts = self.ids.find, self._facts, self._counts
        for letter_id in letter_ids:
            if (number := find(letter_id)) is None:
                continue
            facts = all_facts[number]
            if new == _REPLAYED:
                facts |= _SETTLED
            # Workers may be faster than we are: a letter that has come to its end is not merely replayed.
            if new not in (_REPLAYED, _GONE, _UNSEEN) or facts & _STATE not in (_SUCCEEDED, _FAILED):
                counts[facts & _STATE] -= 1
                counts[new] += 1
                facts = facts & ~(_STATE | _DIFFERENTLY) | new | (_DIFFERENTLY if letter_id in others else 0)
            all_facts[number] = facts

    def at_rest(self) -> None:
        """Nothing is under way: what did not leave is to be looked for, not taken for gone with us."""
        self._facts = self._facts.translate(_AT_REST)


class _Some(Sequence[str]):
    def __init__(self, ids: IdSet, numbers: Sequence[int]) -> None:
        self._ids, self._numbers = ids, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._ids[number] for number in self._numbers[index]]
        return self._ids[self._numbers[index]]
