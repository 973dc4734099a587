"""Fuzzing: ``make fuzz FUZZ="--messages 20000 --letters 2000 --seed N --only redis"``.

Messages nobody should send go through a real worker, and each that the broker took is accounted for; then letters nobody
should store lie in the DLQ, and every command looks at them. Exit 1 if anything was lost, altered or crashed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4

import amqp
import redis
from kombu import Connection

sys.path.insert(0, str(Path(__file__).parent.parent))

from faults import corpus
from faults.tools import Tools
from raw import Sender
from servers import start_broker, wait_for
from workers import Worker

#: Nothing is executed, dead-lettered or taken for this long, in seconds: the worker is done.
QUIET = 3.0


def digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=12).digest()


@dataclass
class Account:
    """What became of the messages."""

    broker: str
    seed: int
    sent: int = 0
    #: Not taken by the broker, or not to be encoded by the client.
    refused: int = 0
    executed: int = 0
    letters: int = 0
    #: For a time that never comes: in their queue again when the worker has stopped.
    waiting: int = 0
    lost: list[str] = field(default_factory=list)
    #: Letters whose bytes nobody sent.
    altered: list[str] = field(default_factory=list)
    #: Executions and letters of one message beyond the first.
    duplicates: int = 0
    #: What the worker did that it must not.
    worker: list[str] = field(default_factory=list)
    tools: dict[str, str] = field(default_factory=dict)
    exits: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return not (self.lost or self.altered or self.worker or self.tools)

    def as_dict(self) -> dict:
        counts = {"lost": len(self.lost), "altered": len(self.altered), "worker": len(self.worker), "tools": len(self.tools)}
        return {
            **vars(self),
            **counts,
            "exits": dict(self.exits),
            "reasons": dict(self.reasons),
            "seconds": round(self.seconds, 1),
        }


class Fuzz:
    """``messages`` through a worker, and ``letters`` into the DLQ, on one broker."""

    def __init__(self, broker, seed: int, messages: int, letters: int, shown: int = 300) -> None:
        self.broker, self.seed, self.messages, self.letters = broker, seed, messages, letters
        self.account = Account(broker.kind, seed)
        #: RabbitMQ is asked for all letters to show one.
        self.shown = shown if broker.kind == "redis" else min(shown, 10)
        name = f"fuzz{uuid4().hex[:8]}"
        self.early, self.late = f"{name}.early", f"{name}.late"
        self.policy = (
            f"version: 1\ndefaults: {{max_deliveries: 3}}\nqueues:\n  {self.early}: {{}}\n"
            f"  {self.late}: {{acks_late: true, reject_on_worker_lost: true, type: quorum}}\n"
        )
        self.worker = Worker(broker.url, [self.early, self.late], app="faults.fuzz_app", policy=self.policy)
        os.environ["CELERY_DLX_STATE"] = str(self.worker.home / "tools")  # journals of this process's replays
        self.tools = Tools(broker.url, self.policy)
        self._sent: dict[bytes, list[corpus.Message]] = defaultdict(list)
        self._open: amqp.Connection | None = None
        self._client = redis.Redis.from_url(broker.url) if broker.kind == "redis" else None

    def run(self) -> Account:
        began = time.monotonic()
        try:
            with self.worker:
                self._through_the_worker()
            self._judge()
            self.account.seconds = time.monotonic() - began
            print(json.dumps(self.account.as_dict()), flush=True)  # the letters take long
            self._letters()
        finally:
            self.tools.close()
            self._close()
        self.account.tools, self.account.exits = self.tools.faults, self.tools.exits
        self.account.seconds = time.monotonic() - began
        return self.account

    # -- messages

    def _through_the_worker(self) -> None:
        assert self.worker.process is not None
        pid = self.worker.process.pid
        for number in range(self.messages):
            self._send(corpus.make(self.seed, number, self.broker.kind))
        try:
            self._settle()
            for queue in (self.early, self.late):
                Sender(self.broker.url).task(queue, "fuzz.work", ["last"])
            wait_for(
                lambda: self.worker.ran().count("last") == 2 or not self.worker.alive, "healthy tasks are executed", 120
            )
        except AssertionError as exc:
            self.account.worker.append(str(exc)[:500])
        if not self.worker.alive or self.worker.process.pid != pid:
            self.account.worker.append(f"it ended:\n{self.worker.output[-6000:]}")

    def _send(self, message: corpus.Message) -> None:
        queue = self.late if message.late else self.early
        if self._client is not None:
            self._client.lpush(queue, message.as_item())
            data = message.as_item()
        else:
            if not self._publish(queue, message):
                self.account.refused += 1
                return
            data = message.body
        self.account.sent += 1
        self._sent[digest(data)].append(message)

    def _publish(self, queue: str, message: corpus.Message, extra: dict | None = None) -> bool:
        """Whether the broker took it."""
        try:
            if self._open is None:
                kombu = Connection(self.broker.url)
                kombu.connect()
                self._open = kombu.connection
                self._channel = self._open.channel()
            raw = amqp.Message(
                message.body,
                **{"delivery_mode": 2, **message.properties},
                application_headers={**message.headers, **(extra or {})},
            )
            self._channel.basic_publish_confirm(raw, exchange="", routing_key=queue, mandatory=True)
        except Exception:  # noqa: BLE001 - the client's encoder, or the broker's refusal: both are "not sent"
            self._close()
            return False
        return True

    def _close(self) -> None:
        if self._open is not None:
            with contextlib.suppress(Exception):
                self._open.collect()
            self._open = None

    def _settle(self) -> None:
        """Until nothing happens any more."""
        last, since = None, time.monotonic()

        def quiet() -> bool:
            nonlocal last, since
            now = (self._ready(), self.worker.runs.stat().st_size, self._letter_count())
            if now != last:
                last, since = now, time.monotonic()
            return not self.worker.alive or (now[0] == 0 and time.monotonic() - since > QUIET)

        # Not within: an endless loop shows here, too.
        wait_for(quiet, lambda: f"{last} ready, bytes noted, letters; still changing:\n{self.worker.output[-3000:]}",
                 180 + self.messages / 50, every=0.2)  # fmt: skip

    def _ready(self) -> int:
        return sum(self._depth(queue) for queue in (self.early, self.late))

    def _letter_count(self) -> int:
        if self._client is not None:
            return sum(int(self._client.zcard(f"dlx:{{{queue}.dlq}}")) for queue in (self.early, self.late))
        return sum(self._depth(f"{queue}.dlq") for queue in (self.early, self.late))

    def _depth(self, queue: str) -> int:
        if self._client is not None:
            return sum(int(self._client.llen(queue + step)) for step in ("", "\x06\x163", "\x06\x166", "\x06\x169"))
        with Connection(self.broker.url) as connection:
            return connection.default_channel.queue_declare(queue, passive=True).message_count

    # -- what became of them: read past all of our own code

    def _held(self, queue: str, dlq: str) -> tuple[list[bytes], list[bytes]]:
        """Bytes of the messages that wait, and of the letters."""
        if self._client is not None:
            keys = [queue + step for step in ("", "\x06\x163", "\x06\x166", "\x06\x169")]
            waiting = [item for key in keys for item in self._client.lrange(key, 0, -1)]
            unacked = [
                value[1 : value.rindex(b', "", "')] for value in self._client.hvals("unacked") if queue.encode() in value
            ]
            return waiting + unacked, self._client.hvals(f"dlx:{{{dlq}}}:payloads")
        return self._bodies(queue), self._bodies(dlq)

    def _bodies(self, queue: str) -> list[bytes]:
        found = []
        with Connection(self.broker.url) as connection:
            channel = connection.default_channel
            channel.auto_decode = False
            while (raw := channel.basic_get(queue)) is not None:  # all come back when the channel closes
                body = raw.body
                found.append(body.encode("utf-8", "surrogateescape") if isinstance(body, str) else bytes(body))
        return found

    def _judge(self) -> None:
        account = self.account
        ran = Counter(self.worker.ran())
        nameless = ran.pop("?", 0)
        ran.pop("last", None)
        account.executed = sum(ran.values()) + nameless
        account.duplicates += sum(count - 1 for count in ran.values())
        kept: Counter = Counter()
        for queue in (self.early, self.late):
            waiting, letters = self._held(queue, f"{queue}.dlq")
            account.waiting += len(waiting)
            account.letters += len(letters)
            for data in (*waiting, *letters):
                kept[digest(data)] += 1
                if digest(data) not in self._sent:
                    account.altered.append(repr(data[:200]))
        missing: list[str] = []
        for name, group in self._sent.items():
            gone = [message for message in group if str(message.number) not in ran]
            if len(gone) > kept[name]:
                missing += [f"{message.number}: {'+'.join(message.what)}" for message in gone[: len(gone) - kept[name]]]
            account.duplicates += max(kept[name] - len(group), 0)
        account.lost = missing[nameless:] if len(missing) > nameless else []

    # -- letters

    def _letters(self) -> None:
        """Every command over what the worker left, then over what others stored; last, a worker gets it all again."""
        with tempfile.TemporaryDirectory() as folder:
            for queue in (self.early, self.late):
                for spoil in (lambda queue: None, self._spoil):
                    spoil(queue)
                    ids = self._ids(queue)
                    before = self._letter_count()
                    self.tools.all_of(queue, ids[:: max(len(ids) // self.shown, 1)], folder)
                    # On RabbitMQ letters with one id, which anybody can write, are taken for one: docs/guarantees.md.
                    if self._client is not None and self._letter_count() != before:
                        self.tools.faults["export, discard, import"] = f"{before} letters became {self._letter_count()}"
                self._import_spoilt(folder)
            with self.worker:
                for queue in (self.early, self.late):
                    self.tools.run("replay", queue, "--all", "--yes", "--wait", "0s", "--limit", "50", "--json")
                    self.tools.run("replay", queue, "--all", "--yes", "--wait", "0s", "--no-preflight")
                    # Of a canary that is garbage nobody reports: a minute's wait.
                    canary = ["--canary", "1"] * (self.messages > 1_000)
                    self.tools.run("replay", queue, "--all", "--yes", "--wait", "1s", "--no-preflight", "--json", *canary)
                try:
                    self._settle()
                except AssertionError as exc:
                    self.account.worker.append(f"after a replay: {str(exc)[:500]}")
                if not self.worker.alive:
                    self.account.worker.append(f"it ended after a replay:\n{self.worker.output[-6000:]}")
            for queue in (self.early, self.late):
                self.tools.run("groups", queue, "--json")
                self.tools.run("discard", queue, "--all", "--yes")
                self.tools.run("purge", queue, "--yes")

    def _ids(self, queue: str) -> list[str]:
        if self._client is not None:
            return [
                member.decode("utf-8", "surrogateescape") for member in self._client.zrange(f"dlx:{{{queue}.dlq}}", 0, -1)
            ]
        found = []
        for text in self.tools.run("list", queue, "--json").splitlines():
            with contextlib.suppress(ValueError, KeyError):
                letter = json.loads(text)
                self.account.reasons[str(letter["reason"])[:40]] += 1
                found.append(str(letter["id"]))
        return found

    def _spoil(self, queue: str) -> None:
        for number in range(self.letters // 2):
            chance = random.Random(f"{self.seed}/spoil/{number}")
            if self._client is None:
                message = corpus.make(self.seed + 1, number, "rabbitmq")
                extra = {"x-celery-dlx": corpus.record(chance)} if chance.random() < 0.7 else {}
                if chance.random() < 0.5:
                    extra["x-death"] = corpus.deaths(chance)
                self._publish(f"{queue}.dlq", message, extra)
                continue
            letter, base = corpus.stored(self.seed, number), f"dlx:{{{queue}.dlq}}"
            self._client.zadd(base, {letter.member: letter.score})
            if letter.record is not None:
                self._client.hset(f"{base}:records", letter.member, letter.record)
            if letter.payload is not None:
                self._client.hset(f"{base}:payloads", letter.member, letter.payload)
        if self._client is not None:
            self._client.hset(f"dlx:{{{queue}.dlq}}:stats", mapping={b"\xff": b"x", b"captured": b"1.5", b"": b""})
            self._client.hset("dlx:queues", b"\xff\xfe", b"\xff")

    def _import_spoilt(self, folder: str) -> None:
        """An export in which one value of each line is another."""
        lines = Path(folder, "letters.jsonl")
        if not lines.exists():
            return
        path = Path(folder, "spoilt.jsonl")
        for number, text in enumerate(lines.read_text().splitlines()[: self.letters // 4]):
            chance = random.Random(f"{self.seed}/import/{number}")
            line = json.loads(text)
            line[chance.choice(list(line))] = corpus.wild(chance)
            data = corpus.dumps(line)
            if chance.random() < 0.2:
                data = data[: chance.randrange(len(data))]
            path.write_bytes(data + b"\n")
            self.tools.run("import", str(path))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--letters", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--only", choices=["rabbitmq", "redis"])
    options = parser.parse_args()
    good = True
    for kind in [options.only] if options.only else ["rabbitmq", "redis"]:
        broker = start_broker(kind)
        try:
            account = Fuzz(broker, options.seed, options.messages, options.letters).run()
        finally:
            broker.stop()
        for fault in [*account.lost[:20], *account.altered[:20], *account.worker, *account.tools.values(), *account.tools]:
            print(fault, flush=True)
        print(json.dumps(account.as_dict()), flush=True)
        good = good and account.good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
