"""Every row of the matrix, on real workers: exactly one dead letter with its reason, and the worker survives them all."""

from __future__ import annotations

from uuid import uuid4

import pytest
from raw import Sender
from rows import ROWS, policy, rows_for
from servers import wait_for
from workers import Worker

#: Pool and its arguments.
POOLS = {
    "prefork": ("-c", "2"),
    "solo": ("-P", "solo"),
    "threads": ("-P", "threads", "-c", "2"),
    "gevent": ("-P", "gevent", "-c", "4"),
}


class Run:
    """One worker that got every row, each on a queue of its own."""

    def __init__(self, broker, pool: str, late: bool) -> None:
        self.rows = rows_for(broker.kind, pool)
        self.late = late
        self.name = f"{pool}{'late' if late else 'early'}{uuid4().hex[:6]}"
        self.queues = {row: row.queue(self.name) for row in self.rows}
        self.worker = Worker(
            broker.url,
            list(self.queues.values()),
            policy=policy(self.name),
            arguments=POOLS[pool],
            DLX_LATE=str(int(late)),
        ).start()
        self.pid = self.worker.process.pid
        sender = Sender(broker.url)
        for row in self.rows:
            row.send(sender, self.queues[row])
        self.letters: dict[str, list[dict]] = {}
        self.expected = {queue for row, queue in self.queues.items() if row.expected(late)}
        try:
            wait_for(self._collect, self._missing, timeout=180, every=1.0)
            # What is to leave no letter has had its time too: the last message in is done.
            sender.task(f"{self.name}.ok", "matrix_app.ok", ["last"])
            wait_for(lambda: "ok last" in self.worker.ran(), "the last task ran")
        except AssertionError as exc:
            self.failure: str | None = str(exc)
        else:
            self.failure = None
        self._collect()
        self.survived = self.worker.alive and self.worker.output.count(" ready.") == 1
        self.exit = self.worker.stop()

    def _collect(self) -> bool:
        found: dict[str, list[dict]] = {}
        for letter in self.worker.letters():
            found.setdefault(letter["queue"], []).append(letter)
        self.letters = {queue: found.get(queue, []) for queue in self.queues.values()}
        return all(self.letters[queue] for queue in self.expected)

    def _missing(self) -> str:
        missing = sorted(queue for queue in self.expected if not self.letters[queue])
        return f"letters of {missing}; the worker's log:\n{self.worker.output[-4000:]}"


_runs: dict[tuple, Run] = {}


@pytest.fixture(scope="module")
def run(request, broker):
    pool, late = request.param
    key = (broker.kind, pool, late)
    if key not in _runs:
        _runs[key] = Run(broker, pool, late)
    return _runs[key]


MODES = [(pool, late) for pool in POOLS for late in (False, True)]
IDS = [f"{pool}-{'late' if late else 'early'}" for pool, late in MODES]


@pytest.mark.parametrize("run", MODES, ids=IDS, indirect=True)
def test_worker_survives_every_message(run):
    assert run.survived, run.worker.output[-5000:]
    assert run.exit == 0


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("run", MODES, ids=IDS, indirect=True)
def test_row(run, row):
    if row not in run.rows:
        return  # cannot happen on this broker or pool (see `Row.only` and `Row.prefork`)
    queue = run.queues[row]
    letters = run.letters[queue]
    expected = row.expected(run.late)
    assert [letter["reason"] for letter in letters] == ([expected] if expected else []), run.failure
    for letter in letters:
        assert letter["dlq"] == f"{queue}.dlq"
        assert letter["service"] == "matrix"
        assert letter["worker"]
        assert letter["fingerprint"].startswith("1-")
        assert len(letter["id"]) == 32
