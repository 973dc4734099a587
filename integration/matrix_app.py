"""The application under test: tasks that die in every way a task can."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from celery import Celery
from celery.exceptions import Ignore, Reject
from kombu import Queue

from celery_dlx import DeadLetters

app = Celery("matrix", broker=os.environ["DLX_BROKER"], backend=os.environ.get("DLX_BACKEND") or None)
app.conf.update(
    worker_prefetch_multiplier=int(os.environ.get("DLX_PREFETCH", "4")),
    task_acks_late=os.environ.get("DLX_LATE") == "1",
    task_reject_on_worker_lost=os.environ.get("DLX_RWL") == "1",
    task_default_queue="default",
    broker_connection_retry_on_startup=True,
    worker_hijack_root_logger=True,
    result_expires=3600,
    broker_transport_options=json.loads(os.environ.get("DLX_TRANSPORT_OPTIONS", "{}")),
    broker_use_ssl=json.loads(os.environ.get("DLX_SSL", "null")),
    worker_pool_restarts=True,
    worker_soft_shutdown_timeout=float(os.environ.get("DLX_SOFT", "0")),
    worker_cancel_long_running_tasks_on_connection_loss=os.environ.get("DLX_CANCEL") == "1",
)
for _name in ("task_acks_on_failure", "task_acks_on_timeout"):
    if os.environ.get("DLX_NO_ACK_ON_FAILURE") == "1" and _name in app.conf:
        app.conf[_name] = False
if os.environ.get("DLX_NO_ACK_ON_FAILURE") == "1":
    app.conf.task_acks_on_failure_or_timeout = False
if os.environ.get("DLX_STOCK") != "1":
    DeadLetters(app)
_LOG = os.environ.get("DLX_RUNS", os.devnull)


def note(text: str) -> None:
    """Tell the test that a task ran: one line, written at once."""
    with open(_LOG, "a") as log:
        log.write(text + "\n")


class NotPicklable(Exception):
    def __init__(self, one, two):
        super().__init__(one)
        self.lock = open(os.devnull)  # noqa: SIM115 - what cannot be pickled is the point


class NotPrintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


@app.task
def ok(key=""):
    note(f"ok {key}")


@app.task
def fail(key="", message="boom"):
    note(f"fail {key}")
    raise ValueError(message)


@app.task
def fail_until(path, key=""):
    note(f"fail_until {key}")
    if not os.path.exists(path):
        raise ValueError("not fixed yet")


@app.task(bind=True, max_retries=2)
def retries(self):
    raise self.retry(exc=ValueError("again"), countdown=0)


@app.task(bind=True, max_retries=2)
def retries_without_exception(self):
    raise self.retry(countdown=0)


@app.task(bind=True, max_retries=5)
def succeeds_at_second_try(self):
    if self.request.retries == 0:
        raise self.retry(exc=ValueError("first"), countdown=0)
    note("succeeds_at_second_try")


@app.task(autoretry_for=(KeyError,), retry_backoff=False, default_retry_delay=0, max_retries=1)
def autoretry():
    raise KeyError("auto")


@app.task(bind=True)
def publish_fails_in_retry(self):
    raise self.retry(countdown=0, queue="nowhere", serializer="no-such-serializer")


@app.task
def reject():
    raise Reject("no", requeue=False)


@app.task
def reject_requeue():
    note("reject_requeue")
    raise Reject("again", requeue=True)


@app.task
def ignore():
    note("ignore")
    raise Ignore()


@app.task(soft_time_limit=1)
def soft():
    time.sleep(30)


@app.task(time_limit=1)
def hard():
    note("hard")
    time.sleep(30)


@app.task
def sleeps(seconds):
    note("sleeps")
    time.sleep(seconds)


@app.task
def naps(key, seconds):
    """Notes that it is done; and before, if it takes its time, that it began."""
    if seconds:
        note(f"began {key}")
        time.sleep(seconds)
    note(f"naps {key}")


@app.task
def killed():
    note("killed")
    os.kill(os.getpid(), signal.SIGKILL)


@app.task
def exits():
    note("exits")
    sys.exit(3)


@app.task
def memory():
    raise MemoryError("too much")


@app.task
def not_picklable():
    raise NotPicklable("a", "b")


@app.task
def not_printable():
    raise NotPrintable()


@app.task
def huge_traceback():
    raise ValueError("x" * 300_000)


def _deep(n):
    if n:
        _deep(n - 1)
    else:
        raise RecursionError("deep " + "y" * 5000)


@app.task
def deep_traceback():
    _deep(400)


@app.task
def surrogate():
    raise ValueError("lone \udc80 surrogate")


@app.task
def base_exception():
    class Odd(BaseException):
        pass

    raise Odd("odd")


@app.task
def add(*numbers):
    return sum(number for number in numbers if isinstance(number, int))


@app.task
def on_error(*args):
    note("errback")


QUEUES = [Queue("default")]
