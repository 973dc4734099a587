"""Raw replays on Redis: each message comes back with its very bytes, into the list that kombu would put it in."""

from __future__ import annotations

import json
import logging
import random

import pytest
import redis
from raw_runs import by_list, emptied, expected, run
from test_causes import CAUSES
from test_moving import EASY, HARD, ITEMS, RAW, envelope, stored

from celery_dlx.brokers.base import Chosen, Run
from celery_dlx.brokers.redis.letters import original_of
from celery_dlx.brokers.redis.store import Capture
from celery_dlx.letters import Death, compose

#: Messages whose priority Redis cannot tell: those not as kombu writes them, and priorities that kombu takes for others.
READ_HERE = {
    "priority beyond", "priority as text", "priority that is none", "priority twice", "properties of a header",
    "properties among the headers", "an object after it", "other keys after it", "other order",
    "compact", "blanks after it", "as UTF-16", "cut short", "two headers", "nothing",
}  # fmt: skip
LISTS = {"kombu's": {}, "others": {"priority_steps": list(range(10)), "sep": ":"}, "few connections": {"max_connections": 2}}


@pytest.fixture(autouse=True)
def _state(monkeypatch, tmp_path):
    monkeypatch.setenv("CELERY_DLX_STATE", str(tmp_path / "state"))


@pytest.fixture
def client(redis_server):
    with redis.Redis.from_url(redis_server.url) as found:
        yield found


@pytest.mark.parametrize("options", LISTS.values(), ids=LISTS)
def test_every_message_comes_back_with_its_very_bytes(redis_server, client, options):
    with stored(redis_server.url, ITEMS, options) as (dead, queue, _, ids):
        moved, record, error = run(dead, queue)
        assert error is None and [each.letter.id for each in moved] == list(ids.values())
        assert record.summary() == {
            "replay": record.replay, "selected": len(ids), "replayed": len(ids), "succeeded": 0, "failed_again": 0,
            "waiting": len(ids), "left": 0, "stopped": None,
        }  # fmt: skip
        assert by_list(client, queue) == expected(dead, queue, list(ITEMS.values()))
        assert emptied(client, queue)
        (counts,) = dead.stats(queue)
        assert (counts.letters, counts.extra["replayed"]) == (0, len(ids))


@pytest.mark.parametrize("name", ITEMS)
def test_redis_reads_those_that_it_can(redis_server, client, name):
    with stored(redis_server.url, {name: ITEMS[name]}) as (dead, queue, _, ids):
        client.config_resetstat()
        (only,), _, error = run(dead, queue)
        assert (only.letter.id, only.queue, only.changes, error) == (ids[name], queue, [], None)
        assert by_list(client, queue) == expected(dead, queue, [ITEMS[name]])
        # Messages that are read here are fetched one by one.
        assert ("cmdstat_hget" in client.info("commandstats")) is (name in READ_HERE)


def test_priorities_are_told_as_kombu_tells_them(redis_server, client):
    """In whatever order properties come, and whatever else stands in them."""
    dice, items = random.Random(20261128), {}
    for number in range(600):
        parts = {
            "correlation_id": dice.choice(["a-1", "{", "}}", '"priority": 7', "ü", "\\", "priority"]),
            "delivery_info": dice.choice(
                [{"routing_key": "q"}, {}, {"priority": 3}, {"x": {"priority": 3}}, [{"a": 1}], "}"]
            ),
            "priority": dice.choice([0, 3, 6, 9, 7, 1, 10, -1, 5.5, True, "3", None, [], {}]),
            'a"priority': 5,
            "reply_to": dice.choice(["", "x, y", '": ', "}, "]),
            "headers": {"priority": 1},
            "more": number,
        }
        some = dice.sample(list(parts), dice.randrange(2, len(parts)))
        whole = {**envelope(), "properties": {key: parts[key] for key in some}}
        items[str(number)] = json.dumps(whole, ensure_ascii=dice.random() < 0.5).encode()
    with stored(redis_server.url, items) as (dead, queue, _, ids):
        moved, _, error = run(dead, queue)
        assert error is None and len(moved) == len(ids)
        assert by_list(client, queue) == expected(dead, queue, list(items.values()))
        assert emptied(client, queue)


