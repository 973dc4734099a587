"""`dlx doctor`."""

from __future__ import annotations

import sys

import click

from celery_dlx.cli import output
from celery_dlx.cli.main import JSON, command, dead_letters
from celery_dlx.doctor import examine
from celery_dlx.errors import EXIT_FINDINGS, EXIT_UNREACHABLE
from celery_dlx.topology.findings import CRITICAL


@command()
@JSON
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Is everything in place? Broker, policy, topology, workers, settings. Exit 1 if anything is critical."""
    code = 0
    for check in examine(dead_letters(ctx)):
        if check.status == CRITICAL:
            code = code or (EXIT_UNREACHABLE if check.name == "broker" else EXIT_FINDINGS)
        if as_json:
            output.json_line(check.as_dict())
            continue
        click.echo(output.line(f"{check.status:8}  {check.name:12} {check.message}"))
        if check.next:
            click.echo(output.line(f"{'':8}  {'':12} → {check.next}"))
    sys.exit(code)
