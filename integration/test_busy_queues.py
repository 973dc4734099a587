"""Quorum queues that are busy: the broker says for them that they are empty, and that nobody consumes them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import amqp
import pytest
from servers import wait_for
from test_browsing import dead, fill  # noqa: F401 - a fixture

from celery_dlx.brokers.rabbitmq import apply, reader
from celery_dlx.brokers.rabbitmq.declare import SideChannel
from celery_dlx.policy.settings import Policy

EXCHANGE = Policy().exchange


@pytest.fixture
def said(rabbitmq, monkeypatch):
    """Messages and consumers, as often as the broker says them."""
    if not hasattr(rabbitmq, "frozen"):
        pytest.fail("needs a broker of our own: unset DLX_TEST_RABBITMQ")
    found, declare = [], amqp.Channel.queue_declare

    def noted(*arguments, **options):
        live = declare(*arguments, **options)
        found.append((live.message_count, live.consumer_count))
        return live

    monkeypatch.setattr(amqp.Channel, "queue_declare", noted)
    return found


def meanwhile(rabbitmq, dlq, said, look):
    """What is found by somebody who began to look while the queue was busy."""
    with ThreadPoolExecutor(1) as pool:
        with rabbitmq.frozen(dlq):
            said.clear()
            found = pool.submit(look)
            # What is asked first is only whether it exists.
            wait_for(lambda: said.count((0, 0)) >= 5 or found.done(), lambda: said)
        return found.result(30)


@pytest.mark.parametrize("what", ["letters", "stats", "held_by_others"])
def test_they_are_not_taken_for_empty(rabbitmq, dead, queue, said, what):  # noqa: F811
    ids = fill(dead, queue, 6)
    look, expected = {
        "letters": (lambda: [letter.id for letter in dead.letters(queue)], ids[4:]),
        "stats": (lambda: dead.stats(queue)[0].letters, 2),
        "held_by_others": (lambda: dead.broker.held_by_others(queue), True),
    }[what]
    with dead.app.connection_for_read() as connection:
        holding = reader.Reader(connection, f"{queue}.dlq", few=4)
        assert meanwhile(rabbitmq, f"{queue}.dlq", said, look) == expected
        assert (0, 0) in said, "the broker did say so"
        assert (2, 1) in said
        holding.close()


def delete(dead, queue):  # noqa: F811
    with dead.app.connection_for_write() as connection, SideChannel(connection.connection) as side:
        return apply._delete_empty(side, EXCHANGE, f"{queue}.dlq", queue)


def is_bound(dead, queue) -> bool:  # noqa: F811
    count = dead.stats(queue)[0].letters
    with dead.app.connection_for_write() as connection:
        connection.default_channel.basic_publish_confirm(amqp.Message(b"one more"), EXCHANGE, queue)
    wait_for(lambda: dead.stats(queue)[0].letters == count + 1, "it to come")
    return True


def test_they_are_not_deleted_for_empty(rabbitmq, dead, queue, said, monkeypatch):  # noqa: F811
    """Nor left without a way in for letters while they are waited for."""
    ids = fill(dead, queue, 3)
    # It becomes busy, and letters come, after it said that it has none to give.
    monkeypatch.setattr(amqp.Channel, "basic_get", lambda channel, name: None)
    with rabbitmq.frozen(f"{queue}.dlq"):
        said.clear()
        assert "did not say at once what it holds" in delete(dead, queue)
        assert said == [(0, 0)], "the broker did say so"
    assert [letter.id for letter in dead.letters(queue)] == ids
    assert is_bound(dead, queue)


def test_what_a_queue_without_a_leader_is_said_to_hold_is_not_believed(dead, queue, monkeypatch):  # noqa: F811
    """Then the broker says at once that it is empty."""
    ids = fill(dead, queue, 3)
    with monkeypatch.context() as lying:
        lying.setattr(SideChannel, "counted", lambda self, name, wait: SimpleNamespace(message_count=0, consumer_count=0))
        assert "replay, export or purge them first" in delete(dead, queue)
    assert sorted(letter.id for letter in dead.letters(queue)) == sorted(ids)
    assert is_bound(dead, queue)
    assert len(list(dead.discard(queue=queue))) == 4
    assert delete(dead, queue) is None
    assert dead.stats(queue)[0].extra == {"missing": True}
