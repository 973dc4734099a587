"""The plan, without a broker: what is wanted, what is there, what is beneath."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_dlx.policy.settings import Policy
from celery_dlx.topology.arguments import dlq_arguments, source_arguments
from celery_dlx.topology.findings import KINDS
from celery_dlx.topology.live import LiveBroker, LivePolicy, LiveQueue
from celery_dlx.topology.plan import finite_delivery_limit, make_plan
from celery_dlx.topology.policies import as_command, exact_pattern
from celery_dlx.topology.scope import conflicts, queues_in_scope

POLICY = Policy(queues={"emails": {"max_deliveries": 3}})


def broker(policy: Policy = POLICY, *queues: LiveQueue, version=(4, 0, 5), policies=(), **more) -> LiveBroker:
    """A broker where everything but the given queues is in line."""
    settings = policy.settings("emails")
    dlq = LiveQueue("emails.dlq", "quorum", dlq_arguments(settings, version))
    source = LiveQueue("emails", "classic", source_arguments(policy, "emails", settings))
    live = LiveBroker(
        version, "/", {policy.exchange: ("direct", True)}, {x.name: x for x in (dlq, source, *queues)},
        {("emails.dlq", "emails")}, list(policies), True, "guest",
    )  # fmt: skip
    return replace(live, **more)


def test_nothing_to_do_where_all_is_as_we_declare_it():
    assert make_plan(POLICY, ["emails"], broker()).in_line


def test_an_empty_broker_is_planned_in_the_safe_order():
    live = LiveBroker((3, 10, 8), "/", {}, {}, set(), [], True)
    steps = make_plan(POLICY, ["emails"], live).ordered()
    assert [(step.kind, step.code) for step in steps] == [("exchange", "DLX101"), ("queue", "DLX103"), ("binding", "DLX103")]


def test_our_policy_carries_over_the_one_beneath():
    ops = LivePolicy("ops", "^e", "queues", {"max-length": 9, "expires": 5}, 4)
    plan = make_plan(
        POLICY, ["emails"], broker(POLICY, LiveQueue("emails", policy="ops", given=ops.definition), policies=[ops])
    )
    (step,) = plan.steps
    assert (step.name, step.value.pattern, step.value.priority) == ("celery-dlx.emails", "^emails$", 5)
    assert step.value.definition == {
        "max-length": 9, "expires": 5, "dead-letter-exchange": "celery.dlx", "dead-letter-routing-key": "emails",
    }  # fmt: skip
    assert step.value.apply_to == "classic_queues"
    assert "ops" in step.note


@pytest.mark.parametrize(
    ("beneath", "code", "words"),
    [
        ({"max-length": 10}, "DLX120", "max-length: 9 → 10 (policy 'ops' says so)"),
        ({}, "DLX120", "max-length: 9 → None (nothing says so any more)"),
    ],
)
def test_a_change_of_the_one_beneath_is_drift(beneath, code, words):
    before = LivePolicy("ops", "^e", "queues", {"max-length": 9}, 4)
    source = LiveQueue("emails", policy="ops", given=before.definition)
    ours = make_plan(POLICY, ["emails"], broker(POLICY, source, policies=[before])).steps[0].value
    after = replace(before, definition=beneath)
    source = replace(source, policy=ours.name, given=ours.definition)
    (step,) = make_plan(POLICY, ["emails"], broker(POLICY, source, policies=[after, ours])).steps
    assert (step.action, step.code) == ("change", code)
    assert words in step.note


def test_a_policy_that_rises_above_ours_is_gone_around():
    ours = make_plan(POLICY, ["emails"], broker(POLICY, LiveQueue("emails"))).steps[0].value
    high = LivePolicy("high", ".*", "all", {"max-length": 1}, 50)
    source = LiveQueue("emails", policy="high", given=high.definition)
    (step,) = make_plan(POLICY, ["emails"], broker(POLICY, source, policies=[high, ours])).steps
    assert (step.code, step.value.priority, step.value.definition["max-length"]) == ("DLX121", 51, 1)


def test_quorum_only_keys_make_a_policy_inapplicable_to_classic_queues():
    poison = LivePolicy("poison", ".*", "queues", {"delivery-limit": 5, "max-length": 1}, 50)
    plan = make_plan(POLICY, ["emails"], broker(POLICY, LiveQueue("emails"), policies=[poison]))
    assert "max-length" not in plan.steps[0].value.definition
    assert "delivery-limit" not in plan.steps[0].value.definition, "nor is ours"


@pytest.mark.parametrize(
    ("limit", "version", "unsafe"),
    [
        (None, (3, 10), False),
        (None, (4, 0), True),
        (-1, (4, 3), False),
        (20, (4, 0), True),
        (20, (3, 10), True),
        (-1, (3, 10), True),
    ],
)
def test_which_dlqs_delete_what_is_read(limit, version, unsafe):
    arguments = {} if limit is None else {"x-delivery-limit": limit}
    assert finite_delivery_limit(LiveQueue("q", "quorum", arguments), version) is unsafe


def test_a_limit_of_the_dlq_is_lifted_by_policy_where_it_is_the_default():
    dlq = LiveQueue("emails.dlq", "quorum", {"x-max-length": 100_000, "x-message-ttl": 15_552_000_000})
    (step,) = make_plan(POLICY, ["emails"], broker(POLICY, dlq)).steps
    assert (step.code, step.value.definition) == ("DLX106", {"delivery-limit": -1})
    dlq.arguments["x-delivery-limit"] = 20
    plan = make_plan(POLICY, ["emails"], broker(POLICY, dlq))
    assert [finding.code for finding in plan.findings] == ["DLX107"]


def test_a_policy_for_other_queues_does_not_shorten_a_dlq():
    broad = LivePolicy(
        "broad", ".*", "all", {"max-length": 5, "expires": 9, "message-ttl": 1, "queue-leader-locator": "balanced"}, 3
    )
    settings = POLICY.settings("emails")
    dlq = LiveQueue("emails.dlq", "quorum", dlq_arguments(settings, (4, 0)), policy="broad", given=broad.definition)
    plan = make_plan(POLICY, ["emails"], broker(POLICY, dlq, policies=[broad]))
    (step,) = [step for step in plan.steps if step.name == "celery-dlx.emails.dlq"]
    assert step.code == "DLX106"
    assert step.value.definition == {
        "queue-leader-locator": "balanced", "max-length": 100_000, "message-ttl": 15_552_000_000,
    }  # fmt: skip
    ours = step.value
    dlq = replace(dlq, policy=ours.name, given=ours.definition)
    again = make_plan(POLICY, ["emails"], broker(POLICY, dlq, policies=[broad, ours]))
    assert [step for step in again.steps if step.name == ours.name] == []


def test_messages_that_are_held_are_not_lost_by_a_change():
    source = LiveQueue("emails", "quorum", held=7)
    plan = make_plan(POLICY, ["emails"], broker(POLICY, source))
    assert (plan.steps, [finding.code for finding in plan.findings]) == ([], ["DLX153"])


@given(st.text(min_size=1, max_size=30), st.text(min_size=1, max_size=30))
def test_a_pattern_matches_its_queue_and_no_other(name, other):
    pattern = re.compile(exact_pattern(name))
    assert pattern.search(name)
    assert (pattern.search(other) is not None) == (other in (name, f"{name}\n"))


def test_the_command_is_quoted_for_a_shell():
    command = as_command(LivePolicy("celery-dlx.a b", "^a\\ b$", "queues", {"x": "it's"}, 1), "/ü")
    assert "'celery-dlx.a b' '^a\\ b$'" in command


def test_an_entry_for_every_queue_is_not_about_other_programs_queues():
    live = LiveBroker((4, 0), "/", {}, {name: LiveQueue(name) for name in ("theirs", "ours", "ours.dlq", "jobs.1")})
    assert queues_in_scope(Policy(), ["known"], live) == ["known", "ours"]
    assert queues_in_scope(Policy(queues={"jobs.*": {}}), [], live) == ["jobs.1"]


def test_conflicts_name_both_files():
    one = Policy(path="a.yaml", queues={"emails": {"max_deliveries": 3}, "same": {}})
    other = Policy(path="b.yaml", queues={"e*": {}, "same": {}, "*": {"max_length": 4}}, exchange="celery.dlx")
    (finding,) = conflicts([one, other])
    assert (finding.code, finding.subject) == ("DLX140", "emails")
    assert "a.yaml and b.yaml" in finding.message


def test_every_code_is_explained():
    text = (Path(__file__).parent.parent / "docs" / "findings.md").read_text()
    assert re.findall(r"^## (DLX\d+):", text, re.MULTILINE) == list(KINDS)
    for kind in KINDS.values():
        assert f"Consequence: {kind.consequence}." in text
