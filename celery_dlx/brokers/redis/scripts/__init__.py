"""The Lua scripts: each one a move that happens whole or not at all."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any


@cache
def source(name: str) -> str:
    return (resources.files(__name__) / f"{name}.lua").read_text("utf-8")


def load(client: Any, name: str) -> Any:
    """A callable script over a client; it is sent by its hash, and whole where the server does not know it."""
    return client.register_script(source(name))
