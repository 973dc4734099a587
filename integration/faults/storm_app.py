"""The application that goes through the storm: late acknowledgement, a tenth of its tasks always fails."""

from __future__ import annotations

import json
import os
import time

from celery import Celery

from celery_dlx import DeadLetters

app = Celery("storm", broker=os.environ["DLX_BROKER"])
app.conf.update(
    broker_transport_options=json.loads(os.environ.get("DLX_TRANSPORT_OPTIONS", "{}")),
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    worker_prefetch_multiplier=2,  # 4 with -c 2
    task_ignore_result=True,
    # Its exclusive queue may still be locked by the connection before: stock Celery ends with RESOURCE_LOCKED.
    worker_enable_remote_control=False,
    worker_cancel_long_running_tasks_on_connection_loss=False,
)
DeadLetters(app)


@app.task(name="storm.work")
def work(number):
    time.sleep(float(os.environ["DLX_STORM_TASK"]))
    with open(os.environ["DLX_RUNS"], "ab", buffering=0) as runs:
        runs.write(b"%d\n" % number)


@app.task(name="storm.bad")
def bad(number):
    raise ValueError(f"number {number} cannot be processed")


@app.task(name="storm.later")
def later(number):
    if not os.path.exists(os.environ["DLX_STORM_FIXED"]):
        raise ValueError(f"number {number} cannot be processed yet")
    work(number)
