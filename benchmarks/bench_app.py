"""The application that is measured, stock, by the usual recipe, or with celery-dlx (``BENCH_MODE``)."""

from __future__ import annotations

import mmap
import os
import struct

from celery import Celery
from kombu import Exchange, Queue

SLOTS = 4096
MODE = os.environ.get("BENCH_MODE", "stock")

app = Celery("bench", broker=os.environ["BENCH_BROKER"])
app.conf.update(
    worker_prefetch_multiplier=32,  # 64 with -c 2
    task_default_queue="bench",
    task_ignore_result=True,
    worker_enable_remote_control=False,
    worker_hijack_root_logger=True,
    broker_connection_retry_on_startup=True,
    task_acks_late=os.environ.get("BENCH_LATE") == "1",
)
if MODE == "recipe":
    app.conf.update(task_acks_late=True, task_acks_on_failure_or_timeout=False)
    if "task_acks_on_failure" in app.conf:
        app.conf.update(task_acks_on_failure=False)
    app.conf.task_queues = [
        Queue("bench", Exchange("bench"), "bench", queue_arguments={
            "x-dead-letter-exchange": "bench.dlx", "x-dead-letter-routing-key": "bench",
        })
    ]  # fmt: skip
if MODE == "dlx":
    from celery_dlx import DeadLetters

    DeadLetters(app)


_slots: list[mmap.mmap] = []


def count() -> None:
    """Note that this process ran one more task: a slot per process in a file that the measuring side reads."""
    if not _slots:
        with open(os.environ["BENCH_COUNTER"], "r+b") as file:
            _slots.append(mmap.mmap(file.fileno(), 0))
    at = os.getpid() % SLOTS * 8
    (seen,) = struct.unpack_from("Q", _slots[0], at)
    struct.pack_into("Q", _slots[0], at, seen + 1)


@app.task
def ok(number):
    count()
    return number


@app.task
def fail(number):
    count()
    raise ValueError(f"number {number} cannot be processed")
