"""`dlx topology plan | apply | destroy`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from typing import Any

import click

from celery_dlx.brokers.rabbitmq.apply import command_for
from celery_dlx.brokers.rabbitmq.topology import RabbitMQTopology
from celery_dlx.cli import output
from celery_dlx.cli.main import DRY_RUN, JSON, YES, command, confirmed, dead_letters, dlx
from celery_dlx.errors import EXIT_FINDINGS, UnsupportedBrokerError
from celery_dlx.policy.loader import load_policy
from celery_dlx.topology.findings import INFO, KINDS, Finding
from celery_dlx.topology.live import LiveBroker, LivePolicy
from celery_dlx.topology.plan import REMOVE, Plan, Step

#: `apply` looks again, and takes what that showed, at most this often.
_ROUNDS = 3
_SIGNS = {"add": "+", "change": "~", "remove": "-"}
QUEUES = click.option("--queue", "queues", multiple=True, metavar="QUEUE", help="Only this queue; may be repeated.")


@dlx.group()
def topology() -> None:
    """RabbitMQ's exchange, queues, bindings and policies: what is there, what should be."""


def _topology(ctx: click.Context) -> RabbitMQTopology:
    try:
        return dead_letters(ctx).topology
    except UnsupportedBrokerError as exc:
        output.say(str(exc))
        sys.exit(0)


@command(topology)
@QUEUES
@click.option("--with", "others", multiple=True, metavar="FILE", help="Policy file of another service on this broker.")
@JSON
def plan(ctx: click.Context, queues: tuple[str, ...], others: tuple[str, ...], as_json: bool) -> None:
    """What `apply` would change, and what it cannot. Exit 0: all is in line; 1: it is not."""
    with closing(_topology(ctx)) as topology:
        found, live, names = topology.plan(queues, [load_policy(file) for file in others])
    _show(found, live, names, as_json)
    if not found.in_line:
        sys.exit(EXIT_FINDINGS)


@command(topology)
@QUEUES
@DRY_RUN
@YES
@JSON
def apply(ctx: click.Context, queues: tuple[str, ...], dry_run: bool, yes: bool, as_json: bool) -> None:
    """Carry out the plan, look again, and prove with a message that letters arrive. Exit 1 if something is left."""
    with closing(_topology(ctx)) as topology:
        found, live, names = topology.plan(queues)
        if dry_run:
            _show(found, live, names, as_json)
            output.say("nothing was done")
            return
        if not as_json:
            _findings(found.findings)
        left, applied = _carry_out(topology, found, live, as_json), len(found.steps)
        again, live, names = topology.plan(queues)
        for _ in range(_ROUNDS):
            remaining = [step for step in again.steps if step.name not in left]
            if not remaining:
                break
            # What was made just now may have got somebody's policy that matches it.
            left |= _carry_out(topology, replace(again, steps=remaining), live, as_json)
            applied += len(remaining)
            again, live, names = topology.plan(queues)
        remaining = [step for step in again.steps if step.name not in left]
        for step in remaining:
            output.say(f"Still to do after it was done: {_line(step)}")
        why_not = topology.probe(live) if not any(step.kind == "exchange" for step in again.steps) else "no exchange"
        proof = f"the probe was not sent: {why_not}" if why_not else "a probe message died and arrived"
        if as_json:
            output.json_line({**_summary(again, live, names), "applied": applied - len(left), "probe": why_not or "ok"})
        output.say(f"{applied - len(left)} changes made, {len(left) + len(remaining)} left; {proof}")
    if left or remaining or not again.in_line:
        sys.exit(EXIT_FINDINGS)


def _carry_out(topology: RabbitMQTopology, found: Plan, live: LiveBroker, as_json: bool) -> set[str]:
    """Take all steps, showing how far it is; returns the names of those that could not be taken."""
    left = set()
    steps: Iterable[tuple[Step, str | None]] = topology.apply(found, live)
    for done, (step, failure) in enumerate(steps, 1):
        if failure:
            left.add(step.name)
            output.say(f"{_line(step)}\n    {failure}")
        elif not as_json:
            click.echo(output.line(_line(step)))
        if as_json:
            output.json_line({**step.as_dict(), "done": failure is None, "error": failure})
        elif sys.stderr.isatty():
            click.echo(f"\r{done}/{len(found.steps)}", nl=False, err=True)
    return left


