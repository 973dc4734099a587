"""What is Redis's own: keys, caps, restores, stock workers beside ours, a full server."""

from __future__ import annotations

import json

import pytest
import redis
import servers
from celery import Celery
from raw import Sender
from servers import wait_for
from workers import Worker, unacknowledged

from celery_dlx import DeadLetters
from celery_dlx.brokers.redis.deliveries import deliveries_key
from celery_dlx.policy.settings import Policy


@pytest.fixture
def client(redis_server):
    with redis.Redis.from_url(redis_server.url) as found:
        yield found


def test_keys_are_the_contracts(redis_server, queue, client):
    with Worker(redis_server.url, [queue], policy="version: 1\n") as worker:
        Sender(redis_server.url).task(queue, "matrix_app.fail")
        (letter,) = worker.wait_letters(queue, 1)
    base = f"dlx:{{{queue}.dlq}}"
    ((member, score),) = client.zrange(base, 0, -1, withscores=True)
    assert member.decode() == letter["id"]
    assert abs(score / 1000 - client.time()[0]) < 120
    assert json.loads(client.hget(f"{base}:payloads", letter["id"]))["headers"]["task"] == "matrix_app.fail"
    assert json.loads(client.hget(f"{base}:records", letter["id"]))["reason"] == "failure"
    assert client.hget("dlx:queues", queue) == f"{queue}.dlq".encode()
    assert not unacknowledged(client, queue)


def test_the_payload_is_kept_byte_for_byte(redis_server, queue, client):
    item = (
        b'{"body": "W1tdLCB7fSwge31d",  "headers": {"task": "matrix_app.fail", "id": "exact", "x": 1.10, "empty": []},'
        b' "content-type": "application/json", "content-encoding": "utf-8", "properties": {"delivery_tag": "dt-1",'
        b' "body_encoding": "base64", "delivery_info": {"exchange": "", "routing_key": "' + queue.encode() + b'"},'
        b' "big": 12345678901234567890}}'
    )
    with Worker(redis_server.url, [queue], policy="version: 1\n", DLX_LATE="1") as worker:
        Sender(redis_server.url).item(queue, item)
        (letter,) = worker.wait_letters(queue, 1)
    assert client.hget(f"dlx:{{{queue}.dlq}}:payloads", letter["id"]) == item


def test_key_prefix_and_priorities(redis_server, queue, client):
    options = json.dumps({"global_keyprefix": "shop:", "priority_steps": [0, 5], "sep": ":"})
    sender = Sender(redis_server.url, prefix="shop:")
    with Worker(redis_server.url, [queue], policy="version: 1\n", DLX_TRANSPORT_OPTIONS=options) as worker:
        sender.task(queue, "matrix_app.fail", properties={"priority": 7})
        (letter,) = worker.wait_letters(queue, 1)
        assert letter["priority"] == 7
        assert client.zcard(f"shop:dlx:{{{queue}.dlq}}") == 1
        assert not client.exists(f"dlx:{{{queue}.dlq}}")
        worker.stop()
        worker.cli("replay", letter["id"], "--queue", queue)
        assert client.llen(f"shop:{queue}:5") == 1, "back in the list of its priority"
        assert worker.json("stats")[0]["queue"] == queue
        worker.start()
        worker.wait_letters(queue, 1)


def test_caps_are_exact_and_evictions_are_counted(redis_server, queue):
    policy = f"version: 1\nqueues: {{{queue}: {{dead_letter: {{max_length: 3}}}}}}\n"
    with Worker(redis_server.url, [queue], policy=policy, arguments=("-c", "1")) as worker:
        sender = Sender(redis_server.url)
        ids = [sender.task(queue, "matrix_app.fail", [n]) for n in range(8)]
        wait_for(lambda: worker.dead.stats(queue)[0].extra.get("captured") == 8, "8 captured", every=0.3)
        (row,) = worker.json("stats", queue)
        assert (row["letters"], row["evicted_max_length"]) == (3, 5)
        assert [letter["task_id"] for letter in worker.letters(queue)] == ids[-3:]


