"""Changes arguments of dead letters on their way back: a JSON Patch over ``{"args": […], "kwargs": {…}}`` (pure).

Only messages whose body is uncompressed JSON can be edited; nothing else is ever opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jsonpatch
import jsonpointer

from celery_dlx.arguments import arguments_of, short_repr, with_arguments
from celery_dlx.errors import ReplayError, UsageError
from celery_dlx.letters import DeadLetter

_EXAMPLE = '[{"op": "replace", "path": "/kwargs/amount", "value": 5}]'
_PATH = re.compile(r"/(args|kwargs)(/.*)?", re.DOTALL)


class Edit:
    """A JSON Patch (RFC 6902), e.g. ``[{"op": "replace", "path": "/kwargs/amount", "value": 5}]``.

    Raises:
        UsageError: it is not one, or reaches for more than ``/args`` and ``/kwargs``.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            steps = json.loads(text)
            if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps) or not steps:
                raise ValueError("expected a list of operations")
            self._patch = jsonpatch.JsonPatch(steps)
            paths = [step[key] for step in steps for key in ("path", "from") if key in step]
        except (ValueError, KeyError, RecursionError, jsonpatch.JsonPatchException, jsonpointer.JsonPointerException) as exc:
            raise UsageError(f"--edit: expected a JSON Patch such as {_EXAMPLE}, found {text[:60]!r}: {exc}") from None
        beyond = [path for path in paths if not _PATH.fullmatch(str(path))]
        if beyond:
            raise UsageError(f"--edit: path {beyond[0]!r}: expected one below /args or /kwargs")

    def apply(self, letter: DeadLetter) -> None:
        """Change a letter's message; ``letter.edited`` keeps the body it had.

        Raises:
            ReplayError: it has no JSON arguments, or the patch does not fit them.
        """
        try:
            # Parsed for this only: nobody else has it.
            after = self._patch.apply(document_of(letter), in_place=True)
            if not isinstance(after.get("args"), list) or not isinstance(after.get("kwargs"), dict):
                raise TypeError("after it, args is no list or kwargs no object")
            edited = with_arguments(letter.original, after["args"], after["kwargs"])
            shown = short_repr(after["args"]), short_repr(after["kwargs"])
        except (jsonpatch.JsonPatchException, jsonpointer.JsonPointerException, TypeError, RecursionError) as exc:
            raise ReplayError(f"letter {letter.id} stays in its DLQ: the edit does not fit its arguments: {exc}") from None
        letter.edited, letter.original = letter.original.body, edited
        letter.args, letter.kwargs = shown


def document_of(letter: DeadLetter) -> dict[str, Any]:
    """What an edit is applied to.

    Raises:
        ReplayError: the message has no JSON arguments.
    """
    arguments = arguments_of(letter.original)
    if arguments is None:
        raise ReplayError(f"letter {letter.id} stays in its DLQ: only uncompressed JSON messages can be edited")
    return {"args": arguments[0], "kwargs": arguments[1]}


def by_hand(letter: DeadLetter, editor: Callable[[str], str | None]) -> Edit | None:
    """The edit somebody makes to a letter's arguments in an editor; ``None`` if nothing was changed.

    Raises:
        UsageError: what came back is no JSON object.
    """
    before = document_of(letter)
    text = editor(json.dumps(before, indent=2, ensure_ascii=False))
    try:
        after = before if text is None else json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"what was edited is no JSON any more: {exc}; nothing was replayed") from None
    if not isinstance(after, dict):
        raise UsageError("what was edited is no JSON object with args and kwargs any more; nothing was replayed")
    steps = jsonpatch.make_patch(before, after).patch
    return Edit(json.dumps(steps)) if steps else None
