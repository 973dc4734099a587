"""Scripts over many letters: what they store is what was given, what they send back is what would be written one by one."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
import redis
from celery import Celery

from celery_dlx import DeadLetters
from celery_dlx.brokers.redis import moving
from celery_dlx.brokers.redis.letters import original_of
from celery_dlx.brokers.redis.revival import revived, told
from celery_dlx.brokers.redis.store import Capture
from celery_dlx.brokers.redis.stored import letter_of
from celery_dlx.letters import HEADER, Death, Original, compose
from celery_dlx.policy.settings import Policy
from celery_dlx.replay import Options
from celery_dlx.replaying import BROKER_HEADERS

HEADERS = {
    "lang": "py", "task": "shop.charge", "id": "a-1", "root_id": "a-1", "parent_id": None, "group": None, "retries": 0,
    "eta": None, "expires": None, "timelimit": [None, None], "argsrepr": "(1,)", "kwargsrepr": "{}", "origin": "gen1@x-1",
}  # fmt: skip
PROPERTIES = {
    "correlation_id": "a-1", "delivery_mode": 2, "priority": 0, "delivery_info": {"exchange": "", "routing_key": "q"},
    "body_encoding": "base64", "delivery_tag": "6f0c",
}  # fmt: skip


def envelope(
    headers: Any = None, properties: Any = None, body: str = "W1sxXSwge30sIG51bGxd", **others: Any
) -> dict[str, Any]:
    return {
        "body": body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {**HEADERS, **(headers or {})},
        "properties": {**PROPERTIES, **(properties or {})},
        **others,
    }


def without(kind: str, key: str) -> dict[str, Any]:
    found = envelope()
    del found[kind][key]
    return found


#: By name; those that Redis does alone, and those it leaves to us.
EASY = {
    "usual": envelope(),
    "retried": envelope({"retries": 3}),
    "never retried": without("headers", "retries"),
    "no expires": without("headers", "expires"),
    "urgent": envelope(properties={"priority": 7}),
    "no priority": without("properties", "priority"),
    "priority beyond": envelope(properties={"priority": 255}),
    "no body": envelope(body=""),
    "words that look like ours": envelope({"argsrepr": '("y-death", "retries": 3, "expires": 1, {}, "properties": {}})'}),
    "a name that ends in x-1": envelope({"origin": "gen1@box-1", "kwargsrepr": "{'x-': '\\\\'}"}),
    "text beyond ASCII": envelope({"argsrepr": "('ümläut', '\U0001f4a5')"}),
    "an object after it": envelope(more={}),
    "more about stamps": envelope({"stamps": {"a": [1, {"b": "}}"}]}, "stamped_headers": ["a"]}),
}
HARD = {
    "retries of a nested object": envelope({"stamps": {"retries": 3}}),
    "expires": envelope({"expires": "2020-01-01T00:00:00"}),
    "expires later": envelope({"expires": "2999-01-01T00:00:00"}),
    "replayed before": envelope({HEADER: {"replays": 2, "last": "b", "deaths": [{"id": "b", "reason": "failure"}]}}),
    "broker's words": envelope({"x-death": [], "x-other": 1}),
    "redelivered": envelope({"redelivered": True}),
    "redelivered, says its route": envelope(properties={"delivery_info": {"routing_key": "q", "redelivered": True}}),
    "retries as text": envelope({"retries": "3"}),
    "retries that are too many": envelope({"retries": 10**9}),
    "priority as text": envelope(properties={"priority": "7"}),
    "priority that is none": envelope(properties={"priority": None}),
    "priority twice": envelope(properties={"delivery_info": {"priority": 3}}),
    "properties of a header": envelope({"stamps": {"more": {}, "properties": {"a": 1}}}),
    "properties among the headers": envelope({"nested": {"a": {}}, "properties": {}, "b": 1}),
    "text as a body": envelope(properties={"body_encoding": None}, body='[["\\"headers\\": {"], {}, null]'),
    "an escape in its content type": {**envelope(), "content-type": 'a"b'},
    "words that look like the broker's": envelope({"argsrepr": '("x-death", 1)'}),
    "other keys after it": envelope(more=1),
    "a broker's word, escaped": envelope({"x-death": [1]}),
    "a letter beyond ASCII that is escaped like one": envelope({"argsrepr": "\x1f\x7f"}),
    "other order": dict(reversed(envelope().items())),
}
#: As bytes: not as kombu writes them.
RAW = {
    "compact": json.dumps(envelope(), separators=(",", ":")).encode(),
    "blanks after it": json.dumps(envelope()).encode() + b" \n",
    "as UTF-16": json.dumps(envelope()).encode("utf-16"),
    "a key twice": json.dumps(envelope()).replace('"retries": 0', '"retries": 0, "retries": 2').encode(),
    "no envelope": b'{"body": "", "content-encoding": "", "content-type": "", "headers": {oops}, "properties": {}}',
    "a key that is escaped": json.dumps(envelope()).replace('"expires"', '"\\u0065xpires"').replace("null", "1", 2).encode(),
    "two headers": json.dumps(envelope()).encode()[:-1] + b', "headers": {"task": "t", "id": "i"}}',
    "cut short": json.dumps(envelope()).encode()[:-20],
    "nothing": b"",
}
RAW_EASY = {"as UTF-8": json.dumps(envelope({"argsrepr": "ü"}), ensure_ascii=False).encode()}
ITEMS = {name: json.dumps(each).encode() for name, each in (EASY | HARD).items()} | RAW | RAW_EASY


@contextmanager
def stored(url: str, items: dict[str, bytes], options: dict[str, Any] | None = None):
    """A DLQ with one letter of each item; gives what reads it, its name, its store and the letters' ids by name."""
    queue = f"q{uuid4().hex[:8]}"
    app = Celery("moving", broker=url, set_as_current=False)
    app.conf.task_default_queue = queue
    dead = DeadLetters(app, policy=Policy())
    with app.connection_for_write() as connection:
        app.conf.broker_transport_options = options or {}  # of what reads, not of what stores
        store = connection.default_channel.dlx_letter_store(dead.policy)
        store.announce(queue)
        ids = {}
        for name, item in items.items():
            letter = compose(Death("failure", queue, 0), original_of(item), f"{queue}.dlq")
            ids[name] = letter.id = f"{uuid4().hex}"
            assert store.capture(Capture(letter, dead.policy.settings(queue), item=item))
        yield dead, queue, store, ids
    dead.close()


