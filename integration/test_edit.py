"""Arguments that are corrected on the way back, on each broker."""

from __future__ import annotations

import base64
import json

from raw import Sender
from servers import wait_for
from workers import Worker


def test_a_wrong_argument_is_corrected(broker, queue, tmp_path):
    there = tmp_path / "there"
    there.touch()
    right = json.dumps([{"op": "replace", "path": "/args/0", "value": str(there)}])
    with Worker(broker.url, [queue], policy=f"version: 1\nqueues: {{{queue}: {{acks_late: true}}}}\n") as worker:
        body = b'[["/nowhere", "\\u00fc"], {}, {"callbacks": null}]'
        Sender(broker.url).task(queue, "matrix_app.fail_until", body=body)
        (letter,) = worker.wait_letters(queue, 1)
        for wrong, words in (
            ('[{"op": "remove", "path": "/args/7"}]', "does not fit"),
            ('[{"op": "add", "path": "/kwargs/nonsense", "value": 1}]', "arguments do not fit"),  # the task's signature
            ("nonsense", "expected a JSON Patch"),
            ("@/no/such/file", "cannot be read"),
        ):
            done = worker.cli("replay", letter["id"], "--edit", wrong, "--yes", check=False)
            assert done.returncode in (1, 2) and words in done.stderr and "Traceback" not in done.stderr, done.stderr
        insisted = '[{"op": "remove", "path": "/args/7"}]'
        done = worker.cli("replay", letter["id"], "--edit", insisted, "--no-preflight", "--yes", "--json", check=False)
        assert done.returncode == 1 and '"left": 1' in done.stdout, done.stdout + done.stderr
        assert [each["id"] for each in worker.letters(queue)] == [letter["id"]], "nothing left its DLQ"
        assert worker.dead.get(letter["id"]).original.body == body

        # Still wrong: it dies again, and both deaths are told.
        patch = tmp_path / "patch.json"
        patch.write_text('[{"op": "replace", "path": "/args/1", "value": "again"}]')
        done = worker.cli("replay", letter["id"], "--edit", f"@{patch}", "--yes", "--json", "--wait", "60s")
        assert json.loads(done.stdout.splitlines()[-1])["failed_again"] == 1
        (again,) = worker.wait_letters(queue, 1)
        shown = json.loads(worker.cli("show", again["id"], "--json").stdout)
        assert json.loads(shown["body"])[0] == ["/nowhere", "again"] and again["args"] == "['/nowhere', 'again']"
        assert [death["id"] for death in shown["deaths"]] == [letter["id"]]
        (journal,) = [path for path in worker.home.glob("state/replays/*.jsonl") if '"succeeded"' not in path.read_text()
                      and '"kind": "edited"' in path.read_text()]  # fmt: skip
        (edited,) = [json.loads(line) for line in journal.read_text().splitlines() if '"kind": "edited"' in line]
        assert base64.b64decode(edited["body"]) == body, "what the producer sent can be read in the journal"

        done = worker.cli("replay", again["id"], "--edit", right, "--yes", "--json", "--wait", "60s")
        assert json.loads(done.stdout.splitlines()[-1])["succeeded"] == 1, done.stdout
        assert '"arguments edited"' in done.stdout
        wait_for(lambda: "fail_until again" in worker.ran(), worker.ran)
        assert worker.letters(queue) == []
