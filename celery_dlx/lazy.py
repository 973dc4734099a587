"""Dataclasses whose fields are read when somebody asks for them (pure): of many letters few fields are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

T = TypeVar("T")
_SOURCE = "_source"


class Lazy:
    """Base of a dataclass that `lazy` decorates. What `unread` makes of it is an instance like any other."""

    if not TYPE_CHECKING:  # or every name would be an attribute

        def __getattr__(self, name: str) -> Any:
            source = self.__dict__.get(_SOURCE)
            if source is None or name not in self.__dataclass_fields__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            for known, value in source(name).items():
                # What was set stays; and of two threads that read at once both must have the same: it may be a list.
                self.__dict__.setdefault(known, value)
            return self.__dict__[name]


def lazy(cls: type[T]) -> type[T]:
    """Over a dataclass: no default may stand in, as an attribute of the class, for what was not read yet."""
    for each in fields(cls):  # type: ignore[arg-type]
        if each.name in vars(cls):
            delattr(cls, each.name)
    return cls


def unread(cls: type[T], source: Callable[[str], Mapping[str, Any]], known: Mapping[str, Any]) -> T:
    """An instance of which some fields are known; once another is asked for, ``source`` gives it, with any others it has."""
    new = object.__new__(cls)
    new.__dict__.update(known, _source=source)
    return new


def source_of(instance: object) -> Any:
    """What an instance is read from; ``None`` if all of it was given."""
    return vars(instance).get(_SOURCE)
