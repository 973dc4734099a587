"""Letters that a replay on RabbitMQ has chosen: read once, held until they are sent, in their places if they are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from celery import Celery
from servers import wait_for
from test_browsing import fill
from workers import environment

from celery_dlx import DeadLetters
from celery_dlx.brokers.rabbitmq import reader, spool
from celery_dlx.brokers.rabbitmq.letters import at_rest
from celery_dlx.errors import UsageError
from celery_dlx.letters import Death, Original, compose
from celery_dlx.policy.settings import Policy
from celery_dlx.replay import Options


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("CELERY_DLX_STATE", str(tmp_path / "state"))


@pytest.fixture
def apps(rabbitmq, queue):
    """Two that look at the same broker."""
    found = []
    for name in ("one", "other"):
        app = Celery(name, broker=rabbitmq.url, set_as_current=False)
        app.conf.task_default_queue = queue
        found.append(DeadLetters(app, policy=Policy()))
    with found[0].app.connection_for_write() as connection:
        connection.default_channel.queue_declare(queue, durable=True, auto_delete=False)
    yield found
    for dead in found:
        dead.close()


def seen(dead: DeadLetters, queue: str) -> list[str]:
    return [letter.id for letter in dead.letters(queue)]


def run(dead: DeadLetters, choice=None, **options) -> tuple[list[str], dict]:
    """What left, and what the journal says in the end."""
    chosen = {"choice": choice} if choice is not None else {}
    engine, locks = dead.start_replay(**chosen, options=Options(wait=0, **options))
    try:
        return [each.letter.id for each in engine.run()], engine.record.summary()
    finally:
        locks.release()
        engine.journal.close()


def test_letters_are_read_once(apps, queue, readings, monkeypatch):
    """For the preflight, for the selection, and to be sent."""
    monkeypatch.setattr(reader, "PER_CHANNEL", 7)
    dead, other = apps
    ids = fill(dead, queue, 40)
    readings.clear()
    choice = dead.choose(queue=queue)
    assert [letter.id for letter in choice.letters()] == ids
    assert [letter.original.body for letter in choice.letters()] == [b"\xff\0body %d" % number for number in range(40)]
    assert seen(other, queue) == [], "nobody else sees them"
    readings.remove(f"{queue}.dlq")
    left, summary = run(dead, choice)
    assert (left, summary["replayed"], summary["left"]) == (ids, 40, 0)
    assert readings == [f"{queue}.dlq"]
    assert seen(dead, queue) == []
    assert dead.stats(queue)[0].letters == 0


def test_what_is_not_sent_is_in_its_place_again(apps, queue, monkeypatch):
    monkeypatch.setattr(reader, "PER_CHANNEL", 7)
    dead, other = apps
    ids = fill(dead, queue, 40)
    choice = dead.choose(queue=queue, limit=10)
    assert [each.id for _, each in choice.chosen()] == ids[:10]
    choice.release()
    assert seen(other, queue) == ids
    # A few of those that were read; the others go back, in order.
    left, summary = run(dead, dead.choose([ids[3], ids[20]], queue))
    assert (left, summary["selected"]) == ([ids[3], ids[20]], 2)
    assert seen(other, queue) == [each for each in ids if each not in left]
    assert next(iter(dead.choose(queue=queue, limit=3).letters())).id == ids[0], "another choice lets go of the one before"


def test_who_may_not_replay_holds_nothing(apps, queue):
    """Not even while he looks: whoever replays already would miss letters, and he would find none."""
    dead, other = apps
    ids = fill(dead, queue, 20)
    choice = other.choose(queue=queue)
    assert len(list(choice.letters())) == 20
    with pytest.raises(UsageError, match=f"is being replayed already, by replay {choice.replay}"):
        list(dead.choose(queue=queue).letters())
    with pytest.raises(UsageError, match="is being replayed already"):
        dead.start_replay(queue=queue)
    assert dead.broker._held == {}
    choice.release()
    assert seen(dead, queue) == ids
    assert run(dead, dead.choose(queue=queue))[0] == ids


def test_choices_do_not_mix(apps, queue):
    dead, other = apps
    ids = fill(dead, queue, 12)
    first, second = dead.choose(ids[:3], queue), dead.choose(ids[6:9], queue)
    assert [letter.id for letter in second.letters()] == ids[6:9]
    with pytest.raises(UsageError, match=f"by replay {second.replay}"):
        next(first.letters())
    assert run(dead, second)[0] == ids[6:9]
    assert [letter.id for letter in first.letters()] == ids[:3]
    assert run(dead, first)[0] == ids[:3]
    # One that is still looked at when another replay goes on.
    engine, locks = dead.start_replay(queue=queue, options=Options(wait=0), hooks={"interrupted": lambda: True})
    assert list(engine.run()) == []
    locks.release()
    engine.journal.close()
    left = [*ids[3:6], *ids[9:]]
    looked = dead.choose([ids[4]], queue)
    assert [letter.id for letter in looked.letters()] == [ids[4]]
    engine, locks = dead.resume_replay(engine.record.replay, wait=0)
    assert [each.letter.id for each in engine.run()] == left
    locks.release()
    engine.journal.close()
    assert seen(other, queue) == []


def test_letters_that_die_again_meanwhile_stay_in_their_dlq(apps, queue, monkeypatch):
    """What is acknowledged makes room in the windows: what comes must not be delivered to us instead."""
    monkeypatch.setattr(reader, "PER_CHANNEL", 5)
    monkeypatch.setattr("celery_dlx.brokers.rabbitmq.moving.WINDOW", 4)
    dead, other = apps
    ids = fill(dead, queue, 60)
    engine, locks = dead.start_replay(queue=queue, options=Options(wait=0))
    held, again, most = dead.broker._held[queue].reader, [], 0
    with other.app.connection_for_write() as connection:
        channel = connection.default_channel
        for number, _ in enumerate(engine.run()):
            original = Original(
                b"again", {"task": "t", "id": f"again-{number}", "retries": 0}, {"delivery_mode": 2}, "", queue
            )
            died = compose(Death("failure", queue, 1_800_000_000_000 + number, "E", "m", "t"), original, f"{queue}.dlq")
            channel.basic_publish_confirm(at_rest(died, "guest"), "", f"{queue}.dlq")
            again.append(died.id)
            most = max(most, sum(len(window.arrived) for window in held._windows.values()))
    locks.release()
    engine.journal.close()
    assert (len(again), most) == (len(ids), 0)
    wait_for(lambda: dead.stats(queue)[0].letters == len(again), "all are counted")
    assert seen(other, queue) == again


def test_a_paced_replay_and_one_that_waits_for_canaries_hold_nothing(apps, queue):
    """For both may take hours, and RabbitMQ takes letters back that are held for half an hour."""
    dead, other = apps
    ids = fill(dead, queue, 12)
    engine, locks = dead.start_replay(queue=queue, options=Options(wait=0, rate=100))
    running = engine.run()
    assert next(running).letter.id == ids[0]
    assert dead.broker._held == {}
    running.close()
    locks.release()
    engine.journal.close()

    ids = seen(other, queue)
    looked = []

    def interrupted() -> bool:
        # Canaries are out, and nobody executes them.
        if engine.record.summary()["replayed"] == 2 and not looked:
            looked.append(seen(other, queue))
        return bool(looked)

    engine, locks = dead.start_replay(queue=queue, options=Options(wait=0, canary=2), hooks={"interrupted": interrupted})
    assert dead.broker._held
    assert [each.letter.id for each in engine.run()] == ids[:2]
    locks.release()
    engine.journal.close()
    assert looked == [ids[2:]]


def resumed(dead: DeadLetters, replay: str) -> tuple[list[str], dict]:
    engine, locks = dead.resume_replay(replay, wait=0)
    try:
        return [each.letter.id for each in engine.run()], engine.record.summary()
    finally:
        locks.release()
        engine.journal.close()


@pytest.fixture
def killed(apps, queue):
    """A replay that was killed when all were about to leave, and three were executed; its connection holds all still."""
    ids = fill(apps[0], queue, 12)
    engine, locks = apps[0].start_replay(queue=queue, options=Options(wait=0))
    engine.journal.write("sending", letters=ids)
    engine.journal.write("state", state="succeeded", letters=ids[:3])
    engine.journal.close()
    locks.release()
    apps[0].broker.release()
    connection = apps[1].app.connection_for_write()
    held: list[object] = []
    connection.default_channel.basic_consume(f"{queue}.dlq", callback=held.append)
    wait_for(lambda: connection.drain_events(timeout=5) or len(held) == 12, "all are held")
    yield engine.record.replay, ids, connection
    connection.close()


def test_a_dead_connection_is_waited_for(apps, queue, killed, monkeypatch):
    replay, ids, connection = killed
    looks = []

    def look(queue: str) -> bool:
        looks.append(held_by_others(queue))
        connection.close()
        return looks[-1]

    held_by_others = apps[0].broker.held_by_others
    monkeypatch.setattr(apps[0].broker, "held_by_others", look)
    left, summary = resumed(apps[0], replay)
    assert looks[:2] == [True, False], "it waited"
    assert (left, summary["succeeded"], summary["left"]) == (ids[3:], 3, 0)
    assert seen(apps[1], queue) == []


def test_what_a_dead_connection_gives_back_after_the_next_run_is_found_by_the_one_after(apps, queue, killed, monkeypatch):
    monkeypatch.setattr("celery_dlx.engine._GIVEN_BACK", 0.0)
    replay, ids, connection = killed
    left, summary = resumed(apps[0], replay)
    assert (left, summary["succeeded"], summary["left"], summary["stopped"]) == ([], 3, 9, None)
    connection.close()
    assert seen(apps[1], queue) == ids
    left, summary = resumed(apps[0], replay)
    assert (left, summary["succeeded"], summary["left"]) == (ids[3:], 3, 0)
    assert seen(apps[1], queue) == []


def test_a_connection_that_broke_meanwhile(apps, queue, readings):
    dead, other = apps
    ids = fill(dead, queue, 30)
    choice = dead.choose(queue=queue)
    assert len(list(choice.letters())) == 30
    dead.broker._open.connection.sock.shutdown(2)
    readings.clear()
    left, summary = run(dead, choice)
    assert (sorted(left), summary["stopped"]) == (sorted(ids), None)
    assert readings == [f"{queue}.dlq"], "they were read again"
    assert seen(other, queue) == []


def test_no_room_to_set_them_aside(apps, queue, readings, monkeypatch):
    monkeypatch.setattr(spool, "_IN_MEMORY", 1_000)
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", lambda buffering: open("/dev/full", "w+b", buffering))  # noqa: SIM115
    dead, other = apps
    ids = fill(dead, queue, 30)
    monkeypatch.setattr(spool, "_BUFFER", 64)
    readings.clear()
    left, _ = run(dead, dead.choose(queue=queue))
    assert left == ids
    assert len(readings) == 3, "tried, then for the selection and for sending"
    assert seen(other, queue) == []


def test_more_queues_than_are_held(apps, queue, monkeypatch):
    monkeypatch.setattr("celery_dlx.brokers.rabbitmq.store._MOST_HELD", 1)
    dead, other = apps
    more = f"{queue}.more"
    for each in apps:
        each.app.amqp.queues.add(more)
    with dead.app.connection_for_write() as connection:
        connection.default_channel.queue_declare(more, durable=True, auto_delete=False)
    first, second = fill(dead, queue, 15), fill(dead, more, 15)
    choice = dead.choose(queue=f"{queue}*")
    assert [letter.id for letter in choice.letters()] == first + second
    assert len(dead.broker._held) == 1
    left, summary = run(dead, choice)
    assert (left, summary["selected"]) == (first + second, 30)
    assert seen(other, f"{queue}*") == []


def test_a_command_that_refuses_puts_them_back_in_order(apps, rabbitmq, queue, tmp_path):
    """More than one channel holds, so that the end of the process alone would mix them."""
    dead, other = apps
    ids = fill(dead, queue, 24)
    (tmp_path / "small.py").write_text(
        "from celery import Celery\nfrom celery_dlx import DeadLetters\nfrom celery_dlx.brokers.rabbitmq import reader\n"
        "import os\nreader.PER_CHANNEL = 5\napp = Celery('small', broker=os.environ['DLX_BROKER'])\n"
        "app.conf.accept_content = ['json']\nDeadLetters(app)\n"
    )
    env = environment(rabbitmq.url, CELERY_DLX_STATE=os.environ["CELERY_DLX_STATE"])
    env["PYTHONPATH"] = os.pathsep.join((str(tmp_path), env["PYTHONPATH"]))
    command = [sys.executable, "-m", "celery", "-A", "small", "dlx", "replay", queue, "--all", "--yes", "--json"]
    patch = json.dumps([{"op": "remove", "path": "/kwargs/nothing"}])
    done = subprocess.run([*command, "--edit", patch], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "nothing was replayed" in done.stderr
    assert seen(other, queue) == ids