def test_caps_by_bytes_and_age(redis_server, queue):
    policy = f"version: 1\nqueues: {{{queue}: {{dead_letter: {{max_bytes: 4KiB}}}}}}\n"
    with Worker(redis_server.url, [queue], policy=policy, arguments=("-c", "1")) as worker:
        sender = Sender(redis_server.url)
        for n in range(4):
            sender.task(queue, "matrix_app.fail", [n], padding="x" * 1000)
        wait_for(lambda: worker.dead.stats(queue)[0].extra.get("captured") == 4, "4 captured", every=0.3)
        (row,) = worker.json("stats", queue)
        before = row["letters"]
        assert row["bytes"] <= 4096 and row["letters"] + row["evicted_max_bytes"] == 4 and row["evicted_max_bytes"] > 0
    policy = policy.replace("max_bytes: 4KiB", "max_age: 1s")
    with Worker(redis_server.url, [queue], policy=policy, arguments=("-c", "1")) as worker:
        # Nothing dies any more: the worker looks at the caps now and then.
        wait_for(lambda: worker.dead.stats(queue)[0].extra.get("evicted_max_age") == before, "the old ones leave", every=0.3)
        assert worker.letters(queue) == []
        wait_for(lambda: f"{before} letters of '{queue}.dlq' are gone by its caps" in worker.output, lambda: worker.output)


def test_a_killed_workers_messages_come_back_and_are_counted(redis_server, queue, client):
    options = json.dumps({"visibility_timeout": 1, "unacked_restore_interval": 1, "unacked_restore_throttle": 1})
    policy = f"version: 1\nqueues: {{{queue}: {{acks_late: true, max_deliveries: 2}}}}\n"
    sender = Sender(redis_server.url)
    item_id = sender.task(queue, "matrix_app.sleeps", [60])
    for delivery in (1, 2):
        worker = Worker(redis_server.url, [queue], policy=policy, DLX_TRANSPORT_OPTIONS=options, arguments=("-P", "solo"))
        worker.start()
        wait_for(lambda worker=worker: worker.ran() == ["sleeps"], f"delivery {delivery} started")
        worker.kill()
        assert len(unacknowledged(client, queue)) == 1, "the fault happened: the message is held by the dead"
    with Worker(redis_server.url, [queue], policy=policy, DLX_TRANSPORT_OPTIONS=options) as worker:
        (letter,) = worker.wait_letters(queue, 1)
        assert (letter["reason"], letter["deliveries"], letter["task_id"]) == ("max_deliveries", 3, item_id)
        assert worker.ran() == [], "poison is not run again"


def test_returns_are_counted_whichever_connection_looks_for_overdue_messages(redis_server, queue, client):
    """Often it is one that covers no queue: Celery's for remote control, or that of a tool."""
    Sender(redis_server.url).task(queue, "matrix_app.ok")
    item = client.rpop(queue)
    own_tag = json.loads(item)["properties"]["delivery_tag"]
    counts = deliveries_key("", queue)
    app = Celery(broker=redis_server.url, set_as_current=False)
    DeadLetters(app, policy=Policy())
    with app.connection_for_read() as connection:
        channel = connection.channel()
        for returns in (1, 2):
            channel.dlx_deliveries.register("unacked", "unacked_index", "dlx-dead:1", item, queue, own_tag)
            channel.qos.restore_by_tag("dlx-dead:1")
            assert client.rpop(queue) == item
            assert client.hget(counts, own_tag) == str(returns).encode()


def test_a_stock_worker_restores_our_deliveries_to_their_queue(redis_server, queue, client):
    """And ours takes what a stock producer sent and a stock worker left behind."""
    options = json.dumps({"visibility_timeout": 1, "unacked_restore_interval": 1, "unacked_restore_throttle": 1})
    ours = Worker(redis_server.url, [queue], policy="version: 1\n", DLX_LATE="1", arguments=("-P", "solo")).start()
    Sender(redis_server.url).task(queue, "matrix_app.sleeps", [60])
    wait_for(lambda: ours.ran() == ["sleeps"], "our worker runs the task")
    ours.kill()
    assert len(unacknowledged(client, queue)) == 1
    stock = Worker(
        redis_server.url, [f"{queue}.other"], DLX_STOCK="1", DLX_TRANSPORT_OPTIONS=options, arguments=("-c", "1")
    ).start()
    wait_for(lambda: client.llen(queue) == 1, "the stock worker puts the message back where it came from")
    assert not unacknowledged(client, queue)
    stock.stop()
    with Worker(redis_server.url, [queue], policy=f"version: 1\nqueues: {{{queue}: {{time_limit: 1s}}}}\n") as again:
        (letter,) = again.wait_letters(queue, 1)
        assert (letter["reason"], letter["deliveries"]) == ("time_limit", 2)


