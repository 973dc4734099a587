"""From exceptions to deaths, and which messages are refused before they become requests."""

from __future__ import annotations

import pytest
from billiard.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError
from celery.exceptions import InvalidTaskError, MaxRetriesExceededError, Reject, TaskRevokedError
from celery.utils.serialization import UnpickleableExceptionWrapper
from hypothesis import given
from hypothesis import strategies as st
from kombu import Queue

from celery_dlx.brokers.queues import CoveredQueue, cover_queue
from celery_dlx.brokers.rabbitmq.letters import at_rest, letter_of, original_of, revived
from celery_dlx.brokers.redis.letters import original_of as redis_original_of
from celery_dlx.letters import Death, compose
from celery_dlx.policy.settings import Policy, QueueSettings
from celery_dlx.topology.arguments import dlq_arguments, source_arguments, version_tuple
from celery_dlx.worker.intake import HeldRequest
from celery_dlx.worker.outcome import failure_reason, make_death
from celery_dlx.worker.strategy import check_message


@pytest.mark.parametrize(
    ("exc", "retries", "limit", "reason"),
    [
        (ValueError(), 0, 3, "failure"),
        (ValueError(), 3, 3, "retries_exhausted"),
        (ValueError(), 5, None, "failure"),
        (ValueError(), 0, 0, "failure"),
        (ValueError(), 2, 3, "failure"),
        (ValueError(), "x", 3, "failure"),
        (MaxRetriesExceededError(), 0, 0, "retries_exhausted"),
        (Reject(), 0, 3, "rejected"),
        (TimeLimitExceeded(1), 0, 3, "time_limit"),
        (SoftTimeLimitExceeded(), 0, 3, "soft_time_limit"),
        (WorkerLostError(), 3, 3, "worker_lost"),
        (SystemExit(1), 0, 3, "worker_lost"),
    ],
)
def test_reasons(exc, retries, limit, reason):
    assert failure_reason(exc, retries, limit) == reason


def test_exceptions_that_cannot_be_pickled_or_printed():
    wrapped = UnpickleableExceptionWrapper("shop.errors", "Broken", ("arg",), "Broken('arg')")
    death = make_death("failure", "q", exc=wrapped, trace="Traceback")
    assert (death.exception_type, death.message, death.traceback) == ("shop.errors.Broken", "Broken('arg')", "Traceback")

    class Bad(Exception):
        def __str__(self):
            raise SystemExit

    assert make_death("failure", "q", exc=Bad()).message.startswith("<unprintable Bad")
    assert len(make_death("failure", "q", exc=ValueError(), trace="x" * 10**6).traceback) <= 16_384


class FakeMessage:
    def __init__(self, payload, **headers):
        self.payload = payload
        self.headers = {"id": "i", "task": "t", **headers}


def test_good_messages_pass():
    check_message(FakeMessage([[], {}, {}], timelimit=[1, None], retries=2), None)
    check_message(FakeMessage([(), {}, None]), None)
    check_message(FakeMessage({"id": "i", "task": "t", "args": [], "kwargs": {}}), {"args": []})


@given(
    st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(), x))
)
def test_any_payload_passes_or_is_invalid(payload):
    try:
        check_message(FakeMessage(payload), None)
    except InvalidTaskError as exc:
        assert "expected" in str(exc)
    else:
        assert isinstance(payload[0] if isinstance(payload, list) else payload.get("args", []), list)


@given(st.binary(max_size=200))
def test_any_list_item_has_an_original(item):
    assert redis_original_of(item).raw == item


