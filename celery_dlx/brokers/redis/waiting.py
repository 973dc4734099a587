"""Connections that wait for a list without taking anything from it, and how the poller hears of them and of a backlog."""

from __future__ import annotations

import socket
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


class Backlog:
    """Readable as long as it is registered: messages are here, and go out one in a turn of the loop.

    A call for the next turn would not do: kombu's loop waits for files first. It is its own kind of client, too.
    """

    def __init__(self, claims: Claims) -> None:
        self.claims = claims
        self._ends: tuple[socket.socket, socket.socket] | None = None

    @property
    def connection(self) -> Backlog:
        """What the poller asks for a socket."""
        return self

    @property
    def _sock(self) -> socket.socket:
        if self._ends is None:
            self._ends = socket.socketpair()
            self._ends[1].send(b"\0")  # nobody reads it
        return self._ends[0]

    def close(self) -> None:
        for end in self._ends or ():
            end.close()
        self._ends = None


class Poller(stock.MultiChannelPoller):  # type: ignore[misc]
    """Lets the channels that claim wait in their own way."""

    #: The event loop, where there is one.
    loop: Any = None

    def _register_BRPOP(self, channel: Any) -> None:
        claims = channel.dlx_claims
        if claims.backlog:
            claims.offer(self)
        elif claims.waiting and not channel._in_poll:
            claims.wait(self)
        else:
            super()._register_BRPOP(channel)

    def on_readable(self, fileno: int) -> Any:
        _, kind = self._fd_to_chan.get(fileno, (None, None))
        if isinstance(kind, Waiter):
            return kind.claims.woken(kind)
        if isinstance(kind, Backlog):
            return kind.claims.give()
        return super().on_readable(fileno)

    def forget(self, channel: Any, waiter: Waiter | Backlog) -> None:
        """No more news of one of these clients."""
        self._chan_to_sock.pop((channel, waiter, waiter), None)
        for fd, found in list(self._fd_to_chan.items()):
            if found == (channel, waiter):
                del self._fd_to_chan[fd]
                try:
                    (self.loop.remove if self.loop is not None else self.poller.unregister)(fd)
                except (OSError, ValueError, KeyError):
                    pass  # closed already
