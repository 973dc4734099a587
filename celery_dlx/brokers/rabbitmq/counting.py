"""How many messages a queue holds, also while it is busy."""

from __future__ import annotations

from time import monotonic
from typing import Any

from celery_dlx.errors import BrokerUnreachableError

#: RabbitMQ gives a quorum queue 0.25 s to say what it holds, and then says for it that it is empty and has no consumers
#: (`rabbit_quorum_queue:stat/1`, all versions): one that prepares thousands of deliveries takes longer. In seconds.
_PATIENCE = 0.2
#: For so long, in seconds, it is asked again.
BUSY = 60.0


def counted(channel: Any, name: str, wait: float = BUSY) -> Any:
    """The queue's name, message and consumer count, as it says them itself, within ``wait`` seconds. Needs no permission.

    Raises:
        NotFound: there is no such queue; the channel is closed.
        BrokerUnreachableError: it does not say.
    """
    deadline = monotonic() + wait
    while True:
        begun = monotonic()
        live = channel.queue_declare(name, passive=True)
        took = monotonic() - begun
        if live.message_count or live.consumer_count or took < _PATIENCE:
            return live
        begun = monotonic()
        channel.basic_qos(0, 0, False)  # asks no queue: the way there and back may be as long
        if took - (monotonic() - begun) < _PATIENCE:
            return live
        if monotonic() > deadline:
            within = f"within {wait:.0f} s" if wait else "at once"
            raise BrokerUnreachableError(
                f"queue {name!r} did not say {within} what it holds: busy, or without a leader; try again later"
            )
