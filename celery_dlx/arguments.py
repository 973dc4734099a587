"""Conditions on a task's arguments, for messages whose body is JSON (pure). No other body is ever opened."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from celery_dlx.errors import UsageError
from celery_dlx.letters import DeadLetter, Original, clip

Condition = Callable[[DeadLetter], bool]

_MISSING = object()
#: What compares a found value with a given one.
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "~": lambda found, text: isinstance(found, str) and str(text) in found,
}
_WHERE = re.compile(r"\s*(?P<path>[^\s=!<>~]+)\s*(?P<operator>==|!=|>=|<=|>|<|~)\s*(?P<value>.+?)\s*", re.DOTALL)
_PATH = re.compile(r"(?P<root>args|kwargs)(?P<steps>(?:\.[^.\[\]]+|\[\d+\])*)")
_STEP = re.compile(r"\.(?P<name>[^.\[\]]+)|\[(?P<index>\d+)\]")


def arguments_of(original: Original) -> tuple[Any, Any] | None:
    """Args and kwargs of a JSON message of either protocol; ``None`` if it is none, or is compressed."""
    if original.properties.get("content_type") != "application/json" or original.headers.get("compression"):
        return None
    try:
        body = json.loads(original.body)
    except (ValueError, RecursionError):
        return None
    if isinstance(body, list) and len(body) >= 2:
        return body[0], body[1]
    if isinstance(body, Mapping):
        return body.get("args", []), body.get("kwargs", {})
    return None


def with_arguments(original: Original, args: Any, kwargs: Any) -> Original:
    """The same JSON message with other arguments.

    Raises:
        RecursionError: they are nested too deep to be written again.
    """
    body, headers, properties = json.loads(original.body), dict(original.headers), dict(original.properties)
    if isinstance(body, list):
        body[0], body[1] = args, kwargs
    else:
        body["args"], body["kwargs"] = args, kwargs
    for key, value in (("argsrepr", args), ("kwargsrepr", kwargs)):
        if key in headers:
            headers[key] = short_repr(value)
    if properties.get("content_encoding"):
        properties["content_encoding"] = "utf-8"  # JSON may come in others; what is written here is ASCII
    return replace(original, body=json.dumps(body).encode(), headers=headers, properties=properties, raw=b"")


def short_repr(value: Any) -> str:
    """As Celery puts arguments into headers: at most 1,024 characters."""
    return clip(repr(value), 1024)


def argument(text: str) -> Condition:
    """``user_id=42``, ``user.name=ada`` or ``0=42``: an argument by name or position, equal to a JSON value or a text.

    Raises:
        UsageError: it is something else.
    """
    name, found, value = text.partition("=")
    if not found or not name:
        raise UsageError(f"--arg {text!r}: expected NAME=VALUE, or POSITION=VALUE")
    path = f"args[{name}]" if name.isdecimal() else f"kwargs.{name}"
    if not _PATH.fullmatch(path):
        raise UsageError(f"--arg {text!r}: expected a name such as user_id, user.name or items[0]")
    return _condition(path, "==", value)


def where(text: str) -> Condition:
    """``kwargs.amount > 100``, ``args[0] == "x"``, ``kwargs.email ~ example.org`` (contains).

    Raises:
        UsageError: it cannot be understood.
    """
    found = _WHERE.fullmatch(text)
    if found is None or not _PATH.fullmatch(found["path"]):
        raise UsageError(
            f"--where {text!r}: expected a path (kwargs.amount, args[0].id), one of {' '.join(OPERATORS)}, and a value"
        )
    return _condition(found["path"], found["operator"], found["value"])


def _condition(path: str, sign: str, text: str) -> Condition:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    compare = OPERATORS[sign]

    def holds(letter: DeadLetter) -> bool:
        arguments = arguments_of(letter.original)
        found = _MISSING if arguments is None else _look_up(path, arguments)
        if found is _MISSING:
            return False
        if sign == "==" and isinstance(found, str):
            return found in (value, text)  # 42 finds "42", too
        if isinstance(found, bool) is not isinstance(value, bool) and sign != "~":
            return sign == "!="
        try:
            return bool(compare(found, value))
        except TypeError:
            return False

    return holds


def steps_of(path: str) -> list[str | int]:
    """``kwargs.items[0].id`` as ``["kwargs", "items", 0, "id"]``; empty if it is no path."""
    parts = _PATH.fullmatch(path)
    if parts is None:
        return []
    steps = _STEP.finditer(parts["steps"])
    return [parts["root"], *(step["name"] if step["name"] is not None else int(step["index"]) for step in steps)]


def _look_up(path: str, arguments: tuple[Any, Any]) -> Any:
    parts = _PATH.fullmatch(path)
    assert parts is not None
    found = arguments[0] if parts["root"] == "args" else arguments[1]
    for step in _STEP.finditer(parts["steps"]):
        name = step["name"]
        if name is not None and isinstance(found, Mapping) and name in found:
            found = found[name]
        elif name is None and isinstance(found, list) and int(step["index"]) < len(found):
            found = found[int(step["index"])]
        else:
            return _MISSING
    return found
