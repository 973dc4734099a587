"""`dlx doctor` on both brokers: all well, and each thing that can be wrong."""

from __future__ import annotations

import json

import pytest
import redis
from kombu import Connection
from servers import Redis, free_port, wait_for
from workers import Worker


def examine(worker: Worker, expect: int, **env: str) -> dict[str, list[dict]]:
    worker.env.update(env)

    def answered():
        done = worker.cli("doctor", "--json", check=False)
        late = "no worker answers" in done.stdout or "did not answer in time" in done.stdout
        return None if late and worker.alive else done

    done = wait_for(answered, "the workers answer in time")
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    checks: dict[str, list[dict]] = {}
    for line in done.stdout.splitlines():
        check = json.loads(line)
        checks.setdefault(check["check"], []).append(check)
    return checks


@pytest.fixture
def policy(queue):
    return f"version: 1\nqueues: {{{queue}: {{}}}}\n"


def test_all_is_well(broker, queue, policy):
    management = {"CELERY_DLX_MANAGEMENT_URL": broker.management_url} if broker.kind == "rabbitmq" else {}
    with Worker(broker.url, [queue], policy=policy, **management) as worker:
        checks = examine(worker, 0)
        assert {check["status"] for rows in checks.values() for check in rows} == {"ok"}, checks
        assert any(queue in check["message"] for check in checks["workers"])
        assert ("topology" in checks) == (broker.kind == "rabbitmq")


def test_a_worker_without_the_bootstep(broker, queue, policy):
    if broker.kind == "rabbitmq":  # a live one: stock Celery could not declare a queue of ours
        with Connection(broker.url) as connection:
            connection.default_channel.queue_declare(queue, durable=True, auto_delete=False)
    with Worker(broker.url, [queue], policy=policy) as ours:
        stock = Worker(broker.url, [queue], policy=policy, arguments=("-c", "1", "-n", f"stock-{queue}@%h"), DLX_STOCK="1")
        with stock:
            (bad,) = [check for check in examine(ours, 1)["workers"] if check["status"] == "critical"]
            assert f"stock-{queue}@" in bad["message"]
            assert "without the bootstep" in bad["message"]


def test_a_broker_that_is_not_there(broker, queue, policy):
    url = f"{broker.url.split('://')[0]}://127.0.0.1:{free_port()}"
    checks = examine(Worker(url, [queue], policy=policy), 69)
    assert checks["broker"][0]["status"] == "critical"
    assert "workers" not in checks


def test_a_policy_that_is_wrong(broker, queue):
    checks = examine(Worker(broker.url, [queue], policy="version: 1\nqueus: {}\n"), 1)
    assert "unknown key 'queus'" in checks["policy"][0]["message"]
    assert "policy check" in checks["policy"][0]["next"]


def test_settings_that_contradict_each_other(broker, queue):
    text = f"version: 1\nqueues: {{{queue}: {{acks_late: false, reject_on_worker_lost: true}}}}\n"
    checks = examine(Worker(broker.url, [queue], policy=text), 1 if broker.kind == "rabbitmq" else 0)
    assert "does nothing" in checks["settings"][0]["message"]


def test_a_redis_that_drops_and_forgets(queue, policy):
    server = Redis("--appendonly", "no", "--maxmemory-policy", "allkeys-lru").start()
    try:
        worker = Worker(server.url, [queue], policy=policy)
        checks = examine(worker, 1)
        assert checks["eviction"][0]["status"] == "critical"
        assert checks["persistence"][0]["status"] == "warning"
        redis.Redis.from_url(server.url).config_set("maxmemory-policy", "noeviction")
        assert examine(worker, 0)["eviction"][0]["status"] == "ok"
    finally:
        server.stop()
