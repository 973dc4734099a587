"""Killed at each step of both roads: what a worker does with a death, what a tool does with a letter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter

import pytest
import redis
from faults.storm import REDIS_OPTIONS
from kombu import Connection
from raw import Sender
from servers import wait_for
from workers import Worker, unacknowledged

MESSAGES = 24
RABBITMQ, REDIS, CLAIMS = "brokers.rabbitmq", "brokers.redis", "brokers.redis.claims:Claims"
PIPELINE, READER = f"{RABBITMQ}.pipeline:ConfirmPipeline", f"{RABBITMQ}.reader:Reader"
CAPTURER, STORE = f"{RABBITMQ}.capture:RabbitMQCapturer", f"{REDIS}.store:LetterStore"
DELIVERIES, JOURNAL = f"{REDIS}.deliveries:Deliveries", "journal:Journal"

#: Of a worker whose tasks fail or succeed.
CAPTURE = {
    "rabbitmq": [
        f"before {CAPTURER}.capture", f"after {PIPELINE}.publish", f"after {PIPELINE}.write_some",
        f"before {PIPELINE}._finish", f"before {CAPTURER}.acknowledge", f"after {CAPTURER}.acknowledge",
    ],
    "redis": [
        f"after {CLAIMS}.start", f"before {CLAIMS}.read", f"after {CLAIMS}.read", f"before {STORE}.capture",
        f"after {STORE}.capture", f"before {DELIVERIES}.ack", f"after {DELIVERIES}.ack",
    ],
}  # fmt: skip
#: Of a worker that gets what another one held when it was killed; on RabbitMQ from a classic queue, which counts nothing.
RETURN = {
    "rabbitmq": [f"after {CAPTURER}.count_return", f"after {PIPELINE}.write_some", f"before {PIPELINE}._finish"],
    "redis": [f"before {DELIVERIES}.restore", f"after {DELIVERIES}.restore", f"after {DELIVERIES}.counts"],
}
_JOURNALED = [f"after {JOURNAL}.write={kind}" for kind in ("start", "selected", "sending", "edited", "state")]
_JOURNALED.append(f"after {JOURNAL}.note=select")
REPLAY = {
    "rabbitmq": [*_JOURNALED, f"after {PIPELINE}.write", f"before {PIPELINE}._finish", f"before {READER}.acknowledge",
                 f"after {READER}.acknowledge"],
    "redis": [*_JOURNALED, f"before {STORE}.replay", f"after {STORE}.replay", f"before {STORE}.begin_replay",
              f"after {STORE}.begin_replay", f"before {REDIS}.aside:Aside.close"],
}  # fmt: skip
RAW_MOVER = f"{REDIS}.raw:RawMover"
RAW = {
    "redis": [*(step for step in _JOURNALED if "=edited" not in step and "=state" not in step),
              f"after {JOURNAL}.note=state", f"after {RAW_MOVER}._args",
              f"before {REDIS}.aside:Aside.begin", f"after {REDIS}.aside:Aside.begin",
              f"before {RAW_MOVER}._settle", f"after {RAW_MOVER}._settle", f"before {RAW_MOVER}.close"],
}  # fmt: skip
LOOK = {
    "rabbitmq": [f"{moment} {READER}.{step}" for step in ("_consume", "_read_ahead", "stop", "_put_back")
                 for moment in ("before", "after")],
}  # fmt: skip
DISCARD = {
    "rabbitmq": [f"before {READER}.acknowledge", f"after {READER}.acknowledge"],
    "redis": [f"before {STORE}.discard", f"after {STORE}.discard"],
}
IMPORT = {
    "rabbitmq": [f"after {PIPELINE}.publish", f"after {PIPELINE}.write"],
    "redis": [f"before {STORE}.restore_letter", f"after {STORE}.restore_letter"],
}


def steps(found: dict[str, list[str]]):
    pairs = [(kind, step) for kind, all_of in found.items() for step in all_of]
    return pytest.mark.parametrize("server,step", pairs, indirect=["server"], ids=[f"{kind}-{step}" for kind, step in pairs])


@pytest.fixture
def server(request):
    return request.getfixturevalue("rabbitmq" if request.param == "rabbitmq" else "redis_server")


def policy(queue: str, **more: str) -> str:
    settings = {"acks_late": "true", "reject_on_worker_lost": "true", **more}
    return f"version: 1\nqueues: {{{queue}: {{{', '.join(f'{key}: {value}' for key, value in settings.items())}}}}}\n"


@pytest.fixture
def worker(server, queue, request, tmp_path):
    kind = "type: quorum" if "return" not in request.node.name else "max_deliveries: 20"
    options = REDIS_OPTIONS if server.kind == "redis" else {}
    text = policy(queue, **dict([kind.split(": ")])) if server.kind == "rabbitmq" else policy(queue)
    found = Worker(
        server.url, [queue], app="faults.step_app", policy=text, arguments=("-c", "2"), DLX_STORM_TASK="0.01",
        DLX_STORM_FIXED=str(tmp_path / "fixed"), DLX_TRANSPORT_OPTIONS=json.dumps(options),
        DLX_STEP_DONE=str(tmp_path / "done"),
    )  # fmt: skip
    yield found
    if found.alive:
        found.kill()
    if found._dead is not None:
        found._dead.close()


def waiting(server, queue: str) -> int:
    """Messages in a queue, or in somebody's hands."""
    if server.kind == "redis":
        with redis.Redis.from_url(server.url) as client:
            return int(client.llen(queue)) + len(unacknowledged(client, queue))
    with Connection(server.url) as connection:
        return connection.default_channel.queue_declare(queue, passive=True).message_count


