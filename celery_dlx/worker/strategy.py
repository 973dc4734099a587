"""One strategy per task and queue: the same task with the settings of the queue it came through.

Each strategy is built by the task's own `Strategy` from a view of the task, so that rate limits, ETAs, signals and the
user's custom strategies and requests keep working; nothing of Celery's is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery.exceptions import InvalidTaskError
from celery.local import Proxy
from celery.utils.imports import instantiate, symbol_by_name

from celery_dlx.brokers.base import delivery_of
from celery_dlx.policy.settings import QueueSettings
from celery_dlx.worker.net import Net
from celery_dlx.worker.request import DeadLetterRequest

#: Stands for "this is the end": no redelivery, whatever the task's own flags say.
FINAL = {
    "acks_on_failure_or_timeout": True,
    "acks_on_failure": True,
    "acks_on_timeout": True,
    "reject_on_worker_lost": False,
}


def view(task: Any, overrides: Mapping[str, Any]) -> Any:
    """A stand-in for a task with some attributes replaced.

    A `Proxy`, because Celery's signals match a receiver's `sender=task` through one.
    """
    return type("TaskView", (Proxy,), dict(overrides))(lambda: task)


def overrides_of(settings: QueueSettings) -> dict[str, Any]:
    """The task attributes that a queue's settings replace."""
    names = ("acks_late", "reject_on_worker_lost", "time_limit", "soft_time_limit")
    return {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}


class Strategies(dict[str, Any]):
    """Takes the place of `Consumer.strategies`: every strategy that Celery puts in gets a dispatcher around it."""

    def __init__(self, consumer: Any, net: Net, service: str | None) -> None:
        super().__init__()
        self._consumer, self._net, self._service = consumer, net, service

    def __setitem__(self, name: str, strategy: Any) -> None:
        task = self._consumer.app.tasks.get(name)
        if task is not None:
            strategy = Dispatcher(task, strategy, self._consumer, self._net, self._service)
        super().__setitem__(name, strategy)


class Dispatcher:
    """Hands each message of one task to the strategy of its queue."""

    def __init__(self, task: Any, plain: Any, consumer: Any, net: Net, service: str | None) -> None:
        self._task, self._plain, self._consumer = task, plain, consumer
        self._net, self._service = net, service
        self._by_queue: dict[str, Any] = {}

    def __call__(self, message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **kwargs: Any) -> Any:
        delivery = delivery_of(message)
        if delivery is None:
            return self._plain(message, body, ack, reject, callbacks, **kwargs)
        check_message(message, body)
        strategy = self._by_queue.get(delivery.queue)
        if strategy is None:
            strategy = self._by_queue[delivery.queue] = self._strategy(delivery.settings)
        return strategy(message, body, ack, reject, callbacks, **kwargs)

    def _strategy(self, settings: QueueSettings) -> Any:
        task, overrides = self._task, overrides_of(settings)
        base = symbol_by_name(task.Request)
        attributes = {"net": self._net, "service": self._service}
        request = type("DeadLetterRequest", (DeadLetterRequest, base), attributes)
        overrides["Request"] = request
        request.final_task = view(task, {**overrides, **FINAL})  # type: ignore[attr-defined]
        return instantiate(task.Strategy, view(task, overrides), self._consumer.app, self._consumer)


def check_message(message: Any, body: Any) -> None:
    """Refuse what would end the worker, or pass silently as success, further on.

    Raises:
        InvalidTaskError: what was expected and what was found.
        Exception: what kombu raises for a body it cannot decode.
    """
    payload = message.payload
    if body is not None or (isinstance(payload, Mapping) and "args" in payload):
        _check_protocol_1(payload)
        return
    headers = message.headers
    _check_id(headers)
    if not isinstance(payload, (list, tuple)) or len(payload) != 3:
        raise InvalidTaskError(f"expected a body of [args, kwargs, embed], found {type(payload).__name__}")
    args, kwargs, embed = payload
    _check_arguments(args, kwargs)
    if embed is not None and not isinstance(embed, Mapping):
        raise InvalidTaskError(f"expected embed to be a mapping, found {type(embed).__name__}")
    _check_numbers(headers)


def _check_numbers(source: Mapping[str, Any]) -> None:
    limits = source.get("timelimit")
    if limits and not (
        isinstance(limits, (list, tuple)) and len(limits) == 2 and all(_is_number_or_none(limit) for limit in limits)
    ):
        raise InvalidTaskError(f"expected timelimit to be two numbers, found {limits!r:.100}")
    if not _is_number_or_none(source.get("retries")):
        raise InvalidTaskError(f"expected retries to be a number, found {source.get('retries')!r:.100}")


def _check_protocol_1(payload: Any) -> None:
    if not isinstance(payload, Mapping):
        raise InvalidTaskError(f"expected a mapping as body, found {type(payload).__name__}")
    _check_id(payload)
    _check_arguments(payload.get("args") or (), payload.get("kwargs") or {})
    _check_numbers(payload)


def _check_id(source: Mapping[str, Any]) -> None:
    if not isinstance(source.get("id"), str):
        raise InvalidTaskError(f"expected an id, found {source.get('id')!r:.100}")


def _check_arguments(args: Any, kwargs: Any) -> None:
    if not isinstance(args, (list, tuple)):
        raise InvalidTaskError(f"expected args to be a list, found {type(args).__name__}")
    if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
        raise InvalidTaskError(f"expected kwargs to be a mapping with text keys, found {type(kwargs).__name__}")


def _is_number_or_none(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
