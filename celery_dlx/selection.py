"""Which letters are meant (pure)."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from time import time
from typing import Any

from celery_dlx.arguments import OPERATORS, argument
from celery_dlx.arguments import where as condition
from celery_dlx.errors import UsageError
from celery_dlx.letters import DeadLetter, Reason
from celery_dlx.policy.durations import parse_duration


class Selection:
    """A test of letters, and what a broker with an index may know of it beforehand."""

    def __init__(
        self,
        matches: Callable[[DeadLetter], bool],
        *,
        bodies: bool = False,
        ids: Collection[str] | None = None,
        cause: Callable[[DeadLetter], bool] | None = None,
        first: int | None = None,
        last: int | None = None,
        causes_only: bool = False,
        words: Sequence[str] = (),
    ) -> None:
        self._matches = matches
        #: It looks into messages, which Redis reads only if somebody wants them.
        self.bodies = bodies
        #: Only these can match; a sequence is in the order of their deaths.
        self.ids = ids
        #: Tests what letters of one fingerprint have in common: where it fails for one, all of them fail.
        self.cause = cause
        #: Only what died between these can match, in milliseconds since the epoch.
        self.first, self.last = first, last
        #: Nothing else is asked: all letters of a fingerprint match, or none.
        self.causes_only = causes_only
        #: Stand in the record of every letter that matches, if what they are words of is text there.
        self.words = words
        #: The newest come first; only what comes after this letter, which died then, is meant.
        self.newest = False
        self.after: str | None = None
        self.after_died = 0

    def __call__(self, letter: DeadLetter) -> bool:
        return self._matches(letter)

    def with_bodies(self) -> Selection:
        """The same, of letters that are given with their messages."""
        other = copy(self)
        other.bodies = True
        return other

    def each(self, visit: Callable[[DeadLetter], None]) -> Selection:
        """Visit what matches, and keep nothing: there may be a million."""

        def note(letter: DeadLetter) -> bool:
            if self._matches(letter):
                visit(letter)
            return False

        return self._with(note)

    def _with(self, matches: Callable[[DeadLetter], bool]) -> Selection:
        other = copy(self)
        other._matches = matches
        return other

    def page(
        self, *, newest: bool = False, after: str | None = None, died_at: int = 0, last: int | None = None
    ) -> Selection:
        """The same, read from the other end, or from a letter on; not what died later than ``last``."""
        other = copy(self)
        other.newest, other.after, other.after_died = newest, after, died_at
        if last is not None:
            other.last = last if self.last is None else min(self.last, last)
            other._matches = lambda letter: letter.died_at <= last and self._matches(letter)
        return other


def match(
    *,
    ids: Iterable[str] | None = None,
    task: str | None = None,
    reason: str | None = None,
    exception: str | None = None,
    since: datetime | float | str | None = None,
    until: datetime | float | str | None = None,
    fingerprint: str | None = None,
    task_id: str | None = None,
    root_id: str | None = None,
    worker: str | None = None,
    retries: int | str | None = None,
    text: str | None = None,
    arguments: Iterable[str] | None = None,
    where: Iterable[str] | None = None,
    bodies: bool = False,
) -> Selection:
    """A test of letters; all conditions given must hold.

    ``task`` and ``worker`` are names or globs; ``exception`` a type, with or without its module, or a glob; ``text`` stands
    in the exception's message; ``retries`` is a number or a comparison (``>=3``); ``arguments`` (``user_id=42``) and
    ``where`` (``kwargs.amount > 100``) look into JSON bodies.
    ``bodies``: give messages with the letters, on Redis too.
    ``since`` and ``until`` are aware datetimes, seconds since the epoch, ISO 8601 text, or an age such as ``2h``.

    Raises:
        UsageError: a condition that cannot be understood.
    """
    wanted = None if ids is None else frozenset(ids)
    if reason is not None and reason not in {str(known) for known in Reason}:
        raise UsageError(f"reason {reason!r}: expected one of {', '.join(str(known) for known in Reason)}")
    first, last = moment(since, "since"), moment(until, "until")
    tried = None if retries is None else _comparison(str(retries))
    conditions = [argument(each) for each in arguments or ()] + [condition(each) for each in where or ()]

    def cause(letter: DeadLetter) -> bool:
        return (
            (task is None or fnmatchcase(letter.task or "", task))
            and (reason is None or letter.reason == reason)
            and (exception is None or _is_type(letter, exception))
            and (fingerprint is None or letter.fingerprint == fingerprint)
        )

    def matches(letter: DeadLetter) -> bool:
        return (
            (wanted is None or letter.id in wanted)
            and cause(letter)
            and (first is None or letter.died_at >= first)
            and (last is None or letter.died_at <= last)
            and (task_id is None or letter.task_id == task_id)
            and (root_id is None or letter.root_id == root_id)
            and (worker is None or fnmatchcase(letter.worker or "", worker))
            and (tried is None or tried(letter.retries))
            and (text is None or text in (letter.exception or {}).get("message", ""))
            and all(holds(letter) for holds in conditions)
        )

    common = None if task is reason is exception is fingerprint is None else cause
    told = (text, task_id, root_id, None if worker is None else _literal(worker))
    single = (wanted, first, last, task_id, root_id, worker, tried, text, conditions or None)
    return Selection(
        matches,
        bodies=bodies or bool(conditions),
        ids=wanted,
        cause=common,
        first=first,
        last=last,
        causes_only=all(condition is None for condition in single),
        words=[word for each in told if each and (word := _plain(each))],
    )


_COMPARISON = re.compile(r"(?P<operator>==|!=|>=|<=|>|<)?\s*(?P<number>\d{1,9})")
#: Characters that every JSON encoder writes as they are.
_PLAIN = re.compile(r"[ A-Za-z0-9_.:@,;()-]+")


def _plain(text: str) -> str:
    """The longest piece of a text that stands in JSON as it is."""
    return max(_PLAIN.findall(text), key=len, default="")


def _literal(glob: str) -> str:
    """The longest piece of what matches that a glob spells out."""
    return max(re.split(r"[*?]", glob.partition("[")[0]), key=len)


#: Fields of an exported letter that restoring needs, whichever broker it is from.
_EXPORTED = ("v", "broker", "queue", "id", "body")


def is_export(line: Mapping[str, Any]) -> bool:
    """Whether this is a line of `dlx export`."""
    return line.get("v") == 1 and all(isinstance(line.get(name), str) for name in _EXPORTED[1:])


def _comparison(text: str) -> Callable[[int], bool]:
    found = _COMPARISON.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"retries {text!r}: expected a number, or a comparison such as '>=3' or '<2'")
    compare, number = OPERATORS[found["operator"] or "=="], int(found["number"])
    return lambda value: bool(compare(value, number))


def _is_type(letter: DeadLetter, pattern: str) -> bool:
    name = (letter.exception or {}).get("type", "")
    return fnmatchcase(name, pattern) or fnmatchcase(name.rsplit(".", 1)[-1], pattern)


def moment(value: datetime | float | str | None, label: str) -> int | None:
    """Milliseconds since the epoch of a point in time, however it was given.

    Raises:
        UsageError: text that is neither a time nor an age.
    """
    if value is None:
        return None
    if isinstance(value, datetime):
        return int((value if value.tzinfo else value.astimezone()).timestamp() * 1000)
    if isinstance(value, (int, float)):
        return int(value * 1000)
    try:
        return int((time() - parse_duration(value)) * 1000)
    except ValueError:
        pass
    try:
        found = datetime.fromisoformat(value.replace("Z", "+00:00"))
    except ValueError:
        raise UsageError(f"{label} {value!r}: expected a time such as 2026-11-20T08:00:00Z or an age such as 2h") from None
    return int((found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp() * 1000)


def age(milliseconds: int) -> str:
    """How long ago something was, for people: ``3m``, ``5h``, ``12d``."""
    seconds = max(int(time()) - milliseconds // 1000, 0)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"
