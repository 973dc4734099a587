"""How many messages a queue holds, as far as it says so itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from celery_dlx.brokers.rabbitmq import counting
from celery_dlx.errors import BrokerUnreachableError


class Channel:
    """A broker's answers, and how long each takes, in seconds; the last one for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, way: float, *answers: tuple[float, int, int]) -> None:
        self.now, self.way, self.answers, self.asked = 0.0, way, list(answers), 0
        monkeypatch.setattr(counting, "monotonic", lambda: self.now)

    def queue_declare(self, name: str, passive: bool) -> SimpleNamespace:
        assert (name, passive) == ("q.dlq", True)
        self.asked += 1
        took, messages, consumers = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.now += self.way + took
        return SimpleNamespace(message_count=messages, consumer_count=consumers)

    def basic_qos(self, *arguments: object) -> None:
        self.now += self.way


@pytest.mark.parametrize("way", [0.001, 0.15, 3.0])
@pytest.mark.parametrize("answer", [(0.001, 0, 0), (0.001, 5, 0), (0.24, 5, 0), (0.24, 0, 1), (8.0, 5, 1)])
def test_an_answer_of_the_queues_own_is_taken(monkeypatch, way, answer):
    channel = Channel(monkeypatch, way, answer)
    found = counting.counted(channel, "q.dlq")
    assert (found.message_count, found.consumer_count) == answer[1:]
    assert channel.asked == 1, "however far away the broker is"


@pytest.mark.parametrize("way", [0.001, 0.15, 3.0])
def test_a_queue_that_is_busy_is_asked_again(monkeypatch, way):
    channel = Channel(monkeypatch, way, (0.25, 0, 0), (0.25, 0, 0), (0.1, 7, 0))
    assert counting.counted(channel, "q.dlq").message_count == 7
    assert channel.asked == 3


def test_one_that_never_says_is_not_taken_for_empty(monkeypatch):
    channel = Channel(monkeypatch, 0.001, (0.25, 0, 0))
    with pytest.raises(BrokerUnreachableError, match=r"queue 'q.dlq' did not say within 60 s what it holds"):
        counting.counted(channel, "q.dlq")
    assert 60 < channel.now < 61


def test_somebody_who_cannot_wait_asks_once(monkeypatch):
    channel = Channel(monkeypatch, 0.001, (0.25, 0, 0))
    with pytest.raises(BrokerUnreachableError, match=r"queue 'q.dlq' did not say at once what it holds"):
        counting.counted(channel, "q.dlq", wait=0)
    assert channel.asked == 1
