"""Letters that are set aside while their DLQ is read."""

from __future__ import annotations

import errno
import os
import stat
from functools import partial

import amqp
import pytest
from amqp.serialization import dumps

from celery_dlx.brokers.rabbitmq import browse, spool
from celery_dlx.brokers.rabbitmq.deliveries import Taken
from celery_dlx.brokers.rabbitmq.framing import encode_properties
from celery_dlx.brokers.rabbitmq.letters import letter_of
from celery_dlx.brokers.rabbitmq.spool import Spool
from celery_dlx.errors import SpoolError
from celery_dlx.letters import HEADER
from celery_dlx.selection import Selection

LETTER = partial(letter_of, queue="q", dlq="q.dlq")
#: Arguments of a `basic.deliver`.
_METHOD = dumps("sLbss", ("consumer", 1, False, "celery.dlx", "q"))


@pytest.fixture
def small(monkeypatch):
    """Two letters or so are kept in memory."""
    monkeypatch.setattr(spool, "_IN_MEMORY", 1_000)


def raw(number: int, body: bytes = b"") -> Taken:
    return Taken(b"method %d" % number, b"\0\0" + bytes([number % 256]) * number, body or b"\xff\0%d" % number)


def as_bytes(letters):
    return [(each.method, each.content, each.body) for each in letters]


def test_letters_come_back_byte_for_byte(small):
    letters, kept = [raw(number) for number in range(300)], Spool(any_order=True)
    for letter in letters:
        kept.add(letter)
    kept.flush()
    assert len(kept) == 300 and kept._file is not None and len(kept._first) < 4
    order = [299, 0, 1, 7, 8, 9, 150]
    assert as_bytes(kept.read(order)) == as_bytes(letters[position] for position in order)
    assert kept._file is None and list(kept.read()) == [], "what was given out is forgotten"


def test_few_letters_make_no_file_and_the_file_is_nobody_elses(small, tmp_path, monkeypatch):
    monkeypatch.setattr(spool.tempfile, "tempdir", str(tmp_path))
    kept = Spool()
    kept.add(raw(1))
    assert kept._file is None
    for number in range(20):
        kept.add(raw(number, b"x" * 1_000))
    found = os.fstat(kept._file.fileno())
    assert (stat.S_IMODE(found.st_mode), found.st_nlink) == (0o600, 0)
    assert list(tmp_path.iterdir()) == []
    reading, file = kept.read(), kept._file
    next(reading)
    reading.close()
    assert file.closed, "whoever goes through them may stop half-way"
    kept = Spool()
    for number in range(20):
        kept.add(raw(number, b"x" * 1_000))
    file = kept._file
    del kept
    assert file.closed


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_one_line(small, monkeypatch):
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", lambda buffering: open("/dev/full", "w+b", buffering))  # noqa: SIM115

    def fill(count):
        kept = Spool()
        for number in range(count):
            kept.add(raw(number, b"x" * 10_000))
        kept.flush()

    for count in (3, 100):
        with pytest.raises(
            SpoolError, match="No space left on device; free some space, name another folder in TMPDIR"
        ) as found:
            fill(count)
        assert "\n" not in str(found.value)

    def refused(buffering):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(spool.tempfile, "TemporaryFile", refused)
    with pytest.raises(SpoolError, match="Permission denied"):
        fill(3)

    def nowhere():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(spool.tempfile, "TemporaryFile", lambda buffering: nowhere())
    monkeypatch.setattr(spool.tempfile, "gettempdir", nowhere)
    with pytest.raises(SpoolError, match="in any folder: No usable temporary directory"):
        fill(3)


class Letters:
    """A reader of letters that died at these times."""

    def __init__(self, deaths: list[int]) -> None:
        self.deaths, self.closed = deaths, False

    def __iter__(self):
        for number, died_at in enumerate(self.deaths):
            record = {"v": 1, "id": str(number), "reason": "failure", "queue": "q", "died_at": died_at}
            content = encode_properties({"application_headers": {HEADER: record}}, amqp.Message.PROPERTIES)
            yield Taken(_METHOD, content, b"x" * 500)

    def close(self):
        self.closed = True


@pytest.mark.parametrize("limit", [None, 0, 1, 3, 50])
@pytest.mark.parametrize("after", [None, "4", "6"])
@pytest.mark.parametrize("few", [0, 1_000])
def test_the_newest_are_the_same_in_memory_and_in_a_file(small, monkeypatch, limit, after, few):
    monkeypatch.setattr(browse, "_FEW", few)
    reader = Letters([5, 9, 1, 9, 7, 3, 7, 2**63 - 1, 0])
    page = Selection(lambda letter: letter.died_at != 3)
    page.newest, page.after = True, after
    page.after_died = 7 if after else 0
    found = [letter.id for letter in browse.letters_in(reader, LETTER, page, limit)]
    order = [str(number) for number in (7, 3, 1, 6, 4, 0, 2, 8)]
    if after:
        order = order[order.index(after) + 1 :]
    assert found == order[:limit]
    assert reader.closed


def test_the_reader_is_closed_before_the_first_letter_is_given_out_and_whatever_happens(small):
    reader = Letters(list(range(30)))
    letters = browse.letters_in(reader, LETTER, Selection(lambda letter: True), None)
    assert reader.closed and [letter.died_at for letter in letters] == list(range(30))

    def fails(letter):
        raise ValueError

    reader = Letters([1])
    with pytest.raises(ValueError):
        browse.letters_in(reader, LETTER, Selection(fails), None)
    assert reader.closed
