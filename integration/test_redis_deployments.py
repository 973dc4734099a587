"""How Redis is run elsewhere: behind TLS, watched by Sentinels, with a password that URLs have to quote."""

from __future__ import annotations

import json
from urllib.parse import quote

import pytest
import redis
import servers
from celery import Celery
from raw import Sender
from servers import wait_for
from workers import Worker, unacknowledged

from celery_dlx import DeadLetters
from celery_dlx.policy.settings import Policy

LATE = "version: 1\nqueues: {{{queue}: {{acks_late: true}}}}\n"


def refused(worker: Worker, *secrets: str) -> str:
    """What `dlx list` says of a broker that cannot be had: one line, nothing confidential."""
    done = worker.cli("list", check=False)
    assert done.returncode == 69 and done.stdout == "", done
    assert "Traceback" not in done.stderr and not any(secret in done.stderr for secret in secrets), done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    return line


# -- TLS


@pytest.fixture(scope="module")
def tls(certificates):
    """A server with a password, and a port that speaks nothing but TLS."""
    port = servers.free_port()
    arguments = ["--tls-port", str(port), "--tls-auth-clients", "no", "--requirepass", "geheim-42"]
    for option, name in (("cert", "server.crt"), ("key", "server.key"), ("ca-cert", "ca.crt")):
        arguments += [f"--tls-{option}-file", str(certificates / name)]
    server = servers.Redis(*arguments).start()
    server.tls_url = f"rediss://:geheim-42@127.0.0.1:{port}/0?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs="
    yield server
    server.stop()


def test_tls(tls, certificates, queue, tmp_path):
    plain = tls.url.replace("redis://", "redis://:geheim-42@")
    fixed = tmp_path / "fixed"
    with Worker(f"{tls.tls_url}{certificates / 'ca.crt'}", [queue], policy=LATE.format(queue=queue)) as worker:
        Sender(plain).task(queue, "matrix_app.fail_until", [str(fixed)])
        (letter,) = worker.wait_letters(queue, 1)
        assert [each["id"] for each in worker.json("list", queue)] == [letter["id"]]
        fixed.touch()
        assert "1 succeeded" in worker.cli("replay", letter["id"], "--wait", "30s").stderr
        assert worker.ran() == ["fail_until "] * 2 and worker.letters(queue) == []
        doctor = worker.cli("doctor", check=False)
        assert "rediss://:**@127.0.0.1" in doctor.stdout + doctor.stderr, doctor
        assert "waiting with BRPOP" not in worker.output
        assert "geheim-42" not in worker.output + doctor.stdout + doctor.stderr


def test_a_server_that_cannot_prove_who_it_is(tls, certificates, queue):
    line = refused(Worker(f"{tls.tls_url}{certificates / 'stranger.crt'}", [queue]), "geheim-42")
    assert "CERTIFICATE_VERIFY_FAILED" in line and "rediss://:**@127.0.0.1" in line, line


# -- Sentinel


def test_nothing_is_lost_in_a_failover(watched, queue, tmp_path):
    replica = watched.replica
    fixed = str(tmp_path / "fixed")
    # Of the two that are named one is not there; kombu names the other one in turn whenever it cannot connect.
    url = f"{watched.sentinel_url};sentinel://127.0.0.1:{servers.free_port()}/0"
    sender, after = Sender(watched.url), Sender(replica.url)
    failing, others = set(), set()
    for number in range(150):
        if number % 10 == 7:
            failing.add(sender.task(queue, "matrix_app.fail_until", [fixed, number]))
        else:
            others.add(f"naps {number}")
            sender.task(queue, "matrix_app.naps", [number, 0.05])
    # What is held comes back at once, or not before the visibility timeout, which is an hour.
    with Worker(url, [queue], policy=LATE.format(queue=queue), DLX_TRANSPORT_OPTIONS=watched.options_json) as worker:
        wait_for(lambda: len(worker.ran()) > 40, lambda: worker.output[-3000:])
        watched.lose()
        assert not others <= set(worker.ran()), "it was in the midst of it"
        wait_for(lambda: "onnection to broker lost" in worker.output, lambda: f"the worker noticed: {worker.output[-3000:]}")
        wait_for(lambda: others <= set(worker.ran()), lambda: f"{others - set(worker.ran())} {worker.output[-5000:]}")
        assert {letter["task_id"] for letter in worker.wait_letters(queue, len(failing))} == failing
        with redis.Redis.from_url(replica.url) as client:
            wait_for(lambda: not unacknowledged(client, queue), lambda: unacknowledged(client, queue))
            failing.add(after.task(queue, "matrix_app.fail_until", [fixed, "late"]))
            worker.wait_letters(queue, len(failing))
            assert client.zcard(f"dlx:{{{queue}.dlq}}") == len(failing), "they are where the Sentinel says"
        assert {letter["task_id"] for letter in worker.json("list", queue)} == failing
        (tmp_path / "fixed").touch()
        done = worker.cli("replay", queue, "--all", "--yes", "--wait", "30s")
        assert f"{len(failing)} letters replayed, {len(failing)} succeeded" in done.stderr
        assert worker.letters(queue) == []


