"""Settings per queue, and everything of Celery's that must keep working beside them."""

from __future__ import annotations

import textwrap
from uuid import uuid4

import pytest
from raw import Sender
from servers import wait_for
from workers import Worker


@pytest.fixture
def pair(broker):
    """Two queues of one worker with different settings for the same tasks."""
    run = uuid4().hex[:6]
    one, two = f"{run}.one", f"{run}.two"
    policy = f"""
    version: 1
    defaults: {{max_deliveries: 2}}
    queues:
      {one}: {{acks_late: true, reject_on_worker_lost: true, time_limit: 9s}}
      {two}: {{acks_late: false, soft_time_limit: 1s, time_limit: 20s}}
    """
    with Worker(broker.url, [one, two], policy=textwrap.dedent(policy)) as worker:
        yield one, two, worker, Sender(broker.url)


def test_the_same_task_on_two_queues(pair):
    one, two, worker, sender = pair
    for queue in (one, two):
        sender.task(queue, "matrix_app.sleeps", [30])
        sender.task(queue, "matrix_app.killed")
    assert sorted(letter["reason"] for letter in worker.wait_letters(one, 2)) == ["max_deliveries", "time_limit"]
    assert sorted(letter["reason"] for letter in worker.wait_letters(two, 2)) == ["soft_time_limit", "worker_lost"]
    assert worker.ran().count("killed") == 3, "late: twice (max_deliveries), early: once"
    (poison,) = [letter for letter in worker.letters(one) if letter["reason"] == "max_deliveries"]
    assert poison["deliveries"] == 2
    assert poison["exception"]["type"] == "billiard.exceptions.WorkerLostError"


APP = """
import os, sys
from celery import Celery, Task, signals, chord, group
from celery.worker.request import Request
from celery_dlx import DeadLetters, task_dead_lettered

app = Celery("features", broker=os.environ["DLX_BROKER"], backend=os.environ["DLX_BACKEND"])
app.conf.update(task_default_queue=os.environ["DLX_QUEUE"], broker_connection_retry_on_startup=True,
                worker_hijack_root_logger=True, task_annotations={"features.limited": {"rate_limit": "60/m"}})
DeadLetters(app)

def note(text):
    with open(os.environ["DLX_RUNS"], "a") as log:
        log.write(text + "\\n")

class MyRequest(Request):
    def on_success(self, *args, **kwargs):
        return super().on_success(*args, **kwargs)
    def on_failure(self, exc_info, *args, **kwargs):
        note("custom request on_failure")
        note(f"frames sent: {exc_info.tb is not None}")
        return super().on_failure(exc_info, *args, **kwargs)

def my_strategy(task, app, consumer, **kwargs):
    from celery.worker.strategy import default
    handler = default(task, app, consumer, **kwargs)
    def strategy(*args, **kwargs):
        note("custom strategy")
        return handler(*args, **kwargs)
    return strategy

class MyTask(Task):
    Request = MyRequest
    Strategy = "features:my_strategy"
    def on_failure(self, exc, task_id, args, kwargs, einfo):
        note("task on_failure")

@app.task(base=MyTask, name="features.custom")
def custom():
    raise ValueError("custom")

@app.task(name="features.hard", base=MyTask, time_limit=1)
def hard():
    import time; time.sleep(30)

@app.task(name="features.limited")
def limited(): note("limited")

@app.task(name="features.fail")
def fail(*args): raise ValueError("boom")

@app.task(name="features.add")
def add(*numbers): return sum(n for n in numbers if isinstance(n, int))

@app.task(name="features.errback")
def errback(*args): note("errback")

@app.task(name="features.total")
def total(numbers): note("total")

@app.task(name="features.killed", acks_late=True)
def killed():
    import signal; os.kill(os.getpid(), signal.SIGKILL)

@signals.task_failure.connect(sender=custom)
def on_failure_of_custom(sender=None, **_): note(f"task_failure {sender.name}")

@signals.task_failure.connect(sender=hard)
def on_failure_of_hard(sender=None, **_): note("task_failure hard")

@task_dead_lettered.connect
def on_dead(sender=None, letter=None, **_): note(f"dead {letter.reason} {sender and sender.name}")
"""


@pytest.fixture
def features(broker, redis_server, tmp_path, queue, monkeypatch):
    (tmp_path / "features.py").write_text(APP)
    backend = redis_server.url.replace("/0", "/9")
    worker = Worker(broker.url, [queue], app="features", DLX_BACKEND=backend, DLX_QUEUE=queue)
    worker.env["PYTHONPATH"] += f":{tmp_path}"
    monkeypatch.setenv("DLX_BROKER", broker.url)
    monkeypatch.setenv("DLX_BACKEND", backend)
    monkeypatch.setenv("DLX_QUEUE", queue)
    with worker:
        yield worker, queue


def python(worker, code: str) -> str:
    """Run code with the worker's app as `m`, in a process of its own."""
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-c", "import features as m\n" + textwrap.dedent(code)],
        env=worker.env,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_custom_request_strategy_and_signals(features):
    worker, queue = features
    python(worker, "m.custom.delay()")
    (letter,) = worker.wait_letters(queue, 1)
    assert (letter["reason"], letter["task"]) == ("failure", "features.custom")
    wait_for(lambda: "dead failure features.custom" in worker.ran(), worker.ran)
    for line in ("custom request on_failure", "custom strategy", "task on_failure", "task_failure features.custom"):
        assert worker.ran().count(line) == 1, (line, worker.ran())
    assert "frames sent: False" in worker.ran() and "frames sent: True" not in worker.ran()


