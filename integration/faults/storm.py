"""Seeded storms: workers are killed, frozen and cut off while they work, and every message is accounted for."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import redis
from celery import Celery
from faults.proxy import Proxy
from kombu import Connection
from raw import Sender
from servers import wait_for
from workers import Worker

from celery_dlx import DeadLetters
from celery_dlx.policy.settings import Policy

#: A killed worker's messages come back after a second or two. kombu's lock over restoring outlives a worker that is killed
#: while it holds it, by five minutes if it is not told otherwise.
REDIS_OPTIONS = {
    "visibility_timeout": 2,
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
    "unacked_mutex_expire": 5,
}
KILLS = ("kill", "kill_parent", "kill_child")
FAULTS = (*KILLS, "freeze", "cut", "reset", "stall")


@dataclass
class Account:
    """What became of a storm's messages."""

    seed: int
    messages: int
    faults: Counter = field(default_factory=Counter)
    #: Neither done nor in a dead letter.
    lost: set[int] = field(default_factory=set)
    #: Healthy ones that were dead-lettered.
    wrong: set[int] = field(default_factory=set)
    #: Executions and letters beyond the first of a message.
    duplicates: int = 0
    #: Faults that came when all was done.
    idle: int = 0
    #: Workers that ended by themselves.
    ended: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict:
        return {
            "seed": self.seed,
            "messages": self.messages,
            "faults": dict(self.faults),
            "lost": len(self.lost),
            "wrong": len(self.wrong),
            "duplicates": self.duplicates,
            "idle": self.idle,
            "ended": self.ended,
            "seconds": round(self.seconds, 1),
        }


