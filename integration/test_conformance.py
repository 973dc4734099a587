"""What `DeadLetters` promises of letters, on each broker alike."""

from __future__ import annotations

import json

import pytest
from celery import Celery
from raw import Sender
from servers import wait_for
from workers import Worker

from celery_dlx import DeadLetters, dead_letter_replayed
from celery_dlx.errors import ReplayError, UnknownLetterError, UsageError
from celery_dlx.policy.settings import Policy

CONTRACT = {
    "id", "queue", "dlq", "reason", "died_at", "task", "task_id", "root_id", "parent_id", "args", "kwargs", "retries",
    "deliveries", "exception", "worker", "service", "fingerprint", "replays", "exchange", "routing_key", "priority",
}  # fmt: skip


@pytest.fixture
def dead(broker, queue):
    """The Python calls, on an app of their own that names the queue."""
    app = Celery("reader", broker=broker.url)
    app.conf.task_default_queue = queue
    found = DeadLetters(app, policy=Policy(service="reader"))
    yield found
    found.close()


@pytest.fixture
def worker(broker, queue, tmp_path):
    with Worker(broker.url, [queue], policy="version: 1\nservice: conformance\n") as found:
        yield found


def kill_some(worker, broker, queue, count: int, **headers) -> list[str]:
    """Make letters; returns the task ids, in order."""
    sender = Sender(broker.url)
    ids = [sender.task(queue, "matrix_app.fail", [number], **headers) for number in range(count)]
    worker.wait_letters(queue, count)
    return ids


def test_a_letter_has_the_contracts_fields(worker, broker, queue, dead):
    (task_id,) = kill_some(worker, broker, queue, 1)
    (letter,) = dead.letters(queue)
    fields = letter.as_dict()
    assert set(fields) == CONTRACT
    assert (fields["queue"], fields["dlq"], fields["task_id"]) == (queue, f"{queue}.dlq", task_id)
    assert (fields["reason"], fields["service"], fields["replays"]) == ("failure", "conformance", 0)
    assert fields["exception"]["type"] == "builtins.ValueError"
    assert fields["exception"]["message"] == "boom"
    assert "raise ValueError(message)" in fields["exception"]["traceback"]
    assert worker.json("list", queue) == [json.loads(json.dumps(fields))]
    whole = dead.get(letter.id)
    assert json.loads(whole.original.body)[0] == [0]
    assert whole.original.headers["id"] == task_id


def test_listing_filters_and_changes_nothing(worker, broker, queue, dead):
    kill_some(worker, broker, queue, 3)
    Sender(broker.url).task(queue, "shop.gone")
    worker.wait_letters(queue, 4)
    assert len(list(dead.letters(queue, reason="failure"))) == 3
    assert len(list(dead.letters(queue, task="shop.*"))) == 1
    assert len(list(dead.letters(queue, exception="ValueError", limit=2))) == 2
    assert len(list(dead.letters(queue, since="1h"))) == 4
    assert list(dead.letters(queue, until="1h")) == []
    for _ in range(25):  # more often than any default delivery limit
        assert len(list(dead.letters(queue))) == 4
    assert [row.as_dict()["letters"] for row in dead.stats(queue)] == [4]
    died = [letter.died_at for letter in dead.letters(queue)]
    assert died == sorted(died), "oldest first"
    newest = [letter["id"] for letter in worker.json("list", queue, "--newest", "--limit", "2")]
    assert newest == [letter.id for letter in dead.letters(queue)][:-3:-1]


def test_pages_are_stable_while_letters_come_and_go(worker, broker, queue, dead):
    kill_some(worker, broker, queue, 12)
    ids = [letter.id for letter in dead.letters(queue)]
    for newest, wanted in ((False, ids), (True, ids[::-1])):
        seen = []
        while page := worker.json(
            "list", queue, "--limit", "5", *["--newest"] * newest, *(["--after", seen[-1]] if seen else [])
        ):
            seen += [letter["id"] for letter in page]
            assert len(page) <= 5
        assert seen == wanted, newest
    first = [letter.id for letter in dead.letters(queue, limit=4)]
    list(dead.discard(first[:3]))
    assert [letter.id for letter in dead.letters(queue, limit=4, after=first[-1])] == ids[4:8]
    assert [letter.id for letter in dead.letters(queue, task="matrix_app.f*", after=ids[6], newest=True)] == ids[3:6][::-1]
    with pytest.raises(UnknownLetterError):
        dead.letters(queue, after=first[0])
    gone = worker.cli("list", queue, "--after", first[0], check=False)
    assert gone.returncode == 1 and "Traceback" not in gone.stderr


