"""Acknowledgements that go together."""

from __future__ import annotations

from collections import Counter, OrderedDict
from types import SimpleNamespace

import pytest

from celery_dlx.brokers.acks import collect
from celery_dlx.brokers.rabbitmq.pipeline import RETURNED, STORED, ConfirmPipeline, return_key
from celery_dlx.brokers.rabbitmq.returns import RETURNS, copy_of, count_of, route_of
from celery_dlx.letters import Original
from celery_dlx.worker.acks import Acks


class Channel:
    no_ack_consumers = None

    def __init__(self, connection: object = "open") -> None:
        self.connection = connection


class Message:
    """As far as kombu's is used."""

    def __init__(self, tag: int = 1, channel: object = None) -> None:
        self.delivery_tag, self.acknowledged = tag, False
        self.channel = channel or Channel()

    def ack(self) -> None:
        self.channel.basic_ack(self.delivery_tag)
        self.acknowledged = True

    def ack_log_error(self, logger, errors, multiple=False) -> None:
        self.acknowledged = "by itself"


class Loop:
    def __init__(self) -> None:
        self.later: list = []

    def call_later(self, seconds, step) -> None:
        self.later.append(step)


class Setup:
    def __init__(self, prefetch: int = 64, eager: bool = False) -> None:
        self.written: list[list[Message]] = []
        self.loop = Loop()
        consumer = SimpleNamespace(qos=SimpleNamespace(value=prefetch), pool=SimpleNamespace(num_processes=2))
        self.acks = Acks(consumer, SimpleNamespace(acknowledge=self.written.append, eager=eager))

    def take(self, count: int) -> list[Message]:
        messages = [Message(tag) for tag in range(count)]
        for message in messages:
            self.acks.take_over(message)
            message.ack_log_error(None, ())
        return messages


def test_they_wait_for_company_and_not_for_long():
    setup = Setup()
    setup.acks.attach(setup.loop)
    messages = setup.take(5)
    assert setup.written == [] and len(setup.loop.later) == 1
    setup.loop.later.pop()()
    assert setup.written == [messages]
    assert not any("ack_log_error" in vars(message) for message in messages), "no cycle is left behind"
    setup.take(1)
    assert len(setup.loop.later) == 1, "the next one has a timer of its own"


@pytest.mark.parametrize(("prefetch", "together"), [(0, 8), (1, 1), (2, 1), (18, 2), (64, 7), (1000, 8)])
def test_a_small_prefetch_does_not_wait(prefetch, together):
    setup = Setup(prefetch)
    setup.acks.attach(setup.loop)
    setup.take(together - 1)
    assert setup.written == []
    setup.take(1)
    assert [len(each) for each in setup.written] == [together]


@pytest.mark.parametrize("eager", [True, False])
def test_without_a_loop_each_goes_by_itself(eager):
    setup = Setup(eager=eager)
    if eager:
        setup.acks.attach(setup.loop)
    assert [message.acknowledged for message in setup.take(2)] == ["by itself"] * 2
    assert setup.written == [] and setup.loop.later == []


def test_the_end_of_the_loop_leaves_none_behind():
    setup = Setup()
    setup.acks.attach(setup.loop)
    messages = setup.take(3)
    setup.acks.detach()
    assert setup.written == [messages]
    assert setup.take(1)[0].acknowledged == "by itself"


def test_what_was_settled_or_lost_its_channel_is_left_out():
    channel = Channel()
    messages = [Message(1, channel), Message(2, Channel(None)), Message(3, channel), Message(4)]
    messages[2].acknowledged = True
    messages[3].channel = None
    assert collect(messages) == {channel: [1]}
    assert messages[0].acknowledged and messages[0].channel is channel


def original(**headers) -> Original:
    return Original(body=b"[]", headers=headers, properties={"priority": 3}, exchange="orders", routing_key="orders.eu")


def test_a_copy_carries_its_count_and_where_it_came_from():
    message, key = copy_of(original(retries=1, own="kept"), 2, "guest")
    headers = message.properties["application_headers"]
    assert (count_of(headers), route_of(headers), headers[RETURNS]["key"]) == (2, ("orders", "orders.eu"), key)
    assert (headers["own"], message.properties["priority"], message.body) == ("kept", 3, b"[]")
    assert count_of({**headers, "retries": 2}) == 0, "the next retry is another message"


@pytest.mark.parametrize("found", [None, "text", [], {"count": -1}, {"count": "2"}, {"count": 10**9}, {"retries": 5}])
def test_anybody_can_send_such_a_header(found):
    assert count_of({RETURNS: found}) == 0


@pytest.mark.parametrize("forged", ["text", 1, [1], None])
def test_a_returned_message_with_a_forged_header_is_told_apart(forged):
    headers = {RETURNS: forged, "x-celery-dlx": {"id": "letter"}}
    assert return_key(SimpleNamespace(properties={"application_headers": headers})) == "letter"


def test_each_of_two_returned_messages_with_one_key_is_a_returned_one():
    """Anybody can make two letters with one id; one acknowledgement may then confirm both."""
    outcomes: list[str] = []
    pipeline = object.__new__(ConfirmPipeline)
    pipeline._on_outcome = lambda token, outcome: outcomes.append(outcome)
    pipeline._waiting = OrderedDict(enumerate([SimpleNamespace(key=key) for key in ("twin", "twin", "other")], 1))
    pipeline._returned = Counter()
    message = SimpleNamespace(properties={"application_headers": {"x-celery-dlx": {"last": "twin"}}})
    for _ in range(2):
        pipeline._on_return(Exception(), "", "gone", message)
    pipeline._on_ack(3, multiple=True)
    assert outcomes == [RETURNED, RETURNED, STORED] and not pipeline._returned and not pipeline._waiting


def test_what_the_broker_would_refuse_or_send_elsewhere_is_not_copied():
    assert copy_of(original(CC=["other"]), 1, "guest") is None
    foreign = original()
    foreign.properties["user_id"] = "somebody"
    assert copy_of(foreign, 1, "guest") is None
    foreign.properties["user_id"] = "guest"
    assert copy_of(foreign, 1, "guest") is not None
