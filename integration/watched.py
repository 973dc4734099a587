"""A Redis master, its replica, and a Sentinel that watches them."""

from __future__ import annotations

import json
from collections.abc import Callable

import redis
from servers import Redis, Sentinel, wait_for


class Watched:
    """``url`` is the master's own, whoever that is; applications ask the Sentinel (``sentinel_url`` and ``options``)."""

    kind = "redis"

    def __init__(self) -> None:
        self.master = Redis("--repl-diskless-sync-delay", "0")
        self.replica = Redis("--replicaof", "127.0.0.1", str(self.master.port))
        self.sentinel = Sentinel(self.master)

    @property
    def url(self) -> str:
        return self.master.url

    @property
    def sentinel_url(self) -> str:
        return f"sentinel://127.0.0.1:{self.sentinel.port}/0"

    @property
    def options(self) -> dict[str, str]:
        return {"master_name": self.sentinel.name}

    @property
    def options_json(self) -> str:
        return json.dumps(self.options)

    def start(self) -> Watched:
        self.master.start()
        self.replica.start()
        self._follows()
        self.sentinel.start()
        wait_for(lambda: self.sentinel.replicas() == [self.replica.port], "the sentinel knows the replica")
        return self

    def _follows(self) -> None:
        with redis.Redis.from_url(self.replica.url) as client:
            wait_for(lambda: client.info("replication")["master_link_status"] == "up", "the replica follows")

    def lose(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Kill the master when all that it confirmed is with the replica, and wait for that one to take over.

        ``meanwhile``: called when nobody is in charge.
        """
        old, new = self.master, self.replica
        with redis.Redis.from_url(old.url) as first, redis.Redis.from_url(new.url) as second:
            first.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")
            offset = first.info("replication")["master_repl_offset"]
            wait_for(lambda: second.info("replication")["slave_repl_offset"] >= offset, "the replica has it all")
            old.crash()
            meanwhile()
            wait_for(lambda: self.sentinel.master() == new.port, "the sentinel names another master")
            wait_for(lambda: second.info("replication")["role"] == "master", "that is what it is")
        self.master, self.replica = new, old

    def recover(self) -> None:
        """The one that was lost comes back, as the replica."""
        self.replica.arguments = ("--replicaof", "127.0.0.1", str(self.master.port))
        self.replica.run()
        self._follows()
        wait_for(lambda: self.sentinel.replicas() == [self.replica.port], "the sentinel knows the replica")

    def stop(self) -> None:
        for server in (self.sentinel, self.replica, self.master):
            server.stop()
