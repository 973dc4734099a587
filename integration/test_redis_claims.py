"""How messages are taken from Redis: all at once, back again, and without a moment in which they are nowhere."""

from __future__ import annotations

import json
import signal
from contextlib import suppress
from dataclasses import replace

import pytest
import redis
from celery import Celery
from kombu import Queue
from raw import Sender
from servers import wait_for
from workers import Worker, unacknowledged

from celery_dlx import DeadLetters
from celery_dlx.brokers.redis.capture import RedisCapturer
from celery_dlx.brokers.redis.limits import Limits
from celery_dlx.policy.settings import BUILT_IN, Policy

POLICY = "version: 1\n"
LATE = "version: 1\ndefaults: {acks_late: true}\n"


@pytest.fixture
def client(redis_server):
    with redis.Redis.from_url(redis_server.url) as found:
        yield found


def waiters(client):
    """Connections that wait for a list, or did."""
    return [each for each in client.client_list() if each["cmd"] == "blmove"]


@pytest.mark.parametrize("pool", ["solo", "gevent", "prefork"])
def test_a_warm_shutdown_puts_back_what_did_not_start(redis_server, queue, client, pool):
    arguments = ("-P", pool, "-c", "1", "--prefetch-multiplier", "8")
    worker = Worker(redis_server.url, [queue], policy=POLICY, arguments=arguments).start()
    sender = Sender(redis_server.url)
    for _ in range(8):
        sender.task(queue, "matrix_app.sleeps", [1.5])

    def begun():
        started = len(worker.ran())
        # What a child has begun and Celery's parent has not heard of is put back, too (AsynPool.flush). Where tasks keep the
        # loop from turning, acknowledgements are always one task behind, and sent when it ends.
        heard = pool != "prefork" or client.llen(queue) + len(unacknowledged(client, queue)) == 8 - started
        return started and heard

    wait_for(begun, "the first task runs, and in a child is acknowledged")
    worker.process.send_signal(signal.SIGTERM)
    assert worker.wait_exit() == 0, worker.output[-5000:]
    done = len(worker.ran())
    assert 1 <= done < 8, "it was stopped in the midst of it"
    assert client.llen(queue) == 8 - done
    assert not unacknowledged(client, queue)


def test_silent_connections_that_the_server_closes_are_no_news(redis_server, queue, client):
    """While there is no credit nothing waits; a server or balancer may close such connections."""
    arguments = ("-c", "1", "--prefetch-multiplier", "1")
    with Worker(redis_server.url, [queue], policy=LATE, arguments=arguments) as worker:
        wait_for(lambda: waiters(client), "the idle worker waits")
        Sender(redis_server.url).task(queue, "matrix_app.sleeps", [12])
        wait_for(lambda: worker.ran(), "the task runs")
        # Waits that were under way end by themselves; then the connections are silent.
        wait_for(lambda: all(float(each["idle"]) >= 3 for each in waiters(client)), "the waits ended", every=0.2)
        killed = [client.client_kill(each["addr"]) for each in waiters(client)]
        assert killed
        Sender(redis_server.url).task(queue, "matrix_app.ok")
        wait_for(lambda: "ok " in worker.ran(), worker.ran)
        assert worker.ran().count("sleeps") == 1, worker.output[-6000:]
        assert "Connection to broker lost" not in worker.output


def test_a_key_that_is_no_list_does_not_keep_the_others_waiting(redis_server, queue, client):
    with Worker(redis_server.url, [queue], policy=POLICY) as worker:
        wait_for(lambda: waiters(client), "the idle worker waits")
        client.set(f"{queue}\x06\x163", "no list")
        for _ in range(3):
            seen = worker.ran().count("ok ")
            Sender(redis_server.url).task(queue, "matrix_app.ok")
            wait_for(lambda seen=seen: worker.ran().count("ok ") > seen, lambda: worker.output[-2000:])
        assert worker.alive
        client.delete(f"{queue}\x06\x163")


def sent(url, queue):
    try:
        return Sender(url).task(queue, "matrix_app.ok")
    except redis.exceptions.ConnectionError:
        return None


def test_a_server_with_no_connections_to_spare(queue, tmp_path):
    from servers import Redis

    server = Redis("--maxclients", "10").start()
    try:
        with Worker(server.url, [queue], policy=POLICY, arguments=("-c", "1")) as worker:
            wait_for(lambda: "for want of more connections" in worker.output, lambda: worker.output[-2000:])
            # It says so before it gives up those it has.
            wait_for(lambda: sent(server.url, queue), "a connection to spare")
            wait_for(lambda: worker.ran() == ["ok "], lambda: worker.output[-2000:])
            assert "Connection to broker lost" not in worker.output
    finally:
        server.stop()


