"""Going through the letters of a RabbitMQ DLQ: what is held, what is set aside, and what may be done meanwhile."""

from __future__ import annotations

from itertools import islice

import pytest
from celery import Celery
from servers import wait_for

from celery_dlx import DeadLetters
from celery_dlx.brokers.rabbitmq import browse, moving, reader, spool, store
from celery_dlx.brokers.rabbitmq.letters import at_rest, exported
from celery_dlx.errors import ReplayError, SpoolError
from celery_dlx.letters import Death, Original, compose
from celery_dlx.policy.settings import Policy


@pytest.fixture
def dead(rabbitmq, queue):
    app = Celery("reader", broker=rabbitmq.url)
    app.conf.task_default_queue = queue
    found = DeadLetters(app, policy=Policy())
    with app.connection_for_write() as connection:
        connection.default_channel.queue_declare(queue, durable=True, auto_delete=False)
    yield found
    found.close()


@pytest.fixture
def small(monkeypatch):
    """Nearly all letters go to the file."""
    monkeypatch.setattr(spool, "_IN_MEMORY", 2_000)
    monkeypatch.setattr(browse, "_FEW", 2)


def fill(dead: DeadLetters, queue: str, count: int) -> list[str]:
    """Store letters; returns their ids."""
    lines = []
    for number in range(count):
        headers = {"task": "t", "id": f"task-{number}", "retries": 0}
        original = Original(b"\xff\0body %d" % number, headers, {"delivery_mode": 2}, "", queue)
        letter = compose(Death("failure", queue, 1_700_000_000_000 + number, "E", "m", "t"), original, f"{queue}.dlq")
        lines.append(exported(at_rest(letter, "guest"), letter, queue))
    assert dead.restore(lines) == (count, 0)
    return [line["id"] for line in lines]


def test_letters_are_in_their_dlq_while_somebody_goes_through_them(small, dead, queue):
    ids = fill(dead, queue, 40)
    seen = []
    for letter in dead.letters(queue):
        seen.append((letter.id, letter.original.body))
        if len(seen) % 2:
            assert [each.id for each in dead.discard(letter.id, queue)] == [letter.id]
        else:
            assert [each.letter.id for each in dead.replay(letter.id, queue)] == [letter.id]
    assert seen == [(letter_id, b"\xff\0body %d" % number) for number, letter_id in enumerate(ids)]
    assert dead.stats(queue)[0].letters == 0


def test_an_iterator_that_is_left_half_way_holds_nothing(small, dead, queue):
    ids = fill(dead, queue, 30)
    letters, lines = dead.letters(queue), dead.export(queue)
    assert next(letters).id == ids[0] == next(lines)["id"]
    assert dead.stats(queue)[0].letters == 30
    assert [letter.id for letter in dead.letters(queue, newest=True)] == ids[::-1]
    assert [letter.id for letter in dead.letters(queue, newest=True, limit=20, after=ids[25])] == ids[5:25][::-1]
    assert [letter.id for letter in letters] == ids[1:]
    assert [line["id"] for line in lines] == ids[1:]


def test_a_full_disk_loses_nothing(small, dead, queue, monkeypatch):
    ids = fill(dead, queue, 30)
    with monkeypatch.context() as full:
        full.setattr(spool.tempfile, "TemporaryFile", lambda buffering: open("/dev/full", "w+b", buffering))  # noqa: SIM115
        for look in (lambda: dead.letters(queue), lambda: dead.letters(queue, newest=True), lambda: dead.export(queue)):
            with pytest.raises(SpoolError, match="No space left on device"):
                list(look())
        assert dead.stats(queue)[0].letters == 30
        assert next(dead.letters(queue, limit=1)).id == ids[0], "few need no file"
    assert [letter.id for letter in dead.letters(queue)] == ids


def test_more_letters_than_can_be_held_are_said(dead, queue, monkeypatch, caplog):
    ids = fill(dead, queue, 25)
    monkeypatch.setattr(reader, "PER_CHANNEL", 5)
    monkeypatch.setattr(reader, "CHANNELS", 4)
    assert [letter.id for letter in dead.letters(queue)] == ids[:20]
    assert f"{queue}.dlq: 20 letters were looked at, 5 more were not" in caplog.text
    assert [group.count for group in dead.groups(queue)] == [20]
    with pytest.raises(ReplayError, match=r"5 letters of .* more are there than can be read at once; nothing was exported"):
        list(dead.export(queue))
    assert [line["id"] for line in dead.export(queue, limit=3)] == ids[:3]
    gone = [letter.id for letter in dead.discard(queue=queue, limit=12)]
    caplog.clear()
    assert sorted(letter.id for letter in dead.letters(queue)) == sorted(set(ids) - set(gone))
    assert "were not" not in caplog.text


