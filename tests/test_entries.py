"""The letters of a replay by their ids, in little memory: as a dict would have them."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_dlx import ids as module
from celery_dlx.entries import Entries
from celery_dlx.ids import IdList, IdSet

#: Of our own, nearly of our own, and others'.
_ids = (
    st.binary(min_size=16, max_size=16).map(bytes.hex)
    | st.sampled_from(["", "0" * 32, "A" * 32, " " * 32, "0" * 31, "ä" * 32, "\udcff" * 32, "00 " * 10 + "00"])
    | st.text(max_size=40)
)


@given(st.lists(_ids), st.lists(_ids, max_size=5))
def test_a_set_numbers_ids_as_a_dict_would(added, others):
    found, expected = IdSet(), dict[str, int]()
    for each in added:
        assert found.add(each) == expected.setdefault(each, len(expected))
    assert list(found) == list(expected)
    assert [found.find(each) for each in [*added, *others]] == [expected.get(each) for each in [*added, *others]]
    assert [each in found for each in others] == [each in expected for each in others]


@given(st.lists(_ids))
def test_a_list_keeps_ids_as_they_are(added):
    found = IdList()
    found.extend(added)
    assert list(found) == added


def test_a_set_grows(monkeypatch):
    grown = []
    monkeypatch.setattr(module.IdSet, "_grow", lambda self, grow=IdSet._grow: (grown.append(len(self)), grow(self)))
    many = [f"{n:032x}" if n % 3 else f"other {n}" for n in range(3_000)]
    found = IdSet([*many, *many])
    assert grown == [44, 86, 172, 342, 684, 1366, 2732]
    assert [found.find(each) for each in many] == list(range(3_000))
    assert found.find("other 1") is None is found.find(f"{3:032x}")


def test_one_of_many_takes_little():
    found = IdSet(f"{n:032x}" for n in range(50_000))
    assert (sys.getsizeof(found._packed) + sys.getsizeof(found._slots)) / 50_000 < 45
    assert not found._others


@pytest.fixture
def entries():
    found = Entries()
    for number in range(6):
        found.add(f"{number:032x}", "qr"[number % 2], "fg"[number // 3], number)
    return found


def test_states_are_counted(entries):
    one, two, three = (f"{number:032x}" for number in (1, 2, 3))
    entries.became([one, two, three, "stranger"], "replayed")
    entries.became([two, three], "failed", [three])
    entries.became([one], "succeeded")
    entries.became([one, two], "replayed")  # we are slower than the worker
    entries.became([one], "gone")
    counted = {state: entries.count(state) for state in ("selected", "gone", "replayed", "succeeded", "failed")}
    assert counted == {"selected": 3, "gone": 0, "replayed": 0, "succeeded": 1, "failed": 2}
    outcomes = [entries[each].outcome for each in (one, two, three, f"{4:032x}")]
    assert outcomes == ["succeeded", "failed_the_same", "failed_differently", "left"]
    assert list(entries.numbers(("selected", "failed"), "q")) == [0, 2, 4]
    assert list(entries.numbers(("selected",))) == [0, 4, 5]
    with pytest.raises(KeyError):
        entries.became([one], "unheard of")


def test_what_is_under_way_was_not_said_to_have_left(entries):
    ids = [entry.id for entry in entries]
    entries.sending(ids[:4])
    entries.became(ids[:2], "replayed")
    assert list(entries.under_way()) == [2, 3]
    entries.at_rest()
    assert list(entries.under_way()) == []
    assert [entry.sending for entry in entries] == [True, True, False, False, False, False]


def test_of_two_letters_under_one_id_the_last_is_meant(entries):
    entries.became([f"{1:032x}"], "replayed")
    entries.add(f"{1:032x}", "s", "h", 2**60)
    assert len(entries) == 6 == entries.count("selected")
    found = entries[f"{1:032x}"]
    assert (found.queue, found.fingerprint, found.died_at, found.state, found.settled) == (
        "s",
        "h",
        2**60,
        "selected",
        False,
    )
    assert entries.queues() == ["q", "r", "s"]
    assert list(entries.numbers(("selected",), "r")) == [3, 5]


def test_ids_of_some_are_a_sequence(entries):
    some = entries.some_ids([4, 1, 0])
    assert (len(some), some[1], some[1:], list(some)) == (
        3, f"{1:032x}", [f"{1:032x}", f"{0:032x}"], [f"{4:032x}", f"{1:032x}", f"{0:032x}"],
    )  # fmt: skip
    assert f"{4:032x}" in some


@pytest.mark.parametrize("line", [[7, "q", "f"], ["a", ["q"], "f"], ["a", "q", "f", "x"], ["a", "q", "f", None]])
def test_a_journal_that_was_tampered_with_leaves_the_others_whole(entries, line):
    with pytest.raises((TypeError, ValueError)):
        entries.add(*line)
    entries.add("z", "q", "f", 9)
    assert (len(entries), entries["z"].died_at, entries["z"].fingerprint) == (7, 9, "f")