def test_whichever_sentinel_is_asked_the_messages_are_the_same(watched):
    """Kombu takes the next one whenever it cannot connect: what had to be put back must be found under that one, too."""
    url = watched.sentinel_url
    app = Celery(broker=f"{url};{url.replace('127.0.0.1', 'localhost')}", set_as_current=False)
    app.conf.broker_transport_options = watched.options
    DeadLetters(app, policy=Policy())
    with app.connection_for_read() as connection:
        homes, asked = set(), set()
        for url in connection.alt:
            connection.switch(url)
            homes.add(connection.channel().dlx_home)
            asked.add(connection.hostname)
    assert asked == {"127.0.0.1", "localhost"} and len(homes) == 1, homes


def test_sentinels_that_know_no_master(queue):
    ports = sorted(servers.free_port() for _ in range(2))
    url = ";".join(f"sentinel://:geheim-42@127.0.0.1:{port}/0" for port in ports)
    options = {"master_name": "shop", "sentinel_kwargs": {"password": "geheim-43"}}
    line = refused(Worker(url, [queue], DLX_TRANSPORT_OPTIONS=json.dumps(options)), "geheim-42", "geheim-43")
    assert f"no master 'shop' according to Sentinel (asked: 127.0.0.1:{ports[0]}, 127.0.0.1:{ports[1]})" in line
    done = Worker(url, [queue]).cli("list", check=False)
    assert done.returncode == 2 and "'master_name' transport option must be specified" in done.stderr
    assert "Traceback" not in done.stderr and "geheim-42" not in done.stderr


# -- passwords


def test_a_password_that_urls_have_to_quote(queue):
    password = "p@ss:/?#[]% +&wörd"
    server = servers.Redis("--requirepass", password).start()
    quoted = quote(password, safe="")
    secrets = (password, quoted, "p@ss", "p%40ss", "wörd", "w%C3%B6rd")
    url = server.url.replace("//", f"//:{quoted}@")
    try:
        with Worker(url, [queue], policy="version: 1\n") as worker:
            Sender(url).task(queue, "matrix_app.fail")
            (letter,) = worker.wait_letters(queue, 1)
            calls = (["list", queue], ["replay", letter["id"], "--wait", "30s"])
            said = [(done := worker.cli(*call, check=False)).stdout + done.stderr for call in calls]
            assert letter["id"] in said[0] and "1 letters replayed" in said[1]
            for text in (worker.output, *said):
                assert not any(secret in text for secret in secrets), text
        refused(Worker(url.replace(quoted, quoted[:-1]), [queue]), *secrets)
        done = Worker(url.replace(quoted, "geheim#42"), [queue]).cli("list", check=False)
        assert done.returncode == 2 and "quote what is special in the password" in done.stderr
        assert "Traceback" not in done.stderr and "geheim" not in done.stderr
        for bad in ("12/geheim", "123?heim=1&geheim", "12#geheim"):
            worker = Worker(url.replace(quoted, bad), [queue])
            for command in ("list", "doctor"):
                done = worker.cli(command, check=False)
                said = done.stdout + done.stderr
                assert done.returncode in (2, 69) and "Traceback" not in said and "heim" not in said, (bad, said)
                assert "quote what is special in the password" in said or "#" in bad, (bad, said)
    finally:
        server.stop()