def expected(store: Any, queue: str, letter_id: str) -> bytes:
    """What the message is when it is written here."""
    score, record, item = store.reader.one(queue, letter_id)
    return revived(item, letter_of(record, item, score, f"{queue}.dlq", letter_id, queue))[0]


def lists(client: redis.Redis, queue: str) -> list[bytes]:
    return [item for key in client.keys(f"{queue}*") for item in client.lrange(key, 0, -1)]


def test_messages_go_back_as_if_written_one_by_one(redis_server):
    client = redis.Redis.from_url(redis_server.url)
    with stored(redis_server.url, ITEMS) as (dead, queue, store, ids):
        wanted = sorted(expected(store, queue, letter_id) for letter_id in ids.values())
        moved = {each.letter.id: each for each in dead.replay(queue=queue)}
        assert moved.keys() == set(ids.values())
        assert moved[ids["retried"]].changes == ["retries 3 → 0"]
        assert sorted(lists(client, queue)) == wanted
        # The default priority's list has the queue's own name.
        assert {int(json.loads(item)["properties"]["priority"]) for item in client.lrange(f"{queue}\x06\x166", 0, -1)} == {7}


@pytest.mark.parametrize("name", ITEMS)
def test_redis_writes_those_that_it_can(redis_server, name, monkeypatch):
    written = []
    monkeypatch.setattr(moving, "revived", lambda item, *args: written.append(item) or revived(item, *args))
    with stored(redis_server.url, {name: ITEMS[name]}) as (dead, queue, store, ids):
        wanted = expected(store, queue, ids[name])
        (only,) = dead.replay(queue=queue)
        assert lists(redis.Redis.from_url(redis_server.url), queue) == [wanted]
        assert bool(written) is (name in HARD or name in RAW)
        assert only.letter.id == ids[name]


