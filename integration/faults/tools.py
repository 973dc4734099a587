"""The commands of `celery dlx`, run in this process, so that thousands of calls are affordable."""

from __future__ import annotations

import signal
import traceback
from collections import Counter
from types import SimpleNamespace

from celery import Celery
from click.testing import CliRunner

from celery_dlx import DeadLetters
from celery_dlx.cli import dlx
from celery_dlx.policy.loader import parse_policy

#: A command that takes longer hangs, in seconds.
PATIENCE = 120


class HangError(BaseException):
    """Not an `Exception`: nothing on the way may swallow it."""


class Tools:
    """Runs commands against one broker; what a command must never do is in ``faults``, each kind once."""

    def __init__(self, url: str, policy: str) -> None:
        self.app = Celery("fuzz-tools", broker=url)
        self.app.conf.task_ignore_result = True
        self.dead = DeadLetters(self.app, policy=parse_policy(policy, "fuzz.yaml"))
        self.exits: Counter[int] = Counter()
        self.faults: dict[str, str] = {}

    def close(self) -> None:
        self.dead.close()

    def run(self, *arguments: str) -> str:
        """Run a command; returns what it wrote."""
        before = signal.signal(signal.SIGALRM, _hang)
        signal.alarm(PATIENCE)
        try:
            done = CliRunner().invoke(dlx, list(arguments), obj=SimpleNamespace(app=self.app))
        except HangError:
            self._fault(arguments, f"hangs: no end within {PATIENCE}s", traceback.format_exc())
            return ""
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        self.exits[done.exit_code] += 1
        text = "" if done.exc_info is None else "".join(traceback.format_exception(*done.exc_info))
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            self._fault(arguments, f"{type(done.exception).__name__} at {_place(done.exc_info[2])}", text)
            self.close()  # what state it left the connection in is not this test's matter
        elif done.exit_code not in (0, 1, 2):
            self._fault(arguments, f"exit {done.exit_code}: {done.output[-200:]}", text)
        return done.output

    def _fault(self, arguments: tuple[str, ...], what: str, text: str) -> None:
        self.faults.setdefault(f"{arguments[0]}{' --json' * ('--json' in arguments)}: {what}", text)

    def all_of(self, queue: str, ids: list[str], folder: str) -> None:
        """Every command that reads, over every letter of a queue; then away with all, and back again."""
        for command in (
            ["list", queue],
            ["list"],
            ["groups", queue],
            ["stats"],
            ["stats", queue],
            ["list", queue, "--newest"],
        ):
            self.run(*command)
            self.run(*command, "--json")
        for selected in (["--arg", "0=k1"], ["--where", "kwargs.a > 1"], ["--text", "x"], ["--task", "fuzz.*"],
        ["--worker", "*"],
                         ["--exception", "Value*"], ["--since", "1h"], ["--root-id", "x"], ["--group", "1-0"]):  # fmt: skip
            self.run("list", queue, *selected, "--json")
        for letter_id in ids:
            # Ids that look like options are no ids.
            self.run("show", "--queue", queue, "--", letter_id)
            self.run("show", "--queue", queue, "--json", "--", letter_id)
        path = f"{folder}/letters.jsonl"
        self.run("export", queue, path)
        self.run("discard", queue, "--all", "--dry-run")
        self.run("discard", queue, "--all", "--yes", "--json")
        self.run("import", path)
        self.run("import", path, "--json")
        self.run("list", queue, "--json")


def _hang(number: int, frame: object) -> None:
    raise HangError


def _place(trace: object) -> str:
    """The innermost line of ours."""
    frames = [frame for frame in traceback.extract_tb(trace) if "celery_dlx" in frame.filename]
    return f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else "?"
