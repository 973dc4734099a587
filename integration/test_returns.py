"""Messages that come back to classic queues, whose broker does not count."""

from __future__ import annotations

import json

import pytest
from celery import Celery
from kombu import Connection
from raw import Sender
from servers import wait_for
from workers import Worker

from celery_dlx import DeadLetters
from celery_dlx.brokers.rabbitmq.returns import RETURNS
from celery_dlx.policy.settings import Policy


@pytest.fixture
def channel(rabbitmq):
    with Connection(rabbitmq.url) as connection:
        yield connection.default_channel


@pytest.fixture
def policy(queue):
    return f"version: 1\nqueues: {{{queue}: {{acks_late: true, max_deliveries: 2}}}}\n"


def holding(url, queue, policy, *arguments):
    """A worker that runs a task without end."""
    worker = Worker(url, [queue], policy=policy, arguments=("-P", "solo", *arguments)).start()
    Sender(url.replace(f"{queue}:secret", "guest:guest")).task(queue, "matrix_app.sleeps", [60])
    wait_for(lambda: worker.ran() == ["sleeps"], "the task started")
    return worker


def test_a_poison_that_kills_every_worker_is_counted_by_all_of_them(rabbitmq, queue, policy, channel):
    sender = Sender(rabbitmq.url)
    for delivery in (1, 2):
        worker = Worker(rabbitmq.url, [queue], policy=policy, arguments=("-P", "solo")).start()
        if delivery == 1:
            task_id = sender.task(queue, "matrix_app.sleeps", [60], properties={"priority": 3}, own="kept")
        wait_for(lambda worker=worker: worker.ran() == ["sleeps"], f"delivery {delivery} started")
        worker.kill()
        wait_for(lambda: channel.queue_declare(queue, passive=True).message_count == 1, "the broker has it back")
    with Worker(rabbitmq.url, [queue], policy=policy, arguments=("-P", "solo")) as worker:
        (letter,) = worker.wait_letters(queue, 1)
        assert (letter["reason"], letter["deliveries"], letter["task_id"]) == ("max_deliveries", 3, task_id)
        assert worker.ran() == [], "poison is not run again"
        assert (letter["exchange"], letter["routing_key"], letter["priority"]) == ("", queue, 3)
        shown = json.dumps(worker.json("show", letter["id"]))
        assert '"own": "kept"' in shown and RETURNS not in shown, "what its producer sent, and nothing else"
        wait_for(lambda: channel.queue_declare(queue, passive=True).message_count == 0, "one copy")
        # Replayed, it is a new message to everybody.
        channel.queue_declare(f"{queue}.away", durable=True, auto_delete=False)
        worker.cli("replay", letter["id"], "--to", f"{queue}.away", "--wait", "0s", "--no-preflight", "--yes")
        assert RETURNS not in channel.basic_get(f"{queue}.away", no_ack=True).headers


def test_what_was_only_prefetched_runs_once(rabbitmq, queue, policy, channel):
    sender = Sender(rabbitmq.url)
    first = holding(rabbitmq.url, queue, policy, "--prefetch-multiplier", "4")
    for n in range(3):
        sender.task(queue, "matrix_app.ok", [n])
    wait_for(lambda: channel.queue_declare(queue, passive=True).message_count == 0, "it holds them all")
    first.kill()
    with Worker(rabbitmq.url, [queue], policy=policy, arguments=("-c", "2", "--prefetch-multiplier", "4")) as worker:
        wait_for(lambda: sorted(worker.ran()) == [*(f"ok {n}" for n in range(3)), "sleeps"], worker.ran)
        assert worker.letters(queue) == []
        worker.kill()  # a warm shutdown would wait for the task


@pytest.fixture
def limited_user(rabbitmq, queue):
    """A user that may use its own queues and exchanges only."""
    if not hasattr(rabbitmq, "ctl"):
        pytest.fail("needs a broker of our own: unset DLX_TEST_RABBITMQ")
    rabbitmq.ctl("add_user", queue, "secret")
    rabbitmq.ctl("set_permissions", "-p", "/", queue, *[f"^({queue}.*|celery.*|.*pidbox)$"] * 3)
    yield rabbitmq.url.replace("guest:guest", f"{queue}:secret")
    rabbitmq.ctl("delete_user", queue)


def test_without_the_permission_messages_are_used_as_they_are(rabbitmq, queue, policy, limited_user):
    """Sending to a queue by its name takes a permission (amq.default) that a worker need not have."""
    holding(limited_user, queue, policy).kill()
    with Worker(limited_user, [queue], policy=policy) as worker:
        wait_for(lambda: worker.ran() == ["sleeps"], worker.ran)
        assert "what comes back to classic queues is not counted" in worker.output
        Sender(rabbitmq.url).task(queue, "matrix_app.fail", ["and letters are stored"])
        worker.wait_letters(queue, 1)
        worker.kill()  # a warm shutdown would wait for the task


def test_copies_name_their_first_exchange(rabbitmq, queue, channel):
    """A later death tells where the message came from, not where its copy did."""
    app = Celery(broker=rabbitmq.url, set_as_current=False)
    dead = DeadLetters(app, policy=Policy())
    channel.queue_declare(queue, durable=True, auto_delete=False, arguments={
        "x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{queue}.dlq", "x-message-ttl": 1,
    })  # fmt: skip
    channel.queue_declare(f"{queue}.dlq", durable=True, auto_delete=False)
    header = {"count": 1, "key": "k", "retries": 0, "exchange": "orders", "routing_key": "orders.eu"}
    Sender(rabbitmq.url).task(queue, "matrix_app.ok", **{RETURNS: header})
    wait_for(lambda: list(dead.letters(queue)), "it expires")
    (letter,) = dead.letters(queue)
    assert (letter.original.exchange, letter.original.routing_key) == ("orders", "orders.eu")
    assert RETURNS not in letter.original.headers
