"""Letters are read in lots that do not fill the memory."""

from __future__ import annotations

import pytest

from celery_dlx.brokers.redis.reader import LetterReader


class Hashes:
    """Records and payloads, each of one size; notes how many are asked for at once."""

    def __init__(self, size: int) -> None:
        self.size, self.asked, self.answers = size, [], []

    def register_script(self, source):
        pass

    def pipeline(self, transaction):
        self.answers = []
        return self

    def hmget(self, key, ids):
        self.asked.append((key, len(ids)))
        self.answers.append([b"x" * (self.size if key == b"payloads" else 10)] * len(ids))

    def execute(self):
        return self.answers


@pytest.mark.parametrize(
    ("size", "lots"),
    [(0, [100, 250, 250, 250, 150]), (1_000, [100, 250, 250, 250, 150]), (500_000, [100] + [16] * 56 + [4])],
)
def test_large_messages_are_read_a_few_at_a_time(size, lots):
    client = Hashes(size)
    reader = LetterReader(client, lambda queue: [b"letters", b"payloads", b"records", b"stats"])
    members = [(b"%d" % number, float(number)) for number in range(1_000)]
    found = list(reader.some("q", members, bodies=True))
    assert [(each.id, each.score, len(each.item)) for each in found] == [(str(n), float(n), size) for n in range(1_000)]
    assert [count for key, count in client.asked if key == b"payloads"] == lots
    client.asked.clear()
    assert len(list(reader.some("q", members, bodies=False))) == 1_000
    assert client.asked == [(b"records", 1_000)]
