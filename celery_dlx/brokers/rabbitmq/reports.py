"""What becomes of replayed messages: workers publish it to a queue of the replay's own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from amqp.exceptions import ChannelError

from celery_dlx.brokers.rabbitmq.declare import SideChannel
from celery_dlx.replaying import REPORT_SECONDS, read_report, report_queue

logger = logging.getLogger("celery_dlx")

#: Reports read at once.
_MOST = 1_000


class Reports:
    """See `celery_dlx.brokers.base.Broker`: its ``watch`` and ``outcomes``. ``connect`` gives an open `kombu.Connection`."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._channel: Any = None
        #: The last one that was read, which is acknowledged with the next look.
        self._last = 0
        self._unwatchable: set[str] = set()

    def watch(self, replay: str) -> None:
        with SideChannel(self._connect().connection) as side:
            try:
                side.channel.queue_declare(
                    report_queue(replay), durable=True, auto_delete=False, arguments={"x-expires": REPORT_SECONDS * 1000}
                )
            except ChannelError as exc:
                logger.warning("what becomes of replayed letters cannot be watched: %s", exc.reply_text)

    def read(self, replay: str) -> list[dict[str, Any]]:
        if replay in self._unwatchable:
            return []
        if self._channel is None or not self._channel.is_open:
            self._channel, self._last = self._connect().channel(), 0
        if self._last:
            self._channel.basic_ack(self._last, multiple=True)
            self._last = 0
        found: list[dict[str, Any]] = []
        try:
            while len(found) < _MOST and (raw := self._channel.basic_get(report_queue(replay))) is not None:
                self._last = raw.delivery_tag
                found.append(read_report(raw.body))
        except ChannelError as exc:  # not there, or not for this user: what becomes of the letters stays unknown
            logger.debug("no reports: %s", exc.reply_text)
            self._unwatchable.add(replay)
            self._last = 0  # its channel is closed
        return found