def test_replay_is_byte_exact_and_says_what_it_changed(worker, broker, queue, dead, tmp_path):
    fixed = tmp_path / "fixed"
    body = b'[["' + str(fixed).encode() + b'", "\\u00fc 1.10 []"], {}, {"callbacks": null, "chain": []}]'
    sender = Sender(broker.url)
    sender.task(queue, "matrix_app.fail_until", body=body, retries=2, custom={"nested": [], "big": 2**53 + 1},
                expires="2999-01-01T00:00:00+00:00")  # fmt: skip
    worker.wait_letters(queue, 1)
    (before,) = [dead.get(letter.id) for letter in dead.letters(queue)]
    assert before.original.body == body
    heard = []
    receiver = lambda letter, queue, **_: heard.append((letter.id, queue))  # noqa: E731
    dead_letter_replayed.connect(receiver)
    try:
        (replayed,) = dead.replay(before.id)
    finally:
        dead_letter_replayed.disconnect(receiver)
    assert replayed.changes == ["retries 2 → 0"]
    assert heard == [(before.id, queue)]
    worker.wait_letters(queue, 1)  # not fixed yet: it died again
    (again,) = [dead.get(letter.id) for letter in dead.letters(queue)]
    assert again.id != before.id
    assert again.replays == 1
    assert again.original.body == body
    changed = {key for key in before.original.headers if before.original.headers[key] != again.original.headers.get(key)}
    assert changed == {"retries"}
    assert again.original.properties == before.original.properties
    fixed.touch()
    (last,) = dead.replay(queue=queue)
    assert last.letter.id == again.id
    wait_for(lambda: worker.ran().count("fail_until \u00fc 1.10 []") == 3, worker.ran)
    assert list(dead.letters(queue)) == []


def test_replay_by_id_leaves_the_others(worker, broker, queue, dead):
    kill_some(worker, broker, queue, 3)
    letters = list(dead.letters(queue))
    moved = list(dead.replay([letters[1].id]))
    assert [replayed.letter.id for replayed in moved] == [letters[1].id]
    key = letters[1].args.strip("[]")
    wait_for(lambda: worker.ran().count(f"fail {key}") == 2, worker.ran)
    worker.wait_letters(queue, 3)
    left = list(dead.letters(queue))
    assert [letter.replays for letter in left] == [0, 0, 1]
    assert [letter.id for letter in left[:2]] == [letters[0].id, letters[2].id], "order is kept"


def test_ids_are_stable_and_unique(worker, broker, queue, dead):
    kill_some(worker, broker, queue, 5)
    first = [letter.id for letter in dead.letters(queue)]
    assert len(set(first)) == 5
    assert [letter.id for letter in dead.letters(queue)] == first


def test_discard_and_purge(worker, broker, queue, dead):
    kill_some(worker, broker, queue, 4)
    letters = list(dead.letters(queue))
    assert [letter.id for letter in dead.discard(letters[0].id)] == [letters[0].id]
    assert [letter.id for letter in dead.discard(queue=queue, limit=1)] == [letters[1].id]
    assert [letter.id for letter in dead.letters(queue)] == [letter.id for letter in letters[2:]]
    assert dead.purge(queue) == 2
    assert list(dead.letters(queue)) == []
    assert dead.purge(queue) == 0


def test_ids_that_do_not_exist(worker, broker, queue, dead):
    (_,) = kill_some(worker, broker, queue, 1)
    unknown = "0" * 32
    for call in (dead.get, lambda i: list(dead.replay(i)), lambda i: list(dead.discard(i))):
        with pytest.raises(UnknownLetterError, match=unknown):
            call(unknown)
    (letter,) = dead.letters(queue)
    with pytest.raises(UnknownLetterError, match=unknown):
        list(dead.replay([letter.id, unknown]))
    wait_for(lambda: worker.ran().count("fail 0") == 2, "what does exist is replayed all the same")
    with pytest.raises(UsageError):
        dead.replay(letter.id, reason="failure")


def test_a_past_expires_is_dropped_at_replay(worker, broker, queue, dead):
    Sender(broker.url).task(queue, "matrix_app.ok", ["late"], expires="2020-01-01T00:00:00+00:00")
    (letter,) = worker.wait_letters(queue, 1)
    assert letter["reason"] == "expired"
    (replayed,) = dead.replay(letter["id"])
    assert replayed.changes == ["expires 2020-01-01T00:00:00+00:00 dropped: it is past"]
    wait_for(lambda: "ok late" in worker.ran(), worker.ran)


