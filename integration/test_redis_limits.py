"""Source queues on Redis are kept within their limits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import redis
from celery import Celery
from raw import Sender
from servers import wait_for
from workers import Worker, unacknowledged

from celery_dlx import DeadLetters
from celery_dlx.brokers.redis.limits import Limits
from celery_dlx.policy.settings import BUILT_IN, Policy


@pytest.fixture
def client(redis_server):
    with redis.Redis.from_url(redis_server.url) as found:
        yield found


@pytest.fixture
def limits(redis_server, queue):
    app = Celery(broker=redis_server.url, set_as_current=False)
    dead = DeadLetters(app, policy=Policy())
    with app.connection_for_read() as connection:
        channel = connection.channel()
        channel.dlx_store = channel.dlx_letter_store(Policy())
        found = Limits(channel, Policy())
        found.letters = lambda: list(dead.letters(queue))
        yield found


@pytest.fixture
def send(redis_server, queue):
    sender = Sender(redis_server.url)
    return lambda count: [sender.task(queue, "matrix_app.ok", [n]) for n in range(count)]


def marks(client, queue):
    return f"dlx:{{{queue}}}:marks:{queue}"


def age(client, queue, milliseconds):
    """As if so much time had gone by."""
    noted = client.lrange(marks(client, queue), 0, -1)
    for at, mark in enumerate(noted):
        since, _, newest = mark.partition(b" ")
        client.lset(marks(client, queue), at, b"%d %s" % (int(since) - milliseconds, newest))
    assert noted, "since when they wait is noted"


def too_old(limits, queue, ttl=3600.0):
    return limits._too_old(queue, replace(BUILT_IN, message_ttl=ttl), queue)


def test_what_waits_for_too_long_becomes_a_letter_and_nothing_else(queue, client, limits, send):
    old = send(3)
    assert too_old(limits, queue) == 0
    young = send(2)
    age(client, queue, 3_500_000)
    assert too_old(limits, queue) == 0
    age(client, queue, 200_000)
    assert too_old(limits, queue) == 3
    letters = limits.letters()
    assert [letter.task_id for letter in letters] == old and {letter.reason for letter in letters} == {"expired"}
    assert [json.loads(item)["headers"]["id"] for item in client.lrange(queue, 0, -1)[::-1]] == young
    assert not unacknowledged(client, queue)


def test_a_message_that_is_asked_for_again_makes_no_other_one_old(queue, client, limits, send):
    """It goes to the end where new ones come, the same to the byte."""
    send(1)
    too_old(limits, queue)
    item, tag = client.rpop(queue), f"dlx-again-{queue}:1"
    deliveries = limits._channel.dlx_deliveries
    deliveries.register("unacked", "unacked_index", tag, item, queue, "")
    send(5)
    limits._channel.qos.put_back([tag], leftmost=True)
    assert client.lindex(queue, 0) == item, "left of what came after it"
    for key in client.keys(marks(client, queue)):
        age(client, queue, 4_000_000)
        assert key
    assert too_old(limits, queue) == 0 and client.llen(queue) == 6


def test_a_clock_that_was_set_back_keeps_nothing_for_longer(queue, client, limits, send):
    send(2)
    too_old(limits, queue)
    age(client, queue, -7_200_000)
    assert too_old(limits, queue) == 0 and client.llen(marks(client, queue)) == 1, "it is noted anew, by the clock of now"
    age(client, queue, 4_000_000)
    assert too_old(limits, queue) == 2


def test_many_go_in_steps_and_consumed_marks_are_forgotten(queue, client, limits, send):
    send(250)
    too_old(limits, queue)
    age(client, queue, 4_000_000)
    assert [too_old(limits, queue) for _ in range(4)] == [100, 100, 50, 0]
    send(5)
    too_old(limits, queue)
    age(client, queue, 4_000_000)
    client.delete(queue)  # somebody consumed them all, and others came
    send(2)
    assert too_old(limits, queue) == 0 and client.llen(queue) == 2
    assert client.llen(marks(client, queue)) == 1


def test_sent_twice_it_takes_no_more(queue, client, limits, send):
    send(150)
    too_old(limits, queue)
    age(client, queue, 4_000_000)
    keys, arguments = (
        limits._keys(marks(client, queue), queue),
        [100, "dlx-twice-ttl:", 0, json.dumps(queue), 3_600_000, 360_000],
    )
    first, second = limits._expire(keys, arguments), limits._expire(keys, arguments)
    assert len(first) == 100 and first == second and client.llen(queue) == 50
    assert limits._channel.qos.put_back([f"dlx-twice-ttl:{n}" for n in range(1, 101)], counted=False) == 100


@pytest.mark.parametrize("reason", ["maxlen", "expired"])
def test_killed_between_taking_and_storing(queue, client, limits, send, reason):
    """What was taken is an unacknowledged delivery: it comes back by age, in its order, and is taken again."""
    ids = send(5)
    too_old(limits, queue)
    age(client, queue, 4_000_000)
    nonce = f"dlx-killed-{queue}:"
    if reason == "expired":
        arguments = [100, nonce, 0, json.dumps(queue), 3_600_000, 360_000]
        taken = limits._expire(limits._keys(marks(client, queue), queue), arguments)
    else:
        taken = limits._overflow(limits._keys(queue), [0, 100, nonce, 0, json.dumps(queue)])
    assert len(taken) == len(unacknowledged(client, queue)) == 5 and not client.llen(queue), "the fault happened"
    client.zadd("unacked_index", {f"{nonce}{n}": n for n in range(1, 6)})
    limits._channel.qos.restore_visible(num=None, interval=1)
    assert client.lrange(queue, 0, -1)[::-1] == taken and not unacknowledged(client, queue)
    if reason == "expired":
        client.lpush(marks(client, queue), f"{int(client.time()[0] - 4_000) * 1000} ".encode() + taken[-1])
        assert too_old(limits, queue) == 5 and [letter.task_id for letter in limits.letters()] == ids


def test_a_worker_that_cannot_keep_up(redis_server, queue, client):
    policy = f"version: 1\nqueues: {{{queue}: {{message_ttl: 2s}}}}\n"
    sender = Sender(redis_server.url)
    sender.task(queue, "matrix_app.sleeps", [60])
    with Worker(redis_server.url, [queue], policy=policy, arguments=("-c", "1", "--prefetch-multiplier", "1")) as worker:
        wait_for(lambda: worker.ran() == ["sleeps"], worker.ran)
        late = [sender.task(queue, "matrix_app.ok", [n]) for n in range(4)]
        letters = worker.wait_letters(queue, 3)
        worker.kill()
        assert [letter["task_id"] for letter in letters] == late[1:], "the first one is the worker's already"
        assert {letter["reason"] for letter in letters} == {"expired"}
