"""What one channel holds of a DLQ."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from celery_dlx.brokers.rabbitmq.window import Window


def arriving(window: Window, *tags: int) -> None:
    window.arrived.extend(SimpleNamespace(delivery_tag=tag) for tag in tags)


def test_it_knows_what_may_still_come():
    window = Window(None, 3)
    assert (window.coming, window.open, window.used) == (3, 0, False)
    arriving(window, 1, 2)
    assert (window.coming, window.open, window.used) == (1, 0, False)
    assert window.hand_out().delivery_tag == 1
    assert (window.coming, window.open, window.used) == (1, 1, False)
    arriving(window, 3)
    assert [window.hand_out().delivery_tag for _ in range(2)] == [2, 3]
    assert (window.coming, window.open, window.used) == (0, 3, True)


def test_what_is_settled_makes_room():
    window = Window(None, 4)
    arriving(window, 1, 2, 3, 4)
    for _ in range(4):
        window.hand_out()
    assert window.settle([2, 4]) == (None, [2, 4])
    assert (window.open, window.coming, window.used) == (2, 2, False)
    assert window.settle([1]) == (1, []), "2 was acknowledged before"
    assert window.settle([3]) == (3, [])
    assert (window.open, window.coming) == (0, 4)
    arriving(window, 5, 6, 7)
    for _ in range(3):
        window.hand_out()
    assert window.settle([5, 7]) == (5, [7])
    assert (window.open, window.coming) == (1, 3)


@given(st.lists(st.lists(st.integers(1, 60), unique=True), max_size=6))
def test_tags_are_settled_as_a_set_of_them_would_be(lots):
    window, left, settled = Window(None, 60), set(range(1, 61)), set()
    window.handed = 60
    for lot in lots:
        fresh = sorted(set(lot) - settled)
        if not fresh:
            continue
        together, alone = window.settle(fresh)
        settled.update(fresh)
        left.difference_update(fresh)
        assert window.open == len(left)
        if together is not None:
            assert together in fresh, "RabbitMQ refuses a tag that is settled"
            assert not any(tag <= together for tag in left)
        assert sorted([tag for tag in fresh if together is not None and tag <= together] + alone) == fresh