@command(topology)
@QUEUES
@DRY_RUN
@YES
@JSON
def destroy(ctx: click.Context, queues: tuple[str, ...], dry_run: bool, yes: bool, as_json: bool) -> None:
    """Take policies, DLQs and exchange away again. What holds letters stays. Exit 1 if something is left."""
    with closing(_topology(ctx)) as topology:
        live = topology.look(queues)
        names = topology.scope(live, queues)
        if dry_run:
            for name in names:
                output.say(f"would be taken away: the DLQ of {name!r} with its binding, and policies of ours")
            output.say("nothing was done")
            return
        confirmed(f"Take away the dead-lettering of {len(names)} queues?", yes)
        carrying = [
            name for name in names if name in live.queues and "x-dead-letter-exchange" in live.queues[name].arguments
        ]
        if carrying:
            output.say(
                f"Declared with dead-lettering, which cannot be changed: {', '.join(map(repr, carrying))}; "
                "what only the broker sees die there is lost from now on"
            )
        failures = 0
        for kind, name, failure in topology.destroy(names, live, exchange_too=not queues):
            failures += failure is not None
            if as_json:
                output.json_line({"kind": kind, "name": name, "done": failure is None, "error": failure})
            else:
                click.echo(
                    output.line(f"{'stays' if failure else 'gone'}: {kind} {name}{f': {failure}' if failure else ''}")
                )
    if failures:
        sys.exit(EXIT_FINDINGS)


def _show(found: Plan, live: LiveBroker, names: list[str], as_json: bool) -> None:
    if as_json:
        for step in found.ordered():
            output.json_line(step.as_dict())
        for finding in found.findings:
            output.json_line(finding.as_dict())
        output.json_line(_summary(found, live, names))
        return
    for step in found.ordered():
        click.echo(output.line(_line(step)))
    for code in sorted({step.code for step in found.steps}):
        output.say(f"  {code}: {KINDS[code].consequence}")
    _findings(found.findings)
    counts = ", ".join(f"{sum(step.action == action for step in found.steps)} to {action}" for action in _SIGNS)
    serious = sum(finding.severity != INFO for finding in found.findings)
    version = ".".join(map(str, live.version))
    where = f"RabbitMQ {version}, vhost {live.vhost!r}, {len(names)} queues"
    if found.in_line:
        output.say(f"{where}: all is in line")
        return
    output.say(f"{where}: {counts}; {serious} findings for people (docs/findings.md)")
    policies = [step for step in found.steps if step.kind == "policy"]
    if policies and (not live.sees_policies or live.may_set_policies is False):
        output.say("Policies that somebody with the right to must set:")
        for step in policies:
            output.say(f"  {command_for(step, live.vhost)}")


def _findings(findings: list[Finding]) -> None:
    for finding in findings:
        kind = KINDS[finding.code]
        click.echo(output.line(f"! {kind.severity} {finding.code} {finding.subject}: {finding.message}"))
        output.say(f"    {kind.consequence}; {kind.remedy}")


def _line(step: Step) -> str:
    value: Any = step.value if step.action != REMOVE else step.before
    if isinstance(value, LivePolicy):
        text = f"{value.pattern} {dict(value.definition)} priority {value.priority} for {value.apply_to}"
    elif step.kind == "binding":
        text = f"to {value['exchange']} by {value['routing_key']!r}"
    else:
        text = " ".join(f"{key}={entry}" for key, entry in value.items())
    note = f"  ({step.note})" if step.note else ""
    return f"{_SIGNS[step.action]} {step.code} {step.kind} {step.name}: {text}{note}"


def _summary(found: Plan, live: LiveBroker, names: list[str]) -> dict[str, Any]:
    return {
        "type": "summary",
        "in_line": found.in_line,
        "steps": len(found.steps),
        "findings": sum(finding.severity != INFO for finding in found.findings),
        "queues": len(names),
        "version": ".".join(map(str, live.version)),
        "vhost": live.vhost,
    }
