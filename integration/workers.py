"""Real worker processes, and what tests ask about them."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from celery import Celery
from raw import Sender
from servers import stop_process, wait_for

from celery_dlx import DeadLetters
from celery_dlx.policy.settings import Policy

HERE = Path(__file__).parent
#: Of all workers of this session.
BASE = tempfile.mkdtemp(prefix="dlx-tests-")
atexit.register(shutil.rmtree, BASE, ignore_errors=True)


def environment(broker: str, **more: str) -> dict[str, str]:
    """The environment a test's processes get: nothing of ours leaks in from outside."""
    base = {key: value for key, value in os.environ.items() if not key.startswith(("DLX_", "CELERY_"))}
    return {**base, "PYTHONPATH": str(HERE), "DLX_BROKER": broker, "PYTHONUNBUFFERED": "1", **more}


def unacknowledged(client, queue: str) -> list[bytes]:
    """What workers hold of a Redis queue and did not acknowledge; a server's other queues share the hash."""
    return [entry for entry in client.hvals("unacked") if queue.encode() in entry]


class Worker:
    """A `celery worker` on an app of this folder."""

    def __init__(
        self,
        broker: str,
        queues: list[str],
        *,
        app: str = "matrix_app",
        policy: str | None = None,
        arguments: tuple[str, ...] = ("-c", "2"),
        **env: str,
    ) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="worker-", dir=BASE))
        self.runs = self.home / "runs"
        self.runs.touch()
        self.log = self.home / "log"
        if policy is not None:
            (self.home / "policy.yaml").write_text(policy)
            env["CELERY_DLX_POLICY"] = str(self.home / "policy.yaml")
        self.env = environment(broker, DLX_RUNS=str(self.runs), CELERY_DLX_STATE=str(self.home / "state"), **env)
        self.app = app
        self.command = [sys.executable, "-m", "celery", "-A", app, "worker", "-l", "INFO"]
        self.command += ["--without-gossip", "--without-mingle", *arguments]
        if queues:
            self.command += ["-Q", ",".join(queues)]
        self.process: subprocess.Popen | None = None
        self._dead: DeadLetters | None = None

    def start(self, *, ready: bool = True) -> Worker:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        if ready:
            seen = self.output.count(" ready.")
            wait_for(
                lambda: self.output.count(" ready.") > seen or self.process.poll() is not None,
                lambda: f"worker ready; its log:\n{self.output[-3000:]}",
                timeout=90,
            )
            assert self.process.poll() is None, f"worker exited with {self.process.returncode}:\n{self.output[-4000:]}"
        return self

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def ran(self) -> list[str]:
        """What the tasks noted, in order."""
        return self.runs.read_text().splitlines()

    def wait_exit(self, timeout: float = 60) -> int:
        assert self.process is not None
        return self.process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL the parent and whatever children it has."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)

    def stop(self) -> int:
        assert self.process is not None
        stop_process(self.process, timeout=60)
        return self.process.returncode

    def __enter__(self) -> Worker:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        if self.alive:
            self.stop()
        if self._dead is not None:
            self._dead.close()

    def cli(self, *arguments: str, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess:
        """Run `celery -A app dlx …` with this worker's environment."""
        command = [sys.executable, "-m", "celery", "-A", self.app, "dlx", *arguments]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=120, input=stdin or "")
        if check and done.returncode:
            raise AssertionError(f"{' '.join(arguments)} exited with {done.returncode}: {done.stderr or done.stdout}")
        return done

    def json(self, *arguments: str) -> list[dict]:
        """The command's lines, read as JSON."""
        return [json.loads(line) for line in self.cli(*arguments, "--json").stdout.splitlines()]

    @property
    def dead(self) -> DeadLetters:
        """The worker's dead letters, read in this process: a command line takes a second to start."""
        if self._dead is None:
            app = Celery("reader", broker=self.env["DLX_BROKER"])
            app.conf.broker_transport_options = json.loads(self.env.get("DLX_TRANSPORT_OPTIONS", "{}"))
            self._dead = DeadLetters(app, policy=self.env.get("CELERY_DLX_POLICY") or Policy())
        return self._dead

    def letters(self, queue: str | None = None) -> list[dict]:
        """What `dlx list --json` prints."""
        return [json.loads(json.dumps(letter.as_dict())) for letter in self.dead.letters(queue)]

    def wait_letters(self, queue: str, count: int, timeout: float = 60) -> list[dict]:
        """Poll until a queue has that many letters: by their number, since reading while others come may reorder them."""
        found: list[dict] = []

        def enough() -> bool:
            if sum(row.letters for row in self.dead.stats(queue)) < count:
                return False
            found[:] = self.letters(queue)
            return len(found) >= count

        wait_for(enough, lambda: f"{count} letters of {queue}, found {found}\n{self.output[-3000:]}", timeout, every=0.1)
        return found


class Load:
    """Publishes tasks to queues in turn, with confirms, until it is stopped; keeps what clients saw go wrong."""

    def __init__(self, url: str, queues: list[str]) -> None:
        self.errors: list[str] = []
        self.sent = 0
        self._url, self._queues, self._over = url, queues, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            sender = Sender(self._url)
            while not self._over.is_set():
                sender.task(self._queues[self.sent % len(self._queues)], "matrix_app.ok", ["load"])
                self.sent += 1
        except Exception as exc:  # noqa: BLE001 - whatever a client sees is counted
            self.errors.append(repr(exc))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join(30)
