"""Raw replays on Redis: what leaves, what stays, what is counted, and what is refused, whatever happens meanwhile."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import redis
from raw import Sender
from raw_runs import by_list, capture, emptied, expected, run
from servers import wait_for
from test_causes import counted, letter_of
from test_moving import ITEMS, envelope, stored
from workers import Worker

from celery_dlx.brokers.base import Chosen, Run
from celery_dlx.errors import ReplayError, UsageError
from celery_dlx.journal import Journal, Record
from celery_dlx.replay import Options
from celery_dlx.signals import dead_letter_replayed


@pytest.fixture(autouse=True)
def _state(monkeypatch, tmp_path):
    monkeypatch.setenv("CELERY_DLX_STATE", str(tmp_path / "state"))


@pytest.fixture
def client(redis_server):
    with redis.Redis.from_url(redis_server.url) as found:
        yield found


def test_what_is_left_is_counted_as_before(redis_server, client):
    with stored(redis_server.url, {}) as (dead, queue, _, _):
        letters = capture(dead, queue, [letter_of(queue, number % 3) for number in range(900)])
        some = letters[1].fingerprint
        for options, left in (
            ({"limit": 100}, letters[100:]),
            ({"fingerprint": some}, [each for each in letters[100:] if each.fingerprint != some]),
            ({"ids": [letters[102].id, letters[899].id]}, None),
        ):
            moved, record, error = run(dead, None if "ids" in options else queue, **options)
            assert error is None and record.summary()["left"] == 0
            there = [letter.id for letter in dead.letters(queue)]
            assert left is None or there == [letter.id for letter in left]
            assert not {each.letter.id for each in moved} & set(there)
            assert {each.letter.fingerprint for each in moved} <= {letter.fingerprint for letter in letters}
            groups = {(each.fingerprint, each.count) for each in dead.groups(queue)}
            assert groups == {(each.fingerprint, each.count) for each in counted(dead, queue)}
            (row,) = dead.stats(queue)
            assert row.letters == len(there) == row.extra["captured"] - row.extra["replayed"]
            assert row.extra["bytes"] == sum(len(each.original.raw) for each in letters if each.id in set(there))
            assert dead.broker._store.reader.causes(queue) is not None, "the causes add up"


def test_a_cause_that_the_selection_took_for_another(redis_server, client):
    """Somebody wrote other words: what the record says counts."""
    with stored(redis_server.url, {}) as (dead, queue, _, _):
        letters = capture(dead, queue, [letter_of(queue, number % 3) for number in range(30)])
        there = {each.id: each.died_at for each in dead.letters(queue)}
        chosen = [Chosen(each.id, letters[0].fingerprint, there[each.id]) for each in letters[:20]]
        assert len(list(dead.broker.replay_raw(queue, iter(chosen), Run()))) == 20
        groups = {(each.fingerprint, each.count) for each in dead.groups(queue)}
        assert groups == {(each.fingerprint, each.count) for each in counted(dead, queue)} and len(groups) == 3
        assert dead.broker._store.reader.causes(queue) is not None


def test_what_died_again_or_left_since_it_was_selected_stays_so(redis_server, client):
    with stored(redis_server.url, {}) as (dead, queue, _, _):
        letters = capture(dead, queue, [letter_of(queue, number % 3) for number in range(10)])
        engine, locks = dead.start_replay(queue=queue, options=Options(raw=True))
        assert len(list(dead.discard([letters[3].id], queue))) == 1
        capture(dead, queue, [letters[5]])  # under its id, as what comes back as it was does
        moved = [each.letter.id for each in engine.run()]
        locks.release()
        engine.journal.close()
        assert moved == [each.id for at, each in enumerate(letters) if at not in (3, 5)]
        assert (engine.record.summary()["replayed"], engine.record.summary()["left"]) == (8, 2)
        assert [letter.id for letter in dead.letters(queue)] == [letters[5].id]
        assert len(by_list(client, queue)[queue.encode()]) == 8


def test_what_left_before_a_kill_and_died_again_is_not_sent_again(redis_server, client):
    with stored(redis_server.url, {}) as (dead, queue, _, _):
        letters = capture(dead, queue, [letter_of(queue, 0) for _ in range(4)])
        died_at = {letter.id: letter.died_at for letter in dead.letters(queue)}
        journal = Journal(Record("a1"))  # of a replay that was killed when it had sent two
        journal.write("start", started=1, selection="", by="", broker=dead.broker_name, options=Options(raw=True).as_dict())
        journal.write("select", letters=[[each.id, queue, each.fingerprint, died_at[each.id]] for each in letters])
        journal.write("selected")
        journal.write("sending", letters=[each.id for each in letters])
        journal.close()
        chosen = [Chosen(each.id, each.fingerprint, died_at[each.id]) for each in letters[:2]]
        assert len(list(dead.broker.replay_raw(queue, iter(chosen), Run()))) == 2
        capture(dead, queue, [letters[0]])
        engine, locks = dead.resume_replay("a1")
        assert [each.letter.id for each in engine.run()] == [each.id for each in letters[2:]]
        locks.release()
        engine.journal.close()
        assert (engine.record.summary()["replayed"], engine.record.summary()["left"]) == (4, 0)
        assert [letter.id for letter in dead.letters(queue)] == [letters[0].id]
        assert len(by_list(client, queue)[queue.encode()]) == 4


def test_a_key_that_is_no_list_keeps_all_letters(redis_server, client):
    items = {str(number): ITEMS["urgent" if number == 7 else "usual"] for number in range(10)}
    with stored(redis_server.url, items) as (dead, queue, _, ids):
        key = f"{queue}\x06\x166"
        client.set(key, b"")
        moved, record, error = run(dead, queue)
        assert moved == [] and isinstance(error, ReplayError)
        assert "is a string and no list" in str(error) and "10 letters stay" in str(error)
        assert record.summary()["left"] == 10 and [letter.id for letter in dead.letters(queue)] == list(ids.values())
        assert not client.exists(queue)
        client.delete(key)
        engine, locks = dead.resume_replay(record.replay)
        assert len(list(engine.run())) == 10
        locks.release()
        engine.journal.close()


def test_a_full_server_sends_them_back(redis_server, client):
    items = {str(number): ITEMS["compact" if number % 200 == 1 else "usual"] for number in range(600)}
    with stored(redis_server.url, items) as (dead, queue, _, ids):
        client.config_set("maxmemory", 1)
        try:
            with pytest.raises(redis.exceptions.OutOfMemoryError):
                client.set(queue, b"")
            moved, _, error = run(dead, queue)
        finally:
            client.config_set("maxmemory", 0)
        assert error is None and len(moved) == len(ids)
        assert by_list(client, queue) == expected(dead, queue, list(items.values()))


def test_a_server_that_forgot_its_scripts(redis_server, client):
    items = {str(number): ITEMS["usual"] for number in range(800)}
    with stored(redis_server.url, items) as (dead, queue, _, ids):
        engine, locks = dead.start_replay(queue=queue, options=Options(raw=True))
        moved = []
        for each in engine.run():
            moved.append(each.letter.id)
            if len(moved) % 250 == 1:
                client.script_flush()
        locks.release()
        engine.journal.close()
        assert engine.error is None and moved == list(ids.values())
        assert client.llen(queue) == 800


def test_connections_that_end_meanwhile(redis_server, client, end_connections):
    """Whoever takes his time finds one that lives; what was under way is told, or is found gone when it is resumed."""
    items = {str(number): ITEMS["usual"] for number in range(5_000)}
    with stored(redis_server.url, items) as (dead, queue, _, ids):
        engine, locks = dead.start_replay(queue=queue, options=Options(raw=True))
        seen, errors = [], []
        while True:
            for each in engine.run():
                seen.append(each.letter.id)
                if len(seen) % 700 == 1:
                    end_connections()
            locks.release()
            engine.journal.close()
            if engine.error is None:
                break
            errors.append(engine.error)
            engine, locks = dead.resume_replay(engine.record.replay)
        assert engine.record.summary()["replayed"] == len(ids) and engine.record.summary()["left"] == 0
        assert len(set(seen)) == len(seen), "none was told twice"
        assert client.llen(queue) == len(ids) and emptied(client, queue)
        assert all(isinstance(error, redis.exceptions.ConnectionError) for error in errors)


def test_whoever_listens_gets_whole_letters(redis_server, client):
    items = {str(number): ITEMS["retried" if number % 3 else "compact"] for number in range(150)}
    heard = []

    def hear(letter, queue, **more):
        heard.append((letter.id, letter.task, letter.original.raw, queue))

    with stored(redis_server.url, items) as (dead, queue, _, ids):
        dead_letter_replayed.connect(hear)
        try:
            moved, _, _ = run(dead, queue)
        finally:
            dead_letter_replayed.disconnect(hear)
        assert heard == [(ids[name], "shop.charge", item, queue) for name, item in items.items()]
        assert [each.letter.id for each in moved] == list(ids.values())
        assert by_list(client, queue) == expected(dead, queue, list(items.values()))


def test_what_is_yielded_without_listeners(redis_server):
    with stored(redis_server.url, {"usual": ITEMS["usual"]}) as (dead, queue, _, _):
        (known,) = dead.letters(queue)
        (only,), _, _ = run(dead, queue)
        letter = only.letter
        assert (letter.id, letter.queue, letter.dlq) == (known.id, queue, f"{queue}.dlq")
        assert (letter.fingerprint, letter.died_at) == (known.fingerprint, known.died_at)
        assert (letter.task, letter.reason, letter.original.body) == (None, "", b"")


def test_ctrl_c_finishes_what_was_begun(redis_server, client):
    items = {str(number): ITEMS["usual"] for number in range(2_000)}
    with stored(redis_server.url, items) as (dead, queue, _, ids):
        seen: list[str] = []
        hooks = {"interrupted": lambda: len(seen) >= 300}
        engine, locks = dead.start_replay(queue=queue, options=Options(raw=True), hooks=hooks)
        for each in engine.run():
            seen.append(each.letter.id)
        locks.release()
        engine.journal.close()
        assert engine.record.summary()["stopped"] == "interrupted" and 300 <= len(seen) < 2_000
        assert engine.record.summary()["replayed"] == client.llen(queue) == len(seen)
        assert [letter.id for letter in dead.letters(queue)] == list(ids.values())[len(seen) :]


@pytest.mark.parametrize("rate", [None, 2_000])
def test_to_another_queue(redis_server, client, rate):
    items = {str(number): ITEMS["urgent" if number % 2 else "compact"] for number in range(60)}
    with stored(redis_server.url, items) as (dead, queue, _, _ids):
        moved, _, _ = run(dead, queue, Options(raw=True, to=f"to.{queue}", rate=rate))
        assert {each.queue for each in moved} == {f"to.{queue}"} and len(moved) == 60
        assert by_list(client, queue) == {}
        assert by_list(client, f"to.{queue}") == expected(dead, f"to.{queue}", list(items.values()))


def test_two_that_send_the_same_letters(redis_server, client):
    """Locks are one machine's; between machines Redis moves each letter once."""
    items = {str(number): ITEMS["compact" if number % 300 == 7 else "usual"] for number in range(3_000)}
    with stored(redis_server.url, items) as (dead, queue, _, ids):
        chosen = list(map(Chosen.of, dead.letters(queue)))
        with ThreadPoolExecutor(2) as pool:
            both = list(
                pool.map(lambda _: [each.letter.id for each in dead.broker.replay_raw(queue, iter(chosen), Run())], "ab")
            )
        assert sorted(both[0] + both[1]) == sorted(ids.values())
        assert client.llen(queue) == 3_000 and emptied(client, queue)


