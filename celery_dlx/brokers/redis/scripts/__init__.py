"""The Lua scripts: each one a move that happens whole or not at all."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from typing import Any

_INCLUDE = re.compile(r"^-- include (?P<name>\w+)$", re.MULTILINE)


@cache
def source(name: str) -> str:
    text = (resources.files(__name__) / f"{name}.lua").read_text("utf-8")
    return _INCLUDE.sub(lambda found: source(found["name"]), text)


def load(client: Any, name: str) -> Any:
    """A callable script over a client; it is sent by its hash, and whole where the server does not know it."""
    return client.register_script(source(name))