def test_a_message_that_was_changed_meanwhile_is_looked_at_again(redis_server):
    """Between reading a record and moving the letter somebody wrote another message."""
    client = redis.Redis.from_url(redis_server.url)
    with stored(redis_server.url, {"usual": ITEMS["usual"]}) as (dead, queue, store, ids):
        payloads = store.keys(queue)[1]
        client.hset(payloads, ids["usual"], ITEMS["urgent"])
        assert len(list(dead.replay(queue=queue))) == 1
        (key,) = client.keys(f"{queue}*")
        assert key != queue.encode()  # it is the message's priority that counts
        (item,) = lists(client, queue)
        assert json.loads(item)["properties"]["priority"] == 7


def test_large_messages_are_moved_a_few_at_a_time(redis_server):
    """A script ends when it has a megabyte: the server does nothing else meanwhile."""
    client = redis.Redis.from_url(redis_server.url)
    items = {str(number): json.dumps(envelope(body="A" * 400_000)).encode() for number in range(40)}
    with stored(redis_server.url, items) as (dead, queue, _, ids):
        client.config_resetstat()
        assert {each.letter.id for each in dead.replay(queue=queue)} == set(ids.values())
        assert client.llen(queue) == 40
        # The first page of letters is one batch: what one script reads and writes is bounded.
        assert client.info("commandstats")["cmdstat_lpush"]["calls"] == 14


def test_what_is_begun_is_finished_when_nobody_wants_to_know(redis_server):
    items = {str(number): ITEMS["usual"] for number in range(300)}
    with stored(redis_server.url, items) as (dead, queue, _store, _):
        replaying = dead.replay(queue=queue)
        next(replaying)
        replaying.close()
        left = {letter.id for letter in dead.letters(queue)}
        moved = {
            json.loads(item)["headers"][HEADER]["last"] for item in lists(redis.Redis.from_url(redis_server.url), queue)
        }
        assert not left & moved
        assert len(left) + len(moved) == 300
        assert {each.letter.id for each in dead.replay(queue=queue)} == left  # and the store can go on


def test_letters_go_back_in_their_order(redis_server):
    names = ["usual", "redelivered", "retried", "expires", "no body", "usual", "broker's words", "usual"] * 20
    items = {str(at): json.dumps(json.loads(ITEMS[name]) | {"at": at}).encode() for at, name in enumerate(names)}
    with stored(redis_server.url, items) as (dead, queue, _, ids):
        assert [each.letter.id for each in dead.replay(queue=queue)] == list(ids.values())
        found = redis.Redis.from_url(redis_server.url).lrange(queue, 0, -1)
        assert [json.loads(item)["at"] for item in reversed(found)] == list(range(len(items)))


@pytest.mark.parametrize("name", ["usual", "redelivered", "priority as text", "words that look like the broker's"])
def test_a_letter_whose_id_is_empty(redis_server, name):
    with stored(redis_server.url, {}) as (dead, queue, store, _):
        for letter_id in ("", "other"):
            letter = compose(Death("failure", queue, 0), original_of(ITEMS[name]), f"{queue}.dlq")
            letter.id = letter_id
            assert store.capture(Capture(letter, dead.policy.settings(queue), item=ITEMS[name]))
        assert [each.letter.id for each in dead.replay(queue=queue)] == ["", "other"]
        assert len(lists(redis.Redis.from_url(redis_server.url), queue)) == 2


