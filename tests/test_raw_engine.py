"""Raw replays by the engine, over a broker made of lists."""

from __future__ import annotations

import json

import pytest
from list_broker import Lists, again, counts, letters, run

from celery_dlx.brokers.base import Replayed
from celery_dlx.errors import UsageError
from celery_dlx.journal import read_record
from celery_dlx.replay import Options


class RawLists(Lists):
    """Moves what is there as it was chosen; breaks off after ``fail_at``, like the others."""

    raw_refusal = ""

    def replay_raw(self, queue, letters, run):
        while not run.stop() and (chosen := next(letters, None)):
            for letter in [each for each in self.dlq if (each.id, each.died_at) == (chosen.id, chosen.died_at)]:
                self.dlq.remove(letter)
                self.queue.append(letter.id)
                if self.fail_at == len(self.queue):
                    raise ConnectionError("gone")
                yield Replayed(letter, queue, [])


def lines(tmp_path, record):
    return [json.loads(text) for text in (tmp_path / "replays" / f"{record.replay}.jsonl").read_text().split("\n") if text]


def test_a_raw_replay_hears_of_nothing_and_waits_for_nothing(tmp_path):
    record = run(RawLists(letters(5)), Options(raw=True, wait=3_600))
    assert counts(record) == {
        "selected": 5, "replayed": 5, "succeeded": 0, "failed_again": 0, "waiting": 5, "left": 0, "stopped": None,
    }  # fmt: skip
    written = lines(tmp_path, record)
    assert [line["kind"] for line in written] == ["start", "select", "selected", "sending", "state", "end"]
    assert written[1]["letters"][3] == [f"{3:032x}", "q", "f", 3], "with when it died"
    assert read_record(record.replay).entries[f"{3:032x}"].died_at == 3


def test_a_raw_replay_goes_on_and_sends_nothing_twice():
    broker = RawLists(letters(6))
    broker.fail_at = 3
    record = run(broker, Options(raw=True))
    assert (record.stopped, record.summary()["replayed"]) == ("gone", 2)
    broker.fail_at = None
    died_again, other = letters(1)[0], letters(4)[3]
    died_again.died_at = 100  # under the id it had, for nothing was counted
    del broker.dlq[0]  # and the fourth was taken by somebody else
    broker.dlq.append(died_again)
    done = again(broker, record.replay)
    assert broker.dlq == [died_again] and other.id not in broker.queue
    assert broker.queue == [letter.id for letter in letters(6) if letter.id != other.id]
    # It was said to be sent, and is not there as it was: who was killed cannot know more.
    assert (done.summary()["replayed"], done.summary()["left"]) == (6, 0)


def test_a_raw_replay_that_is_interrupted():
    broker = RawLists(letters(5))
    record = run(broker, Options(raw=True), interrupted=lambda: len(broker.queue) >= 2)
    assert (record.stopped, record.summary()["replayed"], record.summary()["left"]) == ("interrupted", 2, 3)
    assert again(broker, record.replay).summary()["left"] == 0


@pytest.mark.parametrize(
    ("more", "named"),
    [({"canary": 1}, "--canary"), ({"stop_on_repeat": True}, "--stop-on-repeat"), ({"edit": "[]"}, "--edit")],
)
def test_what_raw_replays_cannot_do_is_refused(more, named, tmp_path):
    with pytest.raises(UsageError, match=f"--raw with {named}: .*leave out"):
        run(RawLists(letters(1)), Options(raw=True, **more))
    with pytest.raises(UsageError, match="with --canary, --edit: "):
        run(RawLists(letters(1)), Options(raw=True, canary=1, stop_on_repeat=True, edit="[]"))
    assert list(tmp_path.iterdir()) == []
