"""`dlx policy check | schema | show`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import click

from celery_dlx.cli import output
from celery_dlx.cli.main import JSON, command, dead_letters, dlx
from celery_dlx.errors import EXIT_FINDINGS, PolicyError
from celery_dlx.policy.durations import format_duration
from celery_dlx.policy.settings import QueueSettings
from celery_dlx.topology.scope import conflicts


@dlx.group()
def policy() -> None:
    """The policy file: check it, see what it means."""


@command(policy)
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@JSON
def check(ctx: click.Context, files: tuple[str, ...], as_json: bool) -> None:
    """Say everything that is wrong with policy files, as file:line:column, and where they disagree. Exit 1 if so."""
    from celery_dlx.policy.loader import load_policy

    wrong, loaded = False, []
    for file in files:
        try:
            loaded.append(load_policy(file))
        except PolicyError as exc:
            wrong = True
            for problem in exc.problems:
                if as_json:
                    output.json_line(
                        {"file": file, "line": problem.line, "column": problem.column, "message": problem.message}
                    )
                else:
                    click.echo(output.neutral(f"{file}:{problem.line}:{problem.column}: {problem.message}"))
        else:
            output.say(f"{file}: ok")
    for finding in conflicts(loaded):
        wrong = True
        if as_json:
            output.json_line(finding.as_dict())
        else:
            click.echo(output.neutral(f"{finding.code} queue {finding.subject!r}: {finding.message}"))
    if wrong:
        sys.exit(EXIT_FINDINGS)


@command(policy)
def schema(ctx: click.Context) -> None:
    """The JSON Schema of a policy file, for editors."""
    from celery_dlx.policy.model import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@command(policy)
@click.argument("queue", required=False)
@JSON
def show(ctx: click.Context, queue: str | None, as_json: bool) -> None:
    """The effective settings of QUEUE, or of every queue the app and the policy name."""
    dead = dead_letters(ctx)
    if not as_json:
        output.say(f"policy: {dead.policy.path or 'built-in'}")
    rows = []
    for name in [queue] if queue else dead.known_queues():
        settings = dead.policy.settings(name)
        if as_json:
            output.json_line({"queue": name, "managed": settings is not None, **(_plain(settings) if settings else {})})
        elif settings is None:
            output.say(f"{name}: not managed by this policy")
        else:
            dlq = dead.policy.dlq(name) if settings.enabled else "-"
            rows.append([name, settings.entry or "(every queue)", dlq, _sentence(settings)])
    if rows:
        output.table(["QUEUE", "ENTRY", "DLQ", "SETTINGS"], rows)


def _plain(settings: QueueSettings) -> dict[str, Any]:
    return {**asdict(settings), "reasons": sorted(settings.reasons)}


def _sentence(settings: QueueSettings) -> str:
    parts = []
    for name, value in asdict(settings).items():
        unset = value is None or (name.startswith("redact") and not value)
        if unset or name in ("entry", "reasons", "enabled"):
            continue
        is_time = name in ("time_limit", "soft_time_limit", "message_ttl", "dlq_max_age")
        parts.append(f"{name}={format_duration(value) if is_time else value}")
    return ", ".join(parts)