def test_a_letter_rests_and_comes_back():
    import amqp

    headers = {"task": "t", "id": "1", "retries": 1, "CC": ["x"], "x-death": [], "n": [1, {"deep": None}]}
    raw = amqp.Message(b"body", application_headers=headers, expiration="5", user_id="other", priority=3)
    raw.delivery_info = {"exchange": "e", "routing_key": "k"}
    letter = compose(Death("failure", "q", 5, "E", "m", "t"), original_of(raw), "q.dlq")
    resting = at_rest(letter, "guest")
    assert {"expiration", "user_id"}.isdisjoint(resting.properties) and "CC" not in resting.properties["application_headers"]
    resting.delivery_info = {"exchange": "celery.dlx", "routing_key": "q"}
    read = letter_of(resting, "q", "q.dlq")
    assert read.as_dict() == letter.as_dict()
    message, changes = revived(read, "guest")
    assert message.properties["expiration"] == "5" and message.body == b"body"
    assert message.properties["application_headers"]["n"] == [1, {"deep": None}]
    assert [change.split(" ")[0] for change in changes] == ["retries", "user_id", "CC"]


def test_a_record_gives_way_to_the_frame():
    import amqp
    from amqp.serialization import dumps

    raw = amqp.Message(b"", application_headers={"task": "t", "id": "1", "big": "x" * 5000})
    raw.delivery_info = {}
    letter = compose(Death("failure", "q", 5, "E", "m" * 2000, "t" * 16000 + "END"), original_of(raw), "q.dlq")
    headers = at_rest(letter, None, 8192).properties["application_headers"]
    assert len(dumps("F", [headers])) < 8192 and headers["x-celery-dlx"]["exception"]["traceback"].endswith("END")
    letter.original.headers = {"big": "x" * 9000}
    with pytest.raises(ValueError, match="bytes left"):
        at_rest(letter, None, 8192)


def test_arguments():
    policy = Policy()
    settings = QueueSettings(type="quorum", max_deliveries=5, message_ttl=1.5, max_length=9)
    assert source_arguments(policy, "q", settings) == {
        "x-queue-type": "quorum", "x-message-ttl": 1500, "x-max-length": 9, "x-delivery-limit": 4,
        "x-dead-letter-exchange": "celery.dlx", "x-dead-letter-routing-key": "q",
    }  # fmt: skip
    own = {"x-dead-letter-exchange": "mine", "x-queue-type": "classic"}
    assert source_arguments(policy, "q", QueueSettings(), own) == own
    assert "x-dead-letter-exchange" not in source_arguments(Policy(via="policy"), "q", QueueSettings())
    assert dlq_arguments(settings, (4, 0, 5))["x-delivery-limit"] == -1
    assert "x-delivery-limit" not in dlq_arguments(settings, (3, 13))
    assert [version_tuple(text) for text in ("4.0.5", "4.3.6-rc.1", "x", None)] == [(4, 0, 5), (4, 3, 6), (0,), (0,)]


def test_covered_queues_stay_what_they_were():
    import pickle

    class Cover:
        queue_classes: dict = {}

        def settings(self, queue):
            return QueueSettings()

        def arguments(self, queue, settings, own):
            return {**own, "x": 1}

    queue = Queue("a", routing_key="k", queue_arguments={"y": 2})
    covered = cover_queue(queue, Cover())
    assert covered is queue and isinstance(queue, CoveredQueue) and isinstance(queue, Queue)
    assert queue.queue_arguments == {"y": 2, "x": 1}
    assert type(pickle.loads(pickle.dumps(queue))) is Queue  # noqa: S301 - our own bytes
    assert type(cover_queue(Queue("b"), Cover())) is type(queue)


def test_what_the_pool_refuses_gives_its_place_back():
    """Celery hands requests to the pool in callbacks, where an error would end the worker."""

    class Request:
        id = "x"

        def execute_using_pool(self, pool):
            raise RecursionError("maximum recursion depth exceeded while pickling an object")

    given_up = []
    held = HeldRequest(Request(), lambda request, exc: given_up.append((request.id, type(exc))))
    with pytest.raises(TaskRevokedError):
        held.execute_using_pool(None)
    assert given_up == [("x", RecursionError)]
