"""Storms of a Redis server whose clock jumps."""

from __future__ import annotations

import redis
from faults.storm import Storm

CLOCK_FAULTS = ("clock_forward", "kill", "clock_back", "freeze")
HOUR = 3_600
#: All that depends on the server's clock is how old it says that something is: the same as if the clock had jumped.
_JUMP = """
local held = redis.call('ZRANGE', KEYS[1], 0, -1)
for _, tag in ipairs(held) do redis.call('ZINCRBY', KEYS[1], 0 - ARGV[1], tag) end
return #held
"""


class ClockStorm(Storm):
    """It is set forward by an hour, and back, and workers that hold messages then are killed."""

    def __init__(self, broker, queue: str, seed: int, messages: int, faults: int) -> None:
        super().__init__(broker, queue, seed, messages, faults, CLOCK_FAULTS)
        self.plan = [CLOCK_FAULTS[n % len(CLOCK_FAULTS)] for n in range(faults)]

    def _jump(self, seconds: int) -> None:
        with redis.Redis.from_url(self.broker.url) as client:
            assert client.eval(_JUMP, 1, "unacked_index", seconds), "messages were held when the clock jumped"

    def _clock_forward(self, worker) -> None:
        self._jump(HOUR)

    def _clock_back(self, worker) -> None:
        """And who holds messages is killed before it gives them a new age."""
        self._jump(-HOUR)
        self._kill(worker)
