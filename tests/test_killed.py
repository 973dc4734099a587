"""Replays that were killed while letters left: what those that resume them find, or do not find yet."""

from __future__ import annotations

import pytest
from list_broker import Lists, again, letters

from celery_dlx.journal import Journal, Record


def killed_while_sending(*executed_and_not):
    """A replay that said of letters that they are leaving, and no more; the first was executed."""
    journal = Journal(Record("a1"))
    journal.write("start", started=1, selection="all", by="me", broker="redis://", options={"wait": 0})
    journal.write("select", letters=[[each.id, "q", "f"] for each in executed_and_not])
    journal.write("selected")
    journal.write("sending", letters=[each.id for each in executed_and_not])
    journal.write("state", state="succeeded", letters=[executed_and_not[0].id])
    journal.close()


def test_a_letter_that_was_executed_and_lies_there_still_is_taken_out():
    (executed,) = letters(1)
    killed_while_sending(executed)  # between publishing and acknowledging
    broker = Lists([executed], None)
    done = again(broker, "a1")
    assert (broker.dlq, done.summary()["succeeded"], done.summary()["left"]) == ([], 1, 0)


@pytest.fixture
def killed():
    """One that was executed, one that was not."""
    both = letters(2)
    killed_while_sending(*both)
    return both


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("celery_dlx.engine._GIVEN_BACK", 0.0)


def test_the_broker_may_notice_late_that_the_last_run_was_killed(killed):
    executed, other = killed

    class Late(Lists):
        looks = 0

        def held_by_others(self, queue):
            self.looks += 1
            if self.looks == 3:
                self.dlq = [executed, other]
            return self.looks < 3

    broker = Late([], None)
    done = again(broker, "a1")
    assert (broker.dlq, broker.queue, done.summary()["left"]) == ([], [other.id], 0)


def test_what_the_broker_gives_back_after_the_next_run_is_found_by_the_one_after(killed, impatient):
    executed, other = killed
    broker = Lists([], None)
    broker.held = True
    for _ in range(2):
        done = again(broker, "a1")
        assert (done.stopped, done.summary()["succeeded"], done.summary()["left"]) == (None, 1, 1)
        assert done.entries[other.id].outcome == "left"
    broker.held, broker.dlq = False, [executed, other]
    done = again(broker, "a1")
    assert (broker.dlq, broker.queue, done.summary()["left"]) == ([], [other.id], 0)


def test_what_is_given_back_just_after_it_was_looked_for(killed, impatient):
    executed, other = killed

    class Late(Lists):
        looks = 0

        def held_by_others(self, queue):
            self.looks += 1
            return self.looks == 1

    broker = Late([], None)
    assert again(broker, "a1").summary()["left"] == 1
    broker.dlq = [executed, other]
    assert (again(broker, "a1").summary()["left"], broker.dlq, broker.queue) == (0, [], [other.id])


def test_what_nobody_holds_any_more_left_with_the_run_that_was_killed(killed, impatient):
    broker = Lists([], None)
    broker.held = True
    assert again(broker, "a1").summary()["left"] == 1
    broker.held = False
    done = again(broker, "a1")
    assert (done.summary()["waiting"], done.summary()["left"]) == (1, 0)
    assert not done.entries.under_way(), "nobody looks for them for ever"
