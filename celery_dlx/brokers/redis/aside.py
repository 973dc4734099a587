"""Scripts whose answers are not waited for at once: Redis is at work while the caller is, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import redis


class Aside:
    """One script over a connection of its own, one call at a time. Closing it drops what was not answered yet, which happens
    or not."""

    def __init__(self, client: Any, script: Any) -> None:
        self._client, self._script = client, script
        self._connection: Any = None
        self._waits = False

    def begin(self, keys: Sequence[Any], args: Sequence[Any]) -> Callable[[], Any]:
        """Send a call; what this returns waits for the answer."""
        if self._connection is None:
            pool = self._client.connection_pool
            self._connection = redis.Redis(connection_pool=pool, single_connection_client=True)
        own = self._connection
        own.connection.send_command("EVALSHA", self._script.sha, len(keys), *keys, *args)
        self._waits = True

        def finish() -> Any:
            try:
                answer = own.parse_response(own.connection, "EVALSHA")
            except redis.exceptions.NoScriptError:
                answer = self._script(keys=keys, args=args)
            except redis.exceptions.ResponseError:
                self._waits = False
                raise
            self._waits = False
            return answer

        return finish

    def close(self) -> None:
        """The connection goes back to its pool."""
        if self._connection is not None:
            if self._waits:
                self._connection.connection.disconnect()
            self._connection.close()
            self._connection, self._waits = None, False
