"""Connections that wait for a list without taking anything from it, and how kombu's poller hears of them."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any

from kombu.transport import redis as stock

if TYPE_CHECKING:
    from celery_dlx.brokers.redis.claims import Claims

#: A waiter whose answer is overdue by this, in seconds, is taken to be cut off.
_OVERDUE = 25.0


class Waiter:
    """A connection that waits for one list. It is its own kind of client to kombu's poller."""

    def __init__(self, claims: Claims, pool: Any, key: str) -> None:
        self.claims, self.connection_pool, self.key = claims, pool, key
        self.connection: Any = None
        self.since: float | None = None

    def wait(self, seconds: float) -> None:
        self.connection.send_command("BLMOVE", self.key, self.key, "RIGHT", "RIGHT", seconds)
        self.since = monotonic()

    def overdue(self, seconds: float) -> bool:
        return self.since is not None and monotonic() - self.since > seconds + _OVERDUE

    def read(self) -> bool:
        """Whether there is something in the list."""
        self.since = None
        return self.connection.read_response() is not None

    def close(self) -> None:
        self.since = None
        if self.connection is not None:
            self.connection.disconnect()
            self.connection_pool.release(self.connection)
            self.connection = None


class Poller(stock.MultiChannelPoller):  # type: ignore[misc]
    """Lets the channels that claim wait in their own way."""

    #: The event loop, where there is one.
    loop: Any = None

    def _register_BRPOP(self, channel: Any) -> None:
        claims = channel.dlx_claims
        if claims.waiting and not channel._in_poll:
            claims.wait(self)
        else:
            super()._register_BRPOP(channel)

    def on_readable(self, fileno: int) -> Any:
        _, kind = self._fd_to_chan.get(fileno, (None, None))
        if isinstance(kind, Waiter):
            return kind.claims.woken(kind)
        return super().on_readable(fileno)

    def forget(self, channel: Any, waiter: Waiter) -> None:
        """No more news of a waiter."""
        self._chan_to_sock.pop((channel, waiter, waiter), None)
        for fd, found in list(self._fd_to_chan.items()):
            if found == (channel, waiter):
                del self._fd_to_chan[fd]
                try:
                    (self.loop.remove if self.loop is not None else self.poller.unregister)(fd)
                except (OSError, ValueError, KeyError):
                    pass  # closed already