def test_what_moved_is_told_also_if_the_next_cannot_be_read(redis_server):
    items = {str(number): ITEMS["usual"] for number in range(300)}
    with stored(redis_server.url, items) as (dead, queue, _, _ids):
        told = []

        def fails(letter: Any) -> bool:
            if len(seen) == 200:
                raise KeyboardInterrupt
            seen.append(letter.id)
            return True

        seen: list[str] = []
        with pytest.raises(KeyboardInterrupt):
            for each in dead.broker.replay(queue, fails):
                told.append(each.letter.id)
        left = {letter.id for letter in dead.letters(queue)}
        assert len(told) == 192
        assert len(left) == 108
        assert not left & set(told)


def test_connections_that_end_while_nobody_reads(redis_server, end_connections):
    """Between pages nothing is held: whoever takes his time finds a connection that lives."""
    items = {str(number): ITEMS["usual"] for number in range(1_500)}
    with stored(redis_server.url, items) as (dead, queue, _, ids):
        for step in (dead.letters, lambda queue: (each.letter for each in dead.replay(queue=queue))):
            seen = []
            for letter in step(queue):
                seen.append(letter.id)
                if len(seen) % 300 == 0:
                    end_connections()
            assert seen == list(ids.values())


def test_more_causes_than_connections(redis_server):
    with stored(redis_server.url, {}) as (dead, queue, store, _):
        letters = []
        for number in range(30 * 300):
            item = json.dumps(envelope({"task": f"shop.t{number % 30}"}, {"delivery_tag": str(number)})).encode()
            letters.append(compose(Death("failure", queue, 0), original_of(item), f"{queue}.dlq"))
        store.capture_all([Capture(each, dead.policy.settings(queue), item=each.original.raw) for each in letters])
        expected = [letter.id for letter in letters]
        assert [letter.id for letter in dead.letters(queue, task="shop.*")] == expected
        side_by_side = [dead.letters(queue) for _ in range(20)]
        assert all(len({next(each).id for each in side_by_side}) == 1 for _ in range(700))
        assert [each.letter.id for each in dead.replay(queue=queue, task="shop.*")] == expected


@pytest.mark.parametrize("most", [1, 2, 3, 10])
def test_few_connections_are_enough(redis_server, most):
    items = {str(number): ITEMS["usual"] for number in range(1_200)}
    with stored(redis_server.url, items, {"max_connections": most}) as (dead, queue, _, ids):
        assert dead.broker._store.client.connection_pool.max_connections == most
        seen = []
        for letter in dead.letters(queue):
            seen.append(letter.id)
            if len(seen) % 100 == 0:
                assert dead.get(letter.id).id == letter.id
        assert seen == list(ids.values())
        assert len(list(dead.discard(queue=queue, limit=200))) == 200
        assert [each.letter.id for each in dead.replay(queue=queue)] == seen[200:]


def test_two_threads_replay_through_one_reader(redis_server):
    items = {str(number): ITEMS["usual"] for number in range(2_000)}
    with stored(redis_server.url, items) as (dead, queue, store, ids):
        other = f"{queue}2"
        store.announce(other)
        settings = dead.policy.settings(other)
        letters = [compose(Death("failure", other, 0), original_of(item), f"{other}.dlq") for item in items.values()]
        for number, letter in enumerate(letters):
            letter.id = str(number)
        store.capture_all([Capture(letter, settings, item=letter.original.raw) for letter in letters])
        with ThreadPoolExecutor(2) as pool:
            both = pool.map(lambda name: [each.letter.id for each in dead.replay(queue=name)], [queue, other])
        assert list(both) == [list(ids.values()), [letter.id for letter in letters]]


def test_a_server_that_forgot_its_scripts(redis_server):
    items = {str(number): ITEMS["usual"] for number in range(300)}
    client = redis.Redis.from_url(redis_server.url)
    with stored(redis_server.url, items) as (dead, queue, _, ids):
        moved = set()
        for each in dead.replay(queue=queue):
            moved.add(each.letter.id)
            if len(moved) % 50 == 1:
                client.script_flush()
        assert moved == set(ids.values())


