"""What `topology plan` and `apply` cost over many live queues.

python benchmarks/topology.py --broker amqp://… --management http://… [--queues 100]

Starts nothing: give it a broker that has nothing else to do, for RabbitMQ matches each queue with each policy whenever one
is set. So the same policies are also set by the broker's own import of definitions. Requests are counted for a tenth of
the queues too: their number must not grow.
"""

from __future__ import annotations

import argparse
import base64
import json
import time
import urllib.request
from contextlib import closing
from urllib.parse import urlsplit
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
        ours = [f"celery-dlx.{queue}" for queue in queues]
        policies = [each for each in topology.management.get("policies", "/") if each["name"] in ours]
        for name in ours:
            topology.management.delete("policies", "/", name)
        timed("the broker's own import", lambda: import_policies(broker, management, policies))
        for name in ours:
            topology.management.delete("policies", "/", name)
    with Connection(broker) as connection:
        for name in names:
            connection.default_channel.queue_delete(name)
    return rows


def import_policies(broker: str, management: str, policies: list[dict]) -> None:
    """What an operator would do with a file of definitions."""
    address = urlsplit(broker)
    request = urllib.request.Request(
        f"{management}/api/definitions/%2F", json.dumps({"policies": policies}).encode(), method="POST"
    )
    login = base64.b64encode(f"{address.username}:{address.password}".encode()).decode()
    request.add_header("Authorization", f"Basic {login}")
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=1_800):
        pass


def measure_new(broker: str, management: str, count: int) -> list[tuple[str, float, int]]:
    """Queues that are not there yet: their workers will declare them with dead-letter arguments."""
    run = f"bench{uuid4().hex[:8]}"
    names = [f"{run}.{number}" for number in range(count)]
    policy = Policy(management_url=management, queues={name: {} for name in names}, exchange=f"{run}.dlx")
    app = Celery("bench", broker=broker, set_as_current=False)
    app.conf.task_default_queue = names[0]
    dead = DeadLetters(app, policy=policy)
    with closing(dead.topology) as topology:
        before, start = topology.management.requests, time.monotonic()
        plan, live, _ = topology.plan()
        failures = [failure for _, failure in topology.apply(plan, live) if failure]
        row = ("plan and apply, new ones", time.monotonic() - start, topology.management.requests - before)
        assert not failures, failures[:3]
    with Connection(broker) as connection:
        for name in names:
            connection.default_channel.queue_delete(f"{name}.dlq")
        connection.default_channel.exchange_delete(f"{run}.dlx")
    return [row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--broker", required=True)
    parser.add_argument("--management", required=True)
    parser.add_argument("--queues", type=int, default=100)
    options = parser.parse_args()
    print(f"{'queues':>6}  {'step':26}{'seconds':>8}  requests")
    for count in (options.queues // 10, options.queues):
        for step in (measure_new, measure):
            for label, seconds, requests in step(options.broker, options.management, count):
                print(f"{count:6}  {label:26}{seconds:8.2f}  {requests}", flush=True)


if __name__ == "__main__":
    main()
