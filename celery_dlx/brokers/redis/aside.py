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
    """Calls of one script, whose answers are taken in their order. Closing it drops what was not answered yet, which
    happens or not.

    ``again``: it only reads, and may be called once more where its connection broke. ``permit``: who holds it has a call
    under way; the others wait for their answers at once, for connections are few.
    """

    def __init__(self, client: Any, script: Any, *, again: bool = False, permit: threading.Lock | None = None) -> None:
        self._client, self._script, self._again = client, script, again
        self._permit = permit if permit is not None else threading.Lock()
        #: A connection of its own, while an answer is to come: between calls the caller may be busy for so long that a
        #: server closes it, which the pool would see.
        self._own: Any = None
        #: Answers to come.
        self._due = 0

    def begin(self, keys: Sequence[Any], args: Sequence[Any]) -> Callable[[], Any]:
        """Send a call; what this returns waits for the answer."""

        def plain() -> Any:
            return self._script(keys=keys, args=args)

        if self._own is None:
            if not _spare(self._client.connection_pool) or not self._permit.acquire(blocking=False):
                return plain
            try:
                self._own = redis.Redis(connection_pool=self._client.connection_pool, single_connection_client=True)
            except BaseException as exc:
                self._permit.release()
                if isinstance(exc, redis.exceptions.ConnectionError):
                    return plain  # as many are in use as there may be; or Redis is gone, which this says, too
                raise
        own = self._own

        def finish() -> Any:
            if own is not self._own:
                if self._again:
                    return plain()
                raise redis.exceptions.ConnectionError("the connection was closed before this was answered")
            try:
                answer = own.parse_response(own.connection, "EVALSHA")
            except redis.exceptions.NoScriptError:
                self._answered()
                return plain()
            except redis.exceptions.ResponseError:
                self._answered()
                raise
            except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError):
                self.close()
                if not self._again:
                    raise
                return plain()
            self._answered()
            return answer

        try:
            self._due += 1
            own.connection.send_command("EVALSHA", self._script.sha, len(keys), *keys, *args)
        except BaseException as exc:
            self.close()
            if self._again and isinstance(exc, (redis.exceptions.RedisError, OSError)):
                return plain
            raise
        return finish

    def answers(self) -> bool:
        """Whether there is an answer to be taken, without waiting for it."""
        return self._own is not None and bool(self._own.connection.can_read(timeout=0))

    def _answered(self) -> None:
        self._due -= 1
        if self._due == 0:
            self._release()

    def _release(self) -> None:
        """The connection goes back to its pool."""
        own, self._own, self._due = self._own, None, 0
        if own is not None:
            try:
                own.close()
            finally:
                self._permit.release()

    def close(self) -> None:
        if self._own is not None:
            self._own.connection.disconnect()
            self._release()
