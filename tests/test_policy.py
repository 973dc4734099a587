"""The policy file: what it accepts, what it means, and what it says of mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from celery_dlx.errors import PolicyError
from celery_dlx.policy.durations import format_duration, parse_duration, parse_size
from celery_dlx.policy.loader import load_policy, parse_policy
from celery_dlx.policy.model import json_schema
from celery_dlx.policy.settings import Policy, specificity

ROOT = Path(__file__).parent.parent
SAMPLES = sorted((ROOT / "configs").glob("*.yaml"))


def problems(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "p.yaml")
    return str(caught.value).splitlines()


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_samples_are_valid_and_name_the_schema(path):
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=../celery_dlx/policy/schema.json\n")
    load_policy(path)
    jsonschema.validate(yaml.safe_load(text.replace("on: [", '"on": [')), json_schema())


def test_shipped_schema_is_the_models():
    shipped = json.loads((ROOT / "celery_dlx/policy/schema.json").read_text())
    assert shipped == json_schema(), "run: make schema"
    jsonschema.Draft202012Validator.check_schema(shipped)


def test_every_key_of_the_rabbitmq_sample():
    settings = load_policy(ROOT / "configs/rabbitmq.yaml").settings("emails")
    assert settings.acks_late is True
    assert settings.reject_on_worker_lost is True
    assert (settings.time_limit, settings.soft_time_limit) == (60, 50)
    assert settings.max_deliveries == 5
    assert settings.type == "quorum"
    assert (settings.message_ttl, settings.max_length) == (3600, 100_000)
    assert (settings.dlq_max_length, settings.dlq_max_bytes, settings.dlq_max_age) == (50_000, 1 << 30, 30 * 86400)
    assert "revoked" not in settings.reasons and settings.captures("failure")


def test_precedence_of_globs():
    policy = load_policy(ROOT / "configs/many-queues.yaml")
    assert policy.settings("tenant.acme.import").time_limit == 7200
    assert policy.settings("tenant.acme.import").reject_on_worker_lost is None, "entries do not add up"
    assert policy.settings("tenant.b.import").time_limit == 1800
    assert policy.settings("tenant.b.other").time_limit == 300
    assert policy.settings("else").time_limit == 600
    assert policy.settings("else").acks_late is True
    assert policy.settings("tmp.x").enabled is False
    assert policy.named_queues() == ["tenant.acme.import"]


def test_more_literal_characters_are_more_specific():
    assert specificity("a.b.*") > specificity("a.*") > specificity("*")
    assert specificity("a[xyz]?") == (1, 0)


def test_without_queues_every_queue_is_managed_and_with_queues_only_those():
    assert parse_policy("version: 1", "p").settings("any") is not None
    assert parse_policy("version: 1\nqueues: {a: {}}", "p").settings("b") is None
    assert Policy().settings("any").max_deliveries == 20


def test_all_problems_at_once_with_positions():
    found = problems(
        "version: 1\n"
        "servce: shop\n"
        "queues:\n"
        "  emails:\n"
        "    acks_late: no\n"
        "    time_limt: 60s\n"
        "    soft_time_limit: 1:30\n"
        "    dead_letter:\n"
        "      on: [failure, rejcted]\n"
        "      enabled: true\n"
        "      enabled: false\n"
    )
    assert [line.split(": ")[0] for line in found] == [
        "p.yaml:2:1", "p.yaml:5:16", "p.yaml:6:5", "p.yaml:7:22", "p.yaml:9:21", "p.yaml:11:7",
    ]  # fmt: skip
    text = "\n".join(found)
    assert "unknown key 'servce', did you mean 'service'?" in text
    assert "found 'no' (YAML 1.1's word; write false)" in text
    assert "did you mean 'time_limit'?" in text
    assert "found '1:30' (YAML 1.1 reads that as 60-based; write 90s or 2m)" in text
    assert "did you mean 'rejected'?" in text
    assert "duplicate key 'enabled', first used at 10:7" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "found nothing"),
        ("- 1", "found a list"),
        ("version: 2", "expected one of 1, found 2"),
        ("queues: {}", "missing key 'version'"),
        ("version: 1\nqueues: [a]", "queues: expected a mapping, found a list"),
        ("version: 1\nqueues: {a: 5}", "queues.a: expected a mapping, found 5"),
        ("version: 1\nqueues: {a: {max_deliveries: 0}}", "a number of at least 1, found 0"),
        ("version: 1\nqueues: {a: {max_deliveries: true}}", "a whole number, found true"),
        ("version: 1\nqueues: {a: {max_length: 1.5}}", "a whole number, found 1.5"),
        ("version: 1\nqueues: {a: {time_limit: 0}}", "above zero"),
        ("version: 1\nqueues: {a: {type: stream}}", "one of classic, quorum, found 'stream'"),
        ("version: 1\nqueues: {a: {time_limit: 5s, soft_time_limit: 5s}}", "expected soft_time_limit below time_limit"),
        ("version: 1\ndefaults: {time_limit: 5s, soft_time_limit: 9s}", "expected soft_time_limit below time_limit"),
        ("version: 1\ntopology: {queue: dlq}", "contains {queue}"),
        ("version: 1\ntopology: {queue: '{queue}.{x}'}", "no placeholder but {queue}"),
        ("version: 1\ntopology: {via: magic}", "one of arguments, policy"),
        ("version: 1\ntopology: {management_url: 'ftp://x'}", "http"),
        ("version: 1\n  bad: [", "not valid YAML"),
        ("version: 1\n? [a]\n: 1", "expected a name as key"),
        ("version: !!python/object:os.system 1", "could not determine a constructor"),
        ("a: &a {b: *a}", "nested more than"),
        ("version: 1\nqueues: {a: {<<: 5}}", "expected a mapping to merge"),
    ],
)  # fmt: skip
def test_problem(text, said):
    assert said in "\n".join(problems(text))


def test_names_are_read_as_meant():
    policy = parse_policy("version: 1\nqueues:\n  no: {max_length: 100_000}\n  0123: {}\n  1e3: {}\n", "p")
    assert policy.settings("no").max_length == 100_000
    assert policy.settings("0123") and policy.settings("1e3")
    assert parse_policy('version: 1\nqueues: {"a": {}, }\ndefaults:\n', "p").settings("a")


def test_anchors_and_merges():
    text = "version: 1\nqueues:\n  a: &a {time_limit: 5s}\n  b: *a\n  c: {<<: *a, max_deliveries: 2}\n"
    policy = parse_policy(text, "p")
    assert policy.settings("b").time_limit == 5
    assert (policy.settings("c").time_limit, policy.settings("c").max_deliveries) == (5, 2)


def test_unreadable_files(tmp_path):
    missing = tmp_path / "none.yaml"
    with pytest.raises(PolicyError, match=r"none\.yaml:1:1: cannot be read: No such file or directory"):
        load_policy(missing)
    (tmp_path / "latin").write_bytes(b"version: 1 # \xe9")
    with pytest.raises(PolicyError, match="expected UTF-8, found byte 0xe9"):
        load_policy(tmp_path / "latin")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("5m", 300), ("12h", 43200), ("30d", 2592000), ("1.5h", 5400), (90, 90), ("7", 7)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds
    assert parse_duration(format_duration(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "s", "-5s", "5 weeks", "1:30", None, True, [], float("nan"), float("inf")])
def test_no_durations(text):
    with pytest.raises(ValueError, match="expected a duration"):
        parse_duration(text)


@pytest.mark.parametrize(("text", "size"), [("64KiB", 65536), ("1GiB", 1 << 30), (10, 10), ("2 MiB", 2 << 20), ("7B", 7)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "64kb", "-1", 0, None, True, 1.5])
def test_no_sizes(text):
    with pytest.raises(ValueError, match="expected a size"):
        parse_size(text)


@given(st.text(max_size=200))
def test_any_text_is_a_policy_or_problems(text):
    try:
        parse_policy(text, "p")
    except PolicyError as exc:
        assert exc.problems and all(problem.line >= 1 and problem.column >= 1 for problem in exc.problems)


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_KEYS = st.sampled_from(["version", "queues", "defaults", "dead_letter", "on", "acks_late", "topology", "time_limit", "a"])


@given(
    st.recursive(
        _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4), max_leaves=12
    )
)
def test_any_document_is_a_policy_or_problems(document):
    try:
        parse_policy(yaml.safe_dump(document), "p")
    except PolicyError as exc:
        assert exc.problems
