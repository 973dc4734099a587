"""Many ids in little memory (pure)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from struct import iter_unpack

#: Bytes of an id of ours, which is written in hexadecimal digits; and those digits.
_BYTES, _DIGITS = 16, 32
#: Stands where an id is another's.
_NOTHING = bytes(_BYTES)
#: The table of numbers grows by this factor when it is two thirds full.
_GROWTH = 2


class IdList:
    """Ids in their order. One of ours takes 16 bytes; as text it would take 90. Others' are kept as they are."""

    __slots__ = ("_others", "_packed")

    def __init__(self) -> None:
        self._packed = bytearray()
        #: By number: what is no id of ours.
        self._others: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._packed) // _BYTES

    def __getitem__(self, number: int) -> str:
        if self._others and (other := self._others.get(number)) is not None:
            return other
        at = number * _BYTES
        return self._packed[at : at + _BYTES].hex()

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))

    def extend(self, letter_ids: Iterable[str]) -> None:
        for letter_id in letter_ids:
            self.append(letter_id)

    def append(self, letter_id: str) -> None:
        packed = _pack(letter_id)
        if packed is None:
            self._others[len(self)] = letter_id
        self._packed += packed or _NOTHING


class IdSet(IdList):
    """Ids, each once, numbered in the order in which they came. One of ours takes some 25 bytes, in a dict 150."""

    __slots__ = ("_mask", "_next", "_slots")

    def __init__(self, letter_ids: Iterable[str] = ()) -> None:
        super().__init__()
        #: Numbers, from 1, where the hash of their ids says, or in the next place that was free; 0 is free.
        self._slots = array("I", bytes(4 * 64))
        self._mask = len(self._slots) - 1
        #: The number after the one that was found last: mostly they are asked for in their order.
        self._next = 0
        for letter_id in letter_ids:
            self.add(letter_id)

    def __contains__(self, letter_id: str) -> bool:
        return self.find(letter_id) is not None

    def find(self, letter_id: str) -> int | None:
        """The number of an id, from 0."""
        number = self._next
        at = number * _BYTES
        if self._packed[at : at + _BYTES].hex() == letter_id != "" and number not in self._others:
            self._next = number + 1
            return number
        number = self._slots[self._place(letter_id, _pack(letter_id))]
        if not number:
            return None
        self._next = number
        return number - 1

    def add(self, letter_id: str) -> int:
        """The number of an id, a new one if it was not there."""
        packed = _pack(letter_id)
        place = self._place(letter_id, packed)
        number = self._slots[place]
        if number:
            return number - 1
        new = len(self)
        if packed is None:
            self._others[new] = letter_id
        self._packed += packed or _NOTHING
        self._slots[place] = new + 1
        if 3 * new > 2 * self._mask:
            self._grow()
        return new

    def _place(self, letter_id: str, packed: bytes | None) -> int:
        """Where the number of an id stands, or would stand. Hashes are salted: nobody can have all ids meet in one place."""
        slots, mask, others = self._slots, self._mask, self._others
        place = hash(letter_id if packed is None else packed) & mask
        if packed is None:
            while (number := slots[place]) and others.get(number - 1) != letter_id:
                place = (place + 1) & mask
            return place
        data = self._packed
        while number := slots[place]:
            at = (number - 1) * _BYTES
            if data[at : at + _BYTES] == packed and number - 1 not in others:
                break
            place = (place + 1) & mask
        return place

    def _grow(self) -> None:
        self._slots = slots = array("I", bytes(4 * _GROWTH * len(self._slots)))
        self._mask = mask = len(slots) - 1
        others = self._others
        for number, (packed,) in enumerate(iter_unpack(f"{_BYTES}s", self._packed)):
            place = hash(others.get(number, packed) if others else packed) & mask
            while slots[place]:
                place = (place + 1) & mask
            slots[place] = number + 1


def _pack(letter_id: str) -> bytes | None:
    """An id of ours as bytes; ``None``: it is another's."""
    if len(letter_id) != _DIGITS:
        return None
    try:
        packed = bytes.fromhex(letter_id)
    except ValueError:
        return None
    return packed if packed.hex() == letter_id else None  # capitals and blanks are others'
