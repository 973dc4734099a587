"""What `topology plan` and `apply` cost over many live queues.

python benchmarks/topology.py --broker amqp://… --management http://… [--queues 100]

Seconds of one run; requests are counted for a tenth of the queues too: their number must not grow.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from uuid import uuid4

from celery import Celery
from kombu import Connection

from celery_dlx import DeadLetters
from celery_dlx.policy.settings import Policy


def measure(broker: str, management: str, count: int) -> list[tuple[str, float, int]]:
    run = f"bench{uuid4().hex[:8]}"
    names = [f"{run}.{number}" for number in range(count)]
    with Connection(broker) as connection:
        for name in names:
            connection.default_channel.queue_declare(name, durable=True, auto_delete=False)
    policy = Policy(management_url=management, queues={f"{run}.*": {}}, exchange=f"{run}.dlx")
    dead = DeadLetters(Celery("bench", broker=broker, set_as_current=False), policy=policy)
    rows = []
    with closing(dead.topology) as topology:

        def timed(label: str, step):
            before, start = topology.management.requests, time.monotonic()
            outcome = step()
            rows.append((label, time.monotonic() - start, topology.management.requests - before))
            return outcome

        plan, live, queues = timed("plan, nothing there", topology.plan)
        failures = timed("apply", lambda: [failure for _, failure in topology.apply(plan, live) if failure])
        again, live, queues = timed("plan, all in line", topology.plan)
        assert not failures and again.in_line and len(queues) == count, (failures[:3], again.steps[:3], len(queues))
        for queue in queues:
            topology.management.delete("policies", "/", f"celery-dlx.{queue}")
    with Connection(broker) as connection:
        for name in names:
            connection.default_channel.queue_delete(name)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--broker", required=True)
    parser.add_argument("--management", required=True)
    parser.add_argument("--queues", type=int, default=100)
    options = parser.parse_args()
    print(f"{'queues':>6}  {'step':22}{'seconds':>8}  requests")
    for count in (options.queues // 10, options.queues):
        for label, seconds, requests in measure(options.broker, options.management, count):
            print(f"{count:6}  {label:22}{seconds:8.2f}  {requests}")


if __name__ == "__main__":
    main()
