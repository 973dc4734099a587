"""What celery-dlx adds to an import and to a worker's start.

python benchmarks/startup.py --broker amqp://… [--rounds 7]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from uuid import uuid4

APP = """
import os
from celery import Celery
app = Celery("start", broker=os.environ["BENCH_BROKER"])
app.conf.broker_connection_retry_on_startup = True
if os.environ.get("BENCH_POLICY"):
    from celery_dlx import DeadLetters
    DeadLetters(app, policy=os.environ["BENCH_POLICY"])
"""
#: What a worker of either kind imports anyhow: Celery's worker, kombu's transports.
CELERY = "\n".join(
    f"import {name}"
    for name in (
        "celery.app.amqp",
        "celery.worker",
        "celery.worker.consumer",
        "kombu.transport.redis",
        "kombu.transport.pyamqp",
    )
)


def import_seconds(code: str) -> float:
    program = f"import time\n{CELERY}\nstart = time.perf_counter()\n{code}\nprint(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


def whole_import(code: str) -> float:
    program = f"import time\nstart = time.perf_counter()\n{code}\nprint(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


def start_seconds(home: Path, broker: str, policy: str, queues: list[str]) -> float:
    env = {**os.environ, "BENCH_BROKER": broker, "BENCH_POLICY": policy, "PYTHONPATH": str(home)}
    command = [sys.executable, "-u", "-m", "celery", "-A", "start_app", "worker", "-c", "1", "-l", "INFO"]
    command += ["--without-gossip", "--without-mingle", "-Q", ",".join(queues)]
    start = time.monotonic()
    worker = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert worker.stdout is not None
    for line in worker.stdout:
        if " ready." in line:
            break
    taken = time.monotonic() - start
    worker.terminate()
    worker.communicate(timeout=60)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--broker", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    both = [(whole_import("import celery.app.amqp, celery.worker"), import_seconds("import celery_dlx"))
            for _ in range(options.rounds)]  # fmt: skip
    print(f"import celery: {statistics.median(a for a, _ in both) * 1000:.0f} ms, "
          f"celery_dlx on top of it: {statistics.median(b for _, b in both) * 1000:.0f} ms")  # fmt: skip
    home = Path(tempfile.mkdtemp())
    (home / "start_app.py").write_text(APP)
    for broker in options.broker:
        for count in (1, 200):
            added = {"first start": [], "later start": []}
            for _ in range(options.rounds):
                run = uuid4().hex[:8]
                names = [f"{run}.{number}" for number in range(200)]
                consumed = names[:count]
                policy = home / f"{run}.yaml"
                policy.write_text("version: 1\nqueues:\n" + "".join(f"  {name}: {{max_deliveries: 3}}\n" for name in names))
                plain = [f"plain.{name}" for name in consumed]
                stock = start_seconds(home, broker, "", plain)
                added["first start"].append(start_seconds(home, broker, str(policy), consumed) - stock)
                stock = start_seconds(home, broker, "", plain)
                added["later start"].append(start_seconds(home, broker, str(policy), consumed) - stock)
            for which, seconds in added.items():
                print(f"{broker.split(':')[0]}: policy of 200 queues, {count} consumed, {which}: "
                      f"{statistics.median(seconds):+.2f} s")  # fmt: skip


if __name__ == "__main__":
    main()
