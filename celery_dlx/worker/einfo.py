"""What a pool process sends its worker of a task that failed or retries: everything but the frames.

billiard's `ExceptionInfo.tb` copies the positions of every instruction of each frame, the task's caller's two thousand among
them: 32 KB and 0.2 ms of the worker's event loop for each failure, of which the worker reads nothing (Celery 5.5 to 5.7:
`Request.on_failure` uses the exception and the text of the traceback). In the pool process all is as ever.
"""

from __future__ import annotations

from typing import Any

from billiard.einfo import ExceptionInfo
from celery import signals


class Told(ExceptionInfo):  # type: ignore[misc]
    """An `ExceptionInfo` that arrives elsewhere as one without ``tb``."""

    def __reduce__(self) -> tuple[Any, ...]:
        return ExceptionInfo.__new__, (ExceptionInfo,), {**self.__dict__, "tb": None}


def lighten(einfo: Any = None, **_: Any) -> None:
    """Receive `task_failure` and `task_retry`, which are sent before the result goes to the worker."""
    if type(einfo) is ExceptionInfo:
        einfo.__class__ = Told


def send_no_frames() -> None:
    """To be called before the pool forks: its processes inherit the receivers."""
    signals.task_failure.connect(lighten)
    signals.task_retry.connect(lighten)
