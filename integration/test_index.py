"""Looking at a large DLQ of RabbitMQ once more: what was read is kept for a while, and never taken for what is there."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import amqp
import pytest
from celery import Celery
from servers import wait_for
from test_browsing import fill
from workers import environment

from celery_dlx import DeadLetters
from celery_dlx.brokers.base import Looking
from celery_dlx.brokers.rabbitmq import index, indexing, reader
from celery_dlx.policy.settings import Policy

COUNT = 60


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("CELERY_DLX_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(indexing, "AT_LEAST", 20)
    monkeypatch.setattr(indexing, "_LOT", 7)
    return tmp_path / "state"


@pytest.fixture
def said():
    return []


@pytest.fixture
def dead(rabbitmq, queue, said):
    app = Celery("looks", broker=rabbitmq.url, set_as_current=False)
    app.conf.task_default_queue = queue
    found = DeadLetters(app, policy=Policy(defaults={"dlq_max_length": 100}))
    with app.connection_for_write() as connection:
        connection.default_channel.queue_declare(queue, durable=True, auto_delete=False)
    found.looking = Looking(said.append)
    yield found
    found.close()


@pytest.fixture
def ids(dead, queue, readings):
    found = fill(dead, queue, COUNT)
    readings.clear()
    return found


def seen(dead: DeadLetters, queue: str, **options) -> list[str]:
    return [letter.id for letter in dead.letters(queue, **options)]


def files(state) -> list:
    return sorted((state / "index").iterdir())


def test_what_was_read_is_looked_at(dead, queue, ids, readings, said, state):
    (read,) = dead.groups(queue)
    assert len(readings) == 1
    (file,) = files(state)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert said == []
    (known,) = dead.groups(queue)
    assert known.as_dict() == read.as_dict()
    assert known.count == COUNT
    assert seen(dead, queue) == ids
    assert seen(dead, queue, limit=5) == ids[:5]
    assert seen(dead, queue, limit=5, after=ids[4]) == ids[5:10]
    assert seen(dead, queue, newest=True, limit=5) == ids[:-6:-1]
    assert seen(dead, queue, newest=True, limit=5, after=ids[-5]) == ids[-6:-11:-1]
    assert seen(dead, queue, ids=[ids[7], ids[3]]) == [ids[3], ids[7]]
    assert seen(dead, queue, task="t") == ids
    assert seen(dead, queue, task="other") == []
    assert seen(dead, queue, exception="E", text="m", reason="failure") == ids
    assert seen(dead, queue, task_id="task-9") == [ids[9]]
    assert seen(dead, queue, since=1_700_000_000.010, until=1_700_000_000.020) == ids[10:21]
    assert [group.count for group in dead.groups(queue, task="t")] == [COUNT]
    assert dead.groups(queue, task="other") == []
    assert [group.count for group in dead.groups(queue, text="m")] == [COUNT]
    whole = [letter.as_dict() for letter in dead.letters(queue)]
    assert len(readings) == 1, "it was read once"
    (words,) = said
    assert f"{queue}.dlq: {COUNT} letters as read at 20" in words
    assert "--fresh" in words
    dead.looking = None
    assert [letter.as_dict() for letter in dead.letters(queue)] == whole
    assert len(readings) == 2


def test_what_is_acted_on_is_read(dead, queue, ids, readings):
    seen(dead, queue)
    readings.clear()
    assert dead.get(ids[3], queue).original.body == b"\xff\0body 3"
    assert seen(dead, queue, bodies=True) == ids
    assert len(list(dead.export(queue))) == COUNT
    assert dead.choose(queue=queue, limit=2).letters().__next__().original.body == b"\xff\0body 0"
    assert len(readings) == 4


@pytest.mark.parametrize("change", ["replay", "discard", "purge", "restore"])
def test_what_we_change_is_read_again(dead, queue, ids, readings, state, change):
    lines = list(dead.export(queue, limit=1))
    seen(dead, queue)
    assert files(state)
    if change == "replay":
        assert len(list(dead.replay(ids[:3], queue))) == 3
    elif change == "discard":
        assert len(list(dead.discard(ids[:3], queue))) == 3
    elif change == "purge":
        assert dead.purge(queue) == COUNT
    else:
        assert dead.restore(lines) == (0, 1)
    assert files(state) == []


def test_what_others_change_is_read_again(dead, queue, ids, readings, rabbitmq, state):
    assert seen(dead, queue) == ids
    other = DeadLetters(Celery("other", broker=rabbitmq.url, set_as_current=False), policy=Policy())
    # As another machine: our index stays.
    kept = files(state)[0].read_bytes()
    assert len(list(other.discard([ids[0]], queue))) == 1
    other.close()
    index.place_of(str(dead.app.connection_for_read().as_uri()), f"{queue}.dlq").write_bytes(kept)
    readings.clear()
    assert seen(dead, queue) == ids[1:]
    assert len(readings) == 1
    assert seen(dead, queue) == ids[1:]
    assert len(readings) == 1


def test_it_is_not_believed_for_ever(dead, queue, ids, readings, monkeypatch):
    seen(dead, queue)
    dead.looking.fresh = True
    assert seen(dead, queue) == ids
    assert len(readings) == 2, "somebody insisted"
    dead.looking.fresh = False
    clock = index.time.time
    for jump in (601, -5):
        monkeypatch.setattr(index.time, "time", lambda jump=jump: clock() + jump)
        assert seen(dead, queue) == ids
    assert len(readings) == 4, "long ago, and in the future"


def test_a_dlq_at_its_cap_is_read(dead, queue, readings):
    """It holds as many letters as before, and others."""
    ids = fill(dead, queue, 100)
    readings.clear()
    for _ in range(2):
        assert seen(dead, queue) == ids
    assert len(readings) == 2


def test_what_was_not_read_wholly_is_not_kept(dead, queue, ids, readings, state, monkeypatch):
    assert seen(dead, queue, limit=3) == ids[:3]
    assert not (state / "index").exists() or files(state) == []
    # Those were put back, so that the others must be read for the order: then it is known.
    monkeypatch.setattr(reader, "PER_CHANNEL", 25)
    seen(dead, queue)
    dead.purge(queue)
    few = fill(dead, queue, 10)
    assert seen(dead, queue) == few
    assert files(state) == [], "so few are read as fast"


def test_a_page_that_had_to_read_all_is_cheap_the_next_time(dead, queue, ids, readings, state):
    dead.looking = None
    assert seen(dead, queue) == ids
    dead.looking = Looking(print)
    assert seen(dead, queue, limit=3) == ids[:3]
    assert len(files(state)) == 1
    readings.clear()
    assert seen(dead, queue, limit=3, after=ids[2]) == ids[3:6]
    assert readings == []


@pytest.mark.parametrize("fault", ["no folder", "full disk", "spoilt"])
def test_no_index_is_nobodys_business(dead, queue, ids, readings, state, monkeypatch, fault):
    if fault == "no folder":
        state.mkdir()
        (state / "index").touch()
    elif fault == "full disk":
        real = indexing.sqlite3.connect

        class Full:
            def __init__(self, base):
                self.base = base

            def __getattr__(self, name):
                return getattr(self.base, name)

            def executemany(self, *arguments):
                raise index.sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(index.sqlite3, "connect", lambda *given, **more: Full(real(*given, **more)))
    for _ in range(2):
        assert seen(dead, queue) == ids
        if fault == "spoilt":
            files(state)[0].write_bytes(b"no base at all" * 100)
    assert len(readings) == 2
    if fault == "full disk":
        assert files(state) == [], "nothing half-written stays"


def test_odd_letters(dead, queue, readings):
    """Those of the first protocol say in their bodies what they are; ids may be anything."""
    fill(dead, queue, 30)
    with dead.app.connection_for_write() as connection:
        channel = connection.default_channel
        body = json.dumps({"task": "old.task", "id": "old-id", "args": [1], "kwargs": {}})
        headers = {"x-celery-dlx": {"id": "odd \ud800 id", "reason": "failure", "queue": queue, "died_at": 1, "v": 1}}
        for message in (
            amqp.Message(body, content_type="application/json", application_headers=headers, delivery_mode=2),
            amqp.Message(b"\xff no letter of ours", delivery_mode=2),
        ):
            channel.basic_publish_confirm(message, "", f"{queue}.dlq")
    wait_for(lambda: dead.stats(queue)[0].letters == 32, "all are counted")
    dead.looking = None
    expected = [letter.as_dict() for letter in dead.letters(queue)]
    assert len(expected) == 32
    dead.looking = Looking(print)
    for _ in range(2):
        assert [letter.as_dict() for letter in dead.letters(queue)] == expected
        assert [letter.task_id for letter in dead.letters(queue, task="old.*")] == ["old-id"]
        assert [letter.task for letter in dead.letters(queue, task_id="old-id")] == ["old.task"]
        for each in expected:
            assert seen(dead, queue, ids=[each["id"]]) == [each["id"]]
    assert len(readings) <= 5, "for what was expected, for the first look, and for ids that cannot be text"


def test_the_commands_say_so(dead, queue, ids, rabbitmq, tmp_path):
    (tmp_path / "small.py").write_text(
        "from celery import Celery\nfrom celery_dlx import DeadLetters\nfrom celery_dlx.brokers.rabbitmq import indexing\n"
        "import os\nindexing.AT_LEAST = 20\napp = Celery('small', broker=os.environ['DLX_BROKER'])\nDeadLetters(app)\n"
    )
    env = environment(rabbitmq.url, CELERY_DLX_STATE=os.environ["CELERY_DLX_STATE"])
    env["PYTHONPATH"] = os.pathsep.join((str(tmp_path), env["PYTHONPATH"]))

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "celery", "-A", "small", "dlx", *arguments, "--json"]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)

    first = run("groups", queue)
    assert "as read at" not in first.stderr
    for arguments, lines in ((("groups", queue), 1), (("list", queue, "--limit", "7"), 7), (("list", queue), COUNT)):
        done = run(*arguments)
        assert done.stderr.count("as read at") == 1
        assert len(done.stdout.splitlines()) == lines
        assert "as read at" not in run(*arguments, "--fresh").stderr
    assert json.loads(run("groups", queue).stdout) == json.loads(first.stdout)
