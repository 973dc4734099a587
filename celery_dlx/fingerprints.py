"""Groups like failures: a short, stable name for *why* a task died.

Two deaths share a fingerprint when the reason, the task, the exception's type and the application's own frames agree.
Line numbers, addresses, ids and the frames of libraries do not count: they move without the cause changing.
"""

from __future__ import annotations

import re
from functools import lru_cache
from hashlib import blake2b

#: Part of every fingerprint: raised whenever the recipe changes, so that groups of two recipes never mix.
VERSION = 1

_FRAME = re.compile(r'^\s*File "(?P<path>[^"]+)", line \d+, in (?P<function>.+)$', re.MULTILINE)
_LIBRARY = re.compile(r"(^|/)(site-packages|dist-packages|lib/python\d[^/]*|celery|kombu|billiard)/|^<frozen ")
_VARIABLE = re.compile(r"0x[0-9a-fA-F]+|\d+|[0-9a-fA-F]{8}-[0-9a-fA-F-]{27}")


def fingerprint(reason: str, task: str | None, exception_type: str | None, traceback: str) -> str:
    """Return the fingerprint of a death, e.g. ``1-5f0c1d2e3a4b5c6d``.

    The traceback is that of Python's ``traceback`` module, possibly with its head cut off.
    """
    # What stands after the last frame (the exception's own words) plays no part: without it, the deaths of one cause
    # have one text, and are reckoned once.
    end = traceback.find("\n", traceback.rfind('  File "') + 1)
    return _reckon(reason, task, exception_type, traceback[: end if end >= 0 else None])


@lru_cache(maxsize=512)
def _reckon(reason: str, task: str | None, exception_type: str | None, traceback: str) -> str:
    frames = [
        f"{_module(found['path'])}:{_VARIABLE.sub('#', found['function'])}"
        for found in _FRAME.finditer(traceback)
        if not _LIBRARY.search(found["path"])
    ]
    material = "\n".join([reason, task or "", exception_type or "", *frames])
    return f"{VERSION}-{blake2b(material.encode('utf-8', 'surrogatepass'), digest_size=8).hexdigest()}"


def _module(path: str) -> str:
    """The last two parts of a path: where an application is installed is not part of the cause."""
    return "/".join(path.replace("\\", "/").rsplit("/", 2)[-2:])
