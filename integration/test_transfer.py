"""Export and import: byte for byte, under the same ids, all or nothing."""

from __future__ import annotations

import gzip
import json

import pytest
from raw import Sender
from workers import Worker


@pytest.fixture
def worker(broker, queue):
    with Worker(broker.url, [queue], policy="version: 1\n") as it:
        sender = Sender(broker.url)
        sender.task(queue, "matrix_app.fail", ["first"])
        sender.task(queue, "matrix_app.fail", ["second"], body=b'[["\xc3\xbc", 1.50], {}, {}]')
        sender.task(queue, "matrix_app.no_such_task", content_type="application/x-nobody", body=b"\x00\xff\xfe")
        it.wait_letters(queue, 3)
    return it


def whole(worker: Worker, queue: str) -> dict[str, tuple]:
    """All that a letter is."""
    found = {}
    for letter in list(worker.dead.letters(queue)):
        letter = worker.dead.get(letter.id, queue)
        found[letter.id] = (
            letter.as_dict(),
            letter.original.body,
            letter.original.headers,
            dict(letter.original.properties),
        )
    return found


@pytest.mark.parametrize("name", ["letters.jsonl", "letters.jsonl.gz"])
def test_what_is_exported_comes_back_as_it_was(worker, queue, tmp_path, name):
    before = whole(worker, queue)
    file = tmp_path / name
    worker.cli("export", queue, str(file))
    assert file.stat().st_mode & 0o777 == 0o600
    data = gzip.decompress(file.read_bytes()) if name.endswith(".gz") else file.read_bytes()
    assert [json.loads(line)["id"] for line in data.splitlines()] == list(before)
    worker.cli("purge", queue, "--yes")
    assert whole(worker, queue) == {}
    (done,) = worker.json("import", str(file))
    assert (done["restored"], done["present"]) == (3, 0)
    assert whole(worker, queue) == before
    (done,) = worker.json("import", str(file))
    assert (done["restored"], done["present"]) == (0, 3), "once is enough"
    assert whole(worker, queue) == before


def test_a_selection_to_standard_output(worker, queue):
    done = worker.cli("export", queue, "-", "--reason", "failure", "--limit", "1")
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["queue"] == queue


def test_what_is_no_export_is_refused_with_its_line(worker, queue, tmp_path):
    file = tmp_path / "letters.jsonl"
    worker.cli("export", queue, str(file))
    good = file.read_text().splitlines()
    for bad, words in (
        ("{}", "expected an exported letter"),
        ("garbage", "expected an exported letter"),
        (json.dumps({**json.loads(good[0]), "broker": "elsewhere"}), "was exported from elsewhere"),
        (json.dumps({**json.loads(good[0]), "id": "0" * 32, "body": "%%%"}), "not as it was exported"),
    ):
        file.write_text("\n".join([good[0], bad]))
        done = worker.cli("import", str(file), check=False)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1
    (tmp_path / "cut.gz").write_bytes(gzip.compress(good[0].encode())[:-9])
    assert worker.cli("import", str(tmp_path / "cut.gz"), check=False).returncode == 2
    assert len(whole(worker, queue)) == 3