def publish(server, queue: str, task: str) -> None:
    sender = Sender(server.url)
    for number in range(MESSAGES):
        sender.task(queue, "storm.bad" if number % 2 else task, [number])


def letters(worker: Worker, queue: str) -> Counter:
    return Counter(json.loads(letter.args)[0] for letter in worker.dead.letters(queue))


def die(worker: Worker, step: str) -> None:
    """Start it, and see that it is killed at that step."""
    worker.env["DLX_STEP"] = step
    worker.start(ready=False)
    assert worker.wait_exit(90) == -signal.SIGKILL, f"the fault happened:\n{worker.output[-3000:]}"
    try:
        os.killpg(worker.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    assert os.path.exists(worker.env["DLX_STEP_DONE"])
    del worker.env["DLX_STEP"]


def settled(worker: Worker, server, queue: str, good: set[int], bad: set[int]) -> None:
    """Each message is done or a letter; none is both, or neither."""

    def over() -> bool:
        done = {int(line) for line in worker.ran() if line}
        return waiting(server, queue) == 0 and done == good and set(letters(worker, queue)) == bad

    def found() -> str:
        done = {int(line) for line in worker.ran() if line}
        return (
            f"done {sorted(done)} letters {letters(worker, queue)} waiting {waiting(server, queue)} {worker.output[-3000:]}"
        )

    wait_for(over, found, 60, every=0.2)


BAD = {number for number in range(MESSAGES) if number % 2}
GOOD = set(range(MESSAGES)) - BAD


@steps(CAPTURE)
def test_a_worker_is_killed_at_a_step(server, queue, worker, step):
    if server.kind == "rabbitmq":
        worker.start().stop()  # the queue is declared
    publish(server, queue, "storm.work")
    die(worker, step)
    worker.start()
    settled(worker, server, queue, GOOD, BAD)


@steps(RETURN)
def test_a_worker_is_killed_at_a_step_of_what_came_back_to_it(server, queue, worker, step):
    worker.env["DLX_STORM_TASK"] = "30"
    worker.start()
    publish(server, queue, "storm.work")
    wait_for(lambda: "storm.work" in worker.output and letters(worker, queue), lambda: f"it works: {worker.output[-2000:]}")
    worker.kill()
    worker.env["DLX_STORM_TASK"] = "0.01"
    die(worker, step)
    worker.start()
    settled(worker, server, queue, GOOD, BAD)


def tool(worker: Worker, *arguments: str, step: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "celery", "-A", "faults.step_app", "dlx", *arguments]
    env = {**worker.env, "DLX_STEP": step}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    if step:
        assert done.returncode == -signal.SIGKILL, f"the fault happened: {done}"
        assert os.path.exists(worker.env["DLX_STEP_DONE"])
    return done


@pytest.fixture
def dead(worker, server, queue):
    """A worker, whose tasks are all letters."""
    worker.start()
    publish(server, queue, "storm.later")
    wait_for(lambda: len(letters(worker, queue)) == MESSAGES, lambda: worker.output[-3000:])
    return worker


@steps(REPLAY)
def test_a_replay_is_killed_at_a_step(server, queue, dead, step, tmp_path):
    (tmp_path / "fixed").touch()
    # What is edited is written by the tool.
    edit = ["--edit", '[{"op": "test", "path": "/kwargs", "value": {}}]'] if "edited" in step or ".replay" in step else []
    tool(dead, "replay", queue, "--all", "--yes", "--no-preflight", "--wait", "30s", *edit, step=step)
    (row,) = dead.json("history")
    whole = row["selected"] == MESSAGES and "=select" not in step
    again = ("--resume", row["replay"]) if whole else (queue, "--all", "--yes")
    done = tool(dead, "replay", *again, "--json")
    assert done.returncode == 0, done
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["left"], summary["stopped"]) == (0, None), summary
    settled(dead, server, queue, GOOD, BAD)


