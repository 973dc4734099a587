"""Storms over a replay: the tool that replays is killed and resumed, and so are the workers that execute what comes back."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

from faults.storm import KILLS, Storm
from raw import Sender
from servers import wait_for
from workers import Worker

REPLAY_FAULTS = ("kill_tool", *KILLS)


class ReplayStorm(Storm):
    """All tasks fail until a file appears; then all letters are replayed. A tenth fails for ever, and is a letter again."""

    def __init__(self, broker, queue: str, seed: int, messages: int, faults: int, kinds: tuple[str, ...] = REPLAY_FAULTS,
                 task_seconds: float = 0.02, rate: str = "20/s") -> None:  # fmt: skip
        super().__init__(broker, queue, seed, messages, faults, kinds, task_seconds)
        self.fixed = self.workers[0].home / "fixed"
        for worker in self.workers:
            worker.env["DLX_STORM_FIXED"] = str(self.fixed)
        self.rate = rate
        self.tool: subprocess.Popen | None = None
        self._out = self.workers[0].home / "tool"
        #: Letters that left, by what the tool printed.
        self.told = 0

    def _publish(self) -> None:
        sender = Sender(self.broker.url)
        for number in range(self.messages):
            sender.task(self.queue, "storm.bad" if number in self._bad else "storm.later", [number])

    def _begin(self) -> None:
        wait_for(lambda: self._count_letters() == self.messages, lambda: f"letters: {self._count_letters()}", 120, every=0.5)
        assert not self._done()
        self.fixed.touch()
        self._start_tool()

    # -- the tool

    def _start_tool(self) -> None:
        """Where it was killed it goes on; where nothing had left, it begins."""
        arguments = (self.queue, "--all", "--yes") if (name := self._resumable()) is None else ("--resume", name)
        command = [sys.executable, "-m", "celery", "-A", "faults.storm_app", "dlx", "replay", *arguments, "--json"]
        command += ["--rate", self.rate]
        with open(self._out, "wb") as out:
            self.tool = subprocess.Popen(command, env=self.workers[0].env, stdout=out, stderr=out, start_new_session=True)

    def _resumable(self) -> str | None:
        rows = self.workers[0].json("history") if self.tool is not None else []
        open_rows = [row for row in rows if row["left"] or row["stopped"]]
        # Killed while it selected: nothing had left, and it says so when it is resumed.
        return open_rows[-1]["replay"] if open_rows and open_rows[-1]["selected"] == self.messages else None

    def _lines(self) -> list[str]:
        return self._out.read_text(errors="replace").splitlines()

    def _kill_tool(self, worker: Worker) -> None:
        """At a random letter of this run."""
        assert self.tool is not None
        wanted, tool = self.random.randrange(1, 30), self.tool
        wait_for(lambda: len(self._lines()) >= wanted or tool.poll() is not None, lambda: self._lines()[-20:], 60)
        tool.send_signal(signal.SIGKILL)
        tool.wait(20)
        if tool.returncode != -signal.SIGKILL:
            self.account.idle += 1
            return
        self._tell()
        self._start_tool()

    def _tell(self) -> None:
        self.told += sum('"changes"' in line for line in self._lines())

    def _settle(self) -> None:
        """The tool comes to its end, after which nothing is left to be replayed."""
        assert self.tool is not None
        tool = self.tool

        def over() -> bool:
            self._supervise()
            return tool.poll() is not None

        wait_for(over, lambda: self._lines()[-20:], 180, every=0.2)
        self._tell()
        summary = json.loads(next(line for line in reversed(self._lines()) if line.startswith('{"replay"')))
        assert tool.returncode == 0, self._lines()[-20:]
        assert (summary["selected"], summary["left"], summary["stopped"]) == (self.messages, 0, None), summary
        super()._settle()

    def run(self):
        try:
            return super().run()
        finally:
            if self.tool is not None and self.tool.poll() is None:
                self.tool.kill()
                self.tool.wait(20)
