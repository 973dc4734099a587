"""What is RabbitMQ's own: topology, live queues, the broker's net, permissions."""

from __future__ import annotations

import subprocess
import sys

import amqp
import pytest
from celery import Celery
from kombu import Connection
from raw import Sender
from servers import wait_for
from workers import Worker, environment

from celery_dlx import DeadLetters
from celery_dlx.letters import UNDECODED
from celery_dlx.policy.settings import Policy


@pytest.fixture
def channel(rabbitmq):
    with Connection(rabbitmq.url) as connection:
        yield connection.default_channel


def arguments_of(rabbitmq, queue: str) -> str:
    rows = rabbitmq.ctl("-q", "list_queues", "name", "arguments").splitlines()
    return next(row for row in rows if row.split("\t")[0] == queue)


def test_topology_is_declared_before_anything_is_consumed(rabbitmq, queue, channel):
    if not hasattr(rabbitmq, "ctl"):
        pytest.fail("needs a broker of our own: unset DLX_TEST_RABBITMQ")
    policy = (
        f"version: 1\nqueues:\n  {queue}:\n    type: quorum\n    max_deliveries: 4\n    message_ttl: 1h\n"
        "    max_length: 1000\n    dead_letter: {max_length: 50, max_bytes: 1MiB, max_age: 2d}\n"
    )
    with Worker(rabbitmq.url, [queue], policy=policy):
        source, dlq = arguments_of(rabbitmq, queue), arguments_of(rabbitmq, f"{queue}.dlq")
        for part in ('"x-dead-letter-exchange","celery.dlx"', f'"x-dead-letter-routing-key","{queue}"',
                     '"x-queue-type","quorum"', '"x-delivery-limit",3', '"x-message-ttl",3600000',
                     '"x-max-length",1000'):  # fmt: skip
            assert part in source
        for part in ('"x-queue-type","quorum"', '"x-max-length",50', '"x-max-length-bytes",1048576',
                     '"x-message-ttl",172800000'):  # fmt: skip
            assert part in dlq
        version = rabbitmq.ctl("-q", "version").strip()
        assert ("x-delivery-limit" in dlq) == (int(version.split(".")[0]) >= 4)
        bindings = rabbitmq.ctl("-q", "list_bindings", "source_name", "destination_name", "routing_key")
        assert f"celery.dlx\t{queue}.dlq\t{queue}" in bindings


def test_a_live_plain_queue_stays_and_is_covered_by_the_worker(rabbitmq, queue, channel):
    channel.exchange_declare(queue, "direct", durable=True, auto_delete=False)
    channel.queue_declare(queue, durable=True, auto_delete=False)
    channel.queue_bind(queue, queue, queue)
    with Worker(rabbitmq.url, [queue], policy="version: 1\n") as worker:
        assert f"queues '{queue}' live without the dead-lettering" in worker.output
        assert "dlx topology apply" in worker.output
        Sender(rabbitmq.url).task(queue, "matrix_app.fail")
        # A producer that shares the app, and one that knows nothing of us.
        code = f"import matrix_app as m; m.app.send_task('matrix_app.fail', ['shared'], queue={queue!r})"
        subprocess.run([sys.executable, "-c", code], env=worker.env, check=True, timeout=60)
        subprocess.run(
            [sys.executable, "-c", code.replace("shared", "stock")],
            env=environment(rabbitmq.url, DLX_STOCK="1"),
            check=True,
            timeout=60,
        )
        assert len(worker.wait_letters(queue, 3)) == 3
    channel.queue_declare(queue, durable=True, auto_delete=False)  # 406 if anyone had changed it


def test_a_queue_we_created_serves_producers_of_the_same_app(rabbitmq, queue):
    with Worker(rabbitmq.url, [queue], policy=f"version: 1\nqueues: {{{queue}: {{type: quorum}}}}\n") as worker:
        for policy in (worker.env["CELERY_DLX_POLICY"], ""):
            code = f"import matrix_app as m; m.app.send_task('matrix_app.ok', ['p'], queue={queue!r})"
            env = {**worker.env, "CELERY_DLX_POLICY": policy}
            subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=60)
        wait_for(lambda: worker.ran().count("ok p") == 2, worker.ran)


def test_a_producer_that_runs_before_any_worker_makes_the_dlq_too(rabbitmq, queue, channel):
    app = Celery("first", broker=rabbitmq.url)
    DeadLetters(app, policy=Policy())
    app.send_task("matrix_app.ok", queue=queue, expiration=0.001)
    wait_for(
        lambda: channel.queue_declare(f"{queue}.dlq", passive=True).message_count == 1,
        "a message that nobody took expires into the DLQ",
    )


