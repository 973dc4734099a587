"""Messages that never become a request: undecodable, malformed, unregistered, poison."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from celery import signals
from celery.app.task import Context
from celery.exceptions import NotRegistered, TaskRevokedError
from celery.worker import state
from kombu.exceptions import ContentDisallowed

from celery_dlx.brokers.base import Delivery, delivery_of
from celery_dlx.letters import Reason
from celery_dlx.worker.net import Net
from celery_dlx.worker.outcome import PoisonMessageError, make_death

logger = logging.getLogger("celery_dlx")


class HeldMessage:
    """A message that Celery's own handler may look at but not settle."""

    def __init__(self, message: Any) -> None:
        self._message = message

    def __getattr__(self, name: str) -> Any:
        return getattr(self._message, name)

    def ack(self, *args: Any, **kwargs: Any) -> None:
        """Held back: its letter is stored first."""

    reject = requeue = ack_log_error = reject_log_error = ack


class HeldRequest:
    """Stands in for a request on its way into the pool, where Celery expects no errors: one there ends the worker, or
    takes one of the pool's places along.
    """

    __slots__ = ("_give_up", "_request")

    def __init__(self, request: Any, give_up: Callable[[Any, Exception], None]) -> None:
        self._request, self._give_up = request, give_up

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)

    def execute_using_pool(self, pool: Any, **kwargs: Any) -> Any:
        try:
            return self._request.execute_using_pool(pool, **kwargs)
        except TaskRevokedError:
            raise
        except Exception as exc:
            self._give_up(self._request, exc)
            raise TaskRevokedError(self._request.id) from exc  # how Celery is told to give its place in the pool back


