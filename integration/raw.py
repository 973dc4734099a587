"""Puts messages of any shape on a queue, past every producer's good manners."""

from __future__ import annotations

import base64
import json
from uuid import uuid4

import amqp
import redis
from kombu import Connection

_DEFAULT = object()


class Sender:
    """Publishes raw messages; ``headers``, ``body`` and ``properties`` may be anything."""

    def __init__(self, broker: str, prefix: str = "") -> None:
        self.broker, self.prefix = broker, prefix

    @property
    def is_redis(self) -> bool:
        return self.broker.startswith("redis")

    def task(
        self,
        queue: str,
        name: object = "matrix_app.ok",
        args: object = (),
        kwargs: object = _DEFAULT,
        *,
        body: bytes | None = None,
        content_type: str | None = "application/json",
        encoding: str | None = "utf-8",
        drop: tuple[str, ...] = (),
        properties: dict | None = None,
        **headers: object,
    ) -> str:
        """A protocol 2 message with parts replaced (``headers``) or left out (``drop``); returns its id."""
        task_id = str(uuid4())
        all_headers = {
            "lang": "py",
            "task": name,
            "id": task_id,
            "root_id": task_id,
            "parent_id": None,
            "retries": 0,
            "argsrepr": repr(args),
            "kwargsrepr": "{}",
            "eta": None,
            "expires": None,
            "timelimit": [None, None],
            **headers,
        }
        for key in drop:
            all_headers.pop(key, None)
        if body is None:
            embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
            body = json.dumps([args, {} if kwargs is _DEFAULT else kwargs, embed]).encode()
        self.message(queue, body, all_headers, content_type, encoding, {"correlation_id": task_id, **(properties or {})})
        return task_id

    def message(
        self, queue: str, body: bytes, headers: object, content_type: str | None, encoding: str | None, properties: dict
    ) -> None:
        if self.is_redis:
            envelope = {
                "body": base64.b64encode(body).decode(),
                "content-encoding": encoding,
                "content-type": content_type,
                "headers": headers,
                "properties": {
                    "delivery_info": {"exchange": "", "routing_key": queue},
                    "priority": 0,
                    "body_encoding": "base64",
                    "delivery_tag": str(uuid4()),
                    **properties,
                },
            }
            self.item(queue, json.dumps(envelope).encode())
            return
        with Connection(self.broker) as connection:
            message = amqp.Message(
                body,
                application_headers=headers,
                content_type=content_type,
                content_encoding=encoding,
                delivery_mode=2,
                **properties,
            )
            connection.default_channel.basic_publish_confirm(message, exchange="", routing_key=queue, mandatory=True)

    def item(self, queue: str, item: bytes) -> None:
        """Push bytes onto a Redis list, as they are."""
        with redis.Redis.from_url(self.broker) as client:
            client.lpush(self.prefix + queue, item)
