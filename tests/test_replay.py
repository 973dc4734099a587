"""The engine and its journal against a broker made of lists."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from list_broker import Lists, again, choice, counts, letters, run

from celery_dlx.errors import JournalError, ReplayError, UsageError
from celery_dlx.groups import group
from celery_dlx.journal import Journal, QueueLocks, Record, history, read_record
from celery_dlx.letters import DeadLetter, Original
from celery_dlx.replay import Options, start
from celery_dlx.replaying import lineage_of, replay_of


def test_all_go_and_are_heard_of():
    record = run(Lists(letters(5)))
    assert counts(record) == {
        "selected": 5, "replayed": 5, "succeeded": 5, "failed_again": 0, "waiting": 0, "left": 0, "stopped": None,
    }  # fmt: skip
    (told,) = history("redis://")
    assert told.summary() == record.summary()
    assert list(history("amqp://")) == []


def test_letters_that_cannot_go_hold_up_no_other_queue():
    class Picky(Lists):
        def replay(self, queue, match, limit=None, run=None):
            if queue == "q":
                raise ReplayError("letter 0 stays in its DLQ: the edit does not fit")
            yield from super().replay(queue, match, limit, run)

    others = letters(3, "r")
    for number, letter in enumerate(others):
        letter.id = f"{100 + number:032x}"
    broker = Picky([*letters(2), *others])
    first = run(broker)
    for record in (first, again(broker, first.replay)):
        assert (record.summary()["replayed"], record.summary()["left"]) == (3, 2)
        assert "does not fit" in record.summary()["stopped"]
    assert broker.queue == [letter.id for letter in others]


def test_canaries_that_fail_stop_it_and_new_ones_go_first_when_it_goes_on():
    broker = Lists(letters(10), "failed")
    record = run(broker, Options(canary=3, stop_on_repeat=True, wait=0))
    assert (len(broker.queue), record.summary()["left"]) == (3, 7)
    broker.outcome = "succeeded"
    assert (again(broker, record.replay).summary()["succeeded"], len(broker.queue)) == (7, 10)


def test_canaries_nobody_reports_on():
    record = run(Lists(letters(4), None), Options(canary=2, wait=0, patience=0))
    assert "no news of 2 canaries" in record.stopped
    assert record.summary()["left"] == 2


def test_an_interrupted_wait_for_canaries_ends():
    broker, pressed = Lists(letters(4), None), []
    record = run(
        broker,
        Options(canary=2, wait=0),
        interrupted=lambda: bool(pressed),
        on_progress=lambda record: pressed.append(len(broker.queue)),
    )
    assert (record.stopped, pressed, record.summary()["left"]) == ("interrupted", [2], 2)


def test_what_others_took_after_an_orderly_end_was_not_replayed():
    broker = Lists(letters(10), None)
    record = run(broker, Options(wait=0), interrupted=lambda: len(broker.queue) >= 3)
    assert (record.summary()["replayed"], record.stopped) == (3, "interrupted")
    del broker.dlq[2:]  # somebody discarded, or holds, all but two
    summary = again(broker, record.replay).summary()
    assert (summary["replayed"], summary["left"]) == (5, 5)


def test_after_a_kill_only_what_was_about_to_leave_is_taken_for_gone_with_us():
    broker = Lists(letters(3_000), None)
    broker.fail_at = 5  # the fifth left, and nobody came to note it
    record = run(broker)
    del broker.dlq[:]
    summary = again(broker, record.replay).summary()
    assert 4 <= summary["replayed"] <= 1_001
    assert summary["replayed"] + summary["left"] == 3_000


def test_a_failure_of_another_kind_does_not_stop_it():
    broker = Lists(letters(3), "failed")
    record = run(broker, Options(stop_on_repeat=False, wait=0))
    assert (record.stopped, record.summary()["failed_again"]) == (None, 3)


def test_a_broken_connection_leaves_a_journal_to_go_on_from():
    broker = Lists(letters(6), None)
    broker.fail_at = 3
    record = run(broker)
    assert (record.summary()["stopped"], record.summary()["replayed"], record.summary()["left"]) == ("gone", 2, 4)
    broker.fail_at = None
    done = again(broker, record.replay)
    assert sorted(broker.queue) == [letter.id for letter in letters(6)], "none twice, none lost"
    assert (done.summary()["replayed"], done.summary()["left"]) == (6, 0)


def test_what_is_gone_was_somebody_elses():
    record = run(Lists(letters(2)), found=letters(4))
    assert (record.summary()["selected"], record.summary()["replayed"], record.summary()["left"]) == (4, 2, 2)


def test_an_interruption_is_said():
    broker = Lists(letters(5))
    record = run(broker, interrupted=lambda: len(broker.queue) >= 2)
    assert (record.stopped, record.summary()["left"]) == ("interrupted", 3)


def test_two_at_once_are_refused():
    locks, broker = QueueLocks("redis://", ["q"], "first"), Lists([])
    with pytest.raises(UsageError, match="by replay first"):
        start(broker, "redis://", choice(broker), Options())
    assert broker.released == 1
    locks.release()


def test_a_journal_that_was_cut_is_read_as_far_as_it_goes(tmp_path):
    record = run(Lists(letters(3)))
    path = tmp_path / "replays" / f"{record.replay}.jsonl"
    assert path.stat().st_mode & 0o777 == 0o600
    whole = path.read_text().splitlines()
    path.write_text("\n".join(whole[:-2])[:-5] + "\n[1]\nnull\n")
    told = read_record(record.replay)
    assert told.summary()["stopped"] == "killed"
    assert len(told.entries) == 3
    with pytest.raises(UsageError, match="no journal"):
        read_record("../../etc/passwd")


def test_a_replay_that_runs_is_called_so():
    journal = Journal(Record("abc"))
    journal.write("start", started=1, selection="all", by="me", broker="b", options={})
    assert read_record("abc").summary()["stopped"] == "running"
    journal.close()
    assert json.loads(json.dumps(read_record("abc").summary()))["stopped"] == "killed"


def test_a_journal_that_cannot_be_written_is_explained(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CELERY_DLX_STATE", str(tmp_path / "file"))
    with pytest.raises(JournalError, match="CELERY_DLX_STATE"):
        run(Lists(letters(1)))


def test_a_disk_that_fills_up_loses_nothing():
    broker = Lists(letters(3), None)
    engine, locks = start(broker, "redis://", choice(broker), Options(wait=0))
    full = open("/dev/full", "w")  # noqa: SIM115 - closed below
    engine.journal._file, real = full, engine.journal._file
    with pytest.raises(JournalError, match="No space left"):
        list(engine.run())  # its end cannot be written either
    locks.release()
    with suppress(OSError):
        full.close()
    real.close()
    done = again(broker, engine.record.replay)
    assert (sorted(broker.queue), done.summary()["left"]) == ([letter.id for letter in letters(3)], 0)


def test_a_selection_that_was_cut_short_is_not_taken_for_the_whole(tmp_path):
    record = run(Lists(letters(3)))
    path = tmp_path / "replays" / f"{record.replay}.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if '"selected",' not in line))
    with pytest.raises(UsageError, match="start it again"):
        again(Lists([]), record.replay)


def test_old_news_stop_nothing():
    broker = Lists(letters(12), "failed")
    record = run(broker, Options(canary=3, stop_on_repeat=True, wait=0))
    broker.reports += [{"of": letter.id, "state": "failed", "fingerprint": "f"} for letter in letters(3)]
    broker.outcome = "succeeded"
    done = again(broker, record.replay).summary()
    assert (done["stopped"], done["left"], done["failed_again"]) == (None, 0, 3)


def test_canaries_that_are_gone_prove_nothing():
    broker = Lists(letters(10)[3:], "failed")
    record = run(broker, Options(canary=3, wait=0), found=letters(10))
    assert "canary failed" in record.stopped
    assert len(broker.queue) == 3


@pytest.mark.parametrize(
    "header", [None, 7, {"replay": "𝐀" * 12}, {"replay": "a" * 4000}, {"replay": ["x"]}, {"replay": "ABC"}]
)
def test_a_forged_lineage_is_nobodys_replay(header):
    assert replay_of({"x-celery-dlx": header}) is None
    assert len(lineage_of({"x-celery-dlx": {"last": "y" * 100_000}})) <= 64


def test_groups_count_causes():
    found = [*letters(3), DeadLetter("x", "q", "q.dlq", "expired", 9, Original(), fingerprint="")]
    big, small = group(found)
    assert (big.count, big.first_seen, big.last_seen, big.example) == (3, 1, 2, f"{2:032x}")
    assert (small.count, small.reason) == (1, "expired")
