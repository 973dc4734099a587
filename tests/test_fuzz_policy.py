"""Any text is a policy or a `PolicyError` that says where."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from celery_dlx.errors import PolicyError
from celery_dlx.policy.loader import load_policy, parse_policy

KEYS = st.sampled_from((
    "version", "service", "topology", "defaults", "queues", "exchange", "queue", "via", "management_url", "acks_late",
    "reject_on_worker_lost", "time_limit", "soft_time_limit", "max_deliveries", "type", "message_ttl", "max_length",
    "dead_letter",
    "enabled", "on", "max_bytes", "max_age", "strategy", "<<", "*", "emails", "1", "true", "", "a b", "[", "é",
))  # fmt: skip
SCALARS = st.sampled_from((
    "1", "0", "-1", "true", "no", "~", "''", "30s", "1e5", "1e999", ".inf", ".nan", "-.inf", "0x10", "1:30", "64KiB",
    "quorum", "failure",
    "9" * 400, "9" * 5_000, "9" * 400 + "s", "9" * 5_000 + "GiB", "1.", "1_", "_1", "+1", "1.5.", "!!int x",
    "!!float x", "!!bool x",
    "!!timestamp x", "2020-01-01", "!!binary x", "!!python/object:x y", "!x y", "&a 1", "*a", "*b", "{queue}",
    "'{queue}.dlq'",
    "'{queue}{'", "http://x", "\"\\ud800\"", "\"\\0\"", "!!set {a}", "!!omap [a: 1]", "!!null 1", "\u0660", "\u00b2",
    "1\u0660s", "'\u00b2s'",
    "!!str 1", "!!seq 1", "!!map 1", "!!int ''", "!!float ''", "!!merge <<", "|\n   x", "&a [*a]", "&a {b: *a}",
    "&a {<<: *a}",
))  # fmt: skip


def _flow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.lists(st.tuples(st.one_of(KEYS, SCALARS), inner).map(": ".join), max_size=4)
    return st.one_of(
        pairs.map(lambda each: "{" + ", ".join(each) + "}"),
        st.lists(inner, max_size=3).map(lambda each: "[" + ", ".join(each) + "]"),
    )


VALUES = st.recursive(SCALARS, _flow, max_leaves=12)
FILES = st.lists(st.tuples(st.one_of(KEYS, SCALARS), VALUES).map(": ".join), max_size=6).map("\n".join)


def check(text: str) -> None:
    try:
        policy = parse_policy(text, "shop.yaml")
    except PolicyError as exc:
        assert exc.problems
        assert all(problem.line >= 1 and problem.column >= 1 and problem.message for problem in exc.problems)
        str(exc)
    else:
        for queue in ("emails", "", "a", "\udcff", "[", "{queue}"):
            policy.settings(queue)
            policy.dlq(queue)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(FILES)
@example("version: 1\nqueues: " + "[" * 400)
@example("version: 1\nqueues: " + "{a: " * 400)
@example("version: 1\nqueues: " + "[" * 300 + "]" * 300)
@example("- " * 1_000)
@example("version: " + "9" * 5_000)
@example("version: 1\ndefaults: {time_limit: " + "9" * 400 + "}")
@example("version: 1\ndefaults: {dead_letter: {max_bytes: " + "9" * 5_000 + "GiB}}")
@example("".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'x'}]\n" for n in range(12)))
def test_like_a_policy(text):
    check(f"version: 1\n{text}")
    check(text)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.text(st.characters(), max_size=60))
def test_any_text(text):
    check(text)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(data=st.binary(max_size=60))
def test_any_bytes(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("policy") / "shop.yaml"
    path.write_bytes(data)
    try:
        load_policy(path)
    except PolicyError as exc:
        str(exc)