def test_unacknowledged_messages_return_at_shutdown(redis_server, queue, client):
    with Worker(redis_server.url, [queue], policy="version: 1\n", DLX_PREFETCH="8", arguments=("-c", "1")) as worker:
        sender = Sender(redis_server.url)
        sender.task(queue, "matrix_app.sleeps", [5])
        wait_for(
            lambda: worker.ran() == ["sleeps"] and not unacknowledged(client, queue), "the task runs, acknowledged early"
        )
        for n in range(5):
            sender.task(queue, "matrix_app.ok", [n])
        wait_for(lambda: len(unacknowledged(client, queue)) == 5, "messages are prefetched")
        worker.stop()
    assert client.llen(queue) == 5 and not unacknowledged(client, queue)


@pytest.fixture
def small_redis():
    """A server of 4 MB that evicts nothing."""
    server = servers.Redis("--maxmemory", "4mb", "--maxmemory-policy", "noeviction", "--appendonly", "no").start()
    yield server
    server.stop()


def fill(client) -> None:
    """Leave no room at all."""
    size = 100_000
    n = 0
    while size > 10:
        try:
            client.set(f"ballast{n}", b"x" * size)
            n += 1
        except redis.exceptions.OutOfMemoryError:
            size //= 2


@pytest.mark.parametrize("late", ["0", "1"])
def test_a_full_server_loses_nothing(small_redis, queue, late):
    client = redis.Redis.from_url(small_redis.url)
    with Worker(small_redis.url, [queue], policy="version: 1\n", DLX_LATE=late, arguments=("-c", "1")) as worker:
        sender = Sender(small_redis.url)
        blocker = sender.task(queue, "matrix_app.sleeps", [3])
        wait_for(lambda: worker.ran() == ["sleeps"], "the worker is busy")
        ids = [sender.task(queue, "matrix_app.fail", [n]) for n in range(6)]
        fill(client)
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            client.set("one more", "x" * 1000)
        wait_for(lambda: client.zcard(f"dlx:{{{queue}.dlq}}") == 6, lambda: worker.output[-3000:], timeout=60)
        assert worker.alive
        client.delete(*client.keys("ballast*"))
        assert {letter["task_id"] for letter in worker.letters(queue)} == set(ids)
        assert blocker not in ids and client.llen(queue) == 0


def test_a_worker_goes_on_after_no_ack_arrived(queue):
    """What cannot be settled must not use up the credit, without which nothing is read, not even that Redis went away."""
    server = servers.Redis("--appendfsync", "always").start()
    policy = f"version: 1\nqueues: {{{queue}: {{acks_late: true}}}}\n"
    try:
        sender = Sender(server.url)
        for number in range(6):
            sender.task(queue, "storm.work", [number])
        # Without remote control, whose connection would notice; busy, so that nothing waits for Redis either.
        with Worker(server.url, [queue], app="faults.storm_app", policy=policy, DLX_STORM_TASK="1",
                    arguments=("-c", "1", "--without-heartbeat")) as worker:  # fmt: skip
            # Two are done, and two that it holds use up its credit; or so a little later.
            wait_for(
                lambda: worker.output.count(" received") == (done := len(worker.ran())) + 2 and done >= 2,
                lambda: worker.output[-2000:],
            )
            server.crash()
            wait_for(
                lambda: worker.output.count("Couldn't ack") == 2 or "onnection to broker lost" in worker.output,
                lambda: f"the fault happened: {worker.output[-2000:]}",
            )
            server.run()
            numbers = {str(number) for number in range(6)}
            wait_for(lambda: set(worker.ran()) == numbers, lambda: f"{worker.ran()} {worker.output[-3000:]}")
            with redis.Redis.from_url(server.url) as client:
                wait_for(lambda: not unacknowledged(client, queue), "nothing is held any more")
    finally:
        server.stop()


