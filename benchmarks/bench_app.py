"""The application that is measured, stock, by the usual recipe, or with celery-dlx (``BENCH_MODE``)."""

from __future__ import annotations

import mmap
import os
import struct
import time

import redis
from celery import Celery
from kombu import Exchange, Queue

SLOTS = 4096
MODE = os.environ.get("BENCH_MODE", "stock")

app = Celery("bench", broker=os.environ["BENCH_BROKER"])
app.conf.update(
    worker_prefetch_multiplier=int(os.environ.get("BENCH_PREFETCH", "32")),  # 64 with -c 2
    task_default_queue="bench",
    task_ignore_result=True,
    worker_enable_remote_control=False,
    worker_hijack_root_logger=True,
    broker_connection_retry_on_startup=True,
    task_acks_late=os.environ.get("BENCH_LATE") == "1",
)
if os.environ.get("BENCH_VISIBILITY"):
    # The throttle (kombu 5.7): a look for overdue messages that finds another's under way is made again soon.
    visibility = {"visibility_timeout": float(os.environ["BENCH_VISIBILITY"]), "unacked_restore_throttle": 1}
    app.conf.broker_transport_options = visibility
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
_clients: list[redis.Redis] = []


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


@app.task
def stamp(number):
    """Tell when this task started, by a clock that all processes of the machine share."""
    started = time.monotonic()
    if not _clients:
        _clients.append(redis.Redis.from_url(os.environ["BENCH_REDIS"]))
    _clients[0].rpush("bench.starts", f"{number} {started!r}")


@app.task
def slow(payload):
    time.sleep(3600)
