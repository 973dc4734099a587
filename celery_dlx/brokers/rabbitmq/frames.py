"""Reads messages whose properties py-amqp cannot decode (text that is no UTF-8, times out of range, unknown types).

RabbitMQ takes and delivers such messages. py-amqp's error comes up in the middle of reading the connection, where it ends
the worker; after a restart the same message comes again. Here such a message arrives without its properties; their bytes
stand in a header.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import amqp
from amqp.method_framing import frame_handler
from amqp.serialization import decode_properties_basic

from celery_dlx.brokers.rabbitmq.framing import encode_properties
from celery_dlx.letters import UNDECODED

#: py-amqp's option of a connection, which kombu takes among a broker's transport options.
OPTION = "frame_handler"
#: Class, weight and body size (AMQP 0-9-1 §4.2.6.1), and the type of the frames that begin with them.
_HEADER_SIZE, _HEADER = 12, 2


class _FrameHandler:
    """An option that can be shown: `inspect stats` sends a connection's options as JSON."""

    def __call__(self, connection: Any, callback: Callable[..., Any], **options: Any) -> Callable[[Any], Any]:
        return tolerant_frame_handler(connection, callback, **options)

    def __json__(self) -> str:
        return repr(self)

    def __repr__(self) -> str:
        return f"{__name__}.tolerant_frame_handler"


def tolerant_frame_handler(connection: Any, callback: Callable[..., Any], **options: Any) -> Callable[[Any], Any]:
    """py-amqp's frame handler, to which no header is unreadable."""
    handle = frame_handler(connection, callback, **options)

    def on_frame(frame: Any) -> Any:
        try:
            return handle(frame)
        except Exception:
            kind, channel, buffer = frame
            if kind != _HEADER or _decodes(buffer):
                raise  # a consumer's error
            raw = bytes(buffer[_HEADER_SIZE:])
            properties = encode_properties({"application_headers": {UNDECODED: raw}}, amqp.Message.PROPERTIES)
            return handle((kind, channel, bytes(buffer[:_HEADER_SIZE]) + properties))

    return on_frame


def _decodes(buffer: Any) -> bool:
    try:
        decode_properties_basic(buffer, _HEADER_SIZE)
    except Exception:  # noqa: BLE001 - a decoder over a stranger's bytes
        return False
    return True


def tolerant(options: dict[str, Any] | None) -> dict[str, Any]:
    """Transport options of a py-amqp connection that survives every message; what the user chose stays."""
    return {OPTION: _FrameHandler(), **(options or {})}
