"""The storm's application, in processes that kill themselves at a named step, once.

``DLX_STEP``: ``before module:Class.method`` or ``after module:Class.method``, with ``=word`` at its end for a call whose
first argument is that word. ``DLX_STEP_DONE``: the file that says that it happened.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal

from faults.storm_app import app  # noqa: F401 - what `celery -A` finds


def _die() -> None:
    try:
        os.close(os.open(os.environ["DLX_STEP_DONE"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(step: str) -> None:
    moment, _, rest = step.partition(" ")
    path, _, word = rest.partition("=")
    module, _, name = path.partition(":")
    owner, _, method = name.partition(".")
    cls = getattr(importlib.import_module(f"celery_dlx.{module}"), owner)
    call = getattr(cls, method)

    @functools.wraps(call)
    def stepped(self, *args, **kwargs):
        meant = not word or (args and args[0] == word)
        if meant and moment == "before":
            _die()
        try:
            return call(self, *args, **kwargs)
        finally:
            if meant and moment == "after":
                _die()

    setattr(cls, method, stepped)


if os.environ.get("DLX_STEP"):
    _arm(os.environ["DLX_STEP"])