def test_what_only_the_broker_sees_is_a_letter_too(rabbitmq, queue):
    policy = f"version: 1\nqueues: {{{queue}: {{max_length: 1, message_ttl: 5s}}}}\n"
    worker = Worker(rabbitmq.url, [queue], policy=policy).start()
    worker.stop()
    sender = Sender(rabbitmq.url)
    first = sender.task(queue, "matrix_app.ok", ["first"], properties={"expiration": "86400000"})
    second = sender.task(queue, "matrix_app.ok", ["second"])
    letters = {letter["task_id"]: letter for letter in worker.wait_letters(queue, 2)}
    assert letters[first]["reason"] == "maxlen"
    assert letters[second]["reason"] == "expired"
    assert {letter["queue"] for letter in letters.values()} == {queue}
    assert letters[first]["id"] == next(x["id"] for x in worker.letters(queue) if x["task_id"] == first), "stable"
    worker.env["CELERY_DLX_POLICY"] = ""
    worker.start()
    worker.cli("replay", queue, "--all", "--yes")
    wait_for(lambda: sorted(worker.ran()) == ["ok first", "ok second"], worker.ran)
    worker.stop()


def test_minus_x_is_respected(rabbitmq, queue):
    other = f"{queue}x"
    with Worker(rabbitmq.url, [], policy="version: 1\n", arguments=("-c", "1", "-X", other)) as worker:
        assert f".> {other}" not in worker.output
        assert ".dlq" not in worker.output.split("[tasks]")[0], "DLQs are not consumed"


def test_queues_added_at_run_time_are_covered(rabbitmq, queue):
    later = f"{queue}.later"
    with Worker(rabbitmq.url, [queue], policy="version: 1\n") as worker:
        code = f"import matrix_app as m; print(m.app.control.add_consumer({later!r}, reply=True, timeout=10))"
        subprocess.run([sys.executable, "-c", code], env=worker.env, check=True, timeout=60)
        Sender(rabbitmq.url).task(later, "matrix_app.fail")
        assert worker.wait_letters(later, 1)[0]["reason"] == "failure"


def test_properties_that_would_harm_a_resting_letter(rabbitmq, queue, channel):
    """TTL would make it vanish, CC would spread it, user_id would close the channel."""
    with Worker(rabbitmq.url, [queue], policy="version: 1\n") as worker:
        channel.queue_declare(f"{queue}.cc", durable=True, auto_delete=False)
        Sender(rabbitmq.url).task(
            queue, "matrix_app.fail", CC=[f"{queue}.cc"], properties={"expiration": "60000", "user_id": "guest"}
        )
        (letter,) = worker.wait_letters(queue, 1)
        (shown,) = worker.json("show", letter["id"], "--queue", queue)
        assert shown["stripped"] == {"expiration": "60000", "CC": [f"{queue}.cc"]}
        assert shown["properties"]["user_id"] == "guest"
        assert channel.queue_declare(f"{queue}.cc", passive=True).message_count == 1, "only the producer's own copy"
        replayed, _ = worker.json("replay", letter["id"], "--queue", queue)
        assert replayed["changes"] == ["CC dropped: a replay goes to the source queue alone"]
        (again,) = worker.wait_letters(queue, 1)
        (shown,) = worker.json("show", again["id"], "--queue", queue)
        assert shown["stripped"] == {"expiration": "60000"}


def test_the_dlq_deleted_at_run_time_is_made_again(rabbitmq, queue, channel):
    with Worker(rabbitmq.url, [queue], policy="version: 1\n", DLX_LATE="1") as worker:
        sender = Sender(rabbitmq.url)
        sender.task(queue, "matrix_app.fail", ["before"])
        worker.wait_letters(queue, 1)
        channel.queue_delete(f"{queue}.dlq")
        sender.task(queue, "matrix_app.fail", ["after"])
        (letter,) = worker.wait_letters(queue, 1)
        assert letter["args"] == "['after']"
        assert letter["exception"]["type"] == "builtins.ValueError", "annotated, not by the broker"
        assert "was returned by the broker" in worker.output, "the fault happened"


@pytest.mark.parametrize("late", ["1", ""])
def test_properties_that_cannot_be_decoded(rabbitmq, queue, channel, late):
    with Worker(rabbitmq.url, [queue], policy="version: 1\n", DLX_LATE=late) as worker:
        sender, pid = Sender(rabbitmq.url), worker.process.pid
        bad = [{"content_type": b"\xff\xfe"}, {"correlation_id": b"\xc3"}, {"content_type": b"\xff", "body": b""}]
        for properties in bad:
            body = properties.pop("body", b"bytes \xff")
            channel.basic_publish_confirm(amqp.Message(body, priority=3, **properties), "", queue)
        sender.task(queue, "matrix_app.fail")
        letters = worker.wait_letters(queue, 4)
        reasons = [letter["reason"] for letter in letters]
        assert reasons.count("failure") == 1 and set(reasons) <= {"failure", "malformed", "undecodable"}, reasons
        assert worker.alive and worker.process.pid == pid
        whole = [worker.dead.get(letter["id"], queue).original for letter in letters if letter["reason"] != "failure"]
        assert sorted(original.body for original in whole) == [b"", b"bytes \xff", b"bytes \xff"]
        assert all(set(original.headers) == {UNDECODED} for original in whole), "what could not be read is kept"
        assert worker.cli("show", letters[0]["id"], "--queue", queue, check=False).returncode == 0


