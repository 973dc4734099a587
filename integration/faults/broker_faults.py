"""Storms of the broker's own faults: it forgets its scripts, is full, becomes a replica, is killed, raises an alarm."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable

import redis
from faults.storm import KILLS, Storm
from raw import Sender
from servers import wait_for
from workers import Worker

BROKER_FAULTS = {
    "redis": ("script_flush", "full", "replica", "crash"),
    "rabbitmq": ("memory_alarm", "disk_alarm", "crash"),
}


class BrokerStorm(Storm):
    """A storm whose faults may be the broker's. ``kills``: in half of them a worker is killed, too, while they last."""

    def __init__(self, broker, queue: str, seed: int, messages: int, faults: int, kinds: tuple[str, ...] | None = None,
                 task_seconds: float = 0.04, kills: bool = False) -> None:  # fmt: skip
        assert hasattr(broker, "crash"), f"needs a broker of our own: unset DLX_TEST_{broker.kind.upper()}"
        super().__init__(broker, queue, seed, messages, faults, kinds or BROKER_FAULTS[broker.kind], task_seconds)
        self.kills = kills
        #: For what depends on the clock: the plan must not.
        self._whim = random.Random(seed)
        self._durable()

    def _durable(self) -> None:
        """What Redis confirmed is on disk."""
        if self.broker.kind == "redis":
            with self._client() as client:
                assert client.config_get("appendonly")["appendonly"] == "yes"
                client.config_set("appendfsync", "always")

    def _client(self) -> redis.Redis:
        return redis.Redis.from_url(self.broker.url)

    def _while(self, worker: Worker, seen: Callable[[], bool], what: str) -> None:
        """For one or two seconds, and until ``seen``: the fault is felt."""
        least = time.monotonic() + self._whim.uniform(1, 2)
        kill = self.kills and self._whim.random() < 0.5
        if kill:
            threading.Event().wait(self._whim.uniform(0, 1))
            getattr(self, f"_{self._whim.choice(KILLS)}")(worker)
            self.account.faults["killed_meanwhile"] += 1

        def over() -> bool:
            self._supervise()
            return seen() and time.monotonic() > least

        wait_for(over, what, timeout=60)

    # -- Redis

    def _script_flush(self, worker: Worker) -> None:
        with self._client() as client:
            before = _refused(client, "NOSCRIPT")
            assert client.info("memory")["number_of_cached_scripts"], "there are scripts to forget"
            client.script_flush()
            wait_for(lambda: _refused(client, "NOSCRIPT") > before, "a forgotten script was asked for")

    def _full(self, worker: Worker) -> None:
        """First at the edge, where some writes go and others do not; then for all."""
        with self._client() as client:
            before = _refused(client, "OOM")
            try:
                edge = time.monotonic() + self._whim.uniform(0.3, 1)
                while time.monotonic() < edge:
                    used = client.info("memory")["used_memory"]
                    client.config_set("maxmemory", used + self._whim.randrange(-4096, 4096))
                    threading.Event().wait(0.01)
                client.config_set("maxmemory", 1)
                self._while(worker, lambda: _refused(client, "OOM") > before, "a full server refused a write")
            finally:
                client.config_set("maxmemory", 0)

    def _replica(self, worker: Worker) -> None:
        """Of a master that is not there: its data stays, and it takes no writes."""
        with self._client() as client, socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            before = _refused(client, "READONLY")
            client.replicaof("127.0.0.1", closed.getsockname()[1])
            try:
                assert client.info("replication")["role"] == "slave"
                self._while(worker, lambda: _refused(client, "READONLY") > before, "a replica refused a write")
            finally:
                client.replicaof("NO", "ONE")
            assert client.info("replication")["role"] == "master"

    # -- RabbitMQ

    def _memory_alarm(self, worker: Worker) -> None:
        self._alarm(worker, "memory", ("set_vm_memory_high_watermark", "absolute", "1"),
                    ("set_vm_memory_high_watermark", "0.4"))  # fmt: skip

    def _disk_alarm(self, worker: Worker) -> None:
        self._alarm(worker, "disk space", ("set_disk_free_limit", "1000000GB"), ("set_disk_free_limit", "50MB"))

    def _alarm(self, worker: Worker, resource: str, on: tuple[str, ...], off: tuple[str, ...]) -> None:
        try:
            self.broker.ctl(*on)
            self._while(worker, lambda: resource in self.broker.alarms(), f"the node raised a {resource} alarm")
        finally:
            self.broker.ctl(*off)
        wait_for(lambda: not self.broker.alarms(), f"the {resource} alarm was over")

    # -- both

    def _crash(self, worker: Worker) -> None:
        before = self._run_id()
        self.broker.crash()
        self._while(worker, lambda: True, "")
        self.broker.run()
        assert self._run_id() != before, "it is another process"
        self._durable()

    def _run_id(self) -> str:
        if self.broker.kind == "redis":
            with self._client() as client:
                return str(client.info("server")["run_id"])
        return str(self.broker.process.pid)

    # -- what became of it

    def _settle(self) -> None:
        super()._settle()
        self._each_works()

    def _each_works(self) -> None:
        """No worker hangs for good: each one takes what is sent now."""
        before = [worker.runs.stat().st_size for worker in self.workers]
        sender, number = Sender(self.broker.url), self.messages

        def each() -> bool:
            nonlocal number
            self._supervise()
            if not self._waiting():
                for _ in range(8):
                    sender.task(self.queue, "storm.work", [number])
                    number += 1
            return all(worker.runs.stat().st_size > size for worker, size in zip(self.workers, before, strict=True))

        wait_for(each, lambda: f"each worker works: {[worker.output[-5000:] for worker in self.workers]}", 90, every=0.1)
        super()._settle()


def _refused(client: redis.Redis, code: str) -> int:
    """How often the server answered with this error."""
    return int(client.info("errorstats").get(f"errorstat_{code}", {}).get("count", 0))
