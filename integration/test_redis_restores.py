"""How deliveries of workers that are gone come back on Redis."""

from __future__ import annotations

import json

import pytest
import redis
from celery import Celery
from raw import Sender
from servers import wait_for
from workers import Worker, unacknowledged

from celery_dlx import DeadLetters
from celery_dlx.brokers.redis.deliveries import deliveries_key
from celery_dlx.policy.settings import Policy

OLD = 4000.0


@pytest.fixture
def client(redis_server):
    with redis.Redis.from_url(redis_server.url) as found:
        yield found


@pytest.fixture
def channel(redis_server):
    app = Celery(broker=redis_server.url, set_as_current=False)
    DeadLetters(app, policy=Policy())
    with app.connection_for_read() as connection:
        yield connection.channel()


@pytest.fixture
def held(redis_server, queue, client, channel):
    """Holds messages as a worker that is gone, since `OLD` seconds and longer; gives their items, oldest first."""

    def hold(count, queue=queue):
        sender, items = Sender(redis_server.url), []
        seconds, micros = client.time()
        for number in range(count):
            sender.task(queue, "matrix_app.ok", [number])
            item = client.rpop(queue)
            channel.dlx_deliveries.register("unacked", "unacked_index", f"dlx-{queue}:{number}", item, queue, own_tag(item))
            client.zadd("unacked_index", {f"dlx-{queue}:{number}": seconds + micros / 1e6 - OLD - count + number})
            items.append(item)
        return items

    yield hold
    client.delete("unacked_mutex")


def own_tag(item):
    return json.loads(item)["properties"]["delivery_tag"]


def restore(channel):
    channel.qos.restore_visible(num=None, interval=1)


def test_they_come_in_their_order_counted_and_never_twice(queue, client, channel, held):
    items = held(50)
    restore(channel)
    assert client.lrange(queue, 0, -1)[::-1] == items, "the oldest is taken first"
    assert unacknowledged(client, queue) == []
    assert {int(client.hget(deliveries_key("", queue), own_tag(item))) for item in items} == {1}
    restore(channel)
    assert client.llen(queue) == 50


def test_ages_in_the_future_hold_up_nothing_on_a_full_server(redis_server, queue, client, channel, held):
    items = held(3)
    client.zadd("unacked_index", {f"dlx-{queue}:0": client.time()[0] + 3_600})
    client.config_set("maxmemory", 1)
    try:
        restore(channel)
    finally:
        client.config_set("maxmemory", 0)
    assert client.lrange(queue, 0, -1)[::-1] == items[1:] and len(unacknowledged(client, queue)) == 1
    assert client.zscore("unacked_index", f"dlx-{queue}:0") < client.time()[0] + 60


def test_those_that_were_renewed_since_stay(queue, client, channel, held):
    held(3)
    channel.dlx_deliveries.renew("unacked_index", [f"dlx-{queue}:1"])
    restore(channel)
    assert client.llen(queue) == 2 and len(unacknowledged(client, queue)) == 1
    entries = channel.dlx_deliveries.held("unacked", "unacked_index", [f"dlx-{queue}:1"])
    assert channel.qos._put_back(entries, older=10.0) == 0, "found overdue, and renewed before it was put back"
    assert channel.qos._put_back(entries) == 1


def test_a_worker_killed_while_it_restored_keeps_nobody_from_it(queue, client, channel, held):
    held(2)
    client.set("unacked_mutex", "someone who is gone", ex=300)
    restore(channel)
    assert client.llen(queue) == 2


def test_what_cannot_be_put_back_holds_up_nothing(queue, client, channel, held):
    """A list's key that is something else, and what is no delivery at all: both stay for people to look at."""
    held(2)
    bad = f"{queue}.bad"
    (other,) = held(1, bad)
    client.set(bad, "no list")
    client.hset("unacked", f"dlx-{queue}:odd", "no delivery")
    client.zadd("unacked_index", {f"dlx-{queue}:odd": 1})
    restore(channel)
    assert client.llen(queue) == 2
    assert client.hexists("unacked", f"dlx-{bad}:0") and client.hexists("unacked", f"dlx-{queue}:odd")
    assert client.zscore("unacked_index", f"dlx-{bad}:0") > client.time()[0] - 60, "it is tried again when it is overdue"
    client.delete(bad)
    assert channel.qos.put_back([f"dlx-{bad}:0"]) == 1
    assert client.lrange(bad, 0, -1) == [other]
    client.hdel("unacked", f"dlx-{queue}:odd")
    client.zrem("unacked_index", f"dlx-{queue}:odd")


def test_a_worker_puts_back_more_than_one_script_takes(redis_server, queue, client, held):
    """And what a stock worker left behind, with it."""
    sender = Sender(redis_server.url)
    sender.task(queue, "matrix_app.ok", [-1])
    stocks = json.loads(client.rpop(queue))
    client.hset("unacked", "stocks", json.dumps([stocks, "", queue]))
    client.zadd("unacked_index", {"stocks": 1})
    held(450)
    options = json.dumps({"unacked_restore_interval": 1, "unacked_restore_throttle": 1})
    with Worker(redis_server.url, [queue], policy="version: 1\n", DLX_TRANSPORT_OPTIONS=options) as worker:
        wait_for(lambda: len(worker.ran()) == 451, lambda: len(worker.ran()))
        # A child may be through before Celery's parent has acknowledged.
        wait_for(lambda: unacknowledged(client, queue) == [] and not client.hexists("unacked", "stocks"), "nothing is held")
