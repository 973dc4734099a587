"""What a message says of its workflow."""

from __future__ import annotations

import json

import pytest

from celery_dlx.canvas import Canvas, canvas_of
from celery_dlx.letters import Original


def original(embed, **headers):
    return Original(json.dumps([[], {}, embed]).encode(), headers, {"content_type": "application/json"})


def test_all_parts_are_named_and_explained():
    canvas = canvas_of(
        original(
            {
                "callbacks": [{"task": "shop.mail"}],
                "errbacks": [{"task": "shop.alarm"}],
                "chain": [{"task": "shop.third"}, {"task": "shop.second"}],
                "chord": {"task": "shop.sum"},
            },
            group="g1",
        )
    )
    assert canvas == Canvas(("shop.mail",), ("shop.alarm",), ("shop.second", "shop.third"), "shop.sum", "g1")
    assert [part for part, _ in canvas.explained()] == ["chain", "callbacks", "errbacks", "chord", "group"]
    assert dict(canvas.explained())["chain"] == "shop.second → shop.third: goes on when a replay succeeds"
    assert canvas.as_dict()["chord"] == "shop.sum"


@pytest.mark.parametrize("embed", [None, [], {}, {"chain": "x", "chord": 3, "callbacks": [None, {"args": []}]}])
def test_nothing_or_nonsense(embed):
    canvas = canvas_of(original(embed))
    assert not canvas and list(canvas.explained()) == []


def test_other_bodies():
    assert not canvas_of(Original(b"\x80\x04N.", {}, {"content_type": "application/x-python-serialize"}))
    assert not canvas_of(Original(b"[" * 100_000, {}, {"content_type": "application/json"}))
    assert canvas_of(Original(b"nonsense", {"group": "g"}, {})).group == "g"
