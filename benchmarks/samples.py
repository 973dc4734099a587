"""Letters as they come: bodies of 1 KiB on average, three causes."""

from __future__ import annotations

import base64
import json
import time
from uuid import uuid4

from celery_dlx.letters import DeadLetter, Death, Original, compose

QUEUE, DLQ = "bench", "bench.dlq"
#: Bytes of a body on average; they go from half of that to one and a half. Were all of one size, that very size would decide
#: what Redis needs: its allocator rounds up, a message of 2,053 bytes to 2,560.
BODY = 1_024
CAUSES = (
    ("shop.tasks.charge", "builtins.ConnectionError", "the payment provider does not answer, order {}", "post"),
    ("shop.tasks.send_receipt", "builtins.ValueError", "order {} has no address", "render"),
    ("billing.tasks.settle", "builtins.KeyError", "'account {}'", "lookup"),
)
_TRACEBACK = """Traceback (most recent call last):
  File "/app/lib/python3.12/site-packages/celery/app/trace.py", line 453, in trace_task
    R = retval = fun(*args, **kwargs)
  File "/app/lib/python3.12/site-packages/celery/app/trace.py", line 736, in __protected_call__
    return self.run(*args, **kwargs)
  File "/app/shop/tasks.py", line 31, in {function}
    return client.{function}(order)
  File "/app/shop/client.py", line 118, in {function}
    raise error
{type}: {message}
"""


def original(number: int) -> Original:
    task, task_id = CAUSES[number % len(CAUSES)][0], str(uuid4())
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    body = json.dumps([[number, ""], {}, embed])
    size = BODY // 2 + number * 7_919 % (BODY + 1)
    body = json.dumps([[number, "x" * (size - len(body))], {}, embed])
    headers = {
        "lang": "py", "task": task, "id": task_id, "root_id": task_id, "parent_id": None, "group": None, "retries": 0,
        "eta": None, "expires": None, "timelimit": [None, None], "argsrepr": f"({number}, …)", "kwargsrepr": "{}",
        "origin": "gen1@shop", "ignore_result": True,
    }  # fmt: skip
    properties = {"correlation_id": task_id, "delivery_mode": 2, "priority": 0}
    properties |= {"content_type": "application/json", "content_encoding": "utf-8"}
    return Original(body.encode(), headers, properties, "", QUEUE)


def item(number: int) -> bytes:
    """The message as it lies in a Redis list."""
    message = original(number)
    properties = {key: message.properties[key] for key in ("correlation_id", "delivery_mode", "priority")}
    properties |= {"delivery_info": {"exchange": "", "routing_key": QUEUE}, "body_encoding": "base64"}
    envelope = {
        "body": base64.b64encode(message.body).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": message.headers,
        "properties": {**properties, "delivery_tag": str(uuid4())},
    }
    return json.dumps(envelope).encode()


def letter(number: int, message: Original) -> DeadLetter:
    _, kind, words, function = CAUSES[number % len(CAUSES)]
    words = words.format(number)
    traceback = _TRACEBACK.format(function=function, type=kind.removeprefix("builtins."), message=words)
    death = Death("failure", QUEUE, int(time.time() * 1000), kind, words, traceback, worker="celery@shop-1")
    return compose(death, message, DLQ)