class Consumer:
    """A channel that claims, driven by hand."""

    def __init__(self, url: str, queues: list[str]) -> None:
        self.app = Celery("claims", broker=url, set_as_current=False)
        DeadLetters(self.app, policy=Policy())
        self.connection = self.app.connection_for_read()
        self.channel = self.connection.default_channel
        self.channel.qos.prefetch_count = 4
        self.got = []
        self.tags = {queue: self.add(queue) for queue in queues}

    def add(self, queue: str) -> str:
        Queue(queue, channel=self.channel).declare()
        settings = Policy().settings(queue)
        self.channel.dlx_cover(queue, settings, Policy(), lambda *garbage: None)
        self.channel.basic_consume(queue, False, self.got.append, f"tag-{queue}")
        return f"tag-{queue}"

    def drain(self, until) -> None:
        def step() -> bool:
            if not until():
                try:
                    self.connection.drain_events(timeout=0.2)
                except TimeoutError:
                    pass
            return until()

        wait_for(step, "what was to be drained")

    def idle(self) -> None:
        """Until it waits for more."""
        self.drain(lambda: self.channel.dlx_claims.waiting and self.channel.dlx_claims._waiters)

    def close(self) -> None:
        self.connection.release()


@pytest.fixture
def consumer(redis_server, queue):
    found = Consumer(redis_server.url, [queue])
    yield found
    found.close()


def test_no_more_than_the_credit_is_claimed(redis_server, queue, client, consumer):
    sender = Sender(redis_server.url)
    for _ in range(10):
        sender.task(queue)
    consumer.drain(lambda: len(consumer.got) == 4)
    assert (client.llen(queue), len(consumer.got)) == (6, 4)
    for message in list(consumer.got):
        message.ack()
    consumer.drain(lambda: len(consumer.got) == 8)
    assert client.llen(queue) == 2


def test_what_is_held_is_in_redis_at_every_moment(redis_server, queue, client, consumer):
    consumer.idle()
    Sender(redis_server.url).task(queue)
    assert client.llen(queue) == 1, "woken or not, it lies in its list until it is claimed"
    consumer.drain(lambda: consumer.got)
    assert len(unacknowledged(client, queue)) == 1


def test_a_claim_whose_answer_is_lost_comes_back_at_once(redis_server, queue, client, consumer):
    Sender(redis_server.url).task(queue)
    channel = consumer.channel
    consumer.connection.transport.cycle.on_poll_start()
    assert channel.dlx_claims.asked, "a claim is under way"
    wait_for(lambda: client.llen(queue) == 0, "it was executed")
    channel.client.connection._sock.close()  # nobody reads the answer
    consumer.close()
    again = Consumer(redis_server.url, [queue])
    again.drain(lambda: again.got)
    assert len(again.got) == 1
    again.close()


def test_cancelled_queues_get_back_what_was_claimed(redis_server, queue, client, consumer):
    consumer.channel.dlx_claims.one_by_one = True
    sender = Sender(redis_server.url)
    for _ in range(4):
        sender.task(queue)
    consumer.drain(lambda: consumer.got)
    consumer.channel.basic_cancel(consumer.tags[queue])
    assert client.llen(queue) == 4 - len(consumer.got)
    assert consumer.channel.dlx_claims.tags() == []


def test_a_backlog_goes_out_one_by_one_and_waits_for_credit(redis_server, queue, client, consumer):
    """As with tasks that run in the loop itself: each is settled before the next one is given out."""
    claims = consumer.channel.dlx_claims
    claims.one_by_one = True
    for _ in range(4):
        Sender(redis_server.url).task(queue)
    consumer.drain(lambda: consumer.got)
    assert (len(consumer.got), len(claims.tags())) == (1, 3), "all were claimed, and one given out"
    consumer.connection.drain_events(timeout=5)
    assert len(consumer.got) == 2
    consumer.channel.qos.prefetch_count = 2
    for _ in range(2):  # its files are readable at once, and then not any more: that would be a busy loop
        with suppress(TimeoutError):
            consumer.connection.drain_events(timeout=0.01)
    assert claims._backlog not in [kind for _, kind in consumer.connection.transport.cycle._fd_to_chan.values()]
    assert len(consumer.got) == 2, "there is no credit for more"
    consumer.channel.qos.prefetch_count = 4
    consumer.drain(lambda: len(consumer.got) == 4)
    for message in consumer.got:
        message.ack()
    assert not unacknowledged(client, queue)