def test_malformed_messages_among_others_keep_their_place(redis_server, client):
    names = ["usual", "compact", "usual", "urgent", "cut short", "retried", "nothing", "usual", "as UTF-16", "urgent"] * 60
    items = {str(at): ITEMS[name].replace(b"gen1@x", b"gen%d@x" % at) for at, name in enumerate(names)}
    with stored(redis_server.url, items) as (dead, queue, _, ids):
        moved, _, error = run(dead, queue)
        assert error is None and [each.letter.id for each in moved] == list(ids.values())
        assert by_list(client, queue) == expected(dead, queue, list(items.values()))


@pytest.mark.parametrize("name", ["usual", "compact"])
def test_letters_whose_id_is_empty(redis_server, client, name):
    with stored(redis_server.url, {}) as (dead, queue, store, _):
        # Nobody has it: also that is an end.
        assert list(dead.broker.replay_raw(queue, iter([Chosen("", "", 0)]), Run())) == []
        letters = [compose(Death("failure", queue, 0), original_of(ITEMS[name]), f"{queue}.dlq") for _ in range(3)]
        for letter, letter_id in zip(letters, ["", "a b", "other"], strict=True):
            letter.id = letter_id
            assert store.capture(Capture(letter, dead.policy.settings(queue), item=ITEMS[name]))
        moved, record, _ = run(dead, queue)
        assert [each.letter.id for each in moved] == ["", "a b", "other"] and record.summary()["left"] == 0
        assert by_list(client, queue) == {queue.encode(): [ITEMS[name]] * 3}
        assert emptied(client, queue)


def test_large_messages_go_a_few_at_a_time(redis_server, client):
    items = {str(number): json.dumps(envelope(body="A" * 400_000)).encode() for number in range(40)}
    with stored(redis_server.url, items) as (dead, queue, _, ids):
        client.config_resetstat()
        moved, _, _ = run(dead, queue)
        assert [each.letter.id for each in moved] == list(ids.values())
        # A script ends when it has two megabytes: the server does nothing else meanwhile.
        assert client.info("commandstats")["cmdstat_lpush"]["calls"] == 7
        assert by_list(client, queue) == expected(dead, queue, list(items.values()))


def test_a_lot_that_ends_early_is_not_overtaken_by_those_sent_after_it(redis_server, client):
    items = {str(number): json.dumps(envelope(body="A" * 60_000)).encode() for number in range(400)}
    with stored(redis_server.url, items) as (dead, queue, _, ids):
        client.config_resetstat()
        moved, _, _ = run(dead, queue)
        assert [each.letter.id for each in moved] == list(ids.values())
        assert client.info("commandstats")["cmdstat_lpush"]["calls"] > 5, "two megabytes are fewer than a lot"
        assert by_list(client, queue) == expected(dead, queue, list(items.values()))


def test_many_go_in_few_scripts(redis_server, client):
    items = {str(number): ITEMS["usual"] for number in range(1_000)}
    with stored(redis_server.url, items) as (dead, queue, _, _ids):
        client.config_resetstat()
        run(dead, queue)
        assert client.info("commandstats")["cmdstat_lpush"]["calls"] == 13


def test_a_letter_without_its_message_stays(redis_server, client, caplog):
    items = {str(number): ITEMS["usual"] for number in range(5)}
    with stored(redis_server.url, items) as (dead, queue, store, ids), caplog.at_level(logging.WARNING, "celery_dlx"):
        client.hdel(store.keys(queue)[1], ids["2"])
        moved, record, error = run(dead, queue)
        assert error is None and [each.letter.id for each in moved] == [ids[name] for name in "0134"]
        assert record.summary()["left"] == 1 and [letter.id for letter in dead.letters(queue)] == [ids["2"]]
        assert any(f"letter {ids['2']} of '{queue}.dlq' has no message" in text for text in caplog.messages)


def test_scores_that_are_no_time(redis_server, client):
    items = {str(number): ITEMS["usual"] for number in range(5)}
    with stored(redis_server.url, items) as (dead, queue, store, ids):
        odd = dict(zip(ids.values(), ["-inf", "-1.5", "0.25", "1e300", "+inf"], strict=True))
        name = store.keys(queue)[0]
        (cause,) = client.scan_iter(name + b":cause:*")
        for key in (name, cause):
            client.zadd(key, odd)
        moved, record, _ = run(dead, queue)
        assert len(moved) == 5 and record.summary()["left"] == 0
        assert client.llen(queue) == 5


def test_names_of_this_file_are_those_of_the_messages():
    assert set(ITEMS) >= READ_HERE and set(EASY) | set(HARD) | set(RAW) < set(ITEMS)
    assert len(CAUSES) == 3
