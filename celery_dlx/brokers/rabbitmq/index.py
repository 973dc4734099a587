"""What was read of a large DLQ, kept for a while: RabbitMQ cannot be asked for a page, or for letters of one kind.

One file for each DLQ, of what its letters rest with; bodies are left out where headers say what a message is. Readable by
its owner only, for headers hold personal data, too. It is written while somebody looks at all of a DLQ, and is never taken
for it: what acts on letters reads those. How it is written is `indexing`'s.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

try:
    import sqlite3
except ImportError:  # a Python that was built without it: then there is no index
    sqlite3 = None  # type: ignore[assignment]

from celery_dlx.brokers.rabbitmq.deliveries import Taken
from celery_dlx.errors import SpoiltIndexError
from celery_dlx.groups import TREND, Group, Groups
from celery_dlx.journal import state_folder
from celery_dlx.letters import DeadLetter, Original
from celery_dlx.selection import Selection

__all__ = ["FORMAT", "Index", "forget", "open_index", "place_of", "sqlite3", "sweep", "text", "whole"]

logger = logging.getLogger("celery_dlx")

#: How long it is believed, in seconds, while the DLQ holds as many letters as it did; how long its file is left lying.
BELIEVED, KEPT = 600, 86_400
#: A DLQ that is as full as this, of bytes, may be losing letters as others come.
_NEARLY_FULL = 0.9
#: Ids, and causes, that one query names at most.
_MOST_IDS, _MOST_CAUSES = 500, 100
#: Names an environment variable: ``off``, and nothing is kept.
VARIABLE = "CELERY_DLX_INDEX"
FORMAT = "celery-dlx 1"
_LEAST, _MOST = -(2**63), 2**63 - 1


def place_of(broker: str, dlq: str) -> Path | None:
    """The file of a DLQ's index; ``None``: there is no place for one. ``broker``: its URL, without a password."""
    folder = state_folder() / "index"
    if sqlite3 is None or folder.parts[0] == "~" or os.environ.get(VARIABLE) == "off":
        return None
    name = blake2b(f"{broker}\0{dlq}".encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
    return folder / f"{name}.sqlite"


def forget(path: Path | None) -> None:
    """The DLQ changes, or changed."""
    if path is not None:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def text(value: object) -> str | None:
    """As SQLite takes it."""
    if value is None or (type(value) is str and value.isascii()):
        return value
    return str(value).encode("utf-8", "backslashreplace").decode()


def whole(value: float) -> int:
    """As SQLite takes it."""
    return int(max(min(value, _MOST), _LEAST))


def sweep(folder: Path) -> None:
    """Remove what was written long ago, and what a process that was killed left half-written."""
    with suppress(OSError):
        for path in [*folder.glob("*.sqlite"), *folder.glob(".*.sqlite.*")]:
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > KEPT or (path.name.startswith(".") and _is_orphan(path)):
                    path.unlink()


def _is_orphan(path: Path) -> bool:
    try:
        os.kill(int(path.name.split(".")[3]), 0)
    except (ValueError, IndexError, ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False  # somebody else's
    return False


def open_index(path: Path, depth: int, most: int, most_bytes: int | None) -> Index | None:
    """The index of a DLQ that holds so many letters, if there is one that may be believed.

    ``most``, ``most_bytes``: what the DLQ may hold; at its cap it holds as many as before, and others.
    """
    if depth >= most:
        return None
    try:
        base = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False)
        known = base.execute("SELECT format, depth, size, read_at FROM facts").fetchone()
    except sqlite3.Error as exc:
        logger.debug("%s: no index: %s", path, exc)
        forget(path)
        return None
    believed = (
        known is not None
        and known[:2] == (FORMAT, depth)
        and not (most_bytes and known[2] > most_bytes * _NEARLY_FULL)
        and 0 <= time.time() - known[3] <= BELIEVED
    )
    if not believed:
        base.close()
        forget(path)
        return None
    return Index(base, path, known[3], depth)


class _Query(NamedTuple):
    """Conditions, their values and an order; ``narrow``: an index tells which letters these are."""

    where: list[str]
    values: list[Any]
    order: str
    narrow: bool


class Index:
    """What was read of a DLQ, of a large one without most bodies; closed when one question was answered."""

    def __init__(self, base: sqlite3.Connection, path: Path, read_at: float, depth: int) -> None:
        #: When the DLQ was read, in seconds since the epoch, and how many letters it held.
        self.read_at, self.depth = read_at, depth
        self._base, self._path = base, path

    def letters(self, page: Selection) -> Iterator[Taken] | None:
        """What may be on a page, in its order; ``None``: a letter that it names is not known here.

        Raises:
            SpoiltIndexError: while they are read.
        """
        try:
            query = self._query(page)
            rows = None if query is None else self._rows(query, page.words)
        except sqlite3.Error as exc:
            self._spoilt(exc)
            return None
        if rows is None:
            self._base.close()
            return None
        return self._taken(rows)

    def _rows(self, query: _Query, words: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """What letters rest with. What has to be put in order first is their positions only."""
        with_words = [*query.where, *["(NOT plain OR instr(content, ?) > 0)"] * len(words)]
        texts = [word.encode() for word in words]
        columns, order = "SELECT method, content, body FROM letters WHERE", f"ORDER BY {query.order}"
        # All is text of ours but the values.
        if not query.narrow:
            return self._base.execute(f"{columns} {' AND '.join(with_words)} {order}", [*query.values, *texts])
        found = self._base.execute(f"SELECT position FROM letters WHERE {' AND '.join(query.where)} {order}", query.values)
        each = f"{columns} {' AND '.join(['position = ?', *with_words[len(query.where) :]])}"
        return (row for (position,) in found for row in self._base.execute(each, [position, *texts]))

    def _taken(self, rows: Iterator[tuple[Any, ...]]) -> Iterator[Taken]:
        with closing(self._base):
            try:
                for row in rows:
                    if any(type(part) is not bytes for part in row):  # a block that never reached the disk reads as nothing
                        raise sqlite3.DatabaseError("a row without a letter")
                    yield Taken(*row)
            except sqlite3.Error as exc:
                self._spoilt(exc)
                raise SpoiltIndexError(f"{self._path} is spoilt ({exc}) and was removed: run the command again") from exc

    def _spoilt(self, exc: Exception) -> None:
        logger.debug("%s: %s", self._path, exc)
        self._base.close()
        forget(self._path)

    def _query(self, page: Selection) -> _Query | None:
        where, values = ["1"], list[Any]()
        for condition, value in (("died_at >= ?", page.first), ("died_at <= ?", page.last)):
            if value is not None:
                where.append(condition)
                values.append(whole(value))
        if page.ids is not None:
            if len(page.ids) > _MOST_IDS or any(text(letter_id) != letter_id for letter_id in page.ids):
                return None
            where.append(f"id IN ({','.join('?' * len(page.ids))})")
            values += page.ids
        if page.cause is not None:
            wanted = {row[:3] for row in self._causes() if page.cause(_example(*row[:4]))}
            if len(wanted) <= _MOST_CAUSES:  # else each letter is looked at
                where.append(f"({' OR '.join(['(fingerprint IS ? AND reason IS ? AND task IS ?)'] * len(wanted)) or '0'})")
                values += [part for each in wanted for part in each]
        narrow = len(where) > 1
        if page.after is not None:
            found = self._base.execute("SELECT position, died_at FROM letters WHERE id = ?", (text(page.after),)).fetchone()
            if found is None:
                return None
            where.append("(died_at, position) < (?, ?)" if page.newest else "position > ?")
            values += (found[1], found[0]) if page.newest else (found[0],)
        return _Query(where, values, "died_at DESC, position DESC" if page.newest else "position", narrow)

    def _causes(self) -> list[tuple[Any, ...]]:
        now = time.time() * 1000
        return self._base.execute(
            "SELECT fingerprint, reason, task, exception, count(*), min(position),"
            " coalesce(min(nullif(died_at, 0)), 0), max(died_at),"  # 0: nobody knows when
            " sum(died_at >= ?), sum(died_at >= ? AND died_at < ?)"
            " FROM letters GROUP BY fingerprint, reason, task, exception ORDER BY min(position)",
            (now - TREND, now - 2 * TREND, now - TREND),
        ).fetchall()

    def groups(self, cause: Callable[[DeadLetter], bool] | None) -> list[Group] | None:
        """The letters by cause. ``cause``: tests what the letters of one have in common; ``None``: all of them."""
        try:
            with closing(self._base):
                return self._groups(cause)
        except sqlite3.Error as exc:
            self._spoilt(exc)
            return None

    def _groups(self, cause: Callable[[DeadLetter], bool] | None) -> list[Group]:
        groups, newest = Groups(), dict[tuple[Any, ...], tuple[int, int]]()
        for fingerprint, reason, task, exception, count, _, first, last, hour, before in self._causes():
            if cause is not None and not cause(_example(fingerprint, reason, task, exception)):
                continue
            letter_id, message, position = self._base.execute(
                "SELECT id, message, position FROM letters WHERE fingerprint IS ? AND reason IS ? AND task IS ?"
                " AND exception IS ? AND died_at = ? ORDER BY position DESC LIMIT 1",
                (fingerprint, reason, task, exception, last),
            ).fetchone()
            group = Group(fingerprint, reason, task, exception, count, first, last, letter_id, message, hour, before)
            # Of several exceptions of one cause: that of its first letter, and the example is its newest letter.
            known = newest.get((fingerprint, reason, task))
            if known is not None and known > (last, position):
                group.last_seen = _LEAST
                groups.merge([group])
            else:
                groups.merge([group])
                newest[fingerprint, reason, task] = last, position
        return groups.sorted()


def _example(fingerprint: str, reason: str, task: str | None, exception: str | None) -> DeadLetter:
    """As much of a letter as `Selection.cause` looks at."""
    letter = DeadLetter("", "", "", reason, 0, Original(), task=task, fingerprint=fingerprint)
    letter.exception = None if exception is None else {"type": exception, "message": "", "traceback": ""}
    return letter
