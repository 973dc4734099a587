"""Sets letters aside while a DLQ is read: a few in memory, those beyond in a file that has no name.

A million letters must fit a small process. The file is the owner's alone (0600), and gone with the process: letters may
hold personal data.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from struct import Struct
from typing import IO

from celery_dlx.brokers.rabbitmq.deliveries import Taken
from celery_dlx.errors import SpoolError

#: Kept in memory at most, in bytes, and what a letter takes there besides its own.
_IN_MEMORY, _EACH = 16_777_216, 400
#: Written and read at once, in bytes.
_BUFFER = 262_144
#: Sizes of method arguments, properties and body stand before them.
_SIZES = Struct(">HIQ")


class Spool:
    """Letters in the order they are added; closing it, or letting go of it, forgets them."""

    def __init__(self, *, any_order: bool = False, share: int = 1) -> None:
        """``any_order``: they may be read in another order than they came. ``share``: of what may be kept in memory, one of
        so many parts."""
        self._file: IO[bytes] | None = None
        self._first: list[Taken] = []
        self._room = _IN_MEMORY // share
        #: Of those beyond: how many, and where the next begins in the file; and where each does, if that must be known.
        self._beyond = self._end = 0
        self._places = array("Q") if any_order else None

    def __len__(self) -> int:
        return len(self._first) + self._beyond

    def add(self, raw: Taken) -> None:
        """Set a letter aside.

        Raises:
            SpoolError: the file cannot be made or written.
        """
        sizes = len(raw.method), len(raw.content), len(raw.body)
        if self._file is None:
            self._room -= sum(sizes) + _EACH
            if self._room >= 0:
                self._first.append(Taken(raw.method, raw.content, raw.body))
                return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=_BUFFER)  # noqa: SIM115 - `close` closes it
            self._file.write(b"".join((_SIZES.pack(*sizes), raw.method, raw.content, raw.body)))
        except OSError as exc:
            raise _explained(exc) from exc
        if self._places is not None:
            self._places.append(self._end)
        self._beyond += 1
        self._end += _SIZES.size + sum(sizes)

    def flush(self) -> None:
        """Have all of it in the file.

        Raises:
            SpoolError: it cannot be written.
        """
        try:
            if self._file is not None:
                self._file.flush()
        except OSError as exc:
            raise _explained(exc) from exc

    def read(self, positions: Iterable[int] | None = None, *, keep: bool = False) -> Iterator[Taken]:
        """The letters at these positions (of a spool in any order), all by default; the spool is closed after the last,
        unless ``keep``.

        Raises:
            SpoolError: the file cannot be read.
        """
        try:
            yield from self._all() if positions is None else map(self._one, positions)
        except OSError as exc:
            raise _explained(exc) from exc
        finally:
            if not keep:
                self.close()

    def _all(self) -> Iterator[Taken]:
        yield from self._first
        place = 0
        while place < self._end:
            raw = self._at(place)
            place += _SIZES.size + len(raw.method) + len(raw.content) + len(raw.body)
            yield raw

    def _one(self, position: int) -> Taken:
        if position < len(self._first):
            return self._first[position]
        assert self._places is not None
        return self._at(self._places[position - len(self._first)])

    def _at(self, place: int) -> Taken:
        assert self._file is not None
        if self._file.tell() != place:
            self._file.seek(place)
        method, content, body = _SIZES.unpack(self._file.read(_SIZES.size))
        return Taken(self._file.read(method), self._file.read(content), self._file.read(body))

    def close(self) -> None:
        self._first, self._beyond, self._end = [], 0, 0
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # what is still to be written is not wanted any more
                file.close()

    __del__ = close


def _explained(exc: OSError) -> SpoolError:
    try:
        folder = tempfile.gettempdir()
    except OSError:  # none can be written to
        folder = "any folder"
    return SpoolError(
        f"letters cannot be set aside in {folder}: {exc.strerror or exc}; free some space, name another "
        "folder in TMPDIR, or look at fewer (--limit). All letters are where they were"
    )
