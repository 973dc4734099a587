"""Storms over Redis servers that a Sentinel watches: the master is killed, and its replica takes over."""

from __future__ import annotations

from faults.storm import REDIS_OPTIONS, Storm
from raw import Sender
from watched import Watched

FAILOVER_FAULTS = ("failover", "kill", "failover_and_kill")


class FailoverStorm(Storm):
    """All that the master confirmed is with its replica when it dies: what Redis itself may lose is not our subject."""

    def __init__(self, watched: Watched, queue: str, seed: int, messages: int, faults: int, kinds=FAILOVER_FAULTS) -> None:
        super().__init__(watched, queue, seed, messages, faults, kinds, task_seconds=0.08)
        self.watched = watched

    def _as_workers_see_it(self) -> tuple[str, dict]:
        return self.broker.sentinel_url, {**REDIS_OPTIONS, **self.broker.options}

    def _failover(self, worker, kill: bool = False) -> None:
        self.watched.lose((lambda: self._kill(worker)) if kill else (lambda: None))
        self.dead.close()
        self.dead = self._reader()
        self._progress()  # with the new one alone
        self.watched.recover()

    def _failover_and_kill(self, worker) -> None:
        self._failover(worker, kill=True)

    def _settle(self) -> None:
        super()._settle()
        # Whoever is in charge is the one that workers consume from.
        Sender(self.broker.url).task(self.queue, "storm.work", [self.messages])
        super()._settle()
        assert self.messages in self._done(), "they go on with the last master"