class Intake:
    """Replaces the consumer's hooks for messages it cannot use; Celery's own run first, for logs, states and signals."""

    def __init__(self, consumer: Any, net: Net, service: str | None) -> None:
        self._consumer, self._net, self._service = consumer, net, service
        self._on_decode_error = consumer.on_decode_error
        self._on_unknown_message = consumer.on_unknown_message
        self._on_unknown_task = consumer.on_unknown_task
        self._on_invalid_task = consumer.on_invalid_task
        self._create_task_handler = consumer.create_task_handler
        self._on_task_request = consumer.on_task_request
        # A lost connection must be seen by the consumer; all else is the message's own fault.
        # (kombu counts KeyError among Redis's connection errors; here it is a message that lacks something.)
        lost = tuple(error for error in consumer.connection_errors if error is not KeyError)
        self._not_the_message = (MemoryError, *lost)
        for name in ("decode_error", "unknown_message", "unknown_task", "invalid_task"):
            setattr(consumer, f"on_{name}", getattr(self, f"on_{name}"))
        consumer.create_task_handler = self.create_task_handler
        consumer.on_task_request = self.on_task_request

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """Celery's handler of every message, made to outlive every message."""
        handle = self._create_task_handler(*args, **kwargs)

        def on_task_received(message: Any) -> None:
            delivery = delivery_of(message)
            if delivery is None:
                handle(message)
                return
            self._survive(message, delivery, lambda: receive(message, delivery))

        def receive(message: Any, delivery: Delivery) -> None:
            self._net.count_deliveries(message, delivery)
            if self._is_poison(message, delivery):
                return
            if delivery.uncounted and self._runs_before_its_ack(message, delivery):
                use = partial(self._survive, message, delivery, lambda: handle(message))
                if self._net.count_return(message, delivery, use):
                    return
            if self._consumer.restart_count:  # else requests acknowledge by `Net.acknowledge`
                self._net.acks.take_over(message)
            handle(message)

        return on_task_received

    def _survive(self, message: Any, delivery: Delivery, step: Callable[[], None]) -> None:
        try:
            step()
        except self._not_the_message:
            raise
        except Exception as exc:
            logger.exception("a message of %r cannot be handled", delivery.queue)
            self._release(message)
            self._bury(message, delivery, Reason.MALFORMED, exc)

    def _runs_before_its_ack(self, message: Any, delivery: Delivery) -> bool:
        """Whether it may have been started when it came back: it is acknowledged late; and whether anybody cares."""
        if not (delivery.settings.enabled and delivery.settings.captures(Reason.MAX_DELIVERIES.value)):
            return False
        if delivery.settings.acks_late is not None:
            return delivery.settings.acks_late
        name = message.headers.get("task") if isinstance(message.headers, dict) else None
        task = self._consumer.app.tasks.get(name) if isinstance(name, str) else None
        return bool(task is not None and task.acks_late)

    def on_task_request(self, request: Any) -> Any:
        """A request goes to the pool: now, when a place is free, or when its time has come."""
        if delivery_of(request.message) is None:
            return self._on_task_request(request)
        return self._on_task_request(HeldRequest(request, self._give_up))

    def _give_up(self, request: Any, exc: Exception) -> None:
        message = request.message
        delivery = delivery_of(message)
        if delivery is None or isinstance(exc, self._not_the_message):
            raise exc
        logger.error("a task of %r cannot be handed to the pool", delivery.queue, exc_info=exc)
        self._release(message)
        self._bury(message, delivery, Reason.MALFORMED, exc)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self._handle(message, Reason.UNDECODABLE, exc, lambda held: self._on_decode_error(held, exc))

    def on_unknown_message(self, body: Any, message: Any) -> None:
        self._handle(message, Reason.MALFORMED, None, lambda held: self._on_unknown_message(body, held))

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        headers = message.headers if isinstance(message.headers, dict) else {}
        named = NotRegistered(headers.get("task") or exc)
        self._handle(message, Reason.UNREGISTERED, named, lambda held: self._on_unknown_task(body, held, exc))

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        reason = Reason.CONTENT_DISALLOWED if isinstance(exc, ContentDisallowed) else Reason.MALFORMED
        self._handle(message, reason, exc, lambda held: self._on_invalid_task(body, held, exc))

    def _handle(self, message: Any, reason: Reason, exc: BaseException | None, stock: Callable[[Any], None]) -> None:
        delivery = delivery_of(message)
        if delivery is None or not delivery.settings.captures(reason.value):
            stock(message)
            return
        try:
            stock(HeldMessage(message))
        except Exception:
            # Celery's hooks expect ids and mappings that such a message need not have.
            logger.exception("Celery's own handling of a message of %r failed", delivery.queue)
        self._bury(message, delivery, reason, exc)

    def _is_poison(self, message: Any, delivery: Delivery) -> bool:
        limit = delivery.settings.max_deliveries
        if not delivery.is_poison or not delivery.settings.captures(Reason.MAX_DELIVERIES.value):
            return False
        if isinstance(message.headers, dict) and message.headers.get("id") in state.revoked:
            return False  # revoked meanwhile: Celery's to say
        exc = PoisonMessageError(f"delivered {delivery.deliveries} times, max_deliveries is {limit}")
        logger.error("a message of %r is poison: %s", delivery.queue, exc)
        self._mark_as_failure(message, exc)
        self._bury(message, delivery, Reason.MAX_DELIVERIES, exc)
        return True

    def _mark_as_failure(self, message: Any, exc: Exception) -> None:
        """Store the final state of a task that will not run again, with its errbacks and its part of a chord."""
        headers = message.headers if isinstance(message.headers, dict) else {}
        task_id, app = headers.get("id"), self._consumer.app
        if not isinstance(task_id, str):
            return
        try:
            args, kwargs, embed = message.payload
            context = Context({**headers, **(embed or {}), "args": args, "kwargs": kwargs})
            app.backend.mark_as_failure(task_id, exc, request=context, store_result=not headers.get("ignore_result"))
            task = app.tasks.get(headers.get("task"))
            signals.task_failure.send(
                sender=task, task_id=task_id, exception=exc, args=args, kwargs=kwargs, traceback=None, einfo=None
            )
        except Exception:
            logger.exception("the final state of task %s was not stored", task_id)

    @staticmethod
    def _release(message: Any) -> None:
        """Forget a request that failed halfway into the worker."""
        task_id = message.headers.get("id") if isinstance(message.headers, dict) else None
        request = state.requests.get(task_id) if isinstance(task_id, str) else None
        if request is not None:
            state.task_ready(request)

    def _bury(self, message: Any, delivery: Delivery, reason: Reason, exc: BaseException | None) -> None:
        if message.acknowledged or delivery.settled:
            return
        if not delivery.settings.captures(reason.value):
            message.reject_log_error(logger, self._consumer.connection_errors)
            return
        death = make_death(
            reason.value,
            delivery.queue,
            exc=exc,
            deliveries=delivery.deliveries,
            worker=self._consumer.hostname,
            service=self._service,
        )
        self._net.bury(delivery, death, message=message, owned=True)
