"""Redis keeps letters by cause: what that says must be what a look at every letter says, whatever happened to them."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import replace
from time import time
from types import SimpleNamespace
from uuid import uuid4

import pytest
import redis
from celery import Celery
from raw import Sender
from servers import wait_for
from workers import Worker

from celery_dlx import DeadLetters
from celery_dlx.brokers.redis.letters import original_of
from celery_dlx.brokers.redis.retention import Retention
from celery_dlx.brokers.redis.store import Capture
from celery_dlx.errors import ReplayError
from celery_dlx.groups import Group, group
from celery_dlx.letters import DeadLetter, Death, compose
from celery_dlx.policy.settings import BUILT_IN, Policy
from celery_dlx.replay import Options
from celery_dlx.selection import match

CAUSES = [("shop.pay", "builtins.ValueError"), ("shop.mail", "builtins.KeyError"), ("shop.pay", "builtins.OSError")]


@pytest.fixture
def dead(redis_server, queue):
    found = DeadLetters(Celery("reader", broker=redis_server.url), policy=Policy(service="reader"))
    found.broker._store.announce(queue)
    yield found
    found.close()


@pytest.fixture
def client(redis_server):
    with redis.Redis.from_url(redis_server.url) as found:
        yield found


def letter_of(queue: str, cause: int, message: str = "boom") -> DeadLetter:
    task, kind = CAUSES[cause]
    headers = {"task": task, "id": str(uuid4()), "argsrepr": "[]", "kwargsrepr": "{}"}
    properties = {"delivery_tag": str(uuid4()), "delivery_info": {"exchange": "", "routing_key": queue}}
    kinds = {"content-type": "application/json", "content-encoding": "utf-8"}
    item = json.dumps({"body": "[[], {}, {}]", "headers": headers, "properties": properties, **kinds}).encode()
    # What others say must not be taken for the record's own fields.
    said = f'"fingerprint":"{message}" "reason":"x"'
    death = Death("failure", queue, 0, kind, said, f"Traceback: {said}", worker=f"w{cause}@host", service="s")
    return compose(death, original_of(item), f"{queue}.dlq")


def store(dead: DeadLetters, queue: str, causes: list[int], settings=BUILT_IN) -> list[DeadLetter]:
    letters = [letter_of(queue, cause) for cause in causes]
    dead.broker._store.capture_all([Capture(letter, settings, item=letter.original.raw) for letter in letters])
    return letters


def counted(dead: DeadLetters, queue: str) -> list[Group]:
    """The groups, by a look at every letter."""
    return group(dead.letters(queue, since=0))


def test_causes_follow_every_move(dead, queue, client):
    dice = random.Random(20261120)
    exported: list[dict] = []
    for _ in range(60):
        letters = list(dead.letters(queue))
        some = [letter.id for letter in dice.sample(letters, min(len(letters), 7))]
        move = dice.choice(["capture", "capture", "capture", "again", "replay", "discard", "export", "import", "trim"])
        if move == "capture":
            store(dead, queue, [dice.randrange(3) for _ in range(10)], replace(BUILT_IN, dlq_max_length=60))
        elif move == "again" and letters:  # the same death a second time, told otherwise
            twin = dead.get(letters[0].id, queue)
            twin.fingerprint += "b"
            dead.broker._store.capture(Capture(twin, BUILT_IN, item=twin.original.raw))
        elif move == "replay":
            assert {each.letter.id for each in dead.replay(some, queue)} == set(some)
        elif move == "discard":
            assert {letter.id for letter in dead.discard(some, queue)} == set(some)
        elif move == "export":
            exported = list(dead.export(queue, ids=some))
        elif move == "import":
            dead.restore(exported)
        else:
            dead.broker._store.trim(queue, replace(BUILT_IN, dlq_max_length=25))
        assert dead.groups(queue) == counted(dead, queue), move
    assert len(dead.groups(queue)) >= 3
    assert dead.broker.groups(queue, match()) is not None, "groups came from the index"
    dead.purge(queue)
    assert dead.groups(queue) == []
    assert {key.rsplit(b":", 1)[1] for key in client.keys(f"dlx:{{{queue}.dlq}}*")} == {b"stats", b"evicted"}


@pytest.mark.parametrize(
    "filters",
    [
        {"task": "shop.pay"},
        {"task": "shop.*", "exception": "KeyError"},
        {"reason": "maxlen"},
        {"worker": "w1@*", "task": "*"},
        {"exception": "builtins.*", "text": "boom"},
        {"worker": "w1@host"},
        {"text": '"reason":"x'},
        {"text": "größer"},
        {"worker": "w[01]@h*st", "text": "boom", "bodies": True},
        {"task": "shop.pay", "worker": "*host"},
        {"since": "1h", "task": "shop.mail"},
        {"until": "1h"},
    ],
)
def test_filters_find_what_a_look_at_every_letter_finds(dead, queue, filters):
    store(dead, queue, [0, 1, 2, 1, 0, 2, 2, 1])
    test = match(**filters)
    wanted = [letter.id for letter in dead.letters(queue) if test(letter)]
    assert [letter.id for letter in dead.letters(queue, **filters)] == wanted
    assert [letter.id for letter in dead.letters(queue, newest=True, **filters)] == wanted[::-1]
    groups = {(each.fingerprint, each.count) for each in dead.groups(queue, **filters)}
    assert groups == {(each.fingerprint, each.count) for each in group(dead.letters(queue, **filters))}


@pytest.mark.parametrize("newest", [False, True])
def test_redis_looks_into_records_lot_by_lot(dead, queue, client, newest):
    """Also where more letters than a lot died in one moment, and the one that was looked at last left meanwhile."""
    ids = [letter.id for letter in store(dead, queue, [0, 1] * 2_000)]
    name = f"dlx:{{{queue}.dlq}}"
    client.zadd(name, dict.fromkeys(ids[500:3_500], client.zscore(name, ids[500])))
    wanted = [letter.id for letter in dead.letters(queue, newest=newest) if letter.worker == "w1@host"]
    assert len(wanted) == 2_000
    assert [letter.id for letter in dead.letters(queue, worker="w1@host", newest=newest)] == wanted
    after = wanted[400]
    assert [letter.id for letter in dead.letters(queue, worker="w1@host", newest=newest, after=after)] == wanted[401:]
    found = dead.letters(queue, worker="w1@host", newest=newest)
    first = [next(found).id]
    (last,) = client.zrange(name, *((-1000, -1000) if newest else (999, 999)))  # where the first lot ended
    client.zrem(name, last)
    rest = [letter.id for letter in found]
    assert set(wanted) - {last.decode()} <= {*first, *rest} and len(set(rest)) == len(rest)
    assert [each for each in wanted if each in rest] == rest


def test_a_letter_whose_id_is_empty_ends_no_search(dead, queue, client):
    """Nobody but another program's hand, or an import, makes one."""
    ids = [letter.id for letter in store(dead, queue, [0, 0])]
    name = f"dlx:{{{queue}.dlq}}"
    client.zadd(name, {"": client.zscore(name, ids[0]) - 1})
    client.hset(f"{name}:records", "", client.hget(f"{name}:records", ids[0]))
    assert [letter.id for letter in dead.letters(queue, worker="w0@host")] == ["", *ids]
    assert [letter.id for letter in dead.letters(queue, worker="w0@host", newest=True)] == [*ids[::-1], ""]


