"""The worker side: notes when the first message is received and when the last one is done."""

from __future__ import annotations

import json
import os
import time

from bench_app import app  # noqa: F401 - the app that celery looks for
from celery.signals import task_received
from celery.worker import state

_expected, _done = int(os.environ["BENCH_MESSAGES"]), os.environ["BENCH_DONE"]
_started: list[float] = []
_count = [0]


@task_received.connect
def _on_received(**_: object) -> None:
    if not _started:
        _started.append(time.monotonic())


_ready = state.task_ready


def _task_ready(request, successful=False, **kwargs):
    _ready(request, successful=successful, **kwargs)
    _count[0] += 1
    if _count[0] == _expected:
        with open(_done + ".part", "w") as out:
            json.dump({"started": _started[0], "finished": time.monotonic()}, out)
        os.replace(_done + ".part", _done)


# The measuring stick only: the same for all modes.
import celery.worker.request as _request  # noqa: E402

_request.task_ready = _task_ready