def test_many_letters(worker, broker, queue, dead):
    app = Celery("sender", broker=broker.url)
    DeadLetters(app, policy=Policy())
    with app.producer_pool.acquire(block=True) as producer:
        for number in range(1500):
            app.send_task("matrix_app.fail", [number], queue=queue, producer=producer)
    wait_for(lambda: dead.stats(queue)[0].letters == 1500, lambda: str(dead.stats(queue)), timeout=180)
    letters = list(dead.letters(queue))
    assert len({letter.id for letter in letters}) == 1500
    worker.stop()
    assert len(list(dead.replay(queue=queue))) == 1500
    assert dead.stats(queue)[0].letters == 0
    worker.start()
    wait_for(lambda: dead.stats(queue)[0].letters == 1500, lambda: str(dead.stats(queue)), timeout=180)
    assert {letter.replays for letter in dead.letters(queue)} == {1}


def test_letters_outlive_everything_about_an_error(worker, broker, queue, dead):
    sender = Sender(broker.url)
    sender.task(queue, "matrix_app.huge_traceback")
    sender.task(queue, "matrix_app.fail", ["x"], padding="p" * 100_000)
    letters = {letter["task"]: letter for letter in worker.wait_letters(queue, 2)}
    huge = letters["matrix_app.huge_traceback"]["exception"]
    assert len(huge["traceback"]) <= 16_384 and len(huge["message"]) <= 2048
    tight = dead.get(letters["matrix_app.fail"]["id"])
    assert tight.original.headers["padding"] == "p" * 100_000
    assert tight.exception["type"] == "builtins.ValueError"
    assert len(list(dead.replay(tight.id))) == 1


def test_replay_into_a_queue_that_is_gone(rabbitmq, queue):
    from kombu import Connection

    with Worker(rabbitmq.url, [queue], policy="version: 1\n") as worker:
        kill_some(worker, rabbitmq, queue, 2)
    with Connection(rabbitmq.url) as connection:
        connection.default_channel.queue_delete(queue)
    app = Celery("reader", broker=rabbitmq.url)
    dead = DeadLetters(app, policy=Policy())
    with pytest.raises(ReplayError, match=f"2 letters stay in '{queue}.dlq'.*does not exist"):
        list(dead.replay(queue=queue))
    assert len(list(dead.letters(queue))) == 2
    dead.close()


def test_letters_are_found_by_their_arguments(worker, broker, queue, dead):
    sender = Sender(broker.url)
    for number in range(6):
        sender.task(queue, "matrix_app.fail", [number], {"user_id": number % 2, "amount": number * 10})
    sender.task(queue, "matrix_app.fail", body=b"\x80\x04N.", content_type="application/x-python-serialize")
    worker.wait_letters(queue, 7)
    assert len(worker.json("list", queue, "--arg", "user_id=1")) == 3
    found = worker.json("list", queue, "--where", "kwargs.amount >= 20", "--arg", "user_id=0")
    assert sorted(letter["args"] for letter in found) == ["[2]", "[4]"], "in the order of their deaths, by two children"
    (group,) = worker.json("groups", queue, "--arg", "0=3")
    assert group["count"] == 1
    worker.stop()
    worker.cli("discard", queue, "--where", "args[0] == 5", "--yes")
    worker.cli("replay", queue, "--arg", "user_id=1", "--yes", "--wait", "0s")
    assert sorted(letter.args or "" for letter in dead.letters(queue)) == ["()", "[0]", "[2]", "[4]"]
    assert worker.cli("list", queue, "--where", "amount", check=False).returncode == 2


def test_show_tells_of_the_workflow_and_the_result(broker, redis_server, queue):
    """The result backend is Redis for both brokers."""
    backend = f"redis://127.0.0.1:{redis_server.port}/3"
    with Worker(broker.url, [queue], policy="version: 1\n", DLX_BACKEND=backend) as worker:
        embed = {"callbacks": [{"task": "matrix_app.ok"}], "errbacks": None, "chord": None,
                 "chain": [{"task": "matrix_app.last"}, {"task": "matrix_app.next"}]}  # fmt: skip
        Sender(broker.url).task(queue, "matrix_app.fail", body=json.dumps([["x"], {}, embed]).encode())
        (letter,) = worker.wait_letters(queue, 1)
        (shown,) = worker.json("show", letter["id"], "--queue", queue)
        assert shown["canvas"]["chain"] == ["matrix_app.next", "matrix_app.last"]
        assert shown["result_state"] == "FAILURE"
        text = worker.cli("show", letter["id"], "--queue", queue).stdout
        assert "matrix_app.next → matrix_app.last: goes on when a replay succeeds" in text
