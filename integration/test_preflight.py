"""What surely dies again is not replayed without `--force`."""

from __future__ import annotations

import pytest
import redis
from celery import Celery
from raw import Sender
from servers import wait_for
from workers import Worker

from celery_dlx import DeadLetters
from celery_dlx.policy import Policy
from celery_dlx.preflight import Fleet


@pytest.fixture(scope="module")
def worker(broker):
    with Worker(broker.url, ["preflight"], policy="version: 1\n") as it:
        yield it


@pytest.fixture
def letters(worker, broker):
    sender = Sender(broker.url)
    sender.task("preflight", "matrix_app.no_such_task")
    sender.task("preflight", "matrix_app.add", [1], {"unknown": 2})
    sender.task("preflight", "matrix_app.fail", ["again"])
    yield {letter["task"]: letter["id"] for letter in worker.wait_letters("preflight", 3)}
    worker.cli("purge", "preflight", "--yes")


def test_what_dies_again_is_refused(worker, letters):
    done = worker.cli("replay", "preflight", "--all", "--yes", check=False)
    assert done.returncode == 1
    assert "'matrix_app.no_such_task' is not registered on" in done.stderr
    assert "its arguments do not fit matrix_app.add: " in done.stderr
    assert "2 of the letters would die again, or cannot be edited; nothing was replayed" in done.stderr
    assert len(worker.letters("preflight")) == 3
    assert worker.json("history") == []


def test_it_can_be_insisted_on(worker, letters):
    worker.cli("replay", "preflight", letters["matrix_app.no_such_task"], "--force", "--wait", "30s")
    (again,) = [each for each in worker.wait_letters("preflight", 3) if each["task"] == "matrix_app.no_such_task"]
    assert again["replays"] == 1


def test_others_go_and_what_is_not_sure_is_only_said(worker, letters):
    done = worker.cli(
        "replay", "preflight", letters["matrix_app.fail"], "--to", "nobody-consumes-this", "--wait", "0s", check=False
    )
    assert "no worker that answers consumes queue 'nobody-consumes-this'" in done.stderr
    assert "would die again" not in done.stderr


def test_without_workers_nothing_is_doubted(worker, letters):
    worker.stop()
    worker.cli("replay", "preflight", "--all", "--yes", "--wait", "0s")
    assert worker.letters("preflight") == []
    worker.start()
    worker.wait_letters("preflight", 3)


def test_the_last_of_many_is_looked_at_too(worker, broker):
    sender = Sender(broker.url)
    for number in range(1_050):
        sender.task("preflight", "matrix_app.fail", [number])
    worker.wait_letters("preflight", 1_050)
    sender.task("preflight", "matrix_app.no_such_task")
    worker.wait_letters("preflight", 1_051)
    done = worker.cli("replay", "preflight", "--all", "--yes", check=False)
    assert done.returncode == 1 and "1 of the letters would die again" in done.stderr, done
    worker.cli("purge", "preflight", "--yes")


def test_a_process_whose_connections_were_closed_meanwhile(worker, broker, letters, pools):
    """One of a pool may be silent for hours, until the server or a balancer closes it."""
    app = Celery("long-lived", broker=broker.url)
    dead = DeadLetters(app, policy=Policy())
    before = _connections(broker)
    assert app.control.ping(timeout=1.0), "the pool has a connection"
    pooled = _connections(broker) - before
    assert pooled
    for each in pooled:
        _close(broker, each)
    wait_for(lambda: not _connections(broker) & pooled, "they are closed")
    assert Fleet(dead.app).tasks, "the worker answers"


def _connections(broker):
    if broker.kind == "redis":
        with redis.Redis.from_url(broker.url) as client:
            mine = client.client_id()
            return {int(each["id"]) for each in client.client_list() if int(each["id"]) != mine}
    return {line.strip() for line in broker.ctl("-q", "list_connections", "pid").splitlines() if "<" in line}


def _close(broker, connection):
    if broker.kind == "redis":
        with redis.Redis.from_url(broker.url) as client:
            client.client_kill_filter(_id=connection)
    else:
        broker.ctl("close_connection", connection, "test")