def test_replay_empties_a_full_server(small_redis, queue):
    client = redis.Redis.from_url(small_redis.url)
    with Worker(small_redis.url, [queue], policy="version: 1\n") as worker:
        Sender(small_redis.url).task(queue, "matrix_app.fail")
        worker.wait_letters(queue, 1)
    fill(client)
    app = Celery("reader", broker=small_redis.url)
    dead = DeadLetters(app, policy=Policy())
    assert len(list(dead.replay(queue=queue))) == 1
    assert client.llen(queue) == 1
    dead.close()


def test_an_evicting_server_is_warned_of(queue):
    server = servers.Redis("--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru").start()
    try:
        with Worker(server.url, [queue], policy="version: 1\n", arguments=("-c", "1")) as worker:
            assert "maxmemory-policy allkeys-lru" in worker.output and "set it to noeviction" in worker.output
    finally:
        server.stop()


def test_control_and_result_queues_are_never_touched(redis_server, queue, client):
    app = Celery("plain", broker=redis_server.url, backend="rpc://")
    DeadLetters(app, policy=Policy())
    before = set(client.keys("dlx:*"))
    with app.connection_for_read() as connection:
        simple = connection.SimpleQueue(queue)
        simple.put({"hello": 1})
        message = simple.get(timeout=30)
        assert message.payload == {"hello": 1}
        message.reject()
        simple.close()
    assert app.control.ping(timeout=0.3) == []
    assert set(client.keys("dlx:*")) <= before, "no more than there were; some of other tests may have expired"
    assert not unacknowledged(client, queue)


def test_a_poisons_neighbours_are_not_to_blame(redis_server, queue, client):
    """They were held by each worker that died, and never started."""
    options = json.dumps({"visibility_timeout": 1, "unacked_restore_interval": 1, "unacked_restore_throttle": 1})
    policy = f"version: 1\nqueues: {{{queue}: {{acks_late: true, max_deliveries: 2}}}}\n"
    sender = Sender(redis_server.url)
    poison = sender.task(queue, "matrix_app.sleeps", [60])
    for _ in range(3):
        sender.task(queue, "matrix_app.ok")
    arguments = ("-P", "solo", "--prefetch-multiplier", "4")
    for delivery in (1, 2):
        worker = Worker(redis_server.url, [queue], policy=policy, DLX_TRANSPORT_OPTIONS=options, arguments=arguments).start()
        wait_for(lambda worker=worker: worker.ran(), f"delivery {delivery} started")
        assert len(unacknowledged(client, queue)) == 4, "its neighbours are held"
        worker.kill()
    arguments = ("-c", "1", "--prefetch-multiplier", "4")
    with Worker(redis_server.url, [queue], policy=policy, DLX_TRANSPORT_OPTIONS=options, arguments=arguments) as worker:
        (letter,) = worker.wait_letters(queue, 1)
        assert (letter["task_id"], letter["reason"]) == (poison, "max_deliveries")
        wait_for(lambda: worker.ran() == ["ok "] * 3, worker.ran)
        assert len(worker.letters(queue)) == 1


def test_what_overflows_becomes_letters(redis_server, queue, client):
    sender = Sender(redis_server.url)
    ids = [sender.task(queue, "matrix_app.sleeps", [0.3]) for _ in range(150)]
    policy = f"version: 1\nqueues: {{{queue}: {{max_length: 20}}}}\n"
    with Worker(redis_server.url, [queue], policy=policy, arguments=("-c", "1", "--prefetch-multiplier", "1")) as worker:
        worker.wait_letters(queue, 100)
        wait_for(lambda: client.llen(queue) <= 20, lambda: client.llen(queue))
        wait_for(lambda: client.llen(queue) == 0, lambda: client.llen(queue), every=0.5)
        letters = worker.letters(queue)
        wait_for(lambda: len(worker.ran()) + len(letters) == len(ids), lambda: (len(worker.ran()), len(letters)))
        assert {letter["reason"] for letter in letters} == {"maxlen"}
        assert [letter["task_id"] for letter in letters] == [i for i in ids if i in {each["task_id"] for each in letters}]
        worker.cli("replay", letters[0]["id"], "--queue", queue, "--wait", "30s")
    assert not unacknowledged(client, queue)
