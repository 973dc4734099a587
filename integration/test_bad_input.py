"""What users get wrong: one clear line with the remedy, the right exit code, nothing lost."""

from __future__ import annotations

import subprocess
import sys

import pytest
import servers
from celery import Celery
from raw import Sender
from workers import Worker

from celery_dlx import DeadLetters
from celery_dlx.errors import AlreadyInstalledError, NotInstalledError


def one_line(done) -> str:
    assert done.stdout == "" and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_wrong_policy_stops_the_worker_before_it_consumes(redis_server, queue):
    policy = "version: 1\nqueues:\n  a: {acks_late: no}\n  b: {typo: 1}\n"
    Sender(redis_server.url).task(queue, "matrix_app.ok")
    worker = Worker(redis_server.url, [queue], policy=policy).start(ready=False)
    assert worker.wait_exit() == 2
    assert "policy.yaml:3:18: queues.a.acks_late: expected true or false, found 'no'" in worker.output
    assert "policy.yaml:4:7: unknown key 'typo'" in worker.output
    assert "Traceback" not in worker.output
    assert worker.ran() == []


def test_a_missing_policy_stops_the_worker(redis_server, queue):
    worker = Worker(redis_server.url, [queue], CELERY_DLX_POLICY="/nowhere/shop.yaml").start(ready=False)
    assert worker.wait_exit() == 2
    assert "/nowhere/shop.yaml:1:1: cannot be read: No such file or directory" in worker.output
    assert "Traceback" not in worker.output


def test_policy_commands(redis_server, queue, tmp_path):
    worker = Worker(redis_server.url, [queue], policy=f"version: 1\nqueues: {{{queue}: {{time_limit: 90s}}}}\n")
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("version: 1\n")
    bad.write_text("version: 1\nqueue: {}\nqueues: {a: {time_limit: x}}\n")
    assert worker.cli("policy", "check", str(good)).stderr == f"{good}: ok\n"
    done = worker.cli("policy", "check", str(good), str(bad), check=False)
    assert done.returncode == 1
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == [f"{bad}:2:1", f"{bad}:3:26"]
    assert worker.cli("policy", "check", check=False).returncode == 2
    assert '"title": "celery-dlx policy"' in worker.cli("policy", "schema").stdout
    (row,) = worker.json("policy", "show", queue)
    assert (row["managed"], row["time_limit"], row["entry"]) == (True, 90.0, queue)
    assert "time_limit=90s" in worker.cli("policy", "show").stdout
    assert worker.json("policy", "show", "other") == [{"queue": "other", "managed": False}]


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_no_broker(scheme, queue):
    port = servers.free_port()
    url = f"redis://127.0.0.1:{port}/0" if scheme == "redis" else f"amqp://guest:guest@127.0.0.1:{port}//"
    worker = Worker(url, [queue], policy="version: 1\n")
    for call in (["list", queue], ["stats"], ["replay", queue, "--all", "--yes"], ["show", "0" * 32]):
        done = worker.cli(*call, check=False)
        assert done.returncode == 69, call
        assert f"127.0.0.1:{port}" in one_line(done) and "running" in done.stderr


def test_wrong_credentials(rabbitmq, queue):
    worker = Worker(rabbitmq.url.replace("guest:guest", "guest:s3cret"), [queue], policy="version: 1\n")
    done = worker.cli("list", queue, check=False)
    assert done.returncode == 69
    assert "refuses the user or password" in one_line(done)
    assert "s3cret" not in done.stderr

    server = servers.Redis("--requirepass", "right").start()
    try:
        worker = Worker(server.url.replace("//", "//:s3cret@"), [queue], policy="version: 1\n")
        done = worker.cli("list", queue, check=False)
        assert done.returncode == 69
        assert "refuses the user or password" in one_line(done)
        assert "s3cret" not in done.stderr
    finally:
        server.stop()


def test_unknown_ids(broker, queue):
    with Worker(broker.url, [queue], policy="version: 1\n") as worker:
        for verb in (["show"], ["replay"], ["discard", "--yes"]):
            done = worker.cli(*verb, "f" * 32, check=False)
            assert done.returncode == 1, verb
            assert "f" * 32 in done.stderr and "Traceback" not in done.stderr


def test_a_reader_that_goes_is_no_news(redis_server, queue):
    """As `head` does. (A broker that goes breaks pipes as well, and is news.)"""
    worker = Worker(redis_server.url, [queue])
    command = [sys.executable, "-m", "celery", "-A", "matrix_app", "dlx", "policy", "schema"]
    process = subprocess.Popen(command, env=worker.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(60) == 1 and said == "", said


def test_destructive_verbs_ask(broker, queue):
    with Worker(broker.url, [queue], policy="version: 1\n") as worker:
        Sender(broker.url).task(queue, "matrix_app.fail")
        (letter,) = worker.wait_letters(queue, 1)
        for call in (["replay", queue, "--all"], ["discard", letter["id"]], ["purge", queue], ["replay"],
                     ["replay", "a", "b", "--all", "--yes"], ["discard", letter["id"], "--all", "--yes"]):  # fmt: skip
            done = worker.cli(*call, check=False)
            assert done.returncode == 2, call
            one_line(done)
        for call in (["replay", queue, "--all"], ["discard", letter["id"]], ["purge", queue]):
            assert "nothing was done" in worker.cli(*call, "--dry-run").stderr
        assert len(worker.letters(queue)) == 1
        assert worker.cli("list", queue, "--reason", "nonsense", check=False).returncode == 2
        assert "expected a time" in one_line(worker.cli("list", queue, "--since", "yesterday", check=False))
        worker.cli("purge", queue, "--yes")
        assert worker.letters(queue) == []


def test_terminal_escapes_are_neutralised(redis_server, queue):
    with Worker(redis_server.url, [queue], policy="version: 1\n") as worker:
        Sender(redis_server.url).task(queue, "matrix_app.fail", ["key", "\x1b[2J\x1b]0;owned\x07"])
        (letter,) = worker.wait_letters(queue, 1)
        for call in (["list", queue], ["show", letter["id"], "--queue", queue]):
            assert "\x1b" not in worker.cli(*call).stdout


def test_installed_twice_or_not_at_all():
    app = Celery("twice", broker="redis://127.0.0.1:1/0")
    dead = DeadLetters(app)
    assert DeadLetters.of(app) is dead
    with pytest.raises(AlreadyInstalledError, match="'twice' has DeadLetters already"):
        DeadLetters(app)
    with pytest.raises(NotInstalledError, match="add `DeadLetters"):
        DeadLetters.of(Celery("none"))


def test_the_policy_comes_from_argument_setting_or_environment(tmp_path, monkeypatch):
    for name in ("argument", "setting", "environment"):
        (tmp_path / name).write_text(f"version: 1\nservice: {name}\n")
    monkeypatch.setenv("CELERY_DLX_POLICY", str(tmp_path / "environment"))
    app = Celery("a")
    app.conf.dlx_policy = str(tmp_path / "setting")
    assert DeadLetters(app, policy=tmp_path / "argument").policy.service == "argument"
    app = Celery("b")
    app.config_from_object({"CELERY_DLX_POLICY": str(tmp_path / "setting")}, namespace="CELERY")
    assert DeadLetters(app).policy.service == "setting"
    assert DeadLetters(Celery("c")).policy.service == "environment"
    monkeypatch.delenv("CELERY_DLX_POLICY")
    assert DeadLetters(Celery("d")).policy.path is None
