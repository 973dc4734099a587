"""Answers other processes that ask a worker about its dead-lettering (`celery inspect dlx_status`)."""

from __future__ import annotations

from typing import Any

from celery.worker.control import inspect_command

from celery_dlx.brokers.queues import identity


@inspect_command()  # type: ignore[untyped-decorator]
def dlx_status(state: Any) -> dict[str, Any]:
    """The policy in force, the managed queues this worker consumes with their DLQs, all it consumes, and its tasks."""
    app = state.app
    cover = app.amqp.queues_cls.dlx_cover
    managed, consumes = {}, []
    for queue in app.amqp.queues.consume_from.values():
        consumes.append(identity(queue))
        settings = cover.settings(identity(queue))
        if settings is not None and settings.enabled:
            managed[identity(queue)] = cover.policy.dlq(identity(queue))
    return {
        "policy": cover.policy.path,
        "service": cover.policy.service,
        "queues": managed,
        "consumes": consumes,
        "tasks": sorted(app.tasks),
    }