def test_hard_time_limit_fires_hooks_once_and_stores_the_state(features):
    worker, queue = features
    state = python(
        worker,
        """
        result = m.hard.apply_async(link_error=m.errback.s())
        try: result.get(timeout=30)
        except Exception as exc: print(type(exc).__name__, result.state)
        """,
    )
    assert state == "TimeLimitExceeded FAILURE"
    assert [letter["reason"] for letter in worker.wait_letters(queue, 1)] == ["time_limit"]
    wait_for(lambda: "errback" in worker.ran(), worker.ran)
    # Whatever would come a second time has come when this task, sent later, is through.
    python(worker, "m.limited.delay()")
    wait_for(lambda: "limited" in worker.ran(), worker.ran)
    assert worker.ran().count("errback") == 1
    assert worker.ran().count("task_failure hard") == 1


def test_a_lost_process_stores_the_state_and_fires_errbacks_once(features):
    worker, queue = features
    state = python(
        worker,
        """
        result = m.killed.apply_async(link_error=m.errback.s())
        try: result.get(timeout=30)
        except Exception as exc: print(type(exc).__name__, result.state)
        """,
    )
    assert state == "WorkerLostError FAILURE"
    assert [letter["reason"] for letter in worker.wait_letters(queue, 1)] == ["worker_lost"]
    wait_for(lambda: worker.ran().count("errback") == 1, worker.ran)


def test_chords_count_their_parts(features):
    worker, queue = features
    done = python(worker, "print(m.chord([m.add.s(1), m.add.s(2)])(m.total.s()).get(timeout=30))")
    assert done == "None" and "total" in worker.ran()
    failed = python(
        worker,
        """
        result = m.chord([m.add.s(1), m.fail.s()])(m.total.s())
        result.get(timeout=30, propagate=False)
        print(type(result.result).__name__)
        """,
    )
    assert failed == "ChordError"
    assert [letter["task"] for letter in worker.wait_letters(queue, 1)] == ["features.fail"]
    assert worker.ran().count("total") == 1


def test_rate_limit_eta_revoke_and_inspect(features):
    worker, queue = features
    out = python(
        worker,
        """
        from time import monotonic
        later = m.add.apply_async((1,), countdown=600)
        start = monotonic()
        print(m.add.apply_async((1, 2), countdown=1).get(timeout=30), monotonic() - start >= 1)
        inspect = m.app.control.inspect(timeout=5)
        scheduled = list(inspect.scheduled().values())[0]
        print([entry["request"]["id"] for entry in scheduled] == [later.id])
        m.app.control.revoke(later.id, reply=True)
        print(later.id in list(inspect.revoked().values())[0])
        m.limited.delay(); m.limited.delay()
        print(list(inspect.stats().values())[0]["prefetch_count"] > 0)
        """,
    )
    assert out.splitlines() == ["3 True", "True", "True", "True"]
    wait_for(lambda: worker.ran().count("limited") == 2, worker.ran)
    assert worker.letters(queue) == []


@pytest.mark.parametrize("on", ["revoked", None])
def test_revoked_is_a_death_only_if_asked_for(broker, queue, on):
    policy = f"version: 1\nqueues:\n  {queue}: " + (f"{{dead_letter: {{on: [{on}]}}}}\n" if on else "{}\n")
    with Worker(broker.url, [queue], policy=policy) as worker:
        task_id = python_revoke(worker, queue)
        Sender(broker.url).task(queue, "matrix_app.ok", ["after"])
        wait_for(lambda: "ok after" in worker.ran(), worker.ran)
        wait_for(lambda: "Discarding revoked task" in worker.output, "the task is seen as revoked")
        found = worker.wait_letters(queue, 1) if on else worker.letters(queue)
        assert [(letter["reason"], letter["task_id"]) for letter in found] == ([("revoked", task_id)] if on else [])


def python_revoke(worker, queue) -> str:
    import subprocess
    import sys
    from uuid import uuid4

    task_id = str(uuid4())
    code = (
        f"import matrix_app as m\nm.app.control.revoke({task_id!r}, reply=True, timeout=5)\n"
        f"m.app.send_task('matrix_app.ok', queue={queue!r}, task_id={task_id!r})"
    )
    subprocess.run([sys.executable, "-c", code], env=worker.env, check=True, timeout=60)
    return task_id


@pytest.mark.parametrize(
    ("pool", "limits"),
    [("solo", ("time_limit", "soft_time_limit")), ("threads", ("time_limit", "soft_time_limit")),
     ("gevent", ("soft_time_limit",))],
)  # fmt: skip
def test_limits_a_pool_does_not_keep_are_warned_of(redis_server, queue, pool, limits):
    policy = f"version: 1\nqueues:\n  {queue}: {{time_limit: 9s, soft_time_limit: 5s}}\n"
    with Worker(redis_server.url, [queue], policy=policy, arguments=("-P", pool, "-c", "1")) as worker:
        for limit in ("time_limit", "soft_time_limit"):
            warned = f"the {pool} pool does not keep {limit}, set for {queue}; use prefork" in worker.output
            assert warned == (limit in limits)


def test_queues_that_are_not_managed_or_not_enabled_are_celerys_own(broker, queue):
    policy = f"version: 1\nqueues:\n  {queue}: {{dead_letter: {{enabled: false}}}}\n"
    other = f"{queue}.other"
    with Worker(broker.url, [queue, other], policy=policy) as worker:
        sender = Sender(broker.url)
        for name in (queue, other):
            sender.task(name, "matrix_app.fail")
            sender.task(name, "matrix_app.ok", ["after"])
        wait_for(lambda: worker.ran().count("ok after") == 2, worker.ran)
        assert worker.letters(queue) == worker.letters(other) == []
        assert {row["letters"] for row in worker.json("stats", queue)} == {0}
