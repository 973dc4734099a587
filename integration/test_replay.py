"""The on-call engineer's hour: groups, canaries, pace, stopping, going on, and what became of each letter."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from raw import Sender
from servers import wait_for
from workers import Worker

from celery_dlx.journal import QueueLocks


@pytest.fixture
def fixed(tmp_path):
    """A file; once it exists, `fail_until` succeeds."""
    return tmp_path / "fixed"


@pytest.fixture
def worker(broker, queue):
    with Worker(
        broker.url, [queue], policy=f"version: 1\nqueues: {{{queue}: {{acks_late: true}}}}\n", DLX_PREFETCH="32"
    ) as it:
        yield it


def kill(sender: Sender, queue: str, fixed, count: int) -> None:
    """Three causes of death; ``count`` letters of the first."""
    for number in range(count):
        sender.task(queue, "matrix_app.fail_until", [str(fixed), f"{number}"])
    for number in range(5):
        sender.task(queue, "matrix_app.fail", [f"{number}", f"order {number} at 0x7f{number}"])
    for _ in range(3):
        sender.task(queue, "matrix_app.no_such_task")


def replay(worker: Worker, *arguments: str, expect: int | None = None) -> dict:
    done = worker.cli("replay", *arguments, "--json", check=False)
    assert "Traceback" not in done.stderr, done.stderr
    if expect is not None:
        assert done.returncode == expect, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def of(worker: Worker, queue: str) -> dict:
    return {group["task"]: group for group in worker.json("groups", queue)}


def test_the_hour(worker, broker, queue, fixed):
    kill(Sender(broker.url), queue, fixed, 40)
    worker.wait_letters(queue, 48)
    groups = worker.json("groups", queue)
    assert [(group["task"], group["count"]) for group in groups] == [
        ("matrix_app.fail_until", 40), ("matrix_app.fail", 5), ("matrix_app.no_such_task", 3),
    ]  # fmt: skip
    first = groups[0]
    assert (first["reason"], first["exception"]) == ("failure", "builtins.ValueError")
    assert first["first_seen"] <= first["last_seen"]
    assert len(first["example"]) == 32

    # Not fixed: it stops after the canaries.
    stopped = replay(worker, queue, "--group", first["fingerprint"], "--canary", "4", "--yes", "--wait", "60s", expect=1)
    assert (stopped["selected"], stopped["replayed"], stopped["left"]) == (40, 4, 36)
    assert stopped["failed_again"] >= 1
    assert "canary" in stopped["stopped"] or "came back" in stopped["stopped"]
    wait_for(lambda: of(worker, queue)["matrix_app.fail_until"]["count"] == 40, lambda: f"{of(worker, queue)}")

    # Fixed: the same replay goes on with new canaries, and drains what it had selected.
    fixed.touch()
    done = replay(worker, "--resume", stopped["replay"], "--wait", "60s", expect=0)
    assert (done["selected"], done["replayed"], done["left"], done["stopped"]) == (40, 40, 0, None)
    assert (done["succeeded"], done["failed_again"]) == (36, 4)
    rest = replay(worker, queue, "--group", first["fingerprint"], "--canary", "2", "--yes", "--wait", "60s", expect=0)
    assert (rest["selected"], rest["succeeded"], rest["stopped"]) == (4, 4, None)
    assert set(of(worker, queue)) == {"matrix_app.fail", "matrix_app.no_such_task"}

    first, second = worker.json("history")
    assert (first["replay"], second["replay"]) == (stopped["replay"], rest["replay"])
    assert first["succeeded"] == 36
    assert first["by"]
    assert "fingerprint" in first["selection"]
    assert first["started"] < second["started"]
    outcomes = Counter(line["outcome"] for line in worker.json("history", stopped["replay"]))
    assert outcomes == {"succeeded": 36, "failed_the_same": 4}


def test_killed_again_and_again(worker, broker, queue, fixed):
    """SIGKILL at random moments; in the end every message was executed, and is in no DLQ. Duplicates are counted."""
    fixed_path, count = fixed, 400
    sender = Sender(broker.url)
    for number in range(count):
        sender.task(queue, "matrix_app.fail_until", [str(fixed_path), f"{number}"])
    worker.wait_letters(queue, count, timeout=120)
    fixed.touch()
    before = len(worker.ran())
    command = [sys.executable, "-m", "celery", "-A", "matrix_app", "dlx", "replay", "--json", "--rate", "40/s"]
    chosen = [queue, "--all", "--yes"]
    killed, seed = 0, random.Random(7)
    for _ in range(10):
        process = subprocess.Popen(
            [*command, *chosen], env=worker.env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for _ in range(seed.randrange(5, 35)):
            if not process.stdout.readline():
                break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        (journal,) = [row for row in worker.json("history") if row["stopped"] == "killed"] or [None]
        assert journal is not None, "the fault happened"
        chosen = ["--resume", journal["replay"]]
        command = command[:8]
    assert killed == 10
    done = replay(worker, *chosen, expect=0)
    assert (done["selected"], done["left"], done["stopped"]) == (count, 0, None)
    assert worker.letters(queue) == []
    expected = {f"fail_until {number}" for number in range(count)}
    wait_for(lambda: set(worker.ran()[before:]) == expected, "every message was executed", timeout=90)
    duplicates = sum(Counter(worker.ran()[before:]).values()) - count
    assert duplicates <= 10 * 2000, "one window per kill at most"
    assert done["succeeded"] + done["waiting"] == count


def test_rate_and_another_queue(broker, queue):
    with Worker(broker.url, [queue], policy="version: 1\n") as worker:
        for number in range(30):
            Sender(broker.url).task(queue, "matrix_app.fail", [number])
        worker.wait_letters(queue, 30)
    other = f"{queue}.other"
    helper = Worker(broker.url, [other], policy="version: 1\n")
    helper.env["CELERY_DLX_STATE"] = worker.env["CELERY_DLX_STATE"]
    with helper:
        start = time.monotonic()
        done = replay(worker, queue, "--all", "--yes", "--rate", "10/s", "--to", other)
        assert time.monotonic() - start >= 2.8, "thirty letters at ten per second"
        assert done["replayed"] == 30
        wait_for(lambda: len(helper.ran()) == 30, helper.ran)
        wait_for(lambda: len(helper.letters(other)) == 30, "they failed again, where they were sent")
    assert worker.letters(queue) == []


def test_two_at_once_are_refused(worker, broker, queue):
    Sender(broker.url).task(queue, "matrix_app.fail")
    worker.wait_letters(queue, 1)
    os.environ["CELERY_DLX_STATE"] = worker.env["CELERY_DLX_STATE"]
    try:
        locks = QueueLocks(worker.dead.broker_name, [queue], "somebody")
    finally:
        del os.environ["CELERY_DLX_STATE"]
    done = worker.cli("replay", queue, "--all", "--yes", check=False)
    assert done.returncode == 2
    assert "is being replayed already, by replay somebody" in done.stderr
    locks.release()
    assert replay(worker, queue, "--all", "--yes", expect=0)["replayed"] == 1


def test_nobody_listens(broker, queue):
    """Without a worker of ours it says what it does not know."""
    worker = Worker(broker.url, [queue], policy="version: 1\n")
    with worker:
        Sender(broker.url).task(queue, "matrix_app.fail")
        worker.wait_letters(queue, 1)
    done = replay(worker, queue, "--all", "--yes", "--wait", "1", expect=0)
    assert (done["replayed"], done["waiting"], done["succeeded"]) == (1, 1, 0)


def test_ctrl_c_finishes_what_was_begun(worker, broker, queue):
    for number in range(60):
        Sender(broker.url).task(queue, "matrix_app.fail", [number])
    worker.wait_letters(queue, 60)
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "matrix_app",
        "dlx",
        "replay",
        queue,
        "--all",
        "--yes",
        "--json",
        "--rate",
        "5",
    ]
    process = subprocess.Popen(command, env=worker.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(5):
        assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    done = json.loads(out.splitlines()[-1])
    assert done["stopped"] == "interrupted"
    assert 5 <= done["replayed"] < 60
    assert done["replayed"] + done["left"] == 60
    assert re.search(r"--resume [0-9a-f]{12}", err)


def test_bad_calls(worker, queue):
    for arguments in (["--resume", "nonsense"], ["--resume", "abc", queue], [queue, "--all", "--yes", "--rate", "fast"],
                      [queue, "--all", "--yes", "--wait", "soon"]):  # fmt: skip
        done = worker.cli("replay", *arguments, check=False)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
    nothing = replay(worker, queue, "--all", "--yes", expect=0)
    assert (nothing["selected"], nothing["stopped"]) == (0, None)


@pytest.mark.parametrize("pool", ["solo", "threads", "gevent"])
def test_outcomes_are_reported_from_every_pool(broker, queue, pool):
    arguments = ("-c", "1" if pool == "solo" else "4", "-P", pool)
    with Worker(broker.url, [queue], policy="version: 1\n", arguments=arguments) as worker:
        sender = Sender(broker.url)
        sender.task(queue, "matrix_app.ok", expires="2020-01-01T00:00:00+00:00")
        sender.task(queue, "matrix_app.fail")
        worker.wait_letters(queue, 2)
        done = replay(worker, queue, "--all", "--yes", "--wait", "60", expect=0)
        assert (done["succeeded"], done["failed_again"], done["waiting"]) == (1, 1, 0)


def test_a_replayed_task_that_retries_is_heard_of_in_the_end(worker, broker, queue):
    sender = Sender(broker.url)
    sender.task(queue, "matrix_app.succeeds_at_second_try", expires="2020-01-01T00:00:00+00:00")
    worker.wait_letters(queue, 1)
    done = replay(worker, queue, "--all", "--yes", "--wait", "60", expect=0)
    assert (done["succeeded"], done["waiting"]) == (1, 0)


def test_monitors_hear_of_deaths(broker, queue):
    from celery import Celery

    events = []
    with Worker(broker.url, [queue], policy="version: 1\n", arguments=("-c", "1", "-E")) as worker:
        app = Celery("monitor", broker=broker.url)
        with app.connection_for_read() as connection:
            receiver = app.events.Receiver(connection, handlers={"task-dead-lettered": events.append})
            with receiver.consumer_context() as (live, _, _):

                def heard() -> bool:
                    try:
                        live.drain_events(timeout=0.2)
                    except (TimeoutError, OSError):
                        pass
                    return bool(events)

                heard()  # Redis is asked for events with the first look, and keeps none that came before
                task_id = Sender(broker.url).task(queue, "matrix_app.fail")
                wait_for(heard, "the event")
    assert (events[0]["uuid"], events[0]["queue"], events[0]["reason"]) == (task_id, queue, "failure")
    assert worker.letters(queue)[0]["id"] == events[0]["letter"]
