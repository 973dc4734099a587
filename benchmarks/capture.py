"""Throughput of a worker with celery-dlx against stock Celery, and against the usual dead-letter recipe.

    python benchmarks/capture.py --broker amqp://… [--broker redis://…] [--messages 12000] [--rounds 3]

Same settings for all: prefork -c 2, prefetch 64, messages preloaded. The modes take turns within each round, and the
ratios are medians of each round's ratios: compare ratios, not absolute figures. Every run checks that all messages were
processed and, where letters are kept, that all were captured (with a traceback, by celery-dlx).
"""

from __future__ import annotations

import argparse
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import amqp
import redis
from kombu import Connection

HERE = Path(__file__).parent
QUEUE = "bench"
#: As in bench_app, which only the measured processes import.
SLOTS = 4096


class RabbitMQBench:
    def __init__(self, url: str) -> None:
        self.url = url

    def reset(self, mode: str) -> None:
        with Connection(self.url) as connection:
            channel = connection.default_channel
            for queue in (QUEUE, "bench.dlq"):
                channel.queue_delete(queue)
            if mode == "recipe":
                channel.exchange_declare("bench.dlx", "direct", durable=True, auto_delete=False)
                channel.queue_declare("bench.dlq", durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"})
                channel.queue_bind("bench.dlq", "bench.dlx", QUEUE)

    def delete(self, queue: str) -> None:
        with Connection(self.url) as connection:
            connection.default_channel.queue_delete(queue)

    def depth(self, queue: str) -> int:
        with Connection(self.url) as connection:
            try:
                return connection.default_channel.queue_declare(queue, passive=True).message_count
            except amqp.exceptions.NotFound:
                return 0

    def waiting(self) -> int:
        return self.depth(QUEUE)

    def letters(self) -> int:
        return self.depth("bench.dlq")


class RedisBench:
    def __init__(self, url: str) -> None:
        self.client = redis.Redis.from_url(url)

    def reset(self, mode: str) -> None:
        keys = self.client.keys("dlx:*")
        self.client.delete(QUEUE, "unacked", "unacked_index", *keys)

    def waiting(self) -> int:
        return self.client.llen(QUEUE) + self.client.hlen("unacked")

    def letters(self) -> int:
        return self.client.zcard("dlx:{bench.dlq}")


def run(url: str, mode: str, task: str, messages: int, late: bool, pool: str = "prefork") -> float:
    """Messages per second of one worker over one preloaded queue."""
    bench = RabbitMQBench(url) if url.startswith("amqp") else RedisBench(url)
    bench.reset(mode)
    home = Path(tempfile.mkdtemp())
    counter = home / "counter"
    counter.write_bytes(bytes(SLOTS * 8))
    env = {
        **os.environ,
        "BENCH_BROKER": url,
        "BENCH_MODE": mode,
        "PYTHONPATH": str(HERE),
        "BENCH_LATE": str(int(late)),
        "BENCH_COUNTER": str(counter),
    }
    preload = (
        f"import bench_app as b\nwith b.app.producer_pool.acquire(block=True) as p:\n  for n in range({messages}): b.{task}"
    )
    subprocess.run([sys.executable, "-c", f"{preload}.apply_async((n,), producer=p)"], env=env, check=True, cwd=HERE)

    def ran() -> int:
        return sum(struct.unpack(f"{SLOTS}Q", counter.read_bytes()))

    expected = messages if task == "fail" and mode != "stock" else 0
    command = [sys.executable, "-m", "celery", "-A", "bench_app", "worker", "-c", "2", "-P", pool, "-l", "CRITICAL"]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat", "-Q", QUEUE]
    with open(home / "log", "wb") as log:
        worker = subprocess.Popen(command, env=env, cwd=HERE, stdout=log, stderr=log)
        deadline = time.monotonic() + 300

        def wait(over: Callable[[], bool]) -> float:
            while not over():
                if worker.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit((home / "log").read_text()[-3000:])
                time.sleep(0.02)
            return time.monotonic()

        try:
            started = wait(lambda: ran() > 0)
            # Not over before every letter is stored.
            finished = wait(lambda: ran() >= messages)
            if bench.letters() < expected or bench.waiting():
                finished = wait(lambda: bench.letters() >= expected and not bench.waiting())
        finally:
            worker.terminate()
            worker.wait(60)
    kept = bench.letters()
    if kept != expected or bench.waiting():
        raise SystemExit(f"{mode} {task}: {kept} letters, expected {expected}; {bench.waiting()} messages left")
    return messages / (finished - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--broker", action="append", required=True)
    parser.add_argument("--messages", type=int, default=12_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--late", action="store_true", help="late acknowledgement for all modes")
    parser.add_argument("--only", choices=["ok", "fail"])
    options = parser.parse_args()
    rows = []
    for url in options.broker:
        rabbit = url.startswith("amqp")
        for task in [options.only] if options.only else ["ok", "fail"]:
            modes = ["stock", "dlx"] + (["recipe"] if rabbit and task == "fail" else [])
            rates: dict[str, list[float]] = {mode: [] for mode in modes}
            for turn in range(options.rounds):
                for mode in modes if turn % 2 == 0 else reversed(modes):
                    rates[mode].append(run(url, mode, task, options.messages, options.late))
                    print(f"  {mode} {task}: {rates[mode][-1]:.0f}/s", file=sys.stderr)
            median = {mode: statistics.median(values) for mode, values in rates.items()}

            def ratio(mode: str, other: str, rates: dict[str, list[float]] = rates) -> str:
                # Round by round: the machine's speed drifts between rounds more than within one.
                if other not in rates:
                    return "-"
                return f"{statistics.median(a / b for a, b in zip(rates[mode], rates[other], strict=True)):.2f}"

            for mode in modes:
                rows.append([
                    "RabbitMQ" if rabbit else "Redis", task, mode, f"{median[mode]:.0f}",
                    ratio(mode, "stock"),
                    ratio(mode, "recipe"),
                ])  # fmt: skip
    for row in [["broker", "task", "mode", "msg/s", "÷ stock", "÷ recipe"], *rows]:
        print("  ".join(cell.ljust(9) for cell in row))


if __name__ == "__main__":
    main()
