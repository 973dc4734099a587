"""The difference between a policy file and a broker: steps that can be taken online, and findings that people must read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from celery_dlx.policy.settings import Policy, QueueSettings
from celery_dlx.topology.arguments import EXCHANGE_TYPE, MAX_NAME, dlq_arguments
from celery_dlx.topology.findings import INFO, Finding
from celery_dlx.topology.live import NUMERIC, LiveBroker, LivePolicy, LiveQueue
from celery_dlx.topology.policies import apply_to, beneath, merged, policy_name, same

ADD, CHANGE, REMOVE = "add", "change", "remove"

#: What a policy may say of other queues, and must not of a DLQ.
_HARM_LETTERS = frozenset(
    {
        "delivery-limit",
        "dead-letter-exchange",
        "dead-letter-routing-key",
        "dead-letter-strategy",
        "expires",
        "max-length",
        "max-length-bytes",
        "message-ttl",
        "overflow",
    }
)


@dataclass(frozen=True)
class Step:
    """One change. ``kind`` is exchange, queue, binding or policy; ``value`` is what has to be there."""

    action: str
    kind: str
    name: str
    code: str
    value: Any = None
    before: Any = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        plain = {key: asdict(value) if isinstance(value, LivePolicy) else value for key, value in vars(self).items()}
        return {"type": "step", **plain}


@dataclass
class Plan:
    """What `apply` would do, in order, and what it cannot."""

    steps: list[Step] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def in_line(self) -> bool:
        """Whether nothing has to be done, by `apply` or by people."""
        return not self.steps and all(finding.severity == INFO for finding in self.findings)

    def ordered(self) -> list[Step]:
        """In the order that never leaves a letter without a home."""
        order = {"exchange": 0, "queue": 1, "binding": 2, "policy": 3}
        return sorted(self.steps, key=lambda step: order[step.kind])


def make_plan(policy: Policy, queues: Iterable[str], live: LiveBroker) -> Plan:
    """Compare what a policy wants for its queues with what a broker has."""
    plan = Plan()
    _plan_exchange(plan, policy, live)
    for queue in queues:
        if len(policy.dlq(queue).encode()) > MAX_NAME:
            plan.findings.append(Finding("DLX119", queue, f"its DLQ's name has more than {MAX_NAME} bytes"))
            continue
        held = live.queues[queue].held if queue in live.queues else 0
        if held:
            text = f"{held} messages wait to be dead-lettered; no policy of it is touched until they are gone"
            plan.findings.append(Finding("DLX153", queue, text))
            continue
        settings = policy.settings(queue)
        if settings is None or not settings.enabled:
            _plan_removal(plan, queue, live)
            continue
        _plan_dlq(plan, policy, queue, settings, live)
        _plan_source(plan, policy, queue, settings, live)
    if not live.sees_policies:
        plan.findings.append(Finding("DLX131", live.vhost, "no management API is configured, or it does not show policies"))
    elif live.may_set_policies is False and any(step.kind == "policy" for step in plan.steps):
        plan.findings.append(Finding("DLX130", live.user, f"user {live.user!r} has no tag that allows setting policies"))
    return plan


def _without_ours(live: LiveBroker, name: str) -> LiveQueue | None:
    """A live queue as it would be without our policy: that one is made anew from what is left."""
    found = live.queues.get(name)
    if found is None or live.policies is None or found.policy != policy_name(name):
        return found  # over AMQP nobody can tell what would be left
    under, _ = beneath(live.policies, name, found.type)
    return replace(found, given=under.definition if under else {})


def _plan_exchange(plan: Plan, policy: Policy, live: LiveBroker) -> None:
    name = policy.exchange
    found = live.exchanges.get(name)
    if found is None:
        plan.steps.append(Step(ADD, "exchange", name, "DLX101", value={"type": EXCHANGE_TYPE, "durable": True}))
    elif found != (EXCHANGE_TYPE, True):
        kind, durable = found
        what = f"expected a durable {EXCHANGE_TYPE} exchange, found a {'durable' if durable else 'transient'} {kind} one"
        plan.findings.append(Finding("DLX102", name, what))


def _plan_dlq(plan: Plan, policy: Policy, queue: str, settings: QueueSettings, live: LiveBroker) -> None:
    name = policy.dlq(queue)
    arguments = dlq_arguments(settings, live.version)
    found = _without_ours(live, name)
    if found is None:
        plan.steps.append(Step(ADD, "queue", name, "DLX103", value=arguments))
    if found is None or (live.bindings is not None and (name, queue) not in live.bindings):
        code = "DLX103" if found is None else "DLX104"
        plan.steps.append(Step(ADD, "binding", name, code, value={"exchange": policy.exchange, "routing_key": queue}))
    if found is None:
        return
    if found.type != "quorum":
        plan.findings.append(Finding("DLX105", name, f"expected a quorum queue, found a {found.type} one"))
    wanted: dict[str, Any] = {}
    why: list[str] = []
    if finite_delivery_limit(found, live.version):
        limit, declared = found.setting("delivery-limit"), found.arguments.get("x-delivery-limit", -1)
        if declared >= 0 or found.above.get("delivery-limit", -1) >= 0:
            by = "by declaration" if declared >= 0 else "by an operator policy"
            plan.findings.append(Finding("DLX107", name, f"has a delivery limit of {limit} {by}"))
        elif live.version >= (4,):
            wanted["delivery-limit"] = -1
            why.append(f"delivery limit {'20, the default' if limit is None else limit}")
    if (expires := found.arguments.get("x-expires")) is not None:
        plan.findings.append(Finding("DLX118", name, f"declared to be deleted when nobody reads it for {expires} ms"))
    caps = {key[2:]: value for key, value in arguments.items() if key.startswith(("x-max-length", "x-message-ttl"))}
    # A policy for other queues that matches the DLQ too (`.*`) is no wish for it: what harms letters is not carried over.
    meant_for_others = sorted(key for key in _HARM_LETTERS & found.given.keys() if found.given[key] != caps.get(key))
    if meant_for_others:
        why.append(f"policy {found.policy!r} says {', '.join(meant_for_others)} of it")
    for key, value in caps.items():
        declared, counts = found.arguments.get(f"x-{key}"), found.setting(key)
        if declared is not None and declared < value:
            plan.findings.append(Finding("DLX109", name, f"{key}: expected {value}, declared with {declared}"))
        elif meant_for_others or counts is None or counts > value:
            wanted[key] = value
            if not meant_for_others:
                why.append(f"{key} {'unlimited' if counts is None else counts}")
    harmful = bool({"delivery-limit", "expires"} & {*wanted, *meant_for_others})
    _plan_policy(plan, found, wanted, live, "DLX106" if harmful else "DLX108", ", ".join(why), drop=_HARM_LETTERS)


def finite_delivery_limit(dlq: LiveQueue, version: tuple[int, ...]) -> bool:
    """Whether looking at letters often enough deletes them.

    From 4.0 quorum queues have a limit of 20 unless told otherwise, and count every return
    (https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling).
    """
    if dlq.type != "quorum":
        return False
    limit = dlq.setting("delivery-limit")
    return version >= (4,) if limit is None else (limit >= 0 or version < (4,))


def _plan_source(plan: Plan, policy: Policy, queue: str, settings: QueueSettings, live: LiveBroker) -> None:
    found = _without_ours(live, queue)
    kind = found.type if found else settings.type
    if settings.strategy == "at-least-once" and kind != "quorum":
        what = "a classic queue" if kind else "a queue that does not exist, and without `type: quorum`"
        plan.findings.append(Finding("DLX150", queue, f"strategy at-least-once on {what}"))
        return
    if found is None:
        if policy.via == "arguments":
            plan.findings.append(Finding("DLX113", queue, "does not exist yet"))
            return
        found = LiveQueue(queue, type=kind or "unknown")
    wanted: dict[str, Any] = {}
    _want_dead_lettering(plan, policy, found, wanted)
    _want_limits(plan, settings, found, wanted)
    if settings.strategy == "at-least-once":
        _want_at_least_once(plan, found, wanted, settings)
    if settings.type is not None and found.type not in (settings.type, "unknown"):
        plan.findings.append(Finding("DLX116", queue, f"expected type {settings.type}, found {found.type}"))
    _plan_policy(plan, found, wanted, live, "DLX110", "the broker's own net is missing")


def _want_dead_lettering(plan: Plan, policy: Policy, found: LiveQueue, wanted: dict[str, Any]) -> None:
    exchange = found.setting("dead-letter-exchange")
    if exchange not in (None, policy.exchange):
        plan.findings.append(Finding("DLX111", found.name, f"dead-letters to {exchange!r}, expected {policy.exchange!r}"))
        return
    key = found.arguments.get("x-dead-letter-routing-key")
    if key not in (None, found.name):
        plan.findings.append(Finding("DLX112", found.name, f"declared with dead-letter-routing-key {key!r}"))
        return
    if "x-dead-letter-exchange" not in found.arguments:
        wanted["dead-letter-exchange"] = policy.exchange
    if key is None:
        wanted["dead-letter-routing-key"] = found.name


def _want_limits(plan: Plan, settings: QueueSettings, found: LiveQueue, wanted: dict[str, Any]) -> None:
    limits: dict[str, int] = {}
    if settings.message_ttl is not None:
        limits["message-ttl"] = max(int(settings.message_ttl * 1000), 1)
    if settings.max_length is not None:
        limits["max-length"] = settings.max_length
    if found.type == "quorum":
        limits["delivery-limit"] = settings.max_deliveries - 1
    for key, value in limits.items():
        declared = found.arguments.get(f"x-{key}")
        if declared == value:
            continue
        if key in found.above and found.above[key] < value:
            text = f"{key}: expected {value}, operator policy {found.operator_policy!r} says {found.above[key]}"
            plan.findings.append(Finding("DLX117", found.name, text))
        if declared is not None and 0 <= declared < value:
            code = "DLX114" if key == "delivery-limit" else "DLX115"
            plan.findings.append(Finding(code, found.name, f"{key}: expected {value}, declared with {declared}"))
        else:
            wanted[key] = value


def _want_at_least_once(plan: Plan, found: LiveQueue, wanted: dict[str, Any], settings: QueueSettings) -> None:
    if found.arguments.get("x-overflow", "reject-publish") != "reject-publish":
        plan.findings.append(Finding("DLX151", found.name, f"declared with overflow {found.arguments['x-overflow']!r}"))
        return
    if found.arguments.get("x-dead-letter-strategy", "at-least-once") != "at-least-once":
        plan.findings.append(Finding("DLX151", found.name, "declared with dead-letter-strategy at-most-once"))
        return
    if found.given.get("overflow", "reject-publish") != "reject-publish":
        # Of a quorum queue's overflow the policy's counts, not the argument's.
        plan.findings.append(Finding("DLX151", found.name, f"policy {found.policy!r} says {found.given['overflow']!r}"))
        return
    for key, value in (("dead-letter-strategy", "at-least-once"), ("overflow", "reject-publish")):
        if f"x-{key}" not in found.arguments:
            wanted[key] = value
    if settings.max_length is not None or found.setting("max-length") is not None:
        plan.findings.append(Finding("DLX152", found.name, "strategy at-least-once with a maximum length"))


def _plan_policy(
    plan: Plan,
    found: LiveQueue,
    wanted: Mapping[str, Any],
    live: LiveBroker,
    code: str,
    why: str,
    drop: frozenset[str] = frozenset(),
) -> None:
    """Plan our policy for one queue: there if something is wanted that the queue does not have by itself, else not."""
    known = found.type if found.type in ("classic", "quorum") else None
    if live.policies is None:
        # Another policy may say it already; nobody can tell over AMQP.
        if wanted and any(found.given.get(key) != value for key, value in wanted.items()):
            kept = {key: value for key, value in found.given.items() if key not in drop}
            seen = LivePolicy(found.policy, "", definition=kept) if found.policy else None
            ours = merged(found.name, wanted, seen, known, live.version)
            first = (
                f"; give it a priority above that of {found.policy!r}" if found.policy else "; look at list_policies first"
            )
            plan.steps.append(Step(ADD, "policy", ours.name, code, value=ours, note=why + first))
        return
    there = next((policy for policy in live.policies if policy.name == policy_name(found.name)), None)
    under, tied = beneath(live.policies, found.name, found.type if known else "classic")
    if there is None and found.policy is not None:
        # What the broker says counts more than our reading of its patterns (PCRE).
        under = next((policy for policy in live.policies if policy.name == found.policy), under)
    if tied and there is None:
        assert under is not None
        text = f"policies of priority {under.priority} both match {found.name!r}, {under.name!r} is one of them"
        plan.findings.append(Finding("DLX122", found.name, text))
    if under is not None and drop:
        kept = {key: value for key, value in under.definition.items() if key not in drop}
        under = replace(under, definition=kept)
    wanted = _respecting(plan, found, dict(wanted), under)
    beyond = {key: value for key, value in wanted.items() if (under.definition.get(key) if under else None) != value}
    if there is None:
        # Somebody's own policy may do all that is wanted.
        if beyond:
            ours = merged(found.name, wanted, under, known, live.version)
            plan.steps.append(Step(ADD, "policy", ours.name, code, value=ours, note=_note(why, under)))
        return
    if not beyond:
        plan.steps.append(Step(REMOVE, "policy", there.name, "DLX123", before=there, note="nothing is left for it to say"))
        return
    ours = merged(found.name, wanted, under, known, live.version)
    actual = live.queues[found.name].policy if found.name in live.queues else there.name
    if under is not None and (under.priority >= there.priority or actual not in (there.name, None)):
        note = f"policy {under.name!r} of priority {under.priority} counts instead"
        plan.steps.append(Step(CHANGE, "policy", ours.name, "DLX121", value=ours, before=there, note=note))
    elif not same(there, ours) or there.apply_to not in ("queues", apply_to(known, live.version)):
        note = _difference(there, ours, under, wanted)
        plan.steps.append(Step(CHANGE, "policy", ours.name, "DLX120", value=ours, before=there, note=note))


def _respecting(plan: Plan, found: LiveQueue, wanted: dict[str, Any], under: LivePolicy | None) -> dict[str, Any]:
    """Leave to the policy beneath what somebody set there: its limits are never overridden, its exchange not either."""
    says = under.definition if under else {}
    for key in [key for key in wanted if key in NUMERIC and key in says]:
        value = wanted.pop(key)
        if says[key] != value:
            text = f"{key}: expected {value}, policy {under.name!r} says {says[key]}"  # type: ignore[union-attr]
            plan.findings.append(Finding("DLX115", found.name, text))
    if says.get("overflow") == "drop-head" and wanted.get("overflow"):
        text = f"policy {under.name!r} says overflow 'drop-head'"  # type: ignore[union-attr]
        plan.findings.append(Finding("DLX151", found.name, text))
        wanted.pop("overflow")
        wanted.pop("dead-letter-strategy", None)
    exchange = says.get("dead-letter-exchange")
    if exchange is not None and exchange != wanted.get("dead-letter-exchange", exchange):
        text = f"policy {under.name!r} dead-letters to {exchange!r}"  # type: ignore[union-attr]
        plan.findings.append(Finding("DLX111", found.name, text))
        wanted.pop("dead-letter-exchange")
        wanted.pop("dead-letter-routing-key", None)
    return wanted


def _note(why: str, under: LivePolicy | None) -> str:
    return f"{why}; carries over policy {under.name!r}" if under and under.definition else why


def _difference(there: LivePolicy, ours: LivePolicy, under: LivePolicy | None, wanted: Mapping[str, Any]) -> str:
    parts = []
    for key in sorted({*there.definition, *ours.definition}):
        before, after = there.definition.get(key), ours.definition.get(key)
        if before != after:
            by = f"policy {under.name!r}" if under and key in under.definition and key not in wanted else "the policy file"
            whose = f"{by} says so" if after is not None else "nothing says so any more"
            parts.append(f"{key}: {before} → {after} ({whose})")
    for name in ("pattern", "priority", "apply_to"):
        if getattr(there, name) != getattr(ours, name):
            parts.append(f"{name}: {getattr(there, name)} → {getattr(ours, name)}")
    return "; ".join(parts)


def _plan_removal(plan: Plan, queue: str, live: LiveBroker) -> None:
    for there in live.policies or ():
        if there.name == policy_name(queue):
            plan.steps.append(Step(REMOVE, "policy", there.name, "DLX123", before=there, note="dead-lettering is off"))
