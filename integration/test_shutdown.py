"""Workers that stop, in every way there is: nothing is lost, and nothing that was merely interrupted becomes a letter."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import pytest
from faults.proxy import Proxy
from raw import Sender
from servers import wait_for
from workers import Worker

MESSAGES = 60


def policy(queue, late):
    return f"version: 1\nqueues: {{{queue}: {{acks_late: {'true' if late else 'false'}}}}}\n"


def send(broker, queue):
    """Short tasks, and some that a stop interrupts."""
    sender = Sender(broker.url)
    for number in range(MESSAGES):
        sender.task(queue, "matrix_app.naps", [str(number), 0.3 if number % 5 == 0 else 0.0])


def counted(*workers):
    return Counter(line for worker in workers for line in worker.ran() if not line.startswith("began "))


def naps_after(worker, line):
    """Whether what it did last is to begin a task that takes its time, not before this line."""
    ran = worker.ran()
    return line in ran and ran[-1].startswith("began ")


def is_idle(process):
    """Whether a process waits for something to happen."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


@pytest.mark.parametrize(("how", "late"), [("warm", True), ("warm", False), ("soft", True), ("cold", True)])
def test_what_a_stopped_worker_left_another_one_does(broker, queue, late, how):
    # A cold stop that arrives while Celery's parent reads a result (it acts in the signal handler) takes half a minute or
    # more, with or without us: so one child, and in the midst of a task.
    children, soft = "2" if how == "warm" else "1", "2" if how == "soft" else "0"
    first = Worker(broker.url, [queue], policy=policy(queue, late), arguments=("-c", children), DLX_SOFT=soft).start()
    send(broker, queue)
    wait_for(lambda: naps_after(first, "began 10") and is_idle(first.process), first.ran, every=0.01)
    first.process.send_signal(signal.SIGTERM if how == "warm" else signal.SIGQUIT)
    first.wait_exit(120)
    done = counted(first)
    assert 8 <= len(done) < MESSAGES, "it was stopped in the midst of it"
    with Worker(broker.url, [queue], policy=policy(queue, late)) as second:
        wait_for(lambda: len(counted(first, second)) == MESSAGES, lambda: len(counted(first, second)))
        Sender(broker.url).task(queue, "matrix_app.ok", ["the last"])
        wait_for(lambda: "ok the last" in second.ran(), second.ran)
        assert second.letters(queue) == []
    if how == "warm":
        # Celery's pool forgets a task that a child took in the last moment (AsynPool.flush): it is delivered again.
        twice = sum(counted(first, second).values()) - MESSAGES - 1
        assert twice <= 2, "one for each child at most is done twice"


@pytest.mark.parametrize(
    ("arguments", "late"), [(("-c", "2", "--max-tasks-per-child", "3"), True), (("--autoscale", "4,1"), False)]
)
def test_children_that_come_and_go(broker, queue, late, arguments):
    with Worker(broker.url, [queue], policy=policy(queue, late), arguments=arguments) as worker:
        send(broker, queue)
        wait_for(lambda: len(counted(worker)) == MESSAGES, lambda: len(counted(worker)))
        assert worker.letters(queue) == []
    assert set(counted(worker).values()) == {1}


def test_tasks_that_are_cancelled_when_the_connection_is_lost(broker, queue):
    """Celery ends late-acknowledged ones then, for they will be delivered again."""
    base, rest = broker.url.rsplit(":", 1)
    port, path = rest.split("/", 1)
    proxy = Proxy(int(port))
    options = json.dumps({"visibility_timeout": 30} if broker.kind == "redis" else {})
    through, env = f"{base}:{proxy.port}/{path}", {"DLX_CANCEL": "1", "DLX_TRANSPORT_OPTIONS": options}
    try:
        with Worker(through, [queue], policy=policy(queue, True), **env) as worker:
            sender = Sender(broker.url)
            for number in range(6):
                sender.task(queue, "matrix_app.naps", [str(number), 4])
            wait_for(lambda: {"began 0", "began 1"} <= set(worker.ran()), worker.ran)
            proxy.cut()
            wait_for(lambda: len(counted(worker)) == 6, worker.ran, 120)
            ran = Counter(worker.ran())
            assert min(ran["began 0"], ran["began 1"]) > 1, "the fault happened: they were ended, and begun again"
            assert set(counted(worker).values()) == {1} and worker.letters(queue) == []
    finally:
        proxy.close()


def test_a_pool_that_is_restarted_under_load(broker, queue):
    with Worker(broker.url, [queue], policy=policy(queue, True)) as worker:
        send(broker, queue)
        wait_for(lambda: len(worker.ran()) >= 5, lambda: len(worker.ran()), every=0.01)
        worker.dead.app.control.broadcast("pool_restart")
        wait_for(lambda: len(counted(worker)) == MESSAGES, lambda: len(counted(worker)))
        Sender(broker.url).task(queue, "matrix_app.fail", ["afterwards"])
        (letter,) = worker.wait_letters(queue, 1)
        assert letter["args"] == "['afterwards']", "what was interrupted is no letter"
