"""Data on stdout, prose on stderr; nothing of a letter reaches a terminal unneutralised."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

from celery_dlx.canvas import canvas_of
from celery_dlx.letters import DeadLetter, iso_time

_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (10, 9)}
#: Overrides of the writing direction would let a text stand elsewhere than it is.
_ESCAPES |= {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def neutral(text: object) -> str:
    """Text that cannot drive a terminal: control characters are spelled out (a letter may hold hostile input)."""
    return str(text).translate(_ESCAPES).encode("utf-8", "backslashreplace").decode()


def line(text: object, width: int | None = None) -> str:
    """Neutral text on one line, cut to a width."""
    flat = neutral(" ".join(str(text).split()))
    return flat if width is None or len(flat) <= width else flat[: width - 1] + "…"


def say(text: str) -> None:
    click.echo(neutral(text), err=True)


def json_line(value: dict[str, Any]) -> None:
    # ASCII only: C1 control characters, DEL and lone surrogates are escaped, not printed.
    click.echo(_json(value).replace("\x7f", "\\u007f"))


def _json(value: dict[str, Any]) -> str:
    try:
        return json.dumps(value, default=str)
    except TypeError:  # AMQP's header names may be any bytes
        return json.dumps(_text_keys(value), default=str)
    except RecursionError:  # a message's headers: what could be read need not be written again
        return json.dumps(
            {key: None if isinstance(part, (dict, list)) else part for key, part in value.items()}, default=str
        )


def _text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(key): _text_keys(part) for key, part in value.items()}
    return [_text_keys(part) for part in value] if isinstance(value, list) else value


#: Of a table's cell, in characters: one long name would pad every row.
_WIDEST = 255


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Aligned columns; with rich installed and on a terminal, a drawn table."""
    cells = [[line(cell, _WIDEST) for cell in row] for row in rows]
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text
        except ImportError:
            pass
        else:
            drawn = Table(*headings)
            for row in cells:
                drawn.add_row(*(Text(cell) for cell in row))
            Console().print(drawn)
            return
    widths = [max(len(str(row[column])) for row in [list(headings), *cells]) for column in range(len(headings))]
    for row in [list(headings), *cells]:
        click.echo("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def letter_row(letter: DeadLetter) -> list[object]:
    exception = letter.exception or {}
    kind = exception.get("type", "").rsplit(".", 1)[-1]
    what = f"{kind}: {exception.get('message', '')}" if kind else ""
    return [
        letter.id,
        letter.queue,
        iso_time(letter.died_at)[:19],
        letter.reason,
        letter.task or "-",
        line(what, 60),
    ]


LETTER_HEADINGS = ["ID", "QUEUE", "DIED (UTC)", "REASON", "TASK", "EXCEPTION"]


def _field(key: str, value: object) -> None:
    click.echo(f"{line(key) + ':':18} {line(value)}")


def show_letter(letter: DeadLetter, state: str | None = None) -> None:
    """All of a letter for a person: the death, the traceback, the message, its workflow. ``state``: its result's."""
    for key, value in letter.as_dict().items():
        if key != "exception" and value not in (None, ""):
            _field(key, value)
    for key, value in letter.original.properties.items():
        if key != "priority":
            _field(key, value)
    if letter.stripped:
        _field("stripped", letter.stripped)
    if letter.redacted:
        _field("redacted", f"{', '.join(letter.redacted)} when it was stored: not what its producer sent")
    for death in letter.deaths:
        _field("died before", f"{iso_time(death['died_at'])[:19]} {death['reason']} {death['fingerprint']} as {death['id']}")
    for part, text in canvas_of(letter.original).explained():
        _field(part, text)
    if state is not None:
        _field("result state", state)
    body = letter.original.body
    _field("body", f"{len(body)} bytes: {body[:200].decode('utf-8', 'backslashreplace')}")
    if letter.exception:
        click.echo(f"\n{line(letter.exception['type'])}: {line(letter.exception['message'])}\n")
        click.echo(neutral(letter.exception["traceback"]))
