"""`dlx export` and `dlx import`."""

from __future__ import annotations

import errno
import gzip
import json
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import click

from celery_dlx import selection
from celery_dlx.cli import output
from celery_dlx.cli.main import FORCE, JSON, command, dead_letters, filters
from celery_dlx.errors import JournalError, UsageError


@command(name="export")
@click.argument("queue")
@click.argument("file", metavar="FILE")
@filters
@FORCE
@JSON
def export_letters(
    ctx: click.Context, queue: str, file: str, force: bool, as_json: bool, limit: int | None, **selected: Any
) -> None:
    """Write letters of QUEUE to FILE (`-`: standard output) as JSON Lines; nothing is removed."""
    lines = dead_letters(ctx).export(queue, limit=limit, **selected)
    count = _write(sys.stdout, lines) if file == "-" else _write_file(Path(file), lines)
    if as_json and file != "-":
        output.json_line({"queue": queue, "file": file, "exported": count})
    output.say(f"{count} letters exported")


@command(name="import")
@click.argument("file", metavar="FILE", type=click.Path(exists=True, dir_okay=False))
@JSON
def import_letters(ctx: click.Context, file: str, as_json: bool) -> None:
    """Restore letters of an export; those that are there already are left alone."""
    with _open(Path(file), "r") as source:
        restored, present = dead_letters(ctx).restore(_parsed(file, source))
    if as_json:
        output.json_line({"file": file, "restored": restored, "present": present})
    output.say(f"{restored} letters restored, {present} were there already")


def _write_file(path: Path, lines: Iterator[dict[str, Any]]) -> int:
    """All of them or no file: a half export must not be taken for a whole one."""
    if not path.name or path.is_dir():
        raise UsageError(f"{path}: expected a file's name, found a folder")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Letters may hold personal data.
        os.close(os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600))
        with _open(partial, "w", compressed=path.suffix == ".gz") as target:
            count = _write(target, lines)
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    except OSError as exc:
        with suppress(OSError):
            partial.unlink()
        if exc.filename is None and exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise  # the broker's
        raise JournalError(f"{path}: cannot be written: {exc.strerror or exc}; nothing was removed from the DLQ") from exc
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    return count


def _write(target: TextIO, lines: Iterator[dict[str, Any]]) -> int:
    count = 0
    for line in lines:
        target.write(json.dumps(line) + "\n")
        count += 1
    return count


def _open(path: Path, mode: str, compressed: bool | None = None) -> TextIO:
    zipped = path.suffix == ".gz" if compressed is None else compressed
    opener: Any = gzip.open if zipped else open
    opened: TextIO = opener(path, f"{mode}t", encoding="utf-8")
    return opened


def _parsed(file: str, source: TextIO) -> Iterator[dict[str, Any]]:
    try:
        for number, text in enumerate(source, 1):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                line = None
            if not isinstance(line, dict) or not selection.is_export(line):
                raise UsageError(f"{file}:{number}: expected an exported letter, found {text[:40]!r}; the rest was not read")
            yield line
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as exc:
        raise UsageError(f"{file}: cannot be read as an export: {exc}") from None
