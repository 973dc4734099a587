"""Queues that know their dead-letter queue, put in place through Celery's `queues_cls`.

Whatever way a queue enters the app (`task_queues`, `-Q`, routing, remote control), it becomes a `CoveredQueue`:
declared with its dead-letter topology, or left exactly as it is where it already lives differently; and its consumer
tells the worker which queue each message came from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import kombu
from celery.app.amqp import Queues

from celery_dlx.policy.settings import QueueSettings


class Cover(Protocol):
    """What a covered queue asks of its app's DeadLetters."""

    #: Covered classes by the class they cover: one each, so that equal queues stay equal.
    queue_classes: dict[type, type]

    def settings(self, queue: str) -> QueueSettings | None: ...

    def arguments(self, queue: str, settings: QueueSettings, own: dict[str, Any]) -> dict[str, Any]: ...

    def declare(self, queue: kombu.Queue, channel: Any, plainly: Callable[[], Any]) -> Any: ...

    def consumer(self, queue: kombu.Queue, channel: Any, callback: Callable[[Any], Any]) -> Callable[[Any], Any]: ...


class CoveredQueue:
    """Mixin over `kombu.Queue` or the application's subclass of it."""

    cover: Cover
    plain_class: type

    def queue_declare(self, nowait: bool = False, passive: bool = False, channel: Any = None) -> Any:
        """Declare only what is missing: a live queue is never declared over, with ours or with other arguments."""
        declare = super().queue_declare  # type: ignore[misc]
        channel = channel or self.channel  # type: ignore[attr-defined]
        if passive or self.cover.settings(identity(self)) is None:
            return declare(nowait=nowait, passive=passive, channel=channel)
        return self.cover.declare(self, channel, lambda: declare(nowait=False, passive=False, channel=channel))

    def queue_declare_here(self, nowait: bool = False) -> Any:
        """Declare with all arguments, over whatever is there: the broker answers 406 if it differs."""
        return super().queue_declare(nowait=nowait, passive=False, channel=self.channel)  # type: ignore[misc, attr-defined]

    def consume(self, consumer_tag: str = "", callback: Any = None, no_ack: bool | None = None, **kwargs: Any) -> Any:
        unacknowledged = self.no_ack if no_ack is None else no_ack  # type: ignore[attr-defined]
        if not unacknowledged and self.cover.settings(identity(self)) is not None:
            callback = self.cover.consumer(self, self.channel, callback)  # type: ignore[attr-defined]
        return super().consume(consumer_tag, callback, no_ack, **kwargs)  # type: ignore[misc]

    def __reduce__(self) -> Any:
        # Another process has its own app, and covers the queue again.
        return _rebuild, (self.plain_class, self.as_dict())  # type: ignore[attr-defined]


def _rebuild(cls: type, attributes: dict[str, Any]) -> Any:
    return cls(**attributes)


def identity(queue: Any) -> str:
    """The name a queue goes by in policies and letters: a broadcast queue's own name is new in every process."""
    return str(queue.alias or queue.name)


def _covered_class(cls: type, cover: Cover) -> type:
    known = cover.queue_classes
    if cls not in known:
        known[cls] = type("CoveredQueue", (CoveredQueue, cls), {"cover": cover, "plain_class": cls})
    return known[cls]


def cover_queue(queue: kombu.Queue, cover: Cover) -> kombu.Queue:
    """Turn a queue into a covered one, in place.

    In place, because an application also hands the very objects of its `task_queues` to `apply_async(queue=…)`: a
    producer that declared them plainly would be refused by a queue we created (406).
    """
    settings = cover.settings(identity(queue))
    if not isinstance(queue, CoveredQueue):
        queue.__class__ = _covered_class(type(queue), cover)
    if settings is not None:
        queue.queue_arguments = cover.arguments(identity(queue), settings, dict(queue.queue_arguments or {})) or None
    return queue


def queues_class(cover: Cover) -> type[Queues]:
    """A `Queues` whose every member is covered."""

    class CoveredQueues(Queues):  # type: ignore[misc]
        #: For the bootsteps, which are given an app and nothing else.
        dlx_cover = cover

        def __setitem__(self, name: str, queue: kombu.Queue) -> None:
            super().__setitem__(name, cover_queue(queue, cover))

    return CoveredQueues
