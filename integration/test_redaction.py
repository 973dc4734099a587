"""What nobody should read, on each broker: not shown, not stored, and not executed blank."""

from __future__ import annotations

import json

import pytest
import redis
from raw import Sender
from servers import wait_for
from workers import Worker

SECRET = "4111-1111-secret"


@pytest.mark.parametrize("late", ["true", "false"])
def test_secrets_are_neither_shown_nor_stored(broker, queue, tmp_path, late):
    there = tmp_path / "there"
    there.touch()
    section = "{redact: ['args[1]'], redact_stored: true}"
    policy = f"version: 1\nqueues: {{{queue}: {{acks_late: {late}, dead_letter: {section}}}}}\n"
    with Worker(broker.url, [queue], policy=policy) as worker:
        arguments = ["/nowhere", SECRET]
        Sender(broker.url).task(queue, "matrix_app.fail_until", arguments, argsrepr=repr(arguments))
        (letter,) = worker.wait_letters(queue, 1)
        for command in (
            ["list", queue],
            ["list", queue, "--json"],
            ["show", letter["id"]],
            ["show", letter["id"], "--json"],
        ):
            text = worker.cli(*command).stdout
            assert SECRET not in text and ("[redacted]" in text or command == ["list", queue]), command
        stored = worker.dead.get(letter["id"])
        assert SECRET not in repr(stored) and stored.redacted == ["args[1]"]
        assert json.loads(stored.original.body)[0] == ["/nowhere", "[redacted]"]
        if broker.kind == "redis":
            with redis.Redis.from_url(broker.url) as client:
                held = [client.hgetall(f"dlx:{{{queue}.dlq}}:{part}") for part in ("payloads", "records")]
                assert SECRET not in repr(held) and not any(queue.encode() in entry for entry in client.hvals("unacked"))
        done = worker.cli("replay", letter["id"], "--yes", check=False)
        assert done.returncode == 1 and "args[1] were blanked" in done.stderr and "--edit" in done.stderr
        give = [
            {"op": "replace", "path": "/args/1", "value": "given"},
            {"op": "replace", "path": "/args/0", "value": str(there)},
        ]
        done = worker.cli("replay", letter["id"], "--edit", json.dumps(give), "--yes", "--json", "--wait", "60s")
        assert json.loads(done.stdout.splitlines()[-1])["succeeded"] == 1
        wait_for(lambda: "fail_until given" in worker.ran(), worker.ran)


def test_what_is_only_hidden_is_replayed_as_it_was(broker, queue):
    policy = f"version: 1\nqueues: {{{queue}: {{dead_letter: {{redact: ['args[1]']}}}}}}\n"
    with Worker(broker.url, [queue], policy=policy) as worker:
        Sender(broker.url).task(queue, "matrix_app.fail_until", ["/nowhere", SECRET], argsrepr=repr(["/nowhere", SECRET]))
        (letter,) = worker.wait_letters(queue, 1)
        assert SECRET not in worker.cli("show", letter["id"], "--json").stdout + worker.cli("list", queue, "--json").stdout
        assert json.loads(worker.dead.get(letter["id"]).original.body)[0] == ["/nowhere", SECRET]
        assert worker.cli("replay", letter["id"], "--yes").returncode == 0
        wait_for(lambda: worker.ran().count(f"fail_until {SECRET}") == 2, worker.ran)
