"""Which acknowledgements go together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class _Collector:
    """Stands in for a message's channel while kombu acknowledges it: kombu does the checks and keeps the state."""

    def __init__(self, channel: Any) -> None:
        self.no_ack_consumers = channel.no_ack_consumers
        self.tags: list[Any] = []

    def basic_ack(self, delivery_tag: Any, multiple: bool = False) -> None:
        self.tags.append(delivery_tag)


def collect(messages: Iterable[Any]) -> dict[Any, list[Any]]:
    """Mark kombu messages as acknowledged; returns by channel the delivery tags that are to be sent.

    Those whose channel is gone are left out: they come again.
    """
    by_channel: dict[Any, _Collector] = {}
    for message in messages:
        channel = message.channel
        if channel is None or channel.connection is None or message.acknowledged:
            continue
        collector = by_channel.get(channel)
        if collector is None:
            collector = by_channel[channel] = _Collector(channel)
        message.channel = collector
        try:
            message.ack()
        finally:
            message.channel = channel
    return {channel: collector.tags for channel, collector in by_channel.items()}
