"""What was read of a large DLQ, kept for a while: RabbitMQ cannot be asked for a page, or for letters of one kind.

One file for each DLQ, of what its letters rest with; bodies are left out where headers say what a message is. Readable by
its owner only, for headers hold personal data, too. It is written while somebody looks at all of a DLQ, and is never taken
for it: what acts on letters reads those.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from celery_dlx.brokers.rabbitmq.deliveries import Taken
from celery_dlx.brokers.rabbitmq.reader import Reader
from celery_dlx.brokers.rabbitmq.resting import Resting
from celery_dlx.groups import TREND, Group, Groups
from celery_dlx.lazy import source_of
from celery_dlx.letters import DeadLetter
from celery_dlx.selection import Selection

logger = logging.getLogger("celery_dlx")

#: A DLQ of fewer letters is read faster than anybody notices.
AT_LEAST = 5_000
#: How long it is believed, in seconds, while the DLQ holds as many letters as it did; how long its file is left lying.
BELIEVED, KEPT = 600, 86_400
#: Letters written at once.
_LOT = 1_000
#: Ids, and causes, that one query names at most.
_MOST_IDS, _MOST_CAUSES = 500, 100
#: Of an exception's message, in characters: as much as groups show.
_MESSAGE = 200
_FORMAT = "celery-dlx 1"
_TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE letters (
  position INTEGER PRIMARY KEY, id TEXT, died_at INTEGER, fingerprint TEXT, reason TEXT, task TEXT, exception TEXT,
  message TEXT, method BLOB, content BLOB, body BLOB
);
CREATE TABLE facts (format TEXT, depth INTEGER, read_at REAL);
"""
_INDEXES = """
CREATE INDEX by_id ON letters (id);
CREATE INDEX by_death ON letters (died_at);
CREATE INDEX by_cause ON letters (fingerprint, reason, task, exception, died_at);
"""


def place_of(folder: Path, broker: str, dlq: str) -> Path:
    """The file of a DLQ's index. ``broker``: its URL, without a password."""
    name = blake2b(f"{broker}\0{dlq}".encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
    return folder / f"{name}.sqlite"


def forget(path: Path) -> None:
    """The DLQ changes, or changed."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


class IndexWriter:
    """Writes an index beside a reading. Whatever keeps it from that is nobody else's business: then there is none."""

    def __init__(self, path: Path, reader: Reader, letter_of: Callable[[Taken], DeadLetter]) -> None:
        """Beside ``reader``, until this is left."""
        self._path, self._reader, self._letter_of = path, reader, letter_of
        self._partial = path.with_name(f".{path.name}.{os.getpid()}")
        self._read_at = time.time()
        self._last: tuple[Taken, DeadLetter] | None = None
        self._rows: list[tuple[Any, ...]] = []
        self._written = 0
        self._base: sqlite3.Connection | None = None
        self._failed = False

    def __enter__(self) -> IndexWriter:
        self._reader.note = self._add
        return self

    def letter(self, raw: Taken) -> DeadLetter:
        """The letter that a delivery is; of the last one that was noted it is known."""
        last = self._last
        return last[1] if last is not None and last[0] is raw else self._letter_of(raw)

    def _add(self, raw: Taken) -> None:
        if self._failed:
            return
        letter = self._letter_of(raw)
        self._last = raw, letter
        try:
            exception = letter.exception or {}
            texts = letter.id, letter.fingerprint, letter.reason, letter.task, exception.get("type")
            died_at = max(min(letter.died_at, 2**63 - 1), -(2**63))
            message = _text(exception.get("message") or "")
            letter_id, *cause = map(_text, texts)
            source = source_of(letter)
            # Of a message of Celery's first protocol, or of no task, all is in its body.
            body = b"" if isinstance(source, Resting) and b"task" in source.layout.spans else raw.body
            row = letter_id, died_at, *cause, (message or "")[:_MESSAGE], raw.method, raw.content, body
            self._rows.append(row)
            if len(self._rows) >= _LOT:
                self._flush()
        except Exception as exc:  # noqa: BLE001 - a letter may hold anything; a disk may be full
            self._give_up(exc)

    def _flush(self) -> None:
        if self._base is None:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(self._partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600))
            self._base = sqlite3.connect(self._partial, isolation_level=None)
            self._base.executescript(_TABLES)
            self._base.execute("BEGIN")
        rows = ((self._written + number, *row) for number, row in enumerate(self._rows))
        self._base.executemany("INSERT INTO letters VALUES (?,?,?,?,?,?,?,?,?,?,?)", rows)
        self._written += len(self._rows)
        self._rows = []

    def __exit__(self, *error: object) -> None:
        """The reading ended. What was not seen wholly is not kept."""
        self._reader.note = self._last = None
        try:
            whole = not self._reader.missed and self._written + len(self._rows) == self._reader.depth
            if whole and not self._failed:
                self._flush()
                self._keep()
        except Exception as exc:  # noqa: BLE001 - as above
            self._give_up(exc)
        finally:
            self._discard()
            sweep(self._path.parent)

    def _keep(self) -> None:
        assert self._base is not None
        self._base.execute("INSERT INTO facts VALUES (?,?,?)", (_FORMAT, self._written, self._read_at))
        self._base.execute("COMMIT")
        self._base.executescript(_INDEXES)
        self._base.close()
        self._base = None
        os.replace(self._partial, self._path)

    def _give_up(self, exc: BaseException) -> None:
        logger.debug("no index of this DLQ in %s: %s", self._path, exc)
        self._failed, self._rows = True, []
        self._discard()

    def _discard(self) -> None:
        base, self._base = self._base, None
        if base is not None:
            with suppress(sqlite3.Error):
                base.close()
        forget(self._partial)


