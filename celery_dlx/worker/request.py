"""A mixin over `Task.Request` that turns final outcomes into deaths.

While a request dies, Celery's own handling runs unchanged (states, errbacks, chords, signals, events), but its
acknowledgement or rejection is only noted: the original is settled once its letter is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.exceptions import Reject, WorkerLostError
from celery.utils.log import get_logger
from celery.worker import state

from celery_dlx.brokers.base import Delivery, delivery_of
from celery_dlx.letters import HEADER, Death, Reason
from celery_dlx.replaying import lineage_of, replay_of
from celery_dlx.worker import compat
from celery_dlx.worker.net import Net
from celery_dlx.worker.outcome import (
    ALIVE,
    PoisonMessageError,
    TaskRanOutOfMemoryError,
    failure_reason,
    make_death,
    unwrap,
)

logger = get_logger("celery.worker.request")


class Held:
    """What Celery decided while its decision was held back."""

    __slots__ = ("acked", "alive", "rejected")

    def __init__(self) -> None:
        self.acked = self.rejected = self.alive = False


class DeadLetterRequest:
    """Mixin. ``net`` and ``service`` are set on the class made for each consumer."""

    net: Net
    service: str | None
    _dlx_held: Held | None = None
    _dlx_expired = False
    _dlx_timed_out = False
    _dlx_reported = False

    # Of celery.worker.request.Request:
    acknowledged: bool
    message: Any
    task: Any
    id: str

    def __init__(self, message: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(message, *args, **kwargs)  # type: ignore[call-arg]
        if replay_of(message.headers) is not None:
            # On the instance: Celery makes a subclass for each task, whose own `on_success` does not call ours.
            self.on_success: Any = partial(self._dlx_on_success, self.on_success)

    # -- outcomes

    def _dlx_on_success(self, handle: Callable[..., Any], result: Any, **kwargs: Any) -> Any:
        """The task of a replayed message came to an end: the replay wants to know."""
        outcome = handle(result, **kwargs)
        # Not of `Ignore`: it is also how a task says that another one does its work.
        if not result[0]:
            headers = self.message.headers
            replay = replay_of(headers)
            if replay is not None:
                self.net.report(replay, {"of": lineage_of(headers), "state": "succeeded"})
        return outcome

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        handle = super().on_failure  # type: ignore[misc]
        self._dlx_reported = True
        delivery = delivery_of(self.message)
        exc = unwrap(exc_info.exception)
        if delivery is None or isinstance(exc, ALIVE) or self._withdrawn(exc):
            return handle(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)
        reason = self._reason(exc, delivery)
        if isinstance(exc, MemoryError):
            exc_info = _substitute(exc_info, TaskRanOutOfMemoryError(*exc.args))
        elif isinstance(exc, (SystemExit, KeyboardInterrupt)):
            lost = WorkerLostError(f"Worker exited prematurely: {type(exc).__name__}.")
            exc_info, return_ok = _substitute(exc_info, lost), False
        if reason is None or not delivery.settings.captures(reason):
            return handle(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)
        if isinstance(exc, Reject) and exc.requeue:
            # Celery would store no state, believing the message comes again.
            exc_info, return_ok = _substitute(exc_info, PoisonMessageError(self._poison_text(delivery))), False
        death = self._death(reason, delivery, exc, exc_info)
        if reason == Reason.TIME_LIMIT.value:
            self._dlx_timed_out = True
            if compat.ON_TIMEOUT_CALLS_HOOKS:
                self._bury(delivery, death, owned=not self.acknowledged)
                return None
        return self._die(
            delivery,
            death,
            lambda: handle(exc_info, send_failed_event=send_failed_event, return_ok=return_ok),
        )

    def on_accepted(self, pid: Any, time_accepted: Any) -> Any:
        delivery = delivery_of(self.message)
        if delivery is not None and delivery.on_started is not None and self.task.acks_late:
            delivery.on_started()
        return super().on_accepted(pid, time_accepted)  # type: ignore[misc]

    def on_timeout(self, soft: bool, timeout: float) -> Any:
        if not soft and self._dlx_timed_out and not compat.ON_TIMEOUT_CALLS_HOOKS:
            return None  # on_failure did it all
        return super().on_timeout(soft, timeout)  # type: ignore[misc]

    def maybe_expire(self) -> Any:
        expired = super().maybe_expire()  # type: ignore[misc]
        self._dlx_expired = bool(expired)
        return expired

    def revoked(self) -> Any:
        return self._held(super().revoked)  # type: ignore[misc]

    def terminate(self, pool: Any, signal: Any = None) -> Any:
        return self._held(lambda: super(DeadLetterRequest, self).terminate(pool, signal))  # type: ignore[misc]

    # -- settling

    def acknowledge(self) -> None:
        if self._dlx_held is not None:
            self._dlx_held.acked = True
        elif not self.acknowledged and self.net.acknowledge(self.message, self.connection_errors):  # type: ignore[attr-defined]
            self.acknowledged = True
        else:
            super().acknowledge()  # type: ignore[misc]

    def reject(self, requeue: bool = False) -> None:
        if self._dlx_held is not None:
            self._dlx_held.rejected = True
            return
        delivery = delivery_of(self.message)
        if delivery is not None and not self.acknowledged:
            if requeue:
                self.net.note_return(self.message, delivery)
            elif not self._dlx_reported and delivery.settings.captures(Reason.MALFORMED.value):
                # Celery gives up on a message before it runs: an eta that is no date this machine can count to.
                self._bury(delivery, self._death(Reason.MALFORMED.value, delivery, None, None), owned=True)
                return
        super().reject(requeue=requeue)  # type: ignore[misc]

    def send_event(self, type: str, **fields: Any) -> None:
        if self._dlx_held is not None and type in ("task-succeeded", "task-retried"):
            # 5.7: the result was stored before the process was lost, or the task is sent again.
            self._dlx_held.alive = True
        super().send_event(type, **fields)  # type: ignore[misc]

    # -- dying

    def _withdrawn(self, exc: BaseException) -> bool:
        """Cancelled or revoked meanwhile: the loss of its process is no news."""
        cancelled = getattr(self, "_already_cancelled", False) or getattr(self, "_already_revoked", False)
        return cancelled and failure_reason(exc, 0, 0) in (Reason.REVOKED.value, Reason.WORKER_LOST.value)

    def _reason(self, exc: BaseException, delivery: Delivery) -> str | None:
        """The reason of this death; ``None`` if the message is to be delivered again."""
        request: dict[str, Any] = self.request_dict  # type: ignore[attr-defined]
        reason = failure_reason(exc, request.get("retries"), self.task.max_retries)
        again = isinstance(exc, Reject) and exc.requeue
        if reason == Reason.WORKER_LOST.value:
            again = bool(self.task.acks_late and self.task.reject_on_worker_lost)
        if not again or self.acknowledged:
            return reason
        if delivery.is_spent and delivery.settings.captures(Reason.MAX_DELIVERIES.value):
            return Reason.MAX_DELIVERIES.value
        return None

    def _poison_text(self, delivery: Delivery) -> str:
        if self.acknowledged:
            return "the task asked for redelivery, but its message was acknowledged early; set acks_late"
        return f"delivered {delivery.deliveries} times, max_deliveries is {delivery.settings.max_deliveries}"

    def _death(self, reason: str, delivery: Delivery, exc: Any, exc_info: Any) -> Death:
        return make_death(
            reason,
            delivery.queue,
            exc=exc,
            trace=getattr(exc_info, "traceback", None),
            deliveries=delivery.deliveries,
            worker=self.hostname,  # type: ignore[attr-defined]
            service=self.service,
        )

    def _die(self, delivery: Delivery, death: Death, handle: Callable[[], Any]) -> Any:
        owned = not self.acknowledged
        self._dlx_held = held = Held()
        # Whatever the task's flags, this is the end: Celery must store the final state, not expect a redelivery.
        self._task = self.final_task  # type: ignore[attr-defined]
        try:
            return handle()
        finally:
            self._dlx_held = None
            if not held.alive:
                self._bury(delivery, death, owned=owned)
            elif owned and held.acked:
                self.acknowledge()

    def _held(self, handle: Callable[[], Any]) -> Any:
        """Run what may announce a revocation; bury the message if that is asked for, else settle as Celery wished."""
        if self._dlx_held is not None or self.acknowledged:
            return handle()
        self._dlx_held = held = Held()
        try:
            return handle()
        finally:
            self._dlx_held = None
            if held.acked:
                delivery = delivery_of(self.message)
                reason = Reason.EXPIRED.value if self._dlx_expired else Reason.REVOKED.value
                if delivery is not None and (delivery.settings.captures(reason) or self._came_back_from_expiry()):
                    if self._dlx_expired:
                        # Celery notes an expired task as revoked; replayed to this worker it would be dropped for that.
                        state.revoked.discard(self.id)
                    self._bury(delivery, self._death(reason, delivery, None, None), owned=True)
                else:
                    self.acknowledge()

    def _came_back_from_expiry(self) -> bool:
        """Replayed after it expired: other workers may still hold it for revoked, as Celery notes expired tasks."""
        lineage = self.request_dict.get(HEADER)  # type: ignore[attr-defined]
        return isinstance(lineage, dict) and lineage.get("died_of") == Reason.EXPIRED.value

    def _bury(self, delivery: Delivery, death: Death, *, owned: bool) -> None:
        self.acknowledged = True  # from here on it is ours to settle
        errors = self.connection_errors  # type: ignore[attr-defined]
        self.net.bury(
            delivery,
            death,
            message=self.message,
            owned=owned,
            task=self.task,
            ack=lambda: self.on_ack(logger, errors),  # type: ignore[attr-defined]
            reject=lambda: self.on_reject(logger, errors, False),  # type: ignore[attr-defined]
        )


def _substitute(exc_info: Any, exc: BaseException) -> Any:
    """The same report with another exception: the traceback's text stays that of the task."""
    try:
        raise exc
    except BaseException:  # noqa: BLE001 - raised here
        substitute = ExceptionInfo()
    substitute.traceback = getattr(exc_info, "traceback", substitute.traceback)
    return substitute
