"""From what the pool or the consumer reports to a `Death`."""

from __future__ import annotations

import traceback
from time import time
from typing import Any

from billiard.einfo import ExceptionWithTraceback
from billiard.exceptions import SoftTimeLimitExceeded, Terminated, TimeLimitExceeded, WorkerLostError
from celery.exceptions import Ignore, MaxRetriesExceededError, Reject, Retry

from celery_dlx.letters import MAX_TRACEBACK, Death, Reason, clip, safe_text, type_name

#: Not deaths: the task asked for something else.
ALIVE = (Ignore, Retry)


class TaskRanOutOfMemoryError(Exception):
    """Stands in for the MemoryError of a task: Celery ends the worker when it sees one, which helps nobody here."""


class PoisonMessageError(Exception):
    """A message that came back too often."""


def unwrap(exception: Any) -> Any:
    """The exception itself, out of what a child process sent."""
    return exception.exc if isinstance(exception, ExceptionWithTraceback) else exception


def failure_reason(exc: BaseException, retries: object, max_retries: object) -> str:
    """Why a task that raised is dead."""
    if isinstance(exc, Reject):
        return Reason.REJECTED.value
    if isinstance(exc, TimeLimitExceeded):
        return Reason.TIME_LIMIT.value
    if isinstance(exc, SoftTimeLimitExceeded):
        return Reason.SOFT_TIME_LIMIT.value
    if isinstance(exc, (WorkerLostError, SystemExit, KeyboardInterrupt)):
        return Reason.WORKER_LOST.value
    if isinstance(exc, Terminated):
        return Reason.REVOKED.value
    if isinstance(exc, MaxRetriesExceededError):
        return Reason.RETRIES_EXHAUSTED.value
    spent = isinstance(retries, int) and isinstance(max_retries, int) and 0 < max_retries <= retries
    return Reason.RETRIES_EXHAUSTED.value if spent else Reason.FAILURE.value


def exception_name(exc: Any) -> str:
    """The qualified name of an exception's class, also of one that could not be pickled in the child."""
    module, name = getattr(exc, "exc_module", None), getattr(exc, "exc_cls_name", None)
    if isinstance(module, str) and isinstance(name, str):  # celery.utils.serialization.UnpickleableExceptionWrapper
        return f"{module}.{name}"
    return type_name(type(exc))


def exception_text(exc: Any) -> str:
    if isinstance(getattr(exc, "exc_cls_name", None), str):
        return safe_text(getattr(exc, "text", exc))
    return safe_text(exc)


def make_death(
    reason: str,
    queue: str,
    *,
    exc: Any = None,
    trace: object = None,
    deliveries: int = 1,
    worker: str | None = None,
    service: str | None = None,
) -> Death:
    """Compose a death; nothing about the exception can make this fail."""
    text = ""
    if exc is not None:
        text = clip(trace, MAX_TRACEBACK, keep="tail") if isinstance(trace, str) else _format(exc)
    return Death(
        reason=reason,
        queue=queue,
        died_at=int(time() * 1000),
        exception_type=None if exc is None else exception_name(exc),
        message="" if exc is None else exception_text(exc),
        traceback=text.encode("utf-8", "replace").decode("utf-8"),
        deliveries=deliveries,
        worker=worker,
        service=service,
    )


def _format(exc: BaseException) -> str:
    try:
        return clip("".join(traceback.format_exception(type(exc), exc, exc.__traceback__)), MAX_TRACEBACK, keep="tail")
    except Exception as failure:  # noqa: BLE001 - a failing __repr__ or __str__ of the exception
        return f"<traceback cannot be printed: {type(failure).__name__}>"
