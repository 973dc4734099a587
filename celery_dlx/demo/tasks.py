"""The demo's shop: tasks that die in different ways until somebody fixes them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from celery import Celery

from celery_dlx import DeadLetters

app = Celery("shop", broker=os.environ["DEMO_BROKER"])
app.conf.update(
    task_default_queue=os.environ["DEMO_QUEUE"],
    broker_connection_retry_on_startup=True,
    worker_hijack_root_logger=True,
    worker_enable_remote_control=False,
)
DeadLetters(app, policy=os.environ["DEMO_POLICY"])

HOME = Path(os.environ["DEMO_HOME"])


def is_fixed() -> bool:
    """The bug fix that gets deployed halfway through the story."""
    return (HOME / "fixed").exists()


@app.task  # type: ignore[untyped-decorator]
def welcome(name: str) -> None:
    """A task that works."""
    (HOME / "done" / f"welcome-{name}").touch()


@app.task  # type: ignore[untyped-decorator]
def charge(order: int, amount: str) -> None:
    """Fails on amounts with a comma, until the fix."""
    cents = round(float(amount.replace(",", ".") if is_fixed() else amount) * 100)
    (HOME / "done" / f"charge-{order}-{cents}").touch()


@app.task(time_limit=1)  # type: ignore[untyped-decorator]
def report(month: str) -> None:
    """Takes longer than its time limit."""
    if not is_fixed():
        time.sleep(60)
    (HOME / "done" / f"report-{month}").touch()


@app.task  # type: ignore[untyped-decorator]
def thumbnail(image: str) -> None:
    """Is killed while running, as by the kernel when memory runs out."""
    if not is_fixed():
        os.kill(os.getpid(), signal.SIGKILL)
    (HOME / "done" / f"thumbnail-{image}").touch()
