"""Arguments that are corrected on the way back."""

from __future__ import annotations

import base64
import contextlib
import json
from uuid import uuid4

import pytest

from celery_dlx.editing import Edit, by_hand
from celery_dlx.errors import ReplayError, UsageError
from celery_dlx.letters import HEADER, Death, Original, compose
from celery_dlx.replaying import revive_headers

JSON = {"content_type": "application/json", "content_encoding": "utf-8"}


def letter(body: object, *, properties=JSON, **headers):
    headers = {"task": "shop.pay", "id": str(uuid4()), "argsrepr": "[1]", "kwargsrepr": "{'amount': '5'}", **headers}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return compose(Death("failure", "pay", 0), Original(content, headers, properties), "pay.dlq")


def patch(*steps: dict) -> Edit:
    return Edit(json.dumps(steps))


AMOUNT = {"op": "replace", "path": "/kwargs/amount", "value": 5}


def test_an_edit_changes_arguments_and_nothing_else():
    body = [[1], {"amount": "5", "who": {"id": 7}}, {"callbacks": None, "chain": []}]
    found = letter(body)
    before = found.original.body
    patch(AMOUNT, {"op": "add", "path": "/args/-", "value": "ü"}, {"op": "remove", "path": "/kwargs/who/id"}).apply(found)
    assert json.loads(found.original.body) == [[1, "ü"], {"amount": 5, "who": {}}, {"callbacks": None, "chain": []}]
    assert found.original.headers["argsrepr"] == "[1, 'ü']" and found.args == "[1, 'ü']"
    assert found.original.headers["kwargsrepr"] == "{'amount': 5, 'who': {}}"
    assert found.edited == before
    headers, changes = revive_headers(found)
    assert base64.b64decode(headers[HEADER]["edited"]["body"]) == before
    assert changes == ["arguments edited"]


def test_a_large_original_is_in_the_journal_only():
    found = letter([["x" * 5000], {"amount": 1}, {}])
    patch(AMOUNT).apply(found)
    assert revive_headers(found)[0][HEADER]["edited"] == {"bytes": len(found.edited), "body": ""}


def test_the_old_protocol():
    found = letter({"task": "shop.pay", "id": "x", "args": [1], "kwargs": {"amount": "5"}, "retries": 0})
    patch(AMOUNT).apply(found)
    assert json.loads(found.original.body) == {
        "task": "shop.pay",
        "id": "x",
        "args": [1],
        "kwargs": {"amount": 5},
        "retries": 0,
    }


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "[1]", "nonsense", '[{"op": "burn", "path": "/args/0"}]', '[{"op": "remove", "path": "/headers/x"}]',
     '[{"op": "remove", "path": "/argsy"}]', '[{"op": "copy", "from": "/embed", "path": "/args/0"}]', "[" * 100_000],
)  # fmt: skip
def test_no_patch(text):
    with pytest.raises(UsageError, match="--edit") as refused:
        Edit(text)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("body", "step", "words"),
    [
        (b"\x80pickle", AMOUNT, "only uncompressed JSON"),
        ([[], {}, {}], AMOUNT, "does not fit"),
        ([[], {"amount": 1}, {}], {"op": "test", "path": "/kwargs/amount", "value": 2}, "does not fit"),
        ([[], {"amount": 1}, {}], {"op": "replace", "path": "/args", "value": 5}, "args is no list"),
        ([[], {"amount": 1}, {}], {"op": "remove", "path": "/kwargs"}, "kwargs no object"),
    ],
)
def test_an_edit_that_does_not_fit(body, step, words):
    found = letter(body)
    before = found.original
    with pytest.raises(ReplayError, match=words):
        patch(step).apply(found)
    assert found.original is before and found.edited is None


@pytest.mark.parametrize("depth", [400, 700, 900, 960])
def test_deep_nesting_is_edited_or_refused(depth):
    found = letter(b"[[" + b"[" * depth + b"]" * depth + b'], {"amount": 1}, {}]')
    with contextlib.suppress(ReplayError):
        patch(AMOUNT).apply(found)
        assert b'"amount": 5' in found.original.body


def test_an_edit_by_hand():
    found = letter([[1], {"amount": "5"}, {}])
    edit = by_hand(found, lambda text: text.replace('"5"', "5"))
    edit.apply(found)
    assert json.loads(found.original.body)[1] == {"amount": 5}
    assert by_hand(found, lambda text: None) is None and by_hand(found, lambda text: text) is None
    for broken in ("{", "[]", '{"args": []}'):
        with pytest.raises((UsageError, ReplayError)):
            edit = by_hand(letter([[1], {}, {}]), lambda text, broken=broken: broken)
            edit.apply(letter([[1], {}, {}]))