@steps(RAW)
def test_a_raw_replay_is_killed_at_a_step(server, queue, dead, step, tmp_path):
    (tmp_path / "fixed").touch()
    # In lots that are waited for, or all at once.
    pace = [] if "Aside" in step else ["--rate", "100/s"]
    tool(dead, "replay", queue, "--all", "--yes", "--raw", "--no-preflight", *pace, step=step)
    (row,) = dead.json("history")
    whole = row["selected"] == MESSAGES and "=select" not in step
    # What left and cannot be processed dies again, under the id it had, before the others are asked for.
    with redis.Redis.from_url(server.url) as client:
        left = int(client.hget(f"dlx:{{{queue}.dlq}}:stats", "replayed") or 0)
    wait_for(lambda: waiting(server, queue) == 0, lambda: dead.output[-3000:])
    again = ("--resume", row["replay"]) if whole else (queue, "--all", "--yes", "--raw")
    done = tool(dead, "replay", *again, "--json")
    assert done.returncode == 0, done
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["replayed"], summary["left"], summary["stopped"]) == (MESSAGES, 0, None), summary
    settled(dead, server, queue, GOOD, BAD)
    assert Counter(line for line in dead.ran() if line) == {str(number): 1 for number in GOOD}, "none ran twice"
    (stats,) = dead.json("stats", queue)
    assert (stats["replayed"], stats["captured"]) == (MESSAGES, MESSAGES + len(BAD)), (left, stats)


@steps(LOOK)
def test_looking_is_killed_at_a_step(server, queue, dead, step):
    before = [letter["id"] for letter in dead.letters(queue)]
    tool(dead, "groups", queue, step=step)
    place = {letter_id: number for number, letter_id in enumerate(before)}
    wait_for(
        lambda: [letter["id"] for letter in dead.letters(queue)] == before,
        lambda: [place.get(letter["id"]) for letter in dead.letters(queue)],
    )


@steps(DISCARD)
def test_discarding_is_killed_at_a_step(server, queue, dead, step):
    first = dead.letters(queue)[0]["id"]
    tool(dead, "discard", first, "--yes", step=step)
    wait_for(lambda: len(letters(dead, queue)) in (MESSAGES - 1, MESSAGES), lambda: letters(dead, queue))
    tool(dead, "discard", first, "--yes")
    wait_for(lambda: len(letters(dead, queue)) == MESSAGES - 1, lambda: letters(dead, queue))
    assert first not in [letter["id"] for letter in dead.letters(queue)]


@steps(IMPORT)
def test_an_import_is_killed_at_a_step(server, queue, dead, step, tmp_path):
    path = str(tmp_path / "letters.jsonl")
    assert tool(dead, "export", queue, path).returncode == 0
    before = {letter["id"] for letter in dead.letters(queue)}
    assert tool(dead, "purge", queue, "--yes").returncode == 0
    wait_for(lambda: not dead.letters(queue), "the DLQ is empty")
    tool(dead, "import", path, step=step)
    assert tool(dead, "import", path).returncode == 0
    wait_for(lambda: {letter["id"] for letter in dead.letters(queue)} == before, lambda: letters(dead, queue))
    assert sum(letters(dead, queue).values()) == MESSAGES, "none is there twice"
