"""RabbitMQ and its management API behind TLS."""

from __future__ import annotations

import json
import ssl

import pytest
from raw import Sender
from servers import RabbitMQ, free_port, wait_for
from workers import Worker


@pytest.fixture(scope="module")
def rabbitmq(certificates):
    """One that listens with TLS, too."""
    port, management = free_port(), free_port()
    files = {"cacertfile": "ca.crt", "certfile": "server.crt", "keyfile": "server.key"}
    lines = [f"listeners.ssl.1 = 127.0.0.1:{port}", "management.ssl.ip = 127.0.0.1", f"management.ssl.port = {management}"]
    for option, name in files.items():
        lines += [f"{section}.{option} = {certificates / name}" for section in ("ssl_options", "management.ssl")]
    broker = RabbitMQ(settings="\n".join(lines) + "\n").start()
    broker.tls_url = f"amqps://guest:guest@localhost:{port}//"
    broker.tls_management_url = f"https://localhost:{management}"
    yield broker
    broker.stop()


def by_tls(certificates, authority="ca.crt"):
    return json.dumps({"ca_certs": str(certificates / authority), "cert_reqs": ssl.CERT_REQUIRED})


@pytest.mark.parametrize("late", ["true", "false"])
def test_letters_travel_by_tls(rabbitmq, certificates, queue, late, tmp_path):
    """Large ones too, of which a socket does not take all at once."""
    policy, fixed = f"version: 1\nqueues: {{{queue}: {{acks_late: {late}}}}}\n", tmp_path / "fixed"
    with Worker(rabbitmq.tls_url, [queue], policy=policy, DLX_SSL=by_tls(certificates)) as worker:
        sender = Sender(rabbitmq.url)
        large = "x" * 200_000
        ids = {
            sender.task(queue, "matrix_app.fail_until", [str(fixed), large * (number % 3)], argsrepr="…")
            for number in range(60)
        }
        (row,) = wait_for(
            lambda: [row for row in worker.json("stats", queue) if row["letters"] == 60], worker.output[-2000:]
        )
        assert row["dlq"] == f"{queue}.dlq"
        assert {letter["task_id"] for letter in worker.json("list", queue)} == ids
        fixed.touch()
        assert "60 succeeded" in worker.cli("replay", queue, "--all", "--yes", "--wait", "60s").stderr
        assert worker.json("list", queue) == []


def test_a_broker_that_cannot_prove_who_it_is(rabbitmq, certificates, queue):
    worker = Worker(rabbitmq.tls_url, [queue], DLX_SSL=by_tls(certificates, "stranger.crt"))
    done = worker.cli("list", check=False)
    assert done.returncode == 69 and "Traceback" not in done.stderr, done.stderr
    assert "CERTIFICATE_VERIFY_FAILED" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_topology_by_a_management_api_behind_tls(rabbitmq, certificates, queue):
    policy = f"version: 1\nqueues: {{{queue}: {{}}}}\n"
    worker = Worker(rabbitmq.tls_url, [queue], policy=policy, DLX_SSL=by_tls(certificates))
    worker.env["CELERY_DLX_MANAGEMENT_URL"] = rabbitmq.tls_management_url
    done = worker.cli("topology", "plan", check=False)
    assert done.returncode == 69 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "the certificate cannot be verified" in done.stderr and "SSL_CERT_FILE" in done.stderr, done.stderr
    worker.env["SSL_CERT_FILE"] = str(certificates / "ca.crt")
    assert worker.cli("topology", "plan", check=False).returncode == 1
    worker.cli("topology", "apply", "--yes")
    worker.cli("topology", "plan")
