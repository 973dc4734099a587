"""The application that is fuzzed: its one task takes anything, and notes which message it ran for."""

from __future__ import annotations

import os

from celery import Celery

from celery_dlx import DeadLetters

app = Celery("fuzz", broker=os.environ["DLX_BROKER"])
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=16,
    worker_log_color=False,
)
DeadLetters(app)


def _number(request, args):
    """Of the message: from its header, else from its first argument; "?" if it has neither any more."""
    found = getattr(request, "fuzz", None)
    if isinstance(found, int) and not isinstance(found, bool):
        return found
    key = args[0] if args else None
    if key == "last":
        return key
    return key[1:] if isinstance(key, str) and key[:1] == "k" and key[1:].isdecimal() else "?"


@app.task(name="fuzz.work", bind=True)
def work(self, *args, **kwargs):
    with open(os.environ["DLX_RUNS"], "ab", buffering=0) as runs:
        runs.write(f"{_number(self.request, args)}\n".encode())


@app.task(name="fuzz.fail")
def fail(*args, **kwargs):
    raise ValueError("as it always does")
