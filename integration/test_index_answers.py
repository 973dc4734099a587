"""The index of a DLQ and the DLQ itself answer alike, whatever lies in it and whatever is asked."""

from __future__ import annotations

import json
import os
import random
from datetime import datetime
from uuid import uuid4

import amqp
import pytest
from celery import Celery
from servers import wait_for

from celery_dlx import DeadLetters
from celery_dlx.brokers.base import Looking
from celery_dlx.brokers.rabbitmq import index, indexing
from celery_dlx.errors import DeadLetterError, UnknownLetterError
from celery_dlx.policy.settings import Policy

TEXT = [
    "a",
    "b",
    "a\0b",
    "",
    "é",
    "x y",
    "Value",
    "%",
    "'",
    "\\ud800",
    "mod.Err",
    "mod.Other",
    "[a]",
    "celery@h1",
    "celery@h2",
]
DIED = [0, 1, 5, 5, 5, 7, 1000, 2**63 - 1, -5, -(2**63), 2**31, 2**62]


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("CELERY_DLX_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(indexing, "AT_LEAST", 1)
    monkeypatch.setattr(indexing, "_LOT", 4)
    return tmp_path / "state"


@pytest.fixture
def dead(rabbitmq, queue):
    app = Celery("asks", broker=rabbitmq.url, set_as_current=False)
    app.conf.task_default_queue = queue
    found = DeadLetters(app, policy=Policy())
    app.amqp.queues.add(f"{queue}.more")
    yield found
    found.close()


def put(dead: DeadLetters, queue: str, messages: list[amqp.Message], there: int = 0) -> None:
    """Into the DLQ as they are: anybody may have written them."""
    with dead.app.connection_for_write() as connection:
        channel = connection.default_channel
        arguments = {"x-queue-type": "quorum"}
        channel.queue_declare(f"{queue}.dlq", durable=True, auto_delete=False, arguments=arguments)
        for message in messages:
            channel.basic_publish_confirm(message, "", f"{queue}.dlq")
        expected = there + len(messages)
        wait_for(lambda: channel.queue_declare(f"{queue}.dlq", passive=True).message_count == expected, "all are counted")


def headers(chance: random.Random, number: int) -> dict:
    found: dict = {}
    if chance.random() < 0.8:
        found["task"] = chance.choice(TEXT)
    if chance.random() < 0.7:
        found["id"] = chance.choice([chance.choice(TEXT) + str(number % 7), 4242])
    if chance.random() < 0.3:
        found["root_id"] = chance.choice([*TEXT, 4242])
    if chance.random() < 0.4:
        found["retries"] = chance.choice([0, 1, 2, 10**7])
    if chance.random() < 0.2:
        found["argsrepr"] = chance.choice(TEXT)
    if chance.random() < 0.1:
        found["big"] = "z" * 100_000
    return found


def record(chance: random.Random, number: int) -> dict:
    found = {"v": 1, "reason": chance.choice(["failure", "expired", "strange"])}
    if chance.random() < 0.9:
        found["id"] = chance.choice([f"{number:032x}", f"{number % 3:032x}", f"id\0x{number}", f"id {number}"])
    if chance.random() < 0.9:
        found["died_at"] = chance.choice(DIED)
    if chance.random() < 0.7:
        found["fingerprint"] = chance.choice(["", "1-a", "1-b", "é\0"])
    if chance.random() < 0.5:
        found["worker"] = chance.choice([*TEXT, 4242])
    if chance.random() < 0.7:
        message = chance.choice([chance.choice(TEXT) + chance.choice(TEXT), 4242])
        found["exception"] = {"type": chance.choice(TEXT), "message": message, "traceback": "t"}
    if chance.random() < 0.1:
        found["redacted"] = ["kwargs.x"]
    return found


def message(chance: random.Random, number: int) -> amqp.Message:
    said = headers(chance, number)
    if chance.random() < 0.8:
        said["x-celery-dlx"] = record(chance, number)
    elif chance.random() < 0.6:
        reason = chance.choice(["expired", "rejected", "delivery_limit"])
        died = {"reason": reason, "queue": "q", "time": datetime(2020, 1, 1 + number % 3), "exchange": "", "count": 1}
        said["x-death"] = [{**died, "routing-keys": ["q"]}]
    old = {"task": chance.choice(TEXT), "id": f"old{number % 4}", "args": [number], "kwargs": {}, "retries": 3}
    body = chance.choice([b"", b"x", b"\xff\0", json.dumps(old).encode(), json.dumps([[1], {}, {}]).encode()])
    more = {"content_type": "application/json", "content_encoding": "utf-8"} if chance.random() < 0.6 else {}
    return amqp.Message(body, application_headers=said, delivery_mode=2, **more)


def filters(chance: random.Random, ids: list[str]) -> dict:
    found: dict = {}
    for likely, name, values in (
        (0.25, "task", [*TEXT, "*", "a*", "?", "old*"]),
        (0.2, "reason", ["failure", "expired", "malformed", "max_deliveries", "rejected"]),
        (0.2, "exception", ["Err", "mod.*", "*", "", "a", "Value"]),
        (0.15, "fingerprint", ["", "1-a", "é\0", "none"]),
        (0.15, "text", [*TEXT, "4242"]),
        (0.15, "task_id", ["a0", "old1", "b3", "é2", "x y5", "1", "4242"]),
        (0.1, "root_id", [*TEXT, "4242"]),
        (0.1, "worker", ["*", "celery@*", "celery@h?", "[c]elery*", "", "4242"]),
        (0.1, "retries", ["0", ">=1", "<2"]),
        (0.15, "since", [0, 0.005, 0.001, -1, 2e6, -1e17]),
        (0.15, "until", [0, 0.005, 1, -1, 2e6, 1e17]),
    ):
        if chance.random() < likely:
            found[name] = chance.choice(values)
    if chance.random() < 0.1:
        found["ids"] = chance.sample(ids, min(3, len(ids)))
    return found


def question(chance: random.Random, ids: list[str], queue: str) -> tuple[str, str | None, dict]:
    where = chance.choice([None, queue, f"{queue}.more", f"{queue}*"])
    asked = filters(chance, ids)
    if chance.random() < 0.35:
        asked.pop("ids", None)
        return "groups", where, asked
    asked["newest"] = chance.random() < 0.5
    if chance.random() < 0.5:
        asked["limit"] = chance.randrange(1, 8)
    if chance.random() < 0.3:
        asked["after"] = chance.choice(ids)
    return "letters", where, asked


def answer(dead: DeadLetters, kind: str, queue: str | None, asked: dict):
    try:
        found = [each.as_dict() for each in getattr(dead, kind)(queue, **asked)]
    except DeadLetterError as exc:
        return type(exc).__name__, str(exc)
    if kind == "groups":
        # Which of those that died at once is the example is nobody's promise.
        for each in found:
            del each["example"], each["message"]
        found.sort(key=json.dumps)
    return found


@pytest.mark.parametrize("seed", range(8))
def test_the_same_answers(dead, queue, readings, seed):
    chance = random.Random(seed)
    for name in (queue, f"{queue}.more"):
        put(dead, name, [message(chance, number) for number in range(chance.randrange(3, 25))])
    ids = [letter.id for letter in dead.letters(f"{queue}*")]
    questions = [question(chance, ids, queue) for _ in range(30)]
    read = [answer(dead, *each) for each in questions]
    dead.looking = Looking(lambda text: None)
    assert len(list(dead.letters(f"{queue}*"))) == len(ids)
    for each, expected in zip(questions, read, strict=True):
        readings.clear()
        assert answer(dead, *each) == expected, each
        assert readings == [] or expected[0] == "UnknownLetterError", each


def letter(number: int, **more) -> amqp.Message:
    told = {"v": 1, "id": f"{number:032x}", "reason": "failure", "queue": "q", "died_at": 1_000 + number, **more}
    said = {"task": "t", "id": f"i{number}", "retries": 0, "x-celery-dlx": told}
    return amqp.Message(b"x", application_headers=said, delivery_mode=2)


def test_more_causes_than_a_query_names(dead, queue, readings, monkeypatch):
    monkeypatch.setattr(index, "_MOST_CAUSES", 5)
    put(dead, queue, [letter(number, fingerprint=f"1-{number}") for number in range(20)])
    said: list[str] = []
    dead.looking = Looking(said.append)
    for _ in range(2):
        assert len(list(dead.letters(queue, reason="failure"))) == 20
        assert [each.fingerprint for each in dead.letters(queue, fingerprint="1-7")] == ["1-7"]
    assert (len(readings), len(said)) == (1, 1)


def test_a_letter_that_came_since(dead, queue, readings, rabbitmq, monkeypatch, tmp_path):
    """The DLQ is asked for what comes after it."""
    put(dead, queue, [letter(number) for number in range(6)])
    dead.looking = Looking(print)
    assert len(list(dead.letters(queue))) == 6
    with monkeypatch.context() as another:
        another.setenv("CELERY_DLX_STATE", str(tmp_path / "of another machine"))
        app = Celery("other", broker=rabbitmq.url, set_as_current=False)
        other = DeadLetters(app, policy=Policy())
        assert len(list(other.discard([f"{0:032x}"], queue))) == 1
        put(other, queue, [letter(9)], there=5)
        other.close()
    readings.clear()
    assert list(dead.letters(queue, after=f"{9:032x}")) == []
    assert readings
    with pytest.raises(UnknownLetterError):
        dead.letters(queue, after=uuid4().hex)


def test_a_spoilt_index_is_forgotten(dead, queue, state, readings):
    put(dead, queue, [letter(number, worker="w" * 4_000) for number in range(60)])
    dead.looking = Looking(print)
    expected = [each.as_dict() for each in dead.letters(queue)]
    (file,) = (state / "index").iterdir()
    whole = file.read_bytes()
    third = len(whole) // 3
    # Blocks that were not on the disk when the power went; and a file that is cut.
    for spoilt in (whole[:third] + bytes(third) + whole[2 * third :], whole[: 2 * third], b"no base at all" * 100):
        file.write_bytes(spoilt)
        for ask in (lambda: dead.groups(queue), lambda: [each.as_dict() for each in dead.letters(queue)]):
            try:
                ask()
            except DeadLetterError as exc:
                assert "is spoilt" in str(exc) and "run the command again" in str(exc)
        assert [each.as_dict() for each in dead.letters(queue)] == expected
        readings.clear()
        assert [each.as_dict() for each in dead.letters(queue)] == expected
        assert readings == []


def test_bodies_that_are_too_many_are_not_kept(dead, queue, state, monkeypatch):
    monkeypatch.setattr(indexing, "_MOST_BODIES", 10_000)
    monkeypatch.setattr(indexing, "_LOT_BYTES", 2_000)
    strangers = [amqp.Message(b"y" * 1_000, delivery_mode=2) for _ in range(9)]
    dead.looking = Looking(print)
    put(dead, queue, strangers)
    assert len(list(dead.letters(queue))) == 9
    assert len(list((state / "index").iterdir())) == 1
    dead.purge(queue)
    put(dead, queue, strangers * 2)
    assert len(list(dead.letters(queue))) == 18
    assert list((state / "index").iterdir()) == []


def test_a_dlq_that_is_nearly_full_is_read(rabbitmq, queue, readings):
    """At a cap of bytes it holds as many letters as before, and others."""
    app = Celery("full", broker=rabbitmq.url, set_as_current=False)
    app.conf.task_default_queue = queue
    dead = DeadLetters(app, policy=Policy(defaults={"dlq_max_bytes": 1_000}))
    dead.looking = Looking(print)
    for bodies, expected in ((850, 1), (950, 2)):
        put(dead, queue, [amqp.Message(b"z" * (bodies // 10), delivery_mode=2) for _ in range(10)])
        readings.clear()
        for _ in range(2):
            assert len(list(dead.letters(queue))) == 10
        assert len(readings) == expected
        dead.purge(queue)
    dead.close()


def test_what_is_left_lying_is_removed(dead, queue, state, monkeypatch):
    put(dead, queue, [letter(number) for number in range(6)])
    folder = state / "index"
    folder.mkdir(parents=True)
    for name in (f".{'a' * 24}.sqlite.4194305.x", "old.sqlite"):  # no process has that number
        (folder / name).touch()
    os.utime(folder / "old.sqlite", (1, 1))
    dead.looking = Looking(print)
    dead.groups(queue)
    (left,) = folder.iterdir()
    assert left.suffix == ".sqlite" and left.name != "old.sqlite"


@pytest.mark.parametrize("where", ["no sqlite3", "no home", "off", "a folder that may not be searched"])
def test_there_is_not_always_an_index(dead, queue, readings, state, monkeypatch, tmp_path, where):
    put(dead, queue, [letter(number) for number in range(6)])
    monkeypatch.chdir(tmp_path)
    if where == "no sqlite3":
        monkeypatch.setattr(index, "sqlite3", None)
    elif where == "no home":
        monkeypatch.delenv("CELERY_DLX_STATE")
        monkeypatch.delenv("XDG_STATE_HOME", raising=False)
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
    elif where == "off":
        monkeypatch.setenv("CELERY_DLX_INDEX", "off")
    else:

        def refuse(self, *arguments, **options):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr("pathlib.Path.stat", refuse)
        monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    dead.looking = Looking(print)
    for _ in range(2):
        assert len(list(dead.letters(queue))) == 6
        assert [group.count for group in dead.groups(queue)] == [6]
    monkeypatch.undo()
    assert len(readings) == 4
    assert not (tmp_path / "~").exists()
