"""How long Redis did nothing else: its slow log."""

from __future__ import annotations

import statistics
import time

import redis


class SlowLog:
    """The longest command of all phases, and the one that one in a thousand exceeds: the machine holds up some of them."""

    def __init__(self, client: redis.Redis) -> None:
        self.client, self.longest, self.what = client, 0, "none above 1 ms"
        self.slow: list[int] = []
        client.config_set("slowlog-log-slower-than", 1000)
        client.config_set("slowlog-max-len", 100_000)
        client.slowlog_reset()

    def read(self, phase: str) -> None:
        for entry in self.client.slowlog_get(100_000):
            command = entry["command"].split()[0].decode()
            if command in ("SLOWLOG", "CONFIG"):
                continue
            self.slow.append(entry["duration"])
            if entry["duration"] > self.longest:
                self.longest, self.what = entry["duration"], f"{command}, in {phase}"
        self.client.slowlog_reset()

    def one_in(self, many: int) -> float:
        """Milliseconds that one in so many scripts takes at least; nearly all commands are scripts."""
        scripts = self.client.info("commandstats")["cmdstat_evalsha"]["calls"]
        return sorted([*self.slow, *[0] * scripts], reverse=True)[scripts // many] / 1000

    def counting(self) -> tuple[float, float]:
        """Milliseconds of the median and of the longest of scripts that touch nothing, while Redis rewrites its append-only
        file (five seconds at least): what the machine makes of a command of about a millisecond."""
        count = "local n = 0 for i = 1, 300000 do n = n + i end return n"
        self.client.slowlog_reset()
        self.client.config_set("slowlog-log-slower-than", 0)
        self.client.bgrewriteaof()
        found: list[int] = []
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline or self.client.info("persistence")["aof_rewrite_in_progress"]:
            for _ in range(50):
                self.client.eval(count, 0)  # not by its hash: `one_in` counts those that are
            found += [each["duration"] for each in self.client.slowlog_get(1_000) if each["command"].startswith(b"EVAL ")]
            self.client.slowlog_reset()
        self.client.config_set("slowlog-log-slower-than", 1000)
        return statistics.median(found) / 1000, max(found) / 1000