class Storm:
    """``faults`` faults of ``kinds`` over two workers that share one queue, of tasks that take ``task_seconds``."""

    #: More of the queue's settings.
    extra = ""

    def __init__(self, broker, queue: str, seed: int, messages: int, faults: int, kinds: tuple[str, ...] = FAULTS,
                 task_seconds: float = 0.04) -> None:  # fmt: skip
        self.random = random.Random(seed)
        self.broker, self.queue, self.messages = broker, queue, messages
        self.account = Account(seed, messages)
        self._bad = {number for number in range(messages) if number % 10 == 0}
        self.plan = [kinds[n % len(kinds)] for n in range(faults)]
        self.random.shuffle(self.plan)
        base, rest = broker.url.rsplit(":", 1)
        port, path = rest.split("/", 1)
        self.proxy = Proxy(int(port))
        self._through = f"{base}:{self.proxy.port}/{path}"
        settings = f"{self.extra}acks_late: true, reject_on_worker_lost: true, max_deliveries: 50"
        policy = f"version: 1\nqueues: {{{queue}: {{{settings}}}}}\n"
        self.dead = self._reader()
        address, options = self._as_workers_see_it()
        self.workers = [
            Worker(address, [queue], app="faults.storm_app", policy=policy, DLX_TRANSPORT_OPTIONS=json.dumps(options),
                   DLX_STORM_TASK=str(task_seconds),
                   arguments=("-c", "2", "-n", f"storm{n}@%h"))
            for n in range(2)
        ]  # fmt: skip

    def _as_workers_see_it(self) -> tuple[str, dict]:
        """The broker's URL, and transport options."""
        return self._through, REDIS_OPTIONS if self.broker.kind == "redis" else {}

    def _reader(self) -> DeadLetters:
        """Past the proxy."""
        return DeadLetters(Celery("reader", broker=self.broker.url, set_as_current=False), policy=Policy())

    # -- what happens

    def run(self) -> Account:
        began = time.monotonic()
        try:
            self.workers[0].start()  # it declares the queue
            self.workers[0].stop()
            self._publish()
            for worker in self.workers:
                worker.start()
            self._begin()
            for fault in self.plan:
                self._progress()
                self.account.idle += not self._busy()
                getattr(self, f"_{fault}")(self.random.choice(self.workers))
                self.account.faults[fault] += 1
            self._settle()
        finally:
            self.proxy.flow()
            for worker in self.workers:
                if worker.alive:
                    worker.stop()
            self.proxy.close()
        self._judge()
        self.dead.close()
        self.account.seconds = time.monotonic() - began
        return self.account

    def _publish(self) -> None:
        sender = Sender(self.broker.url)
        for number in range(self.messages):
            sender.task(self.queue, self.task_of(number), [number])

    @staticmethod
    def task_of(number: int) -> str:
        return "storm.bad" if number % 10 == 0 else "storm.work"

    def _begin(self) -> None:
        """Before the first fault."""

    def _progress(self) -> None:
        """Until something was done since the last fault, and a little longer, so that faults fall anywhere."""
        before, wanted = self._executions(), self.random.randrange(1, 100)
        deadline = time.monotonic() + 120
        while self._executions() < before + wanted and self._busy():
            self._supervise()
            assert time.monotonic() < deadline, f"no progress in 120s:\n{self.workers[0].output[-30000:]}"
            time.sleep(0.02)
        threading.Event().wait(self.random.uniform(0, 0.02))

    def _supervise(self) -> None:
        """A worker that ended by itself is started again, as it would be in production; nothing may be lost by that."""
        for worker in self.workers:
            if not worker.alive:
                self.account.ended += 1
                print(f"a worker ended by itself:\n{worker.output[-1500:]}")  # pytest shows it if the test fails
                worker.start(ready=False)

    def _busy(self) -> bool:
        return len(self._done()) < self.messages - len(self._bad)

    def _executions(self) -> int:
        return sum(worker.runs.stat().st_size for worker in self.workers)

    def _done(self) -> Counter:
        return Counter(int(line) for worker in self.workers for line in worker.ran() if line)

    def _kill(self, worker: Worker) -> None:
        worker.kill()
        worker.start(ready=False)

    def _kill_parent(self, worker: Worker) -> None:
        """Its children go on for a moment with what they have."""
        worker.process.kill()
        worker.process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.start(ready=False)

    def _kill_child(self, worker: Worker) -> None:

        def found() -> list[int]:
            self._supervise()  # the worker itself may have ended
            return _children(worker.process.pid)

        children = wait_for(found, "a child to kill", timeout=60)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.random.choice(children), signal.SIGKILL)

    def _freeze(self, worker: Worker) -> None:
        """For longer than its messages are left to it."""
        group = worker.process.pid
        os.killpg(group, signal.SIGSTOP)
        threading.Event().wait(self.random.uniform(0.1, REDIS_OPTIONS["visibility_timeout"] + 2))
        os.killpg(group, signal.SIGCONT)

    def _cut(self, worker: Worker) -> None:
        self.proxy.cut()

    def _reset(self, worker: Worker) -> None:
        self.proxy.cut(reset=True)

    def _stall(self, worker: Worker) -> None:
        """Nothing arrives for a while, and then the connections break with what was under way."""
        self.proxy.stall()
        threading.Event().wait(self.random.uniform(0.1, REDIS_OPTIONS["visibility_timeout"] + 1))
        self.proxy.cut(reset=True)
        self.proxy.flow()

    # -- what became of it

    def _letters(self) -> Counter:
        return Counter(json.loads(letter.args)[0] for letter in self.dead.letters(self.queue))

    def _count_letters(self) -> int:
        (row,) = self.dead.stats(self.queue)
        return int(row.letters)

    def _waiting(self) -> int:
        if self.broker.kind == "redis":
            with redis.Redis.from_url(self.broker.url) as client:
                return int(client.llen(self.queue)) + sum(self.queue.encode() in entry for entry in client.hvals("unacked"))
        with Connection(self.broker.url) as connection:
            return connection.default_channel.queue_declare(self.queue, passive=True).message_count

    def _stuck(self) -> object:
        """For whoever must find out why."""
        logs = [worker.output[-3000:] for worker in self.workers]
        if self.broker.kind != "redis":
            return logs
        with redis.Redis.from_url(self.broker.url) as client:
            now = client.time()[0]
            held = {tag: now - (client.zscore("unacked_index", tag) or 0) for tag in client.hkeys("unacked")}
            return held, client.keys("*"), [each["cmd"] for each in client.client_list()], *logs

    def _settle(self) -> None:
        """Until nothing is left to do; then a lost message shows as one that is nowhere."""

        def over() -> bool:
            self._supervise()
            return not self._waiting() and self._quiet()

        wait_for(over, lambda: f"{self._waiting()} messages still wait: {self._stuck()}", 180, every=0.5)

    def _quiet(self) -> bool:
        """Nothing was executed or dead-lettered for longer than anything may stay unseen: a letter that waits for a
        connection, for five seconds.
        """
        before, deadline = (self._executions(), self._count_letters()), time.monotonic() + 6
        while time.monotonic() < deadline:
            if self._waiting() or (self._executions(), self._count_letters()) != before:
                return False
            time.sleep(0.2)
        return True

    def _judge(self) -> None:
        done, letters = self._done(), self._letters()
        assert not set(done) & self._bad, "a failing task wrote that it was done"
        self.account.lost = set(range(self.messages)) - set(done) - set(letters)
        self.account.wrong = set(letters) - self._bad
        self.account.duplicates = sum(done.values()) - len(done) + sum(letters.values()) - len(letters)


def _children(parent: int) -> list[int]:
    try:
        with open(f"/proc/{parent}/task/{parent}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []
