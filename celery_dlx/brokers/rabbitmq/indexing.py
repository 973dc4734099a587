"""Writes an index while a DLQ is read. Whatever keeps it from that is nobody else's business: then there is none."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from celery_dlx.brokers.rabbitmq.deliveries import Taken
from celery_dlx.brokers.rabbitmq.index import FORMAT, forget, sqlite3, sweep, text, whole
from celery_dlx.brokers.rabbitmq.reader import Reader
from celery_dlx.brokers.rabbitmq.resting import Resting
from celery_dlx.lazy import source_of
from celery_dlx.letters import DeadLetter

logger = logging.getLogger("celery_dlx")

#: A DLQ of fewer letters is read faster than anybody notices.
AT_LEAST = 5_000
#: Letters written at once, and bytes of their bodies; with more than so many bytes of bodies in all there is no index.
_LOT, _LOT_BYTES, _MOST_BODIES = 100, 4_194_304, 67_108_864
#: What a letter takes in an index, in bytes; the disk is left as much again for others.
_EACH, _SPARE = 2_500, 2
#: Of an exception's message, in characters: as much as groups show.
_MESSAGE = 200
#: Types of AMQP values that are text, or nothing.
_TEXT = frozenset(b"SV")
#: Two letters fit a page of SQLite's usual size, and leave a fifth of it empty.
_TABLES = """
PRAGMA page_size = 65536;
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE letters (
  position INTEGER PRIMARY KEY, id TEXT, died_at INTEGER, fingerprint TEXT, reason TEXT, task TEXT, exception TEXT,
  message TEXT, plain INTEGER, method BLOB, content BLOB, body BLOB
);
CREATE TABLE facts (format TEXT, depth INTEGER, size INTEGER, read_at REAL);
"""
_INDEXES = """
CREATE INDEX by_id ON letters (id);
CREATE INDEX by_death ON letters (died_at);
CREATE INDEX by_cause ON letters (fingerprint, reason, task, exception, died_at);
"""


class IndexWriter:
    """Of one reading."""

    def __init__(self, path: Path, reader: Reader, letter_of: Callable[[Taken], DeadLetter]) -> None:
        """Beside ``reader``, until this is left."""
        self._path, self._reader, self._letter_of = path, reader, letter_of
        self._partial: Path | None = None
        self._read_at = time.time()
        self._last: tuple[Taken, DeadLetter] | None = None
        self._rows: list[tuple[Any, ...]] = []
        self._written = self._size = self._bodies = self._waiting = 0
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
            texts = letter.fingerprint, letter.reason, letter.task, exception.get("type")
            message = (text(exception.get("message")) or "")[:_MESSAGE]
            # Of a message of Celery's first protocol, or of no task, all is in its body.
            source = source_of(letter)
            speaks = isinstance(source, Resting) and b"task" in source.layout.spans
            body = b"" if speaks else raw.body
            plain = speaks and _is_plain(source)
            known = text(letter.id), whole(letter.died_at), *map(text, texts)
            self._rows.append((*known, message, plain, raw.method, raw.content, body))
            self._size += len(raw.body)
            self._bodies += len(body)
            self._waiting += len(body)
            if self._bodies > _MOST_BODIES:
                raise OSError(f"more than {_MOST_BODIES} bytes of bodies")
            if len(self._rows) >= _LOT or self._waiting >= _LOT_BYTES:
                self._flush()
        except Exception as exc:  # noqa: BLE001 - a letter may hold anything; a disk may be full
            self._give_up(exc)

    def _flush(self) -> None:
        if self._base is None:
            folder = self._path.parent
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            wanted = self._reader.depth * _EACH
            if shutil.disk_usage(folder).free < _SPARE * wanted:
                raise OSError(f"{folder}: no room for {wanted} bytes and as many again")
            # Owner only, and never somebody else's file; the number tells whose it is, should we be killed.
            descriptor, name = tempfile.mkstemp(prefix=f".{self._path.name}.{os.getpid()}.", dir=folder)
            os.close(descriptor)
            self._partial = Path(name)
            self._base = sqlite3.connect(name, isolation_level=None)
            self._base.executescript(_TABLES)
            self._base.execute("BEGIN")
        rows = ((self._written + number, *row) for number, row in enumerate(self._rows))
        self._base.executemany("INSERT INTO letters VALUES (?,?,?,?,?,?,?,?,?,?,?,?)", rows)
        self._written += len(self._rows)
        self._rows, self._waiting = [], 0

    def __exit__(self, *error: object) -> None:
        """The reading ended. What was not seen wholly is not kept."""
        self._reader.note = self._last = None
        try:
            seen_all = not self._reader.missed and self._written + len(self._rows) == self._reader.depth
            if seen_all and not self._failed:
                self._flush()
                self._keep()
        except Exception as exc:  # noqa: BLE001 - as above
            self._give_up(exc)
        finally:
            self._discard()
            sweep(self._path.parent)

    def _keep(self) -> None:
        assert self._base is not None and self._partial is not None
        self._base.execute("INSERT INTO facts VALUES (?,?,?,?)", (FORMAT, self._written, self._size, self._read_at))
        self._base.execute("COMMIT")
        self._base.executescript(_INDEXES)
        self._base.close()
        self._base = None
        os.replace(self._partial, self._path)
        self._partial = None

    def _give_up(self, exc: BaseException) -> None:
        logger.debug("no index of this DLQ in %s: %s", self._path, exc)
        self._failed, self._rows = True, []
        self._discard()

    def _discard(self) -> None:
        base, self._base = self._base, None
        if base is not None:
            with suppress(Exception):
                base.close()
        partial, self._partial = self._partial, None
        forget(partial)


def _is_plain(source: Resting) -> bool:
    """Whether what filters look for words in is text as it stands there, and not a number, say."""
    content, spans = source.raw.content, source.layout.spans
    exception, worker = source.record.get("exception"), source.record.get("worker")
    message = exception.get("message") if isinstance(exception, dict) else None
    return (
        all(name not in spans or content[spans[name][1]] in _TEXT for name in (b"id", b"root_id"))
        and (worker is None or isinstance(worker, str))
        and (message is None or isinstance(message, str))
    )
