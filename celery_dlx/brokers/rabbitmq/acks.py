"""Acknowledgements that become due together are written together: a system call each costs more than all the rest of one."""

from __future__ import annotations

import logging
from struct import Struct
from typing import Any

from amqp.spec import Basic

logger = logging.getLogger("celery_dlx")

#: A method frame with one `basic.ack`: type, channel, size, class, method, delivery tag, multiple, end (AMQP 0-9-1 §4.2.3).
_ACK = Struct(">BHIHHQBB").pack
_SIZE, _END = 13, 0xCE
_CLASS, _METHOD = Basic.Ack


def ack_frame(channel_id: int, delivery_tag: int) -> bytes:
    return _ACK(1, channel_id, _SIZE, _CLASS, _METHOD, delivery_tag, 0, _END)


class _Collector:
    """Stands in for a message's channel while kombu acknowledges it: it does the checks and keeps the state."""

    def __init__(self, channel: Any) -> None:
        self.no_ack_consumers = channel.no_ack_consumers
        self._channel_id = channel.channel_id
        self.frames = bytearray()

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> None:
        self.frames += ack_frame(self._channel_id, delivery_tag)


class AckBatch:
    """The messages of one turn of the event loop."""

    def __init__(self) -> None:
        self._messages: list[Any] = []

    def add(self, message: Any) -> None:
        """``message`` is a kombu message of an open channel, not yet settled."""
        self._messages.append(message)

    def write(self) -> None:
        """Acknowledge what was added. A broken connection is the consumer's to notice: the messages come again."""
        messages, self._messages = self._messages, []
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
        for channel, collector in by_channel.items():
            try:
                channel.connection.transport.write(bytes(collector.frames))
            except Exception as exc:  # noqa: BLE001 - a connection that is being torn down has many ways to say so
                logger.warning("acknowledgements were not sent, their messages come again: %s", exc)
