"""Conditions on arguments."""

from __future__ import annotations

import json
import pickle

import pytest

from celery_dlx.arguments import argument, where
from celery_dlx.errors import UsageError
from celery_dlx.letters import DeadLetter, Original
from celery_dlx.selection import match

EMBED = {"callbacks": None}


def letter(body, content_type="application/json", **headers):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return DeadLetter("a", "q", "q.dlq", "failure", 0, Original(raw, headers, {"content_type": content_type}))


ORDER = letter([[7, "seven", {"id": 3}], {"user_id": 42, "amount": 99.5, "email": "ada@example.org", "vip": True,
                                          "user": {"name": "ada"}, "items": [{"sku": "x"}], "none": None},
                 EMBED])  # fmt: skip


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("user_id=42", True), ("user_id=43", False), ("0=7", True), ("1=seven", True), ("1=eight", False), ("9=7", False),
        ("user.name=ada", True), ("items[0].sku=x", True), ("items[1].sku=x", False), ("vip=true", True), ("vip=1", False),
        ("none=null", True), ("missing=null", False), ('email="ada@example.org"', True), ("amount=99.5", True),
    ],
)  # fmt: skip
def test_argument(text, holds):
    assert argument(text)(ORDER) is holds


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("kwargs.amount > 99", True), ("kwargs.amount>=99.5", True), ("kwargs.amount < 99", False),
        ("kwargs.amount != 1", True),
        ("kwargs.email ~ example.org", True), ("kwargs.email ~ example.com", False), ("args[2].id == 3", True),
        ("kwargs.email > 3", False), ("kwargs.vip == 1", False), ("kwargs.vip == true", True), ("kwargs.gone != 1", False),
        ("kwargs.user == {\"name\": \"ada\"}", True), ("args[0] <= 7", True), ("kwargs.user_id == \"42\"", False),
    ],
)  # fmt: skip
def test_where(text, holds):
    assert where(text)(ORDER) is holds


@pytest.mark.parametrize(
    "text", ["", "amount > 3", "kwargs.amount", "kwargs.amount => 3", "kwargs.a[b] == 1", "__import__ == 1"]
)
def test_where_that_cannot_be_understood(text):
    with pytest.raises(UsageError, match="expected a path"):
        where(text)


@pytest.mark.parametrize("text", ["", "x", "=3", "a[b]=3"])
def test_argument_that_cannot_be_understood(text):
    with pytest.raises(UsageError, match="expected"):
        argument(text)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


def test_other_bodies_are_not_opened():
    for other in (
        letter(pickle.dumps(Bomb()), "application/x-python-serialize"),
        letter(b"\xff\x00"), letter(b"[" * 100_000), letter("text"), letter([1]), letter([3, 4]),
        letter([[7], {}, EMBED], compression="application/x-gzip"),
    ):  # fmt: skip
        assert argument("0=7")(other) is False
    assert argument("0=7")(letter({"args": [7], "kwargs": {}})) is True, "protocol 1"


def test_they_are_combined_with_and():
    assert match(arguments=["user_id=42"], where=["kwargs.amount > 99"])(ORDER)
    assert not match(arguments=["user_id=42"], where=["kwargs.amount > 100"])(ORDER)
    assert match(arguments=["user_id=42"]).bodies and not match(task="x").bodies
