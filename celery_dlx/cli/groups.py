"""`dlx groups`."""

from __future__ import annotations

from typing import Any

import click

from celery_dlx.cli import output
from celery_dlx.cli.main import FORCE, FRESH, JSON, command, dead_letters, filters
from celery_dlx.letters import iso_time


@command()
@click.argument("queue", required=False)
@filters
@FRESH
@FORCE
@JSON
def groups(
    ctx: click.Context, queue: str | None, force: bool, fresh: bool, as_json: bool, limit: int | None, **selected: Any
) -> None:
    """Letters by cause: how many, since when, with an example. The largest group first."""
    found = dead_letters(ctx).groups(queue, **selected)[:limit]
    if as_json:
        for group in found:
            output.json_line(group.as_dict())
        return
    rows = []
    for group in found:
        kind = (group.exception or "").rsplit(".", 1)[-1]
        what = output.line(f"{kind}: {group.message}" if kind else "-", 50)
        seen = f"{iso_time(group.first_seen)[:19]} … {iso_time(group.last_seen)[:19]}"
        rows.append(
            [group.fingerprint, group.count, group.reason, group.task or "-", what, seen, group.trend, group.example]
        )
    if rows:
        output.table(["GROUP", "COUNT", "REASON", "TASK", "EXCEPTION", "SEEN (UTC)", "TREND", "EXAMPLE"], rows)
    output.say(f"{sum(group.count for group in found)} letters of {len(found)} causes")
