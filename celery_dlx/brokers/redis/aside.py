"""Scripts whose answers are not waited for at once: Redis is at work while the caller is, too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import redis

#: Connections that the pool must have left: what is called plainly meanwhile needs one, and who reads within a replay, too.
_SPARE = 3


def _spare(pool: Any) -> bool:
    """Whether a pool can do without a connection for a while, as far as it says."""
    used = getattr(pool, "_in_use_connections", ())
    return bool(pool.max_connections - len(used) >= _SPARE)


class Aside:
    """Calls of one script, one at a time. Closing it drops what was not answered yet, which happens or not.

    ``again``: it only reads, and may be called once more where its connection broke. ``permit``: who holds it has a call
    under way; the others wait for their answers at once, for connections are few.
    """

    def __init__(self, client: Any, script: Any, *, again: bool = False, permit: threading.Lock | None = None) -> None:
        self._client, self._script, self._again = client, script, again
        self._permit = permit if permit is not None else threading.Lock()
        #: A connection of its own, while an answer is to come: between calls the caller may be busy for so long that a
        #: server closes it, which the pool would see.
        self._own: Any = None

    def begin(self, keys: Sequence[Any], args: Sequence[Any]) -> Callable[[], Any]:
        """Send a call; what this returns waits for the answer."""

        def plain() -> Any:
            return self._script(keys=keys, args=args)

        if not _spare(self._client.connection_pool) or not self._permit.acquire(blocking=False):
            return plain
        try:
            self._own = own = redis.Redis(connection_pool=self._client.connection_pool, single_connection_client=True)
        except BaseException as exc:
            self._permit.release()
            if isinstance(exc, redis.exceptions.ConnectionError):
                return plain  # as many are in use as there may be; or Redis is gone, which this says, too
            raise

        def finish() -> Any:
            try:
                answer = own.parse_response(own.connection, "EVALSHA")
            except redis.exceptions.NoScriptError:
                self._release()
                return plain()
            except redis.exceptions.ResponseError:
                self._release()
                raise
            except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError):
                self.close()
                if not self._again:
                    raise
                return plain()
            self._release()
            return answer

        try:
            own.connection.send_command("EVALSHA", self._script.sha, len(keys), *keys, *args)
        except BaseException as exc:
            self.close()
            if self._again and isinstance(exc, (redis.exceptions.RedisError, OSError)):
                return plain
            raise
        return finish

    def _release(self) -> None:
        """The connection goes back to its pool."""
        own, self._own = self._own, None
        if own is not None:
            try:
                own.close()
            finally:
                self._permit.release()

    def close(self) -> None:
        if self._own is not None:
            self._own.connection.disconnect()
            self._release()
