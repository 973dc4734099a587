"""Acknowledgements that become due together are written together: a system call each costs more than all the rest of one."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from struct import Struct
from typing import Any

from amqp.spec import Basic

from celery_dlx.brokers.acks import collect

logger = logging.getLogger("celery_dlx")

#: A method frame with one `basic.ack`: type, channel, size, class, method, delivery tag, multiple, end (AMQP 0-9-1 §4.2.3).
_ACK = Struct(">BHIHHQBB").pack
_SIZE, _END = 13, 0xCE
_CLASS, _METHOD = Basic.Ack


def ack_frame(channel_id: int, delivery_tag: int) -> bytes:
    return _ACK(1, channel_id, _SIZE, _CLASS, _METHOD, delivery_tag, 0, _END)


def write_acks(messages: Iterable[Any]) -> None:
    """Acknowledge kombu messages. A broken connection is the consumer's to notice: the messages come again."""
    for channel, tags in collect(messages).items():
        frames = b"".join(ack_frame(channel.channel_id, tag) for tag in tags)
        try:
            channel.connection.transport.write(frames)
        except Exception as exc:  # noqa: BLE001 - a connection that is being torn down has many ways to say so
            logger.warning("acknowledgements were not sent, their messages come again: %s", exc)