def test_letters_named_twice_leave_once(redis_server, client):
    with stored(redis_server.url, {"a": ITEMS["usual"], "b": ITEMS["usual"]}) as (dead, queue, _, _):
        chosen = list(map(Chosen.of, dead.letters(queue)))
        assert len(list(dead.broker.replay_raw(queue, iter(chosen * 2), Run()))) == 2
        assert client.llen(queue) == 2


def test_rabbitmq_refuses_with_one_line(rabbitmq, queue):
    worker = Worker(rabbitmq.url, [queue], policy="version: 1\n")
    done = worker.cli("replay", queue, "--all", "--yes", "--raw", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--raw: not on RabbitMQ" in done.stderr and "shovel" in done.stderr
    with pytest.raises(UsageError, match="not on RabbitMQ"):
        worker.dead.start_replay(queue=queue, options=Options(raw=True))
    with pytest.raises(UsageError, match="not on RabbitMQ"):
        worker.dead.broker.replay_raw(queue, iter(()), Run())
    assert worker.cli("history", "--json").stdout == ""
    worker.dead.close()


def test_the_command_line(redis_server, client):
    items = {str(number): json.dumps(envelope({"retries": 3, "id": str(number)})).encode() for number in range(30)}
    with stored(redis_server.url, items) as (dead, queue, _, ids):
        worker = Worker(redis_server.url, [queue], policy="version: 1\n")
        for more in (["--canary", "1"], ["--stop-on-repeat"], ["--edit", "[]"]):
            done = worker.cli("replay", queue, "--all", "--yes", "--raw", *more, check=False)
            assert done.returncode == 2 and f"--raw with {more[0]}:" in done.stderr and "Traceback" not in done.stderr
        assert client.llen(queue) == 0
        done = worker.cli("replay", queue, "--all", "--yes", "--raw", "--limit", "20", "--wait", "60s", "--json")
        *lines, summary = [json.loads(line) for line in done.stdout.splitlines()]
        assert lines == [{"id": each, "queue": queue, "changes": []} for each in list(ids.values())[:20]]
        assert summary == {
            "replay": summary["replay"], "selected": 20, "replayed": 20, "succeeded": 0, "failed_again": 0, "waiting": 20,
            "left": 0, "stopped": None,
        }  # fmt: skip
        for words in ("Nobody reports", "Retries and expires stay", "not counted", "20 raw, of which nobody will tell"):
            assert words in done.stderr.replace("\n", " ")
        assert by_list(client, queue) == expected(dead, queue, list(items.values())[:20])
        (row,) = worker.json("history")
        assert (row["replay"], row["waiting"], row["stopped"]) == (summary["replay"], 20, None)
        done = worker.cli("replay", "--resume", summary["replay"], "--raw", check=False)
        assert done.returncode == 2 and "no more" in done.stderr
        group = worker.json("groups", queue)[0]["fingerprint"]
        done = worker.cli("replay", queue, "--group", group, "--yes", "--raw")
        assert len(done.stdout.splitlines()) == 10 and client.llen(queue) == 30
        assert "--raw" in worker.cli("replay", "--help").stdout


def test_what_was_blanked_goes_back_blank_only_where_somebody_insists(redis_server, client):
    with stored(redis_server.url, {}) as (dead, queue, _, _):
        letter = letter_of(queue, 0)
        letter.redacted = ["args[0]"]
        letter.original = replace(letter.original, raw=letter.original.raw.replace(b"[[], ", b'[[\\"[redacted]\\"], '))
        capture(dead, queue, [letter])
        worker = Worker(redis_server.url, [queue], policy="version: 1\n")
        done = worker.cli("replay", queue, "--all", "--yes", "--raw", check=False)
        assert done.returncode == 1 and "were blanked" in done.stderr and client.llen(queue) == 0
        worker.cli("replay", queue, "--all", "--yes", "--raw", "--no-preflight")
        assert by_list(client, queue) == {queue.encode(): [letter.original.raw]}


def test_a_worker_executes_what_came_back_and_its_next_death_is_like_the_first(redis_server, queue):
    with Worker(redis_server.url, [queue], policy="version: 1\n") as worker:
        task_id = Sender(redis_server.url).task(queue, "matrix_app.fail", ["1"])
        (first,) = worker.wait_letters(queue, 1)
        worker.cli("replay", queue, "--all", "--yes", "--raw")
        wait_for(
            lambda: [each["died_at"] for each in worker.letters(queue)] > [first["died_at"]], lambda: worker.letters(queue)
        )
        (second,) = worker.letters(queue)
        assert second["task_id"] == task_id and len(worker.ran()) == 2
        assert {**second, "died_at": 0, "worker": 0} == {**first, "died_at": 0, "worker": 0}
