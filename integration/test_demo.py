"""The story that README promises, on the embedded Redis and on real brokers."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("kind", ["embedded", "rabbitmq", "redis_server"])
def test_demo(kind, request):
    arguments = [] if kind == "embedded" else [request.getfixturevalue(kind).url]
    command = [sys.executable, "-m", "celery_dlx.demo", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("Four died", "could not convert string to float: '12,50'", "worker_lost", "time_limit", "unregistered",
                 "done: charge-17-1250, report-october, thumbnail-cat.png, welcome-ada", "Nothing was lost."):  # fmt: skip
        assert part in done.stdout