def sweep(folder: Path) -> None:
    """Remove what was written long ago, and what a process that was killed left half-written."""
    with suppress(OSError):
        for path in [*folder.glob("*.sqlite"), *folder.glob(".*.sqlite.*")]:
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > KEPT:
                    path.unlink()


def open_index(path: Path, depth: int, most: int) -> Index | None:
    """The index of a DLQ that holds so many letters, if there is one that may be believed.

    ``most``: as many as the DLQ may hold; at its cap it holds as many as before, and others.
    """
    if depth >= most or not path.exists():
        return None
    try:
        base = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False)
        known = base.execute("SELECT format, depth, read_at FROM facts").fetchone()
    except sqlite3.Error as exc:
        logger.debug("%s: no index: %s", path, exc)
        forget(path)
        return None
    if known is None or known[0] != _FORMAT or known[1] != depth or not 0 <= time.time() - known[2] <= BELIEVED:
        base.close()
        forget(path)
        return None
    return Index(base, known[2], depth)


def _text(value: object) -> str | None:
    return None if value is None else str(value).encode("utf-8", "backslashreplace").decode()


class Index:
    """What was read of a DLQ, of a large one without most bodies."""

    def __init__(self, base: sqlite3.Connection, read_at: float, depth: int) -> None:
        #: When the DLQ was read, in seconds since the epoch, and how many letters it held.
        self.read_at, self.depth = read_at, depth
        self._base = base

    def close(self) -> None:
        self._base.close()

    def letters(self, page: Selection) -> Iterator[Taken] | None:
        """What may be on a page, in its order, without bodies; ``None``: the letter it begins after is not known."""
        where, values = ["1"], list[Any]()
        for condition, value in (("died_at >= ?", page.first), ("died_at <= ?", page.last)):
            if value is not None:
                where.append(condition)
                values.append(value)
        if page.ids is not None:
            if len(page.ids) > _MOST_IDS or any(_text(letter_id) != letter_id for letter_id in page.ids):
                return None
            where.append(f"id IN ({','.join('?' * len(page.ids))})")
            values += page.ids
        if page.cause is not None:
            wanted = [each for each, example in self._examples() if page.cause(example)]
            if len(wanted) > _MOST_CAUSES:
                return None
            where.append(f"({' OR '.join(['(fingerprint IS ? AND reason IS ? AND task IS ?)'] * len(wanted)) or '0'})")
            values += [part for each in wanted for part in each]
        if page.after is not None:
            found = self._base.execute("SELECT position, died_at FROM letters WHERE id = ?", (page.after,)).fetchone()
            if found is None:
                return None
            where.append("(died_at, position) < (?, ?)" if page.newest else "position > ?")
            values += (found[1], found[0]) if page.newest else (found[0],)
        for word in page.words:
            where.append("(length(body) > 0 OR instr(content, ?) > 0)")
            values.append(word.encode())
        order = "died_at DESC, position DESC" if page.newest else "position"
        # All is text of ours but the values.
        query = f"SELECT method, content, body FROM letters WHERE {' AND '.join(where)} ORDER BY {order}"
        return (Taken(*row) for row in self._base.execute(query, values))

    def _examples(self) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """The causes, and for each what its letters have in common."""
        for fingerprint, reason, task, exception in self._base.execute(
            "SELECT fingerprint, reason, task, exception FROM letters GROUP BY fingerprint, reason, task, exception"
        ):
            yield (fingerprint, reason, task), _Example(fingerprint, reason, task, exception)

    def groups(self, cause: Callable[[Any], bool] | None) -> list[Group]:
        """The letters by cause. ``cause``: tests what the letters of one have in common; ``None``: all of them."""
        now, groups = time.time() * 1000, Groups()
        rows = self._base.execute(
            "SELECT fingerprint, reason, task, exception, count(*), min(died_at), max(died_at), sum(died_at >= ?),"
            " sum(died_at >= ? AND died_at < ?) FROM letters GROUP BY fingerprint, reason, task, exception",
            (now - TREND, now - 2 * TREND, now - TREND),
        ).fetchall()
        for fingerprint, reason, task, exception, count, first, last, hour, before in rows:
            if cause is not None and not cause(_Example(fingerprint, reason, task, exception)):
                continue
            letter_id, message = self._base.execute(
                "SELECT id, message FROM letters WHERE fingerprint IS ? AND reason IS ? AND task IS ? AND exception IS ?"
                " AND died_at = ? ORDER BY position DESC LIMIT 1",
                (fingerprint, reason, task, exception, last),
            ).fetchone()
            groups.merge([Group(fingerprint, reason, task, exception, count, first, last, letter_id, message, hour, before)])
        return groups.sorted()


class _Example:
    """As much of a letter as `Selection.cause` looks at."""

    def __init__(self, fingerprint: str, reason: str, task: str | None, exception: str | None) -> None:
        self.fingerprint, self.reason, self.task = fingerprint, reason, task
        self.exception = None if exception is None else {"type": exception}