def test_looking_does_not_change_their_order(dead, queue, monkeypatch):
    """RabbitMQ gives out first what was put back, in the order in which it was."""
    monkeypatch.setattr(reader, "PER_CHANNEL", 5)
    for each in (store, moving):
        monkeypatch.setattr(each, "WINDOW", 8)
    ids = fill(dead, queue, 27)

    def seen(**options):
        return [letter.id for letter in dead.letters(queue, **options)]

    for _ in range(3):
        assert seen() == ids
        assert seen(limit=3) == ids[:3]
        assert seen(limit=9) == ids[:9]
        assert seen(limit=3, after=ids[8]) == ids[9:12]
        assert seen(limit=2, newest=True) == ids[:-3:-1]
        assert dead.get(ids[2], queue).id == ids[2]
    assert [letter.id for letter in dead.discard([ids[1], ids[7]], queue)] == [ids[1], ids[7]]
    assert [each.letter.id for each in dead.replay(queue=queue, limit=2)] == [ids[0], ids[2]]
    assert seen(limit=4) == [ids[3], ids[4], ids[5], ids[6]]
    assert seen() == [*ids[3:7], *ids[8:]]


BODIES = [b"\xff\0body %d" % number for number in range(70)]


@pytest.mark.parametrize("whole,small,begun", [(False, True, 2), (True, False, 2), (True, True, 3)])
def test_the_next_windows_are_begun_while_one_is_looked_at(dead, queue, monkeypatch, whole, small, begun):
    monkeypatch.setattr(reader, "PER_CHANNEL", 20)
    if not small:
        monkeypatch.setattr(reader, "_SMALL", 0)
    ids = fill(dead, queue, 70)
    with dead.app.connection_for_read() as connection:
        for _ in ("letters nobody looked at", "letters that were put back"):
            found = reader.Reader(connection, f"{queue}.dlq", ahead=True, whole=whole)
            first = next(reversed(found._windows.values()))
            letters = iter(found)
            seen = [next(letters)]
            wait_for(
                lambda of=first, all_of=found: all_of._drain(0) or len(of.arrived) == 19, lambda of=first: len(of.arrived)
            )
            seen.append(next(letters))
            assert begun <= len(found._windows) <= begun + 1, "one more if all of the second is here, too"
            seen += letters
            assert [raw.body for raw in seen] == BODIES
            found.close()
    assert [letter.id for letter in dead.letters(queue)] == ids


def test_windows_that_were_asked_for_and_not_looked_at_go_back_in_order(dead, queue, monkeypatch):
    monkeypatch.setattr(reader, "PER_CHANNEL", 10)
    ids = fill(dead, queue, 70)
    with dead.app.connection_for_read() as connection:
        for wanted in (1, 3, 12, 25, 70, 1):
            found = reader.Reader(connection, f"{queue}.dlq", ahead=True, whole=True)
            letters = iter(found)
            assert [next(letters).body for _ in range(wanted)] == BODIES[:wanted]
            assert len(found._windows) > 1
            found.close()
            assert found.seen <= 70
    assert [letter.id for letter in dead.letters(queue)] == ids


def test_what_comes_back_fills_one_window_after_the_other(dead, queue, monkeypatch):
    """Somebody else took what was counted, so two have room; without priorities they would get letters by turns."""
    monkeypatch.setattr(reader, "PER_CHANNEL", 10)
    monkeypatch.setattr(reader, "_QUIET", 0.5)
    ids = fill(dead, queue, 50)
    with dead.app.connection_for_read() as connection, dead.app.connection_for_read() as other:
        found = reader.Reader(connection, f"{queue}.dlq", ahead=True, whole=True)
        with monkeypatch.context() as larger:
            larger.setattr(reader, "PER_CHANNEL", 35)
            holding = reader.Reader(other, f"{queue}.dlq")
        assert [raw.body for raw in found] == [*BODIES[:10], *BODIES[45:50]]
        assert (found.missed, [window.size for window in found._windows.values()]) == (35, [10, 20, 20])
        assert [raw.body for raw in islice(holding, 35)] == BODIES[10:45]
        holding.close()
        second, third = list(found._windows.values())[1:]
        wait_for(lambda: found._drain(0) or len(third.arrived) == 20, lambda: (second.arrived, third.arrived))
        assert [raw.body for window in (second, third) for raw in window.arrived] == BODIES[10:45], "in their order"
        found.close()
    wait_for(lambda: dead.stats(queue)[0].letters == 50, "all are back")
    assert [letter.id for letter in dead.letters(queue)] == [*ids[:10], *ids[45:], *ids[10:45]]