def test_the_exchange_deleted_at_run_time_is_made_again(rabbitmq, queue, channel):
    policy = f"version: 1\ntopology: {{exchange: {queue}.x}}\n"
    with Worker(rabbitmq.url, [queue], policy=policy) as worker:
        channel.exchange_delete(f"{queue}.x")
        Sender(rabbitmq.url).task(queue, "matrix_app.fail")
        (letter,) = worker.wait_letters(queue, 1)
        assert letter["reason"] == "failure"
        assert "no exchange" in worker.output, "the fault happened"


def test_capture_survives_the_brokers_restart(rabbitmq, queue):
    if not hasattr(rabbitmq, "halt"):
        pytest.fail("needs a broker of our own: unset DLX_TEST_RABBITMQ")
    with Worker(rabbitmq.url, [queue], policy="version: 1\n", DLX_LATE="1") as worker:
        sender = Sender(rabbitmq.url)
        first = sender.task(queue, "matrix_app.fail", ["first"])
        worker.wait_letters(queue, 1)
        ready = worker.output.count("mingle") + worker.output.count("Connected to")
        rabbitmq.halt()
        rabbitmq.run()
        wait_for(lambda: worker.output.count("Connected to") + worker.output.count("mingle") > ready, worker.output[-2000:])
        second = sender.task(queue, "matrix_app.fail", ["second"])
        # The first one, if the broker went before it was acknowledged, dies twice.
        wait_for(lambda: {letter["task_id"] for letter in worker.letters(queue)} == {first, second}, worker.letters)
        assert worker.alive


@pytest.fixture
def limited_user(rabbitmq, queue):
    """A user that may use its own queue only."""
    if not hasattr(rabbitmq, "ctl"):
        pytest.fail("needs a broker of our own: unset DLX_TEST_RABBITMQ")
    rabbitmq.ctl("add_user", queue, "secret")
    own = f"^({queue}|celery.*|.*pidbox)$"
    rabbitmq.ctl("set_permissions", "-p", "/", queue, own, own, own)
    yield rabbitmq.url.replace("guest:guest", f"{queue}:secret")
    rabbitmq.ctl("delete_user", queue)


def test_a_dlx_that_may_not_be_declared_stops_the_worker_with_one_line(limited_user, queue, channel):
    policy = f"version: 1\ntopology: {{exchange: forbidden.dlx}}\nqueues: {{{queue}: {{}}}}\n"
    worker = Worker(limited_user, [queue], policy=policy).start(ready=False)
    assert worker.wait_exit() == 1
    (line,) = [line for line in worker.output.splitlines() if "CRITICAL" in line]
    assert "exchange 'forbidden.dlx': the broker user may not declare it" in line
    assert "grant configure, write and read" in line
    assert "Traceback" not in worker.output
    with pytest.raises(amqp.exceptions.NotFound):
        channel.queue_declare(queue, passive=True)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-16", "utf-16-le", "utf-7"])
def test_a_body_keeps_its_bytes_whatever_encoding_it_names(rabbitmq, queue, encoding):
    """py-amqp decodes bodies; encoded again they need not be the same."""
    body = '[["\u00e9"], {}, null]'.encode(encoding)
    if encoding == "utf-16":
        body = body[2:]  # without the byte order mark that Python would write
    with Worker(rabbitmq.url, [queue], policy="version: 1\n") as worker:
        Sender(rabbitmq.url).task(queue, "matrix_app.fail", body=body, encoding=encoding)
        (letter,) = worker.wait_letters(queue, 1)
        assert worker.ran() == ["fail \u00e9"], "Celery still gets it decoded"
        assert worker.dead.get(letter["id"], queue).original.body == body


def test_a_message_that_py_amqp_cannot_decode_lies_in_a_dlq(rabbitmq, queue, channel):
    with Worker(rabbitmq.url, [queue], policy="version: 1\n") as worker:
        Sender(rabbitmq.url).task(queue, "matrix_app.fail")
        worker.wait_letters(queue, 1)
        odd = amqp.Message(b"[]", content_type=b"\xff\xfe")
        channel.basic_publish(odd, exchange="", routing_key=f"{queue}.dlq")
        wait_for(lambda: worker.dead.stats(queue)[0].letters == 2, "it lies in the DLQ")
        (other,) = [letter for letter in worker.letters(queue) if letter["reason"] == "malformed"]
        assert worker.cli("export", queue, "-").stdout.count("\n") == 2
        assert worker.cli("discard", queue, other["id"], "--yes").returncode == 0
        assert [letter["reason"] for letter in worker.letters(queue)] == ["failure"]
