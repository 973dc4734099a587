"""What our Redis transport costs against kombu's own: throughput, idle latency, restoring, memory.

    python benchmarks/transport.py [--messages 12000] [--rounds 3] [--samples 200] [--reserved 2000] [--rabbitmq]

Starts its own brokers. Stock Celery and celery-dlx take turns within each round; only the ratios mean anything. With
`--rabbitmq` throughput, latency and memory are measured there too (nothing is restored by workers there).
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import capture
import redis
from celery import Celery
from celery.signals import before_task_publish
from common import HERE, Table, private, ratio, turns

QUEUE, LOAD = capture.QUEUE, "bench.load"
MODES = ("stock", "dlx")
WANTED = {
    "prefork no-op": "≥ 1.5",
    "prefork raising": "≥ 1.1",
    "solo no-op": "≥ 2",
    "latency": "≤ 1.1",
    "restore": "≥ 4",
    "memory": "≤ 1.1",
}
#: Before figures are taken, in seconds: what was allocated on arrival is settled.
_SETTLE = 1.0
_TIMEOUT = 180.0


class Worker:
    """A worker of one mode, in a process group of its own."""

    def __init__(self, url: str, mode: str, queue: str, processes: int = 2, **env: str) -> None:
        self.env = {**os.environ, "BENCH_BROKER": url, "BENCH_MODE": mode, "PYTHONPATH": str(HERE), **env}
        command = [sys.executable, "-m", "celery", "-A", "bench_app", "worker", "-c", str(processes), "-l", "CRITICAL"]
        command += ["--without-gossip", "--without-mingle", "--without-heartbeat", "-Q", queue]
        self.home = Path(tempfile.mkdtemp())
        (self.home / "counter").write_bytes(bytes(capture.SLOTS * 8))
        self.env["BENCH_COUNTER"] = str(self.home / "counter")
        with open(self.home / "log", "wb") as log:
            self.process = subprocess.Popen(command, env=self.env, cwd=HERE, stdout=log, stderr=log, start_new_session=True)

    def wait(self, over: Callable[[], bool], what: str, every: float = 0.02) -> float:
        """When it was so."""
        deadline = time.monotonic() + _TIMEOUT
        while not over():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{what}\n" + (self.home / "log").read_text()[-3000:])
            time.sleep(every)
        return time.monotonic()

    def resident(self) -> float:
        """KiB of the parent process in memory."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return float(line.split()[1])
        raise SystemExit("no VmRSS: memory is measured on Linux only")

    def kill(self) -> None:
        """SIGKILL it and its children."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.kill()  # what it leaves is deleted before the next measurement


def publish(env: dict[str, str], call: str, count: int, queue: str) -> None:
    program = f"import bench_app as b\nwith b.app.producer_pool.acquire(block=True) as p:\n  for n in range({count}): "
    program += f"b.{call}, producer=p, queue={queue!r})"
    subprocess.run([sys.executable, "-c", program], env=env, check=True, cwd=HERE)


def reset(url: str) -> None:
    if url.startswith("redis"):
        with redis.Redis.from_url(url) as client:
            client.flushdb()
    else:
        bench = capture.RabbitMQBench(url)
        for queue in (QUEUE, LOAD, *(f"{QUEUE}.{mode}" for mode in MODES)):
            bench.delete(queue)


# -- a worker that holds many messages


@contextmanager
def holding(url: str, mode: str, reserved: int) -> Iterator[tuple[Worker, float]]:
    """A worker with that many messages reserved beside the one it executes, and what it held in memory before (KiB)."""
    reset(url)
    bench = capture.RabbitMQBench(url) if url.startswith("amqp") else capture.RedisBench(url)
    with Worker(url, mode, QUEUE, 1, BENCH_PREFETCH=str(reserved + 100)) as worker:

        def taken() -> bool:
            if isinstance(bench, capture.RedisBench):
                return not bench.client.llen(QUEUE) and bench.client.hlen("unacked") >= held
            return not bench.depth(QUEUE)

        before = 0.0
        for held, more in ((0, 1), (reserved, reserved)):  # what is executed is acknowledged
            before = worker.resident()
            publish(worker.env, "slow.apply_async(('x' * 1000,)", more, QUEUE)
            worker.wait(taken, f"{mode}: {held} messages reserved")
            time.sleep(_SETTLE)
        yield worker, before


def memory(url: str, reserved: int, rounds: int, table: Table, kind: str) -> None:
    grown: dict[str, list[float]] = {mode: [] for mode in MODES}

    def measure(mode: str) -> float:
        with holding(url, mode, reserved) as (worker, before):
            resident = worker.resident()
            grown[mode].append((resident - before) / reserved)
            return resident / 1024

    found = turns(rounds, MODES, measure, f"{kind} memory in MiB")
    for mode in MODES:
        each = f"{statistics.median(grown[mode]):.2f} KiB more for each message"
        table.add(f"{kind}: parent with {reserved} reserved, {mode}", statistics.median(found[mode]), "MiB", note=each)
    table.add(f"{kind}: memory with {reserved} reserved", ratio(found, "dlx", "stock"), "÷ stock", WANTED["memory"])


def restore(url: str, reserved: int, rounds: int, load: int, table: Table) -> None:
    """A worker that held messages is killed; another one, that starts when they are overdue, puts them back.

    Meanwhile a third one is busy. Counted are messages back in their list, which nobody consumes then.
    """
    client = redis.Redis.from_url(url)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}

    def measure(mode: str) -> float:
        with holding(url, mode, reserved) as (holder, _):
            publish(holder.env, "ok.apply_async((1,)", load, LOAD)
            holder.kill()
            with Worker(url, mode, LOAD) as busy:
                busy.wait(lambda: client.llen(LOAD) < load - 200, "the load is worked on")
                time.sleep(1.2)  # until they are overdue
                if client.hlen("unacked") < reserved or client.llen(QUEUE):
                    raise SystemExit(
                        f"{mode}: {client.hlen('unacked')} messages are held, {client.llen(QUEUE)} came back early"
                    )
                begun = time.monotonic()
                with Worker(url, mode, "bench.other", 1, BENCH_VISIBILITY="1") as restorer:
                    first = restorer.wait(lambda: client.llen(QUEUE) > 0, f"{mode}: restored the first", 0.001)
                    there = client.llen(QUEUE)
                    last = restorer.wait(lambda: client.llen(QUEUE) >= reserved, f"{mode}: restored all", 0.001)
                    if not client.llen(LOAD):
                        print(f"  {mode}: the load was over before; give a larger --load", file=sys.stderr)
        seconds[mode].append(last - begun)
        return (reserved - there) / max(last - first, 0.001)

    found = turns(rounds, MODES, measure, "restored messages/s")
    for mode in MODES:
        note = f"all were back {statistics.median(seconds[mode]):.1f} s after the restoring worker was started"
        table.add(f"redis: restored under load, {mode}", statistics.median(found[mode]), "msg/s", note=note)
    table.add("redis: restored under load", ratio(found, "dlx", "stock"), "÷ stock", WANTED["restore"])


# -- idle latency


def latency(url: str, stamps: str, samples: int, rounds: int, table: Table, kind: str) -> None:
    """From publishing to the task's start; both workers are idle side by side, and either gets one task at a time.

    The publisher is stock for both. Its clock is read when the message is built, before it is sent.
    """
    client, sent = redis.Redis.from_url(stamps, socket_timeout=None), [0.0]

    def note(**_: object) -> None:
        sent[0] = time.monotonic()

    before_task_publish.connect(note)
    app = Celery("publisher", broker=url, set_as_current=False)
    queues = {mode: f"{QUEUE}.{mode}" for mode in MODES}
    medians: dict[str, list[float]] = {mode: [] for mode in MODES}
    late: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(rounds):
        reset(url)
        client.delete("bench.starts")
        with ExitStack() as stack:
            for mode, queue in queues.items():
                worker = stack.enter_context(Worker(url, mode, queue, BENCH_REDIS=stamps))
                publish(worker.env, "stamp.apply_async((0,)", 1, queue)  # declares the queue as this mode does
                if client.blpop("bench.starts", timeout=60) is None:
                    raise SystemExit(f"{mode}: no task was started in a minute")
            producer = stack.enter_context(app.producer_pool.acquire(block=True))

            def once(mode: str, number: int, timeout: float, producer: object = producer) -> float:
                app.send_task("bench_app.stamp", (number,), queue=queues[mode], declare=[], producer=producer)
                answer = client.blpop("bench.starts", timeout=timeout)
                if answer is None:
                    raise SystemExit(f"{mode}: the task did not start in {timeout:.0f} s")
                told, started = answer[1].split()
                assert int(told) == number
                return (float(started) - sent[0]) * 1000

            for number in range(20):  # the first ones start connections, and meet pages that were never touched
                for mode in MODES:
                    once(mode, -number, 60)
            taken: dict[str, list[float]] = {mode: [] for mode in MODES}
            for number in range(samples):
                for mode in random.sample(MODES, 2):
                    time.sleep(random.uniform(0.01, 0.05))
                    taken[mode].append(once(mode, number, 10))
        for mode in MODES:
            medians[mode].append(statistics.median(taken[mode]))
            late[mode].append(statistics.quantiles(taken[mode], n=20)[-1])
    before_task_publish.disconnect(note)
    app.close()
    for mode in MODES:
        note_ = f"19 of 20 within {statistics.median(late[mode]):.2f} ms"
        table.add(f"{kind}: idle latency, {mode}", statistics.median(medians[mode]), "ms", note=note_)
    table.add(f"{kind}: idle latency", ratio(medians, "dlx", "stock"), "÷ stock", WANTED["latency"])


def throughput(url: str, messages: int, rounds: int, table: Table, kind: str) -> None:
    for name, task, pool in (
        ("prefork no-op", "ok", "prefork"),
        ("prefork raising", "fail", "prefork"),
        ("solo no-op", "ok", "solo"),
    ):
        reset(url)

        def measure(mode: str, task: str = task, pool: str = pool) -> float:
            return capture.run(url, mode, task, messages, False, pool)

        found = turns(rounds, MODES, measure, f"{kind} {name} in msg/s")
        note = ", ".join(f"{mode} {statistics.median(found[mode]):,.0f}/s" for mode in MODES)
        table.add(f"{kind}: {name}", ratio(found, "dlx", "stock"), "÷ stock", WANTED[name], note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=12_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=200, help="tasks whose latency is measured, by mode and round")
    parser.add_argument("--reserved", type=int, default=2_000, help="messages that a worker holds when it is killed")
    parser.add_argument("--load", type=int, default=20_000, help="messages executed while others are restored")
    parser.add_argument("--only", choices=["throughput", "latency", "restore", "memory"])
    parser.add_argument("--rabbitmq", action="store_true", help="on RabbitMQ too")
    options = parser.parse_args()
    table = Table()
    with ExitStack() as stack:
        stamps = stack.enter_context(private("redis")).url
        urls = {"redis": stamps}
        if options.rabbitmq:
            urls["rabbitmq"] = stack.enter_context(private("rabbitmq")).url
        for kind, url in urls.items():
            if options.only in (None, "throughput"):
                throughput(url, options.messages, options.rounds, table, kind)
            if options.only in (None, "latency"):
                latency(url, stamps, options.samples, options.rounds, table, kind)
            if options.only in (None, "restore") and kind == "redis":
                restore(url, options.reserved, options.rounds, options.load, table)
            if options.only in (None, "memory"):
                memory(url, 1_000, options.rounds, table, kind)
    table.print()


if __name__ == "__main__":
    main()