def test_a_letter_that_is_stored_by_force_takes_the_place_of_no_other(dead, queue):
    """A full server refuses what comes first."""
    (letter,) = store(dead, queue, [0])
    dead.broker._store.restore_letter(queue, "", repr(time() * 1000 - 1000), b"{}", letter.original.raw)
    dead.broker._store._call(Capture(letter, BUILT_IN, item=letter.original.raw), "1")
    assert [each.id for each in dead.letters(queue)] == ["", letter.id]


def test_large_records_are_looked_into_a_few_at_a_time(dead, queue, client):
    letters = [letter_of(queue, 0, "boom" + "x" * 16_000) for _ in range(300)]
    letters[299].worker = "other@host"
    dead.broker._store.capture_all([Capture(letter, BUILT_IN, item=letter.original.raw) for letter in letters])
    client.config_resetstat()
    assert [letter.id for letter in dead.letters(queue, worker="other@host")] == [letters[299].id]
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] >= 3, "a script looks at two megabytes at most"


def test_large_messages_are_moved_a_few_at_a_time(dead, queue, client):
    letters = [letter_of(queue, 0) for _ in range(7)]
    for letter in letters:
        letter.original.raw = letter.original.raw.replace(b"[[], {}, {}]", b"x" * 400_000)
    dead.broker._store.capture_all([Capture(letter, BUILT_IN, item=letter.original.raw) for letter in letters])
    client.config_resetstat()
    assert [each.letter.id for each in dead.replay(queue=queue)] == [letter.id for letter in letters]
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] >= 4, "a script moves a megabyte at most"
    assert client.llen(queue) == 7


def test_a_letter_without_a_message_stays(dead, queue, client):
    ids = [letter.id for letter in store(dead, queue, [0, 0, 0])]
    client.hdel(f"dlx:{{{queue}.dlq}}:payloads", ids[1])
    replayed = dead.replay(queue=queue, worker="w0@host", bodies=True)
    assert [each.letter.id for each in replayed] == [ids[0], ids[2]]
    assert [letter.id for letter in dead.letters(queue)] == [ids[1]] and client.llen(queue) == 2


def test_nothing_leaves_for_a_key_that_is_no_list(dead, queue, client):
    ids = [letter.id for letter in store(dead, queue, [0, 1, 0])]
    client.set(queue, "somebody's")
    with pytest.raises(ReplayError, match="3 letters stay"):
        list(dead.replay(queue=queue))
    assert [letter.id for letter in dead.letters(queue)] == ids
    assert client.hlen(f"dlx:{{{queue}.dlq}}:payloads") == 3
    client.delete(queue)


