"""The commands. Exit codes: 0 done, 1 findings or something left undone, 2 usage, 69 broker unreachable."""

from __future__ import annotations

import functools
import logging
import re
import select
import sys
from collections.abc import Callable, Iterable
from typing import Any

import click
from amqp.exceptions import AMQPError
from celery.bin.base import handle_preload_options
from kombu.exceptions import KombuError
from redis.exceptions import RedisError, ResponseError

from celery_dlx.app import DeadLetters
from celery_dlx.brokers.base import Looking
from celery_dlx.canvas import canvas_of
from celery_dlx.cli import output
from celery_dlx.errors import EXIT_FINDINGS, EXIT_UNREACHABLE, DeadLetterError, UsageError
from celery_dlx.letters import DeadLetter, Reason, iso_time
from celery_dlx.redaction import shown

_ID = re.compile(r"[0-9a-f]{32}")


@click.group(name="dlx")
@click.pass_context
@handle_preload_options  # type: ignore[untyped-decorator]
def dlx(ctx: click.Context, **_: Any) -> None:
    """Dead letters: find, understand, replay."""
    # What the broker still sends while a channel closes is no news.
    logging.getLogger("amqp").setLevel(logging.ERROR)


def _nobody_reads() -> bool:
    """Whether what our output goes to has ended, as `head` does: else it is the broker's connection that broke."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # there is no poll here, or this is no file
        return False


def command(group: Any = dlx, **settings: Any) -> Callable[[Callable[..., Any]], Any]:
    """A command whose errors are one line and the right exit code, never a traceback."""

    def decorate(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except DeadLetterError as exc:
                output.say(f"Error: {exc}")
                sys.exit(exc.exit_code)
            except ResponseError as exc:
                output.say(f"Error: Redis refuses: {exc}; what was not done is still in its dead-letter queue")
                sys.exit(EXIT_FINDINGS)
            except (AMQPError, RedisError, KombuError, OSError) as exc:
                if isinstance(exc, BrokenPipeError) and _nobody_reads():
                    raise
                reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
                output.say(f"Error: the broker connection failed: {reason}; nothing was lost, try again")
                sys.exit(EXIT_UNREACHABLE)

        return group.command(**settings)(click.pass_context(guarded))

    return decorate


def dead_letters(ctx: click.Context) -> DeadLetters:
    dead = DeadLetters.of(ctx.obj.app)
    dead.insist = bool(ctx.params.get("force"))
    dead.looking = Looking(output.say, ctx.params["fresh"]) if "fresh" in ctx.params else None
    return dead


def for_eyes(dead: DeadLetters, letter: DeadLetter) -> DeadLetter:
    """A letter without what the policy says nobody should read."""
    settings = dead.policy.settings(letter.queue)
    return letter if settings is None else shown(letter, settings.redact)


JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
FORCE = click.option(
    "--force", is_flag=True, help="Insist: read where that may delete letters (DLX107); replay what would die again."
)
FRESH = click.option("--fresh", is_flag=True, help="Read a large DLQ again, also if that was done a while ago (RabbitMQ).")
YES = click.option("--yes", is_flag=True, help="Do not ask.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Only say what would be done.")


def filters(function: Any) -> Any:
    """The options that select letters."""
    return _decorated(function, _FILTERS)


def targets(function: Any) -> Any:
    """The arguments and options of commands that act on letters: which ones, see `split_targets`, and how."""
    return _decorated(function, (YES, DRY_RUN, FORCE, JSON, *_FILTERS, *_TARGETS))


def _decorated(function: Any, options: Iterable[Any]) -> Any:
    for option in options:
        function = option(function)
    return function


_TARGETS = (
    click.option("--queue", help="The queue, where its name looks like an id."),
    click.option("--all", "everything", is_flag=True, help="Every letter (of QUEUE, if given)."),
    click.argument("targets", metavar="[QUEUE] [ID]...", nargs=-1),
)
_FILTERS = (
    click.option("--limit", type=click.IntRange(min=1), help="At most this many."),
    click.option("--until", metavar="WHEN", help="Died at or before: a time, or an age such as 2h."),
    click.option("--since", metavar="WHEN", help="Died at or after: a time, or an age such as 2h."),
    click.option("--exception", metavar="TYPE", help="Exception type, with or without module, or glob."),
    click.option("--reason", type=click.Choice([str(reason) for reason in Reason])),
    click.option("--where", multiple=True, metavar="CONDITION", help="On JSON arguments: 'kwargs.amount > 100'."),
    click.option("--arg", "arguments", multiple=True, metavar="NAME=VALUE", help="A JSON argument: user_id=42, 0=42."),
    click.option("--text", metavar="WORDS", help="Words in the exception's message."),
    click.option("--retries", metavar="N", help="How often it was retried: a number, or a comparison such as '>=3'."),
    click.option("--worker", metavar="NAME", help="Worker name or glob."),
    click.option("--root-id", metavar="ID", help="Id of the workflow's first task."),
    click.option("--task-id", metavar="ID", help="Task id."),
    click.option("--group", "fingerprint", metavar="FINGERPRINT", help="One group of `dlx groups`."),
    click.option("--task", metavar="NAME", help="Task name or glob."),
)


@command(name="list")
@click.argument("queue", required=False)
@click.option("--newest/--oldest", default=False, help="Which come first; with --limit, which are shown.")
@click.option("--after", metavar="ID", help="The next page: what comes after this letter.")
@filters
@FRESH
@FORCE
@JSON
def list_letters(
    ctx: click.Context,
    queue: str | None,
    newest: bool,
    after: str | None,
    force: bool,
    fresh: bool,
    as_json: bool,
    limit: int | None,
    **selected: Any,
) -> None:
    """Dead letters of QUEUE, or of all queues, oldest first."""
    dead = dead_letters(ctx)
    letters = dead.letters(queue, limit=limit, newest=newest, after=after, **selected)
    found = (for_eyes(dead, letter) for letter in letters)
    if as_json:
        for letter in found:
            output.json_line(letter.as_dict())
        return
    rows = [output.letter_row(letter) for letter in found]
    if rows:
        output.table(output.LETTER_HEADINGS, rows)
    more = f"; what comes after them: --after {rows[-1][0]}" if rows and len(rows) == limit else ""
    output.say(f"{len(rows)} dead letters{more}")


@command()
@click.argument("letter_id", metavar="ID")
@click.option("--queue", help="The queue it died in; default: search all.")
@FORCE
@JSON
def show(ctx: click.Context, letter_id: str, queue: str | None, force: bool, as_json: bool) -> None:
    """One letter: its death, its traceback, its message."""
    dead = dead_letters(ctx)
    letter = for_eyes(dead, dead.get(letter_id, queue))
    state = dead.result_state(letter)
    if as_json:
        original = letter.original
        output.json_line(
            {
                **letter.as_dict(),
                "headers": dict(original.headers),
                "properties": dict(original.properties),
                "stripped": letter.stripped,
                "redacted": letter.redacted,
                "deaths": [{**death, "died_at": iso_time(death["died_at"])} for death in letter.deaths],
                "body": original.body.decode("utf-8", "backslashreplace"),
                "canvas": canvas_of(original).as_dict(),
                "result_state": state,
            }
        )
    else:
        output.show_letter(letter, state)


@command()
@click.argument("queue", required=False)
@JSON
def stats(ctx: click.Context, queue: str | None, as_json: bool) -> None:
    """How many letters each DLQ holds."""
    rows = dead_letters(ctx).stats(queue)
    if as_json:
        for row in rows:
            output.json_line(row.as_dict())
        return
    shown = [(row, {key: value for key, value in row.extra.items() if not isinstance(value, dict)}) for row in rows]
    output.table(
        ["QUEUE", "DLQ", "LETTERS", ""],
        [
            [row.queue, row.dlq, row.letters, ", ".join(f"{key}={value}" for key, value in extra.items())]
            for row, extra in shown
        ],
    )
    for row in rows:
        for label, count in row.extra.get("evicted", {}).items():
            output.say(f"{row.dlq}: {count} letters of {label} were dropped by the caps")


def split_targets(targets: tuple[str, ...], everything: bool, queue: str | None, selected: dict[str, Any]) -> Any:
    """Split `[QUEUE] [ID…]`, and refuse a call that says neither which letters nor `--all`."""
    ids = [target for target in targets if _ID.fullmatch(target)]
    queues = [target for target in targets if not _ID.fullmatch(target)]
    if queue:
        queues.append(queue)
    if len(queues) > 1:
        raise UsageError(f"expected one queue, found {', '.join(queues)}; an id is 32 hexadecimal digits")
    selected = {key: value for key, value in selected.items() if value not in (None, ())}
    if ids and (everything or selected):
        raise UsageError("expected ids, or --all, or filters; found more than one of them")
    if not ids and not everything and not selected:
        raise UsageError("which letters? give ids, filters, or --all")
    return ids or None, queues[0] if queues else None, selected


def confirmed(question: str, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("not on a terminal: give --yes to go on, or --dry-run to look first")
    if not click.confirm(question, err=True):
        raise DeadLetterError("nothing was done")


def preview(dead: DeadLetters, ids: Any, queue: str | None, limit: int | None, selected: Any, as_json: bool) -> None:
    count = 0
    for letter in dead.letters(queue, limit=limit, ids=ids, **selected):
        letter = for_eyes(dead, letter)
        count += 1
        if as_json:
            output.json_line(letter.as_dict())
        else:
            click.echo("  ".join(output.line(cell) for cell in output.letter_row(letter)))
    output.say(f"{count} letters would be taken; nothing was done")


@command()
@targets
def discard(
    ctx: click.Context,
    targets: tuple[str, ...],
    everything: bool,
    queue: str | None,
    limit: int | None,
    dry_run: bool,
    yes: bool,
    force: bool,
    as_json: bool,
    **selected: Any,
) -> None:
    """Delete letters for good."""
    dead = dead_letters(ctx)
    ids, queue, selected = split_targets(targets, everything, queue, selected)
    if dry_run:
        preview(dead, ids, queue, limit, selected, as_json)
        return
    confirmed(f"Delete {len(ids) if ids else 'the selected'} letters of {queue or 'every queue'} for good?", yes)
    count = 0
    try:
        for letter in dead.discard(ids, queue, limit=limit, **selected):
            count += 1
            if as_json:
                output.json_line({"id": letter.id, "queue": letter.queue})
    finally:
        output.say(f"{count} letters deleted")


@command()
@click.argument("queue")
@DRY_RUN
@YES
@JSON
def purge(ctx: click.Context, queue: str, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Delete all letters of QUEUE at once, without looking at them."""
    dead = dead_letters(ctx)
    (row,) = dead.stats(queue)
    if dry_run:
        output.say(f"{row.letters} letters of {row.dlq!r} would be deleted; nothing was done")
        return
    confirmed(f"Delete all {row.letters} letters of {row.dlq!r} for good?", yes)
    count = dead.purge(queue)
    if as_json:
        output.json_line({"queue": queue, "dlq": row.dlq, "deleted": count})
    output.say(f"{count} letters deleted")


from celery_dlx.cli import doctor as _doctor  # noqa: E402, F401
from celery_dlx.cli import groups as _groups  # noqa: E402, F401
from celery_dlx.cli import policy as _policy  # noqa: E402, F401 - registers its commands
from celery_dlx.cli import replay as _replay  # noqa: E402, F401
from celery_dlx.cli import topology as _topology  # noqa: E402, F401
from celery_dlx.cli import transfer as _transfer  # noqa: E402, F401
