"""What keeps us from a broker, in one line."""

from __future__ import annotations

from typing import Any

from amqp.exceptions import AccessRefused, AMQPError

from celery_dlx.errors import BrokerUnreachableError


def unreachable(connection: Any, exc: BaseException) -> BrokerUnreachableError:
    """Say in one line what keeps us from the broker; the URL without its password."""
    uri = connection.as_uri()
    if isinstance(exc, AccessRefused):
        return BrokerUnreachableError(f"{uri}: the broker refuses the user or password; check the broker URL")
    reason = str(getattr(exc, "strerror", None) or str(exc) or type(exc).__name__).splitlines()[0]
    return BrokerUnreachableError(f"{uri}: {reason}; is the broker running, and the broker URL right?")


def connected(connection: Any) -> Any:
    """The `kombu.Connection`, connected.

    Raises:
        BrokerUnreachableError: there is no way.
    """
    try:
        connection.connect()
    except (OSError, AMQPError) as exc:
        raise unreachable(connection, exc) from exc
    return connection