def test_what_is_acknowledged_late_makes_no_room_out_of_turn(dead, queue, monkeypatch):
    """A letter that came over the first channel again would be put back before those of the second."""
    monkeypatch.setattr(reader, "PER_CHANNEL", 4)
    ids = fill(dead, queue, 14)
    with dead.app.connection_for_write() as connection:
        found = reader.Reader(connection, f"{queue}.dlq")
        letters = iter(found)
        seen = [next(letters) for _ in range(7)]
        assert len(found._windows) == 2
        found.acknowledge([(raw, letter_id) for raw, letter_id in zip(seen[:3], ids, strict=False)])
        seen += letters
        assert [raw.body for raw in seen] == [b"\xff\0body %d" % number for number in range(14)]
        found.close()
    assert [letter.id for letter in dead.letters(queue)] == ids[3:]


@pytest.mark.parametrize("act", ["replay", "discard"])
def test_acknowledgements_that_were_lost_are_sent_again(dead, queue, monkeypatch, caplog, act):
    ids = fill(dead, queue, 12)
    lost, acknowledge = [], reader.Reader._acknowledge

    def lose(self, channel, tags):
        if lost:
            acknowledge(self, channel, tags)
        else:
            lost.extend(tags)
            self._windows[channel].settle(tags)

    monkeypatch.setattr(reader.Reader, "_acknowledge", lose)
    left = [getattr(each, "letter", each).id for each in getattr(dead, act)(ids[:5], queue)]
    assert (len(lost), left) == (5, ids[:5])
    assert f"5 acknowledgements of {queue}.dlq were lost, and are sent again" in caplog.text
    assert [letter.id for letter in dead.letters(queue)] == ids[5:]


def test_who_finds_a_dlq_empty_takes_nothing_that_comes_back(dead, queue):
    """It would go back behind the others."""
    ids = fill(dead, queue, 6)
    with dead.app.connection_for_write() as connection, dead.app.connection_for_write() as other:
        for asks in (False, True):
            holding = reader.Reader(connection, f"{queue}.dlq")
            assert len(list(holding)) == 6
            late = reader.Reader(other, f"{queue}.dlq")
            assert (late.depth, list(late)) == (0, [])
            holding.close()
            if asks:
                assert late.more()
                assert [raw.body for raw in late] == [b"\xff\0body %d" % number for number in range(6)]
            late.close()
            assert [letter.id for letter in dead.letters(queue)] == ids


def test_a_replay_that_ends_early_leaves_the_others_in_order(dead, queue):
    ids = fill(dead, queue, 300)
    for _ in range(5):
        assert [each.letter.id for each in dead.replay(queue=queue, limit=10)] == ids[:10]
        del ids[:10]
        assert [letter.id for letter in dead.letters(queue)] == ids
    some = [*ids[:60], ids[200]]
    assert [each.letter.id for each in dead.replay(some, queue)] == some
    assert [letter.id for letter in dead.letters(queue)] == [each for each in ids if each not in some]


def test_letters_beyond_a_window_of_others_are_found(dead, queue, monkeypatch):
    monkeypatch.setattr(reader, "PER_CHANNEL", 20)
    for each in (store, moving):
        monkeypatch.setattr(each, "WINDOW", 8)
    ids = fill(dead, queue, 120)
    some = [*ids[:45], ids[118]]
    assert {each.letter.id for each in dead.replay(some, queue)} == set(some)
    assert {letter.id for letter in dead.discard(ids[45:60] + ids[117:118], queue)} == {*ids[45:60], ids[117]}
    assert [letter.id for letter in dead.letters(queue)] == [*ids[60:117], ids[119]]


def test_letters_that_are_taken_here_and_there(dead, queue):
    """Acknowledged one by one, and all up to one."""
    ids = fill(dead, queue, 200)
    some = {*ids[:50], *ids[60:150:3]}
    assert {letter.id for letter in dead.discard(some, queue)} == some
    assert [letter.id for letter in dead.letters(queue)] == [each for each in ids if each not in some]
    assert len([*dead.replay(queue=queue)]) == 200 - len(some)
    assert dead.stats(queue)[0].letters == 0