def test_all_headers_of_brokers_begin_as_the_script_expects():
    assert all(name.startswith("x-") for name in (HEADER, *BROKER_HEADERS))
    assert told(letter_of(b"{}", None, 0.0, "q.dlq", "a", "q")) is None  # no task id: perhaps no message


def test_letters_that_are_stored_together(redis_server):
    """By few scripts; in their order; each with its own record, though they have one time."""
    client = redis.Redis.from_url(redis_server.url)
    with stored(redis_server.url, {}) as (dead, queue, store, _):
        settings = dead.policy.settings(queue)
        items = [
            json.dumps(envelope({"argsrepr": f"({number}, 'ü')"}, {"delivery_tag": str(number)})) for number in range(120)
        ]
        letters = [compose(Death("failure", queue, 0), original_of(item.encode()), f"{queue}.dlq") for item in items]
        client.config_resetstat()
        store.capture_all([Capture(letter, settings, item=letter.original.raw) for letter in letters])
        assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == 5
        assert [letter.id for letter in dead.letters(queue)] == [letter.id for letter in letters]
        assert [letter.args for letter in dead.letters(queue)] == [letter.args for letter in letters]
        assert dead.get(letters[7].id).original.raw == letters[7].original.raw
        (counted,) = dead.stats(queue)
        assert (counted.letters, counted.extra["captured"], counted.extra["reason:failure"]) == (120, 120, 120)
        assert counted.extra["bytes"] == sum(len(letter.original.raw) for letter in letters)
        # Stored again, for the answer was lost: nothing is there twice.
        store.capture_all([Capture(letter, settings, item=letter.original.raw) for letter in letters[:30]])
        assert store.reader.count(queue) == 120
        (group,) = dead.groups(queue)
        assert group.count == 120


def test_letters_that_are_stored_together_keep_within_the_caps(redis_server):
    with stored(redis_server.url, {}) as (dead, queue, store, _):
        settings = replace(dead.policy.settings(queue), dlq_max_length=10)
        letters = [compose(Death("failure", queue, 0), Original(b"{}", raw=b"%d" % n), f"{queue}.dlq") for n in range(60)]
        store.capture_all([Capture(letter, settings, item=letter.original.raw) for letter in letters])
        assert [letter.id for letter in dead.letters(queue)] == [letter.id for letter in letters[50:]]


def test_letters_that_are_stored_together_on_a_full_server(redis_server):
    """Refused whole, they are stored one by one, by force: their items have no other copy."""
    client = redis.Redis.from_url(redis_server.url)
    with stored(redis_server.url, {}) as (dead, queue, store, _):
        letters = [compose(Death("failure", queue, 0), Original(b"{}", raw=b"%d" % n), f"{queue}.dlq") for n in range(30)]
        client.config_set("maxmemory", client.info("memory")["used_memory"])
        try:
            with pytest.raises(redis.exceptions.OutOfMemoryError):
                client.set(queue, b"")
            store.capture_all([Capture(each, dead.policy.settings(queue), item=each.original.raw) for each in letters])
        finally:
            client.config_set("maxmemory", 0)
        assert [letter.id for letter in dead.letters(queue)] == [letter.id for letter in letters]


def test_the_engine_replays_on_a_full_server(redis_server, monkeypatch, tmp_path):
    """Which refuses transactions, also those that only read."""
    monkeypatch.setenv("CELERY_DLX_STATE", str(tmp_path))
    client = redis.Redis.from_url(redis_server.url)
    with stored(redis_server.url, {str(number): ITEMS["usual"] for number in range(200)}) as (dead, queue, _, ids):
        client.config_set("maxmemory", 1)
        try:
            with pytest.raises(redis.exceptions.OutOfMemoryError):
                client.set(queue, b"")
            engine, locks = dead.start_replay(queue=queue, options=Options(wait=0))
            moved = [each.letter.id for each in engine.run()]
        finally:
            client.config_set("maxmemory", 0)
        locks.release()
        engine.journal.close()
        assert engine.error is None and moved == list(ids.values())
