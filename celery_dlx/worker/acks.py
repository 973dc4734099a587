"""Acknowledgements wait a moment for company: a system call or a round trip each costs more than all the rest of one."""

from __future__ import annotations

from functools import partial
from typing import Any

from celery_dlx.brokers.base import Capturer

#: How long one waits for company, in seconds; how many are written at once; and what part of the prefetch may wait.
_LINGER, _MOST, _PART = 0.005, 8, 8


class Acks:
    """Of one consumer. Only while its event loop runs; else each is sent at once, as Celery does."""

    def __init__(self, consumer: Any, capturer: Capturer) -> None:
        self._consumer, self._capturer = consumer, capturer
        self._hub: Any = None
        self._waiting: list[Any] = []
        self._scheduled = False

    def attach(self, hub: Any) -> None:
        self._hub, self._scheduled = hub, False

    def detach(self) -> None:
        """The loop ended: what waits must not wait for it."""
        self.write()
        self._hub = None

    def take_over(self, message: Any) -> None:
        """From now on, this message is acknowledged with others."""
        message.ack_log_error = partial(self._acknowledge, message)

    @staticmethod
    def give_back(message: Any) -> None:
        """It is settled, or by other means: it need not refer to itself any more."""
        vars(message).pop("ack_log_error", None)

    def _acknowledge(self, message: Any, logger: Any, errors: Any, multiple: bool = False) -> None:
        self.give_back(message)
        if multiple or message.acknowledged or not self.add(message):
            message.ack_log_error(logger, errors, multiple)

    def add(self, message: Any) -> bool:
        """Acknowledge a message soon; ``False`` if there is no loop to do it."""
        if self._hub is None or self._capturer.eager:
            return False
        self._waiting.append(message)
        if len(self._waiting) >= self._enough():
            self.write()
        elif not self._scheduled:
            self._scheduled = True
            self._hub.call_later(_LINGER, self._turn)
        return True

    def _enough(self) -> int:
        # What waits here is missing from the prefetch, in which each child must find its next task; 0: it has no end.
        consumer = self._consumer
        prefetch = consumer.qos.value if consumer.qos is not None else 1
        return min(_MOST, (prefetch - consumer.pool.num_processes) // _PART) if prefetch else _MOST

    def _turn(self) -> None:
        self._scheduled = False
        self.write()

    def write(self) -> None:
        """Send what waits."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._capturer.acknowledge(waiting)
