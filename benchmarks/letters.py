"""What many dead letters cost: to list, to group, to filter, to keep, to replay.

    python benchmarks/letters.py [--letters 100000] [--rounds 1] [--only redis|rabbitmq]

Starts its own brokers. The letters have bodies of 1 KiB on average, and three causes. On Redis the server's slow log is
read: a command holds up everybody. On RabbitMQ replaying is compared with the broker's own shovel, from a queue of letters
to the queue they died in.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import amqp
import redis
from celery import Celery
from common import HERE, Table, hiccup, private, ratio, turns
from kombu import Connection
from samples import BODY, CAUSES, DLQ, QUEUE, item, letter, original
from servers import RABBITMQ, wait_for
from slowlog import SlowLog

from celery_dlx import DeadLetters
from celery_dlx.brokers.base import Looking
from celery_dlx.brokers.rabbitmq.letters import at_rest, exported
from celery_dlx.brokers.rabbitmq.management import Management
from celery_dlx.brokers.redis.letters import original_of
from celery_dlx.brokers.redis.store import Capture
from celery_dlx.errors import DeadLetterError
from celery_dlx.letters import DeadLetter
from celery_dlx.policy.settings import Policy
from celery_dlx.replay import Options

#: As many letters share a round trip in a worker.
BATCH = 100
PAGE = 50
WANTED = {
    "page": "≤ 50", "middle": "≤ 50", "groups": "≤ 50", "scan": "≥ 200000", "memory": "≤ 1.6", "replay": "≥ 15000",
    "slow": "≤ 10", "list": "≤ 1", "rabbit groups": "≥ 15000", "client": "≤ 200", "shovel": "≥ 0.75", "loop": "≥ 1",
    "rate": "≤ 5", "raw": "≥ 100000",
}  # fmt: skip
RATE, RATED = 200, 1_000
#: Letters that left within this time of each other, in seconds, left together.
_BURST = 0.02
#: Run in a process that is small itself: a child's peak begins with that of its parent.
_PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def dead_letters(url: str, count: int) -> DeadLetters:
    app = Celery("bench", broker=url, set_as_current=False)
    app.conf.task_default_queue = QUEUE
    return DeadLetters(app, policy=Policy(defaults={"dlq_max_length": 2 * count}))


def timed(step: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    outcome = step()
    return time.perf_counter() - start, outcome


def engine_seconds(
    dead: DeadLetters, count: int, each: Callable[[], object] = lambda: None, **options: Any
) -> tuple[float, float]:
    """Seconds of selecting and of sending letters with the engine; nobody consumes them. ``each``: called as one left."""
    selecting, (engine, locks) = timed(
        lambda: dead.start_replay(queue=QUEUE, limit=count if options else None, options=Options(wait=0, **options))
    )
    with closing(engine.journal):
        try:
            sending, moved = timed(lambda: len([each() for _ in engine.run()]))
        finally:
            locks.release()
    if engine.error is not None or moved != count:
        raise SystemExit(f"{moved} letters replayed, expected {count}: {engine.error}")
    return selecting, sending


def report_engine(table: Table, kind: str, count: int, selecting: float, sending: float, wanted: str = "") -> None:
    note = f"selecting {selecting:.1f} s, sending {sending:.1f} s"
    table.add(f"{kind}: replay by the engine", count / (selecting + sending), "letters/s", wanted, note)


def report_rate(table: Table, kind: str, dead: DeadLetters) -> None:
    """Letters leave in bursts: the first burst is where the time begins."""
    times: list[float] = []
    _, sending = engine_seconds(dead, RATED, lambda: times.append(time.perf_counter()), rate=RATE)
    later = sum(1 for at in times if at > times[0] + _BURST)
    found = later / (times[-1] - times[0])
    note = f"{found:.1f}/s; {RATED / sending:.1f}/s over all of its {sending:.1f} s"
    table.add(f"{kind}: replay at {RATE}/s, off by", abs(found / RATE - 1) * 100, "%", WANTED["rate"], note)


def exhausted(letters: Iterator[DeadLetter], expected: int | None = None) -> int:
    count = sum(1 for _ in letters)
    if expected is not None and count != expected:
        raise SystemExit(f"{count} letters, expected {expected}")
    return count


# -- Redis


def fill_redis(dead: DeadLetters, count: int) -> int:
    """Store letters as workers do; returns the bytes of their items."""
    stored, settings = 0, dead.policy.settings(QUEUE)
    with dead.app.connection_for_write() as connection:
        store = connection.default_channel.dlx_letter_store(dead.policy)
        store.announce(QUEUE)
        for start in range(0, count, BATCH):
            items = [(number, item(number)) for number in range(start, min(start + BATCH, count))]
            store.capture_all([Capture(letter(number, original_of(raw)), settings, item=raw) for number, raw in items])
            stored += sum(len(raw) for _, raw in items)
    return stored


def measure_redis(url: str, count: int, table: Table) -> None:
    client = redis.Redis.from_url(url)
    dead = dead_letters(url, count)
    before, slow = client.info("memory")["used_memory"], SlowLog(client)
    seconds, stored = timed(lambda: fill_redis(dead, count))
    slow.read("storing")
    table.add("redis: storing, composing included", count / seconds, "letters/s")
    grown = client.info("memory")["used_memory"] - before
    note = f"{grown / count:,.0f} bytes for each, {grown / count / BODY:.2f} ÷ body"
    table.add("redis: the server's memory", grown / stored, "÷ messages", WANTED["memory"], note)

    def page(since: float | None) -> float:
        return statistics.median(
            timed(lambda: exhausted(dead.letters(QUEUE, limit=PAGE, since=since), PAGE))[0] * 1000 for _ in range(5)
        )

    table.add(f"redis: first page of {PAGE}", page(None), "ms", WANTED["page"])
    (_, middle), *_ = client.zrange(f"dlx:{{{DLQ}}}", count // 2, count // 2, withscores=True)
    table.add(f"redis: page of {PAGE} in the middle, by since", page(middle / 1000), "ms", WANTED["middle"])
    seconds, groups = timed(lambda: dead.groups(QUEUE))
    if len(groups) != len(CAUSES) or sum(group.count for group in groups) != count:
        raise SystemExit(f"unexpected groups: {groups}")
    table.add("redis: groups", seconds * 1000, "ms", WANTED["groups"], f"{count / seconds:,.0f} letters/s")
    third = (count + 1) // 3
    for what, filters, found in (
        ("task glob, a third matches", {"task": "shop.*receipt"}, third),
        ("message text, a third matches", {"text": "no address"}, third),
        ("message text, one matches", {"text": "order 1 has no address"}, 1),
    ):
        seconds, _ = timed(lambda filters=filters, found=found: exhausted(dead.letters(QUEUE, **filters), found))
        table.add(f"redis: scan by {what}", count / seconds, "letters/s", WANTED["scan"])
    slow.read("reading")
    seconds, _ = timed(lambda: exhausted(dead.replay(queue=QUEUE), count))
    slow.read("replaying")
    table.add("redis: replay by DeadLetters.replay", count / seconds, "letters/s", WANTED["replay"])
    client.unlink(QUEUE)  # aside: it must not be the longest command
    fill_redis(dead, count)
    slow.read("storing")
    report_engine(table, "redis", count, *engine_seconds(dead, count), WANTED["replay"])
    slow.read("replaying by the engine")
    usual, longest = slow.counting()
    for file, kept in ("yes", ""), ("no", ", no append-only file"):
        client.config_set("appendonly", file)
        client.unlink(QUEUE)  # aside: it must not be the longest command
        fill_redis(dead, count)
        slow.read("storing")
        selecting, sending = engine_seconds(dead, count, raw=True)
        note = f"after selecting, which took {selecting:.1f} s; sending {sending:.1f} s"
        table.add(f"redis: raw bulk replay by the engine{kept}", count / sending, "letters/s", WANTED["raw"], note)
        slow.read("replaying raw")
    client.unlink(QUEUE)  # aside: it must not be the longest command
    fill_redis(dead, RATED)
    report_rate(table, "redis", dead)
    table.add("redis: longest command", slow.longest / 1000, "ms", WANTED["slow"], slow.what)
    note = f"touching nothing, {usual:.1f} ms mostly, while the append-only file is rewritten"
    table.add("redis: longest script that only counts", longest, "ms", note=note)
    table.add("redis: one command in a thousand takes", slow.one_in(1_000), "ms", WANTED["slow"], "or more")
    table.add("this machine holds up a busy loop for", hiccup() * 1000, "ms", note="a command's time includes such")
    dead.close()


# -- RabbitMQ


def fill_rabbitmq(dead: DeadLetters, count: int) -> None:
    """Publish letters with confirms, into an empty DLQ; the queue they died in is made empty too."""
    with dead.app.connection_for_write() as connection:
        channel = connection.default_channel
        channel.queue_declare(QUEUE, durable=True, auto_delete=False)
        channel.queue_purge(QUEUE)
        with suppress(amqp.exceptions.NotFound):
            channel.queue_purge(DLQ)
    letters = (letter(number, original(number)) for number in range(count))
    restored, _ = dead.restore(exported(at_rest(each, "guest"), each, QUEUE) for each in letters)
    assert restored == count


def arriving(url: str, count: int, start: Callable[[], None]) -> float:
    """Messages per second that arrive in the source queue, from the first that is seen to the last."""
    with Connection(url) as connection:
        channel = connection.default_channel

        def depth() -> int:
            return int(channel.queue_declare(QUEUE, passive=True).message_count)

        begun = time.monotonic()
        start()
        there = wait_for(depth, "the first message was moved", every=0.002)
        first = time.monotonic()
        if there >= count:
            return count / (first - begun)
        wait_for(lambda: depth() >= count, lambda: f"{count} messages moved, found {depth()}", 1800, every=0.002)
        return (count - there) / (time.monotonic() - first)


def shovel(management: Management, url: str, count: int) -> float:
    value = {
        "src-protocol": "amqp091", "src-uri": "amqp://", "src-queue": DLQ, "src-delete-after": "queue-length",
        "dest-protocol": "amqp091", "dest-uri": "amqp://", "dest-queue": QUEUE, "ack-mode": "on-confirm",
    }  # fmt: skip
    path = ("parameters", "shovel", "/", "bench")
    try:
        rate = arriving(url, count, lambda: management.put(*path, body={"value": value}))
        wait_for(lambda: management.get(*path) is None, "the shovel ended")  # it still acknowledges
        return rate
    finally:
        management.delete(*path)


def loop(url: str, count: int) -> float:
    """The plain way: each is taken, published, confirmed and acknowledged."""
    with Connection(url) as connection:
        channel = connection.default_channel
        channel.basic_qos(0, 1_000, False)
        taken: deque[Any] = deque()
        channel.basic_consume(DLQ, callback=taken.append)  # publishing there would read the next delivery within this one
        start = time.monotonic()
        for _ in range(count):
            while not taken:
                connection.drain_events(timeout=30)
            raw = taken.popleft()
            channel.basic_publish_confirm(amqp.Message(raw.body, **raw.properties), exchange="", routing_key=QUEUE)
            channel.basic_ack(raw.delivery_tag)
        return count / (time.monotonic() - start)


def peak(url: str, *arguments: str) -> float:
    """MiB that a command line took at most."""
    env = {**os.environ, "BENCH_BROKER": url, "BENCH_MODE": "dlx", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    command = [sys.executable, "-c", _PEAK, sys.executable, "-m", "celery", "-A", "bench_app", "dlx", *arguments]
    return int(subprocess.run(command, env=env, cwd=HERE, stdout=subprocess.PIPE, check=True).stdout) / 1024


def shovel_is_there(broker: Any, management: Management | None) -> bool:
    """Whether the broker has dynamic shovels; one of our own gets them."""
    if hasattr(broker, "environment"):
        command = [RABBITMQ.replace("rabbitmq-server", "rabbitmq-plugins"), "-n", broker.node, "enable", "rabbitmq_shovel"]
        subprocess.run(command, env=broker.environment, capture_output=True, timeout=120)
    if management is None:
        return False
    try:
        management.put("parameters", "shovel", "/", "bench", body={"value": {}})  # refused, for this reason or for another
    except DeadLetterError as exc:
        return "component shovel not found" not in str(exc)
    return True


def measure_rabbitmq(broker: Any, count: int, rounds: int, table: Table) -> None:
    url, dead = broker.url, dead_letters(broker.url, count)
    management = Management(broker.management_url, "guest", "guest", "/") if broker.management_url else None
    fill_rabbitmq(dead, 1)
    alone = peak(url, "groups", QUEUE)
    seconds, _ = timed(lambda: fill_rabbitmq(dead, count))
    table.add("rabbitmq: storing, composing included", count / seconds, "letters/s")
    seconds = statistics.median(timed(lambda: exhausted(dead.letters(QUEUE, limit=PAGE), PAGE))[0] for _ in range(3))
    table.add(f"rabbitmq: first page of {PAGE}", seconds, "s", WANTED["list"])
    seconds, groups = timed(lambda: dead.groups(QUEUE))
    if len(groups) != len(CAUSES) or sum(group.count for group in groups) != count:
        raise SystemExit(f"unexpected groups: {groups}")
    table.add("rabbitmq: groups", count / seconds, "letters/s", WANTED["rabbit groups"], f"{seconds:.1f} s")
    seconds, _ = timed(lambda: exhausted(dead.letters(QUEUE, limit=PAGE), PAGE))
    table.add(f"rabbitmq: first page of {PAGE}, once all were looked at, read", seconds, "s")
    dead.looking = Looking(lambda text: None, fresh=True)
    seconds, _ = timed(lambda: dead.groups(QUEUE))
    table.add(
        "rabbitmq: groups, the index written", count / seconds, "letters/s", WANTED["rabbit groups"], f"{seconds:.1f} s"
    )
    dead.looking = Looking(lambda text: None)
    for what, options in (("first page", {}), ("first page of a cause", {"task": "shop.*receipt"})):
        seconds, _ = timed(lambda options=options: exhausted(dead.letters(QUEUE, limit=PAGE, **options), PAGE))
        table.add(f"rabbitmq: {what}, by the index", seconds, "s", WANTED["list"])
    seconds, known = timed(lambda: dead.groups(QUEUE))
    if [group.as_dict() for group in known] != [group.as_dict() for group in groups]:
        raise SystemExit(f"unexpected groups by the index: {known}")
    table.add("rabbitmq: groups, by the index", seconds, "s", WANTED["list"])
    text = {"text": "no address"}
    seconds, _ = timed(lambda: exhausted(dead.letters(QUEUE, **text), (count + 1) // 3))
    table.add("rabbitmq: scan by message text, a third matches, by the index", count / seconds, "letters/s")
    dead.looking = None
    replaying = ["replay", QUEUE, "--all", "--yes", "--wait", "0"]  # the last: then they are gone
    for command in (["list", QUEUE, "--limit", str(PAGE)], ["groups", QUEUE], ["list", QUEUE, "--json"], replaying):
        found, name = peak(url, *command), " ".join(command)
        wanted = "" if "--json" in command else WANTED["client"]
        table.add(f"rabbitmq: peak of dlx {name}", found, "MiB", wanted, f"{alone:.0f} MiB with one letter")
    has_shovel = shovel_is_there(broker, management)
    other = "the dynamic shovel" if has_shovel else "a plain loop of py-amqp"
    parts: list[tuple[float, float]] = []

    def replay(mode: str) -> float:
        fill_rabbitmq(dead, count)
        if mode == "library":
            return count / timed(lambda: exhausted(dead.replay(queue=QUEUE), count))[0]
        if mode != "engine":
            return shovel(management, url, count) if has_shovel and management else loop(url, count)
        parts.append(engine_seconds(dead, count))
        return count / sum(parts[-1])

    found = turns(rounds, ["engine", "library", other], replay, "rabbitmq replay in letters/s")
    report_engine(table, "rabbitmq", count, *(statistics.median(part) for part in zip(*parts, strict=True)))
    table.add(f"rabbitmq: {other}", statistics.median(found[other]), "letters/s")
    wanted = WANTED["shovel" if has_shovel else "loop"]
    table.add("rabbitmq: replay by DeadLetters.replay", ratio(found, "library", other), f"÷ {other}", wanted)
    table.add("rabbitmq: replay by the engine, selecting included", ratio(found, "engine", other), f"÷ {other}", wanted)
    found["sending"] = [count / sending for _, sending in parts]
    table.add("rabbitmq: replay by the engine, sending alone", ratio(found, "sending", other), f"÷ {other}")
    fill_rabbitmq(dead, RATED)
    report_rate(table, "rabbitmq", dead)
    dead.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--letters", type=int, default=100_000)
    parser.add_argument(
        "--rounds", type=int, default=1, help="of replaying on RabbitMQ, in turns with what it is compared to"
    )
    parser.add_argument("--only", choices=["redis", "rabbitmq"])
    options = parser.parse_args()
    table = Table()
    logging.getLogger("amqp").setLevel(logging.ERROR)  # what the broker still sends while a channel closes
    with tempfile.TemporaryDirectory() as home:
        os.environ["CELERY_DLX_STATE"] = str(Path(home) / "state")
        if options.only in (None, "redis"):
            with private("redis") as broker:
                measure_redis(broker.url, options.letters, table)
        if options.only in (None, "rabbitmq"):
            with private("rabbitmq") as broker:
                measure_rabbitmq(broker, options.letters, options.rounds, table)
    table.print()


if __name__ == "__main__":
    main()
