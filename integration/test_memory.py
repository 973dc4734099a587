"""Large letters: a tool that sends them back or deletes them holds a part of them only."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from celery import Celery

from celery_dlx import DeadLetters
from celery_dlx.brokers.rabbitmq.letters import at_rest, exported
from celery_dlx.letters import Death, Original, compose
from celery_dlx.policy.settings import Policy

LETTERS, SIZE = 160, 2_000_000
#: MiB; all of the letters are 305, and a process without any takes 60.
MOST = 270

#: Prints how many letters went, and the process's peak in MiB.
TOOL = """
import json, resource, sys
from celery import Celery
from celery_dlx import DeadLetters
from celery_dlx.policy.settings import Policy
dead = DeadLetters(Celery("memory", broker=sys.argv[1]), policy=Policy())
count = sum(1 for _ in getattr(dead, sys.argv[3])(queue=sys.argv[2]))
print(json.dumps([count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


@pytest.mark.parametrize("step", ["replay", "discard"])
def test_large_letters_are_held_a_few_at_a_time(rabbitmq, queue, step):
    app = Celery("memory", broker=rabbitmq.url, set_as_current=False)
    app.conf.task_default_queue = queue
    dead = DeadLetters(app, policy=Policy())
    with app.connection_for_write() as connection:
        connection.default_channel.queue_declare(queue, durable=True, auto_delete=False)

    def line(number: int) -> dict:
        original = Original(bytes([number]) * SIZE, {"task": "t", "id": str(number)}, {"delivery_mode": 2}, "", queue)
        letter = compose(Death("failure", queue, number), original, f"{queue}.dlq")
        return exported(at_rest(letter, "guest"), letter, queue)

    for start in range(0, LETTERS, 20):  # not all of them in our own memory
        dead.restore(line(number) for number in range(start, start + 20))
    command = [sys.executable, "-c", TOOL, rabbitmq.url, queue, step]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done
    count, peak = json.loads(done.stdout)
    assert count == LETTERS
    assert peak < MOST, peak
    assert [stats.letters for stats in dead.stats(queue)] == [0]
    with app.connection_for_write() as connection:
        found = connection.default_channel.queue_declare(queue, passive=True).message_count
        assert found == (LETTERS if step == "replay" else 0)
        connection.default_channel.queue_delete(queue)
    dead.close()
