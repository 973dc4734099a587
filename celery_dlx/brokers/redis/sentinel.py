"""Connections to whichever server Sentinels name as master."""

from __future__ import annotations

from typing import Any

from kombu.transport import redis as stock
from redis.sentinel import MasterNotFoundError


class _NamesSentinels:
    """Mixin over a connection to the master that Sentinels name: one line says who was asked.

    redis-py's own words show how each client was made: pages, and in 6.4 and 7.1 with the Sentinels' password.
    """

    connection_pool: Any

    def connect(self) -> None:
        try:
            super().connect()  # type: ignore[misc]
        except MasterNotFoundError:
            pool = self.connection_pool
            asked = sorted("{host}:{port}".format_map(each.connection_pool.connection_kwargs) for each in sentinels_of(pool))
            raise MasterNotFoundError(
                f"no master {pool.service_name!r} according to Sentinel (asked: {', '.join(asked)})"
            ) from None


def sentinels_of(pool: Any) -> list[Any]:
    """The clients through which a pool asks for the master; none without Sentinel."""
    return list(getattr(getattr(pool, "sentinel_manager", None), "sentinels", ()))


class SentinelConnection(_NamesSentinels, stock.SentinelChannel.connection_class):  # type: ignore[misc]
    pass


class SentinelSSLConnection(_NamesSentinels, stock.SentinelChannel.connection_class_ssl):  # type: ignore[misc]
    pass
