"""`dlx replay` and `dlx history`."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import click

from celery_dlx import preflight
from celery_dlx.app import DeadLetters
from celery_dlx.brokers.base import Replayed
from celery_dlx.choice import Choice
from celery_dlx.cli import output
from celery_dlx.cli.main import JSON, command, confirmed, dead_letters, preview, split_targets, targets
from celery_dlx.editing import Edit, by_hand
from celery_dlx.errors import EXIT_FINDINGS, ReplayError, UnknownLetterError, UsageError
from celery_dlx.journal import Record, as_history, history, read_record
from celery_dlx.letters import DeadLetter
from celery_dlx.policy.durations import parse_duration
from celery_dlx.raw import MEANING, check
from celery_dlx.replay import Engine, Options

#: Kinds of doubts that are shown.
_SHOWN = 10
_RATE = re.compile(r"(?P<count>\d+(?:\.\d+)?)(?:/(?P<unit>[smh]))?")
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def _rate(ctx: click.Context, option: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    found = _RATE.fullmatch(value)
    rate = float(found["count"]) / _SECONDS[found["unit"] or "s"] if found else 0
    if rate <= 0:
        raise click.BadParameter(f"{value}: expected a number of letters per second, such as 50/s, or 600/m")
    return rate


def _seconds(ctx: click.Context, option: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    if value in ("0", "0s"):
        return 0.0  # no policy has a use for it, but here it is: do not wait
    try:
        return parse_duration(value)
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from None


@command(name="replay")
@targets
@click.option("--canary", type=click.IntRange(min=1), help="Replay this many, and the rest only if they succeed.")
@click.option("--rate", metavar="N/s", callback=_rate, help="At most this many letters per second (50/s, 600/m).")
@click.option("--to", metavar="QUEUE", help="To this queue instead of the one each died in.")
@click.option("--stop-on-repeat/--no-stop-on-repeat", default=None, help="Stop when a letter dies of the same again.")
@click.option("--wait", metavar="TIME", callback=_seconds, help="Go on listening this long without news (default 2s).")
@click.option(
    "--edit",
    metavar="PATCH",
    help="Change arguments on the way: a JSON Patch over /args and /kwargs, @FILE, or `editor` for one letter.",
)
@click.option(
    "--raw",
    is_flag=True,
    help="In bulk, messages as they are (Redis): nobody reports on them; retries, expires and the count of replays stay.",
)
@click.option("--no-preflight", is_flag=True, help="Do not ask workers whether they would execute it.")
@click.option("--resume", metavar="REPLAY", help="Go on with a replay that was stopped or killed.")
def replay_letters(
    ctx: click.Context,
    targets: tuple[str, ...],
    everything: bool,
    queue: str | None,
    limit: int | None,
    canary: int | None,
    rate: float | None,
    to: str | None,
    stop_on_repeat: bool | None,
    wait: float | None,
    resume: str | None,
    edit: str | None,
    raw: bool,
    no_preflight: bool,
    dry_run: bool,
    yes: bool,
    force: bool,
    as_json: bool,
    **selected: Any,
) -> None:
    """Send letters back to the queue they died in, and tell what becomes of them. Exit 1 if something is left."""
    dead = dead_letters(ctx)
    ids = None
    if resume is not None:
        given = (
            *(value or None for value in selected.values()),
            targets or None,
            everything or None,
            queue,
            limit,
            canary,
            to,
            stop_on_repeat,
            edit,
            raw or None,
            dry_run or None,
        )
        if any(value is not None for value in given):
            raise UsageError(
                "--resume goes on with the selection and the options it had; give --rate or --wait besides, no more"
            )
    else:
        ids, queue, selected = split_targets(targets, everything, queue, selected)
        options = Options(canary, rate, to, bool(canary) if stop_on_repeat is None else stop_on_repeat, edit=edit, raw=raw)
        check(options, dead.broker)
        change = _edit(dead, edit, ids, queue)
        if dry_run:
            preview(dead, ids, queue, limit, selected, as_json)
            return
        if ids is None:
            confirmed(f"Replay {'the selected' if selected else 'all'} letters of {queue or 'every queue'}?", yes)
    with _interruptible() as interrupted:
        hooks = {"interrupted": interrupted, "on_progress": _progress(as_json)}
        if resume is not None:
            engine, locks = dead.resume_replay(resume, hooks, rate=rate, wait=wait)
        else:
            choice = dead.choose(ids, queue, limit=limit, **selected)
            try:
                if not no_preflight:
                    _preflight(dead, choice, to, force, change)
                options.edit = None if change is None else change.text
                options.wait = options.wait if wait is None else wait
                engine, locks = dead.start_replay(choice=choice, options=options, hooks=hooks)
            except BaseException:
                choice.release()  # in their order, which the end of the process would not keep
                raise
        if engine.options.raw:
            output.say(MEANING)
        run = engine.run()
        try:
            for replayed in run:
                _show(replayed, engine.record, as_json)
        finally:
            run.close()  # it writes the end into its journal
            locks.release()
            engine.journal.close()
    _report(engine, as_json)
    if engine.error is not None:
        raise engine.error
    missing = sorted(each for each in set(ids or ()) if each not in engine.record.entries)
    if missing:
        raise UnknownLetterError(
            f"no letter {', '.join(missing)}; it was replayed, discarded or evicted, or lies in the DLQ of a queue this app "
            "does not name: give the queue"
        )
    summary = engine.record.summary()
    if summary["stopped"] or summary["left"]:
        sys.exit(EXIT_FINDINGS)


def _edit(dead: DeadLetters, text: str | None, ids: Any, queue: str | None) -> Edit | None:
    if text is None:
        return None
    if text != "editor":
        if text.startswith("@"):
            try:
                text = Path(text[1:]).read_text("utf-8")
            except (OSError, UnicodeDecodeError) as exc:
                raise UsageError(f"--edit {text}: cannot be read: {exc}") from None
        return Edit(text)
    if ids is None or len(ids) != 1:
        raise UsageError("--edit editor: expected the id of one letter; give a JSON Patch for more")
    change = by_hand(dead.get(ids[0], queue), lambda document: click.edit(document, extension=".json"))
    if change is None:
        raise UsageError("nothing was edited, nothing was replayed; leave --edit out to replay it as it is")
    return change


def _preflight(dead: DeadLetters, choice: Choice, to: str | None, force: bool, change: Edit | None) -> None:
    """Say what will go wrong again, and refuse what surely will.

    Raises:
        ReplayError: a message will surely die again.
    """
    letters: Iterable[DeadLetter] = choice.letters()
    findings = preflight.Findings()
    if change is not None:
        letters = _edited(letters, change, findings)
    for doubt in preflight.doubts(dead, letters, to):
        findings.add(doubt)
    for message, found in islice(findings.kinds.items(), _SHOWN):
        others = f" and {found.letters - 1} more" if found.letters > 1 else ""
        output.say(f"letter {found.letter}{others}: {message}")
    if findings.sure and not force:
        raise ReplayError(
            f"{findings.sure} of the letters would die again, or cannot be edited; nothing was replayed. Correct what "
            "is said above, choose other letters, or insist with --no-preflight"
        )


def _edited(letters: Iterable[DeadLetter], change: Edit, findings: preflight.Findings) -> Iterator[DeadLetter]:
    for letter in letters:
        try:
            change.apply(letter)
        except ReplayError as exc:
            findings.add(preflight.Doubt(letter.id, letter.queue, str(exc).split(": ", 1)[1], True))
        else:
            yield letter


def _show(replayed: Replayed, record: Record, as_json: bool) -> None:
    letter = replayed.letter
    if as_json:
        output.json_line({"id": letter.id, "queue": replayed.queue, "changes": replayed.changes})
    elif not sys.stderr.isatty() or len(record.entries) <= 20:
        changes = f"  ({'; '.join(replayed.changes)})" if replayed.changes else ""
        click.echo(output.line(f"{letter.id} → {replayed.queue}  {letter.task or '-'}{changes}"))


def _report(engine: Engine, as_json: bool) -> None:
    record = engine.record
    summary = record.summary()
    if as_json:
        output.json_line(summary)
    parts = [f"{summary['replayed']} letters replayed"]
    words = {**_WORDS, "waiting": "raw, of which nobody will tell"} if engine.options.raw else _WORDS
    parts += [f"{summary[key]} {said}" for key, said in words.items() if summary[key]]
    output.say(f"{', '.join(parts)} (replay {record.replay})")
    if summary["stopped"]:
        output.say(f"Stopped: {summary['stopped']}. Go on with: celery -A APP dlx replay --resume {record.replay}")


_WORDS = {
    "succeeded": "succeeded",
    "failed_again": "failed again",
    "waiting": "without news yet",
    "left": "not replayed",
}


def _progress(quiet: bool) -> Any:
    started = time.monotonic()

    def show(record: Record) -> None:
        if quiet or not sys.stderr.isatty() or len(record.entries) <= 20:
            return
        summary = record.summary()
        rate = summary["replayed"] / max(time.monotonic() - started, 0.001)
        text = f"{summary['replayed']}/{summary['selected']}  {rate:.0f}/s  {summary['succeeded']} succeeded"
        click.echo(f"\r{text}  {summary['failed_again']} failed again  {summary['left']} left ", nl=False, err=True)

    return show


@contextmanager
def _interruptible() -> Iterator[Any]:
    """Ctrl-C ends a replay in good order: what was begun is finished. A second one does not wait for that."""
    pressed: list[int] = []

    def note(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        output.say("stopping; press Ctrl-C again not to wait")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(pressed)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@command(name="history")
@click.argument("replay", required=False)
@click.option("--all", "everywhere", is_flag=True, help="Also replays on other brokers.")
@JSON
def show_history(ctx: click.Context, replay: str | None, everywhere: bool, as_json: bool) -> None:
    """The replays that were run from this machine by this user, oldest first; or what became of each letter of REPLAY."""
    if replay is not None:
        _show_entries(read_record(replay), as_json)
        return
    dead = dead_letters(ctx)
    records = map(as_history, history(None if everywhere else dead.broker_name))
    if as_json:
        for record in records:
            output.json_line(record)
        return
    keys = ["replay", "started", "by", "selection", "selected", "replayed", "succeeded", "failed_again", "waiting", "left"]
    rows = [[*(record[key] for key in keys), record["stopped"] or ""] for record in records]
    output.table([key.replace("_", " ").upper() for key in [*keys, "stopped"]], rows)


def _show_entries(record: Record, as_json: bool) -> None:
    counts: Counter[str] = Counter()
    rows = []
    for entry in record.entries:
        counts[entry.outcome] += 1
        if as_json:
            output.json_line(
                {"id": entry.id, "queue": entry.queue, "fingerprint": entry.fingerprint, "outcome": entry.outcome}
            )
        else:
            rows.append([entry.id, entry.queue, entry.fingerprint, entry.outcome.replace("_", " ")])
    if rows:
        output.table(["ID", "QUEUE", "GROUP", "OUTCOME"], rows)
    output.say(", ".join(f"{count} {outcome.replace('_', ' ')}" for outcome, count in counts.most_common()) or "no letters")