def test_a_replay_that_fails_half_way_loses_no_message(dead, queue, client):
    """Somebody wrote into a DLQ's statistics."""
    ids = [letter.task_id for letter in store(dead, queue, [0, 1, 0])]
    client.hset(f"dlx:{{{queue}.dlq}}:stats", "bytes", "many")
    with pytest.raises(redis.exceptions.ResponseError, match="not an integer"):
        list(dead.replay(queue=queue))
    assert [json.loads(item)["headers"]["id"] for item in reversed(client.lrange(queue, 0, -1))] == ids
    client.delete(queue)


def test_letters_stored_by_another_hand_are_counted_all_the_same(dead, queue, client):
    store(dead, queue, [0, 0, 1])
    client.zadd(f"dlx:{{{queue}.dlq}}", {"stranger": 1})
    assert sum(each.count for each in dead.groups(queue)) == 4
    assert len(list(dead.letters(queue, task="shop.pay"))) == 2


def test_a_replay_takes_what_is_there_and_not_what_dies_meanwhile(dead, queue):
    letters = store(dead, queue, [0] * 250)
    seen = []
    for replayed in dead.replay(queue=queue):
        seen.append(replayed.letter.id)
        if len(seen) % 50 == 0:
            store(dead, queue, [1])
    assert seen == [letter.id for letter in letters]
    assert len(list(dead.letters(queue))) == 5


def test_caps_are_kept_and_warned_of_when_nothing_dies(dead, queue, caplog):
    settings = replace(BUILT_IN, dlq_max_length=100)
    channel = SimpleNamespace(dlx_queues={queue: settings}, dlx_store=dead.broker._store)
    retention = Retention(channel, dead.policy)
    caplog.set_level(logging.WARNING, "celery_dlx")
    store(dead, queue, [0] * 79)
    retention.run()
    assert not caplog.records
    store(dead, queue, [1])
    retention.run()
    retention.run()
    (warning,) = caplog.messages
    assert f"'{queue}.dlq' holds 80 letters" in warning and "80 % of what it may" in warning
    caplog.clear()
    channel.dlx_queues[queue] = replace(settings, dlq_max_length=10)
    assert retention.run() == 70
    assert f"70 letters of '{queue}.dlq' are gone by its caps" in caplog.messages[0]
    (row,) = dead.stats(queue)
    assert row.letters == 10 and sum(row.extra["evicted"].values()) == 70
    labels = {label.split(" ", 1)[1] for label in row.extra["evicted"]}
    assert labels == {"failure shop.pay"}


def test_ids_are_paged_like_all_else(dead, queue):
    ids = [letter.id for letter in store(dead, queue, [0, 1, 2, 0])]
    some = [ids[0], ids[1], ids[3]]

    def found(**page) -> list[str]:
        return [letter.id for letter in dead.letters(queue, ids=some, **page)]

    assert found() == some and found(newest=True, limit=1) == [ids[3]]
    assert found(after=ids[1]) == [ids[3]] and found(newest=True, after=ids[1]) == [ids[0]]


def test_an_edit_that_does_not_fit_one_letter_holds_up_no_other(dead, queue, tmp_path, monkeypatch):
    monkeypatch.setenv("CELERY_DLX_STATE", str(tmp_path))
    letters = store(dead, queue, [0] * 5)
    edit = json.dumps([{"op": "test", "path": "/args", "value": []}, {"op": "add", "path": "/args/0", "value": 1}])
    odd = letter_of(queue, 1)
    odd.original.raw = odd.original.raw.replace(b"[[], {}, {}]", b"[[7], {}, {}]")
    dead.broker._store.capture_all([Capture(odd, BUILT_IN, item=odd.original.raw)])
    letters += store(dead, queue, [0] * 5)
    engine, locks = dead.start_replay(queue=queue, options=Options(edit=edit, wait=0))
    moved = [replayed.letter.id for replayed in engine.run()]
    locks.release()
    assert moved == [letter.id for letter in letters] and "does not fit" in str(engine.error)
    assert [letter.id for letter in dead.letters(queue)] == [odd.id]


def test_overflow_keeps_no_secrets(redis_server, queue, client):
    section = "{redact: ['args[0]'], redact_stored: true}"
    policy = f"version: 1\nqueues: {{{queue}: {{max_length: 1, dead_letter: {section}}}}}\n"
    sender = Sender(redis_server.url)
    with Worker(redis_server.url, [queue], policy=policy, arguments=("-c", "1"), DLX_PREFETCH="1") as worker:
        for _ in range(6):
            sender.task(queue, "matrix_app.sleeps", [20.0625], argsrepr="[20.0625]")
        (letter, *_) = wait_for(lambda: worker.letters(queue), "overflow")
        worker.kill()
    assert letter["reason"] == "maxlen"
    held = repr([client.hgetall(f"dlx:{{{queue}.dlq}}:{part}") for part in ("payloads", "records")])
    assert "[redacted]" in held and "20.0625" not in held and "W1syMC4" not in held
