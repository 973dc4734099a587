"""Blanks arguments that nobody should read: in what is shown, and where the policy says so in what is stored (pure).

Paths are those of ``--where``: ``kwargs.card.number``, ``args[0]``. Only JSON bodies can be looked into; others are hidden
whole when shown, and kept as they are when stored, for a letter without its message could never be replayed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from celery_dlx.arguments import arguments_of, short_repr, steps_of, with_arguments
from celery_dlx.letters import HEADER, UNDECODED, DeadLetter, Original

BLANK = "[redacted]"


def shown(letter: DeadLetter, paths: Sequence[str]) -> DeadLetter:
    """A letter as people may see it."""
    if not paths:
        return letter
    hidden = replace(letter)
    original = replace(letter.original, headers=_without_copies(letter.original.headers))
    if original.body and (blanked := _blanked(original, paths)) is not None:
        with suppress(RecursionError):
            hidden.original = with_arguments(original, *blanked)
            hidden.args, hidden.kwargs = short_repr(blanked[0]), short_repr(blanked[1])
            return hidden
    # Without its arguments (a listing on Redis reads no message, other bodies are not opened) all of them may be the ones.
    roots = {path.split(".")[0].split("[")[0] for path in paths}
    headers = dict(original.headers)
    for root, key in (("args", "argsrepr"), ("kwargs", "kwargsrepr")):
        if root in roots:
            setattr(hidden, root, BLANK if getattr(letter, root) is not None else None)
            if key in headers:
                headers[key] = BLANK
    body = f"{BLANK} {len(original.body)} bytes".encode() if original.body else b""
    hidden.original = replace(original, body=body, headers=headers, raw=b"")
    return hidden


def for_storage(letter: DeadLetter, paths: Sequence[str]) -> bool:
    """Blank arguments of a letter that is about to be stored; whether there were any. Never raises."""
    original = replace(letter.original, headers=_without_copies(letter.original.headers))
    blanked = _blanked(original, paths)
    if blanked is None:
        return False
    if list(blanked) == list(arguments_of(original) or ()):
        blank = [path for path in paths if _value(blanked, path) == BLANK]  # it was stored before
        letter.redacted = blank
        if original.headers == letter.original.headers:
            return False
    try:
        rewritten, args, kwargs = with_arguments(original, *blanked), short_repr(blanked[0]), short_repr(blanked[1])
    except RecursionError:
        return False  # as what cannot be read
    letter.original, letter.args, letter.kwargs = rewritten, args, kwargs
    letter.redacted = letter.redacted or list(paths)
    return True


def is_blank(letter: DeadLetter) -> bool:
    """Whether what was blanked when it was stored is blank still: its task would get that instead."""
    arguments = arguments_of(letter.original)
    if not letter.redacted or arguments is None:
        return bool(letter.redacted)
    document = {"args": arguments[0], "kwargs": arguments[1]}
    return any(_holder(document, steps)[1] == BLANK for path in letter.redacted if (steps := steps_of(path)))


def _without_copies(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Headers without what else holds the arguments: the body before an edit, and properties that could not be decoded."""
    kept = {key: BLANK if key == UNDECODED else value for key, value in headers.items()}
    lineage = kept.get(HEADER)
    if isinstance(lineage, Mapping) and isinstance(lineage.get("edited"), Mapping):
        kept[HEADER] = {**lineage, "edited": {**lineage["edited"], "body": ""}}
    return kept


def _value(arguments: Sequence[Any], path: str) -> Any:
    return _holder({"args": arguments[0], "kwargs": arguments[1]}, steps_of(path))[1]


def _blanked(original: Original, paths: Sequence[str]) -> tuple[Any, Any] | None:
    """Arguments with their secrets blanked; ``None`` if they cannot be read."""
    arguments = arguments_of(original)
    if arguments is None:
        return None
    document = {"args": arguments[0], "kwargs": arguments[1]}  # parsed just now: nobody else's
    for path in paths:
        steps = steps_of(path)
        holder, value = _holder(document, steps)
        if holder is not None and value is not None:
            holder[steps[-1]] = BLANK
    return document["args"], document["kwargs"]


def _holder(document: Any, steps: Sequence[str | int]) -> tuple[Any, Any]:
    """What holds the value at a path, and the value; ``None`` where there is none."""
    holder, found = None, document
    for step in steps:
        holder = found
        if isinstance(step, str) and isinstance(holder, Mapping):
            found = holder.get(step)
        elif isinstance(step, int) and isinstance(holder, list) and step < len(holder):
            found = holder[step]
        else:
            return None, None
    return holder, found