def test_queues_that_come_and_go_leave_no_connections(redis_server, queue, client, consumer):
    consumer.idle()
    wait_for(lambda: len(waiters(client)) >= 4, "Redis has heard of all")
    before = len(waiters(client))
    for n in range(20):
        tag = consumer.add(f"{queue}-{n}")
        consumer.drain(lambda n=n: any(f"{queue}-{n}" in key for key in consumer.channel.dlx_claims._waiters))
        consumer.channel.basic_cancel(tag)
    consumer.idle()
    consumer.drain(lambda: len(consumer.channel.dlx_claims._waiters) == 4)
    wait_for(lambda: len(waiters(client)) <= before, lambda: str(len(waiters(client))))


def test_queues_take_turns(redis_server, queue, client):
    other = f"{queue}-other"
    sender = Sender(redis_server.url)
    for _ in range(6):
        sender.task(queue, "busy")
    for _ in range(2):
        sender.task(other, "quiet")
    consumer = Consumer(redis_server.url, [queue, other])
    consumer.drain(lambda: len(consumer.got) == 4)
    names = [message.headers["task"] for message in consumer.got]
    assert names.count("quiet") == 2
    consumer.close()


@pytest.fixture
def overflow(consumer):
    return Limits(consumer.channel, Policy())


def test_an_overflow_that_is_sent_twice_takes_no_more(redis_server, queue, client, consumer, overflow):
    """As redis-py does with kombu's `retry_on_timeout`, when an answer is lost."""
    for _ in range(30):
        Sender(redis_server.url).task(queue)
    keys, arguments = ["unacked", "unacked_index", queue], [10, 100, "dlx-twice:", 0, json.dumps(queue)]
    first, second = overflow._overflow(keys, arguments), overflow._overflow(keys, arguments)
    assert len(first) == 20 and first == second
    assert client.llen(queue) == 10
    for number in range(1, 21):
        consumer.channel.qos.put_back([f"dlx-twice:{number}"], counted=False)
    assert client.llen(queue) == 30


def test_an_overflow_whose_answer_is_lost_comes_back(redis_server, queue, client, consumer, overflow):
    for _ in range(6):
        Sender(redis_server.url).task(queue)
    run = overflow._overflow

    def lose(*args):
        run(*args)
        raise redis.exceptions.ConnectionError("the answer is lost")

    overflow._overflow = lose
    with pytest.raises(redis.exceptions.ConnectionError):
        overflow._too_many(queue, replace(BUILT_IN, max_length=2), [queue])
    assert client.llen(queue) == 2, "the fault happened"
    consumer.drain(lambda: len(consumer.got) == 4)
    for message in consumer.got:
        message.ack()
    consumer.drain(lambda: len(consumer.got) == 6)
    assert all(message.dlx.deliveries == 1 for message in consumer.got), "nobody had been given them"


@pytest.fixture
def capturer(consumer):
    return RedisCapturer(lambda: consumer.connection, Policy())


def test_acknowledgements_that_redis_refuses_keep_no_credit(redis_server, queue, client, consumer, capturer):
    """For want of replicas, or with a disk that is full: else the worker would be without credit for good."""
    for _ in range(8):
        Sender(redis_server.url).task(queue)
    consumer.drain(lambda: len(consumer.got) == 4)
    client.config_set("min-replicas-to-write", 1)
    try:
        capturer.acknowledge(list(consumer.got))
        assert len(unacknowledged(client, queue)) == 4, "the fault happened"
    finally:
        client.config_set("min-replicas-to-write", 0)
    consumer.drain(lambda: len(consumer.got) == 8)
    assert sum(message.dlx.deliveries == 2 for message in consumer.got[4:]) == 4, "those come again, and are counted"


def test_what_waits_to_be_acknowledged_is_not_put_back_when_its_channel_closes(
    redis_server, queue, client, consumer, capturer
):
    for _ in range(3):
        Sender(redis_server.url).task(queue)
    consumer.drain(lambda: len(consumer.got) == 3)
    consumer.channel.dlx_settle = lambda: capturer.acknowledge(consumer.got[:2])
    consumer.channel.close()
    assert client.llen(queue) == 1
