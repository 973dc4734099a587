"""What nobody should read is not shown, and not stored where the policy says so."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_dlx.errors import PolicyError
from celery_dlx.letters import HEADER, UNDECODED, Death, Original, compose, read_record
from celery_dlx.policy.loader import parse_policy
from celery_dlx.redaction import BLANK, for_storage, is_blank, shown

SECRET = "4111-1111"
PATHS = ("kwargs.card.number", "args[1]", "kwargs.missing", "args[9].x")
BODY = [["order", SECRET], {"card": {"number": SECRET, "name": "ada"}, "n": 1}, {"chain": []}]


def letter(body=None, content_type="application/json", **headers):
    content = body if isinstance(body, bytes) else json.dumps(BODY if body is None else body).encode()
    text = {"argsrepr": f"['order', '{SECRET}']", "kwargsrepr": f"{{'card': '{SECRET}'}}"}
    headers = {"task": "shop.pay", "id": "t", **text, **headers}
    return compose(Death("failure", "pay", 0), Original(content, headers, {"content_type": content_type}), "pay.dlq")


def everything(found) -> str:
    return repr([found.as_dict(), found.original, found.record()])


def test_what_is_shown():
    found = letter()
    seen = shown(found, PATHS)
    assert SECRET not in everything(seen) and SECRET in everything(found), "the letter itself is not changed"
    assert json.loads(seen.original.body) == [
        ["order", BLANK],
        {"card": {"number": BLANK, "name": "ada"}, "n": 1},
        {"chain": []},
    ]
    assert shown(found, ()) is found


@pytest.mark.parametrize("found", [letter(b""), letter(b"\x80" + SECRET.encode(), "application/x-python-serialize"),
                                   letter(json.dumps(BODY).encode(), compression="gzip")])  # fmt: skip
def test_what_cannot_be_looked_into_is_hidden_whole(found):
    assert SECRET not in everything(shown(found, PATHS))
    only_args = shown(found, ["args[1]"])
    assert only_args.args == BLANK and only_args.kwargs == found.kwargs


def test_what_is_stored():
    found = letter()
    before = found.id
    assert for_storage(found, PATHS)
    assert SECRET not in everything(found) and found.id == before
    assert found.redacted == list(PATHS) and is_blank(found)
    again = read_record(found.record(), found.original, "pay.dlq")
    assert again.redacted == list(PATHS) and is_blank(again)
    again.original.body = json.dumps([["order", "given"], {"card": {"number": "given"}}, {}]).encode()
    assert not is_blank(again), "it was given anew"


def test_what_has_no_secrets_is_stored_as_it_is():
    for found in (letter([["order"], {}, {}]), letter(b"\x80", "application/x-python-serialize"), letter(b"{")):
        body = found.original.body
        assert not for_storage(found, PATHS) and found.original.body is body and found.redacted == []


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(_json, st.lists(st.sampled_from([*PATHS, "kwargs", "args", "nonsense", "args[0].a.b"])))
def test_nothing_stops_it(body, paths):
    found = letter(body)
    shown(found, paths)
    for_storage(found, paths)
    is_blank(found)


def test_the_policy():
    policy = parse_policy(
        "version: 1\ndefaults: {dead_letter: {redact: [kwargs.card, 'args[0]'], redact_stored: true}}\nqueues: {a: {}}",
        "p.yaml",
    )
    settings = policy.settings("a")
    assert settings.redact == ("kwargs.card", "args[0]") and settings.redact_stored
    with pytest.raises(PolicyError, match=r"expected a path such as kwargs\.card\.number"):
        parse_policy("version: 1\ndefaults: {dead_letter: {redact: [card]}}", "p.yaml")


def test_copies_of_the_arguments_are_hidden_too():
    edited = {"replays": 1, "edited": {"bytes": 9, "body": base64.b64encode(json.dumps(BODY).encode()).decode()}}
    secret = edited["edited"]["body"]
    copies = {HEADER: edited, UNDECODED: b"raw " + SECRET.encode()}
    for found in (letter(**copies), letter([["order"], {}, {}], **copies), letter(b"\x80", "application/data", **copies)):
        seen = everything(shown(found, PATHS))
        assert SECRET not in seen and secret not in seen
    found = letter([["order"], {}, {}], **copies, argsrepr="[]", kwargsrepr="{}")
    assert for_storage(found, PATHS)
    assert secret not in everything(found) and SECRET not in everything(found)


def test_what_is_blank_stays_marked():
    found = letter()
    for_storage(found, PATHS)
    again = compose(Death("failure", "pay", 0), found.original, "pay.dlq")  # replayed in spite of that, and dead again
    for_storage(again, PATHS)
    assert is_blank(again) and set(again.redacted) <= set(PATHS)


def test_other_encodings_of_json():
    found = letter(json.dumps(BODY).encode("utf-16"))
    found.original.properties["content_encoding"] = "utf-16"
    assert for_storage(found, PATHS)
    assert found.original.properties["content_encoding"] == "utf-8"
    assert json.loads(found.original.body.decode("utf-8"))[0] == ["order", BLANK]


@pytest.mark.parametrize("depth", [400, 700, 900, 960])
def test_deep_nesting_stops_nothing(depth):
    body = b"[[" + b"[" * depth + b"]" * depth + b', "' + SECRET.encode() + b'"], {}, {}]'
    assert SECRET not in everything(shown(letter(body), PATHS))
    for_storage(letter(body), PATHS)
