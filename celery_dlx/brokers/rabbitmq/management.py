"""A client of RabbitMQ's management API, as small as what is asked of it: one connection, JSON, clear errors."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import time
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from celery_dlx.errors import BrokerUnreachableError, DeadLetterError, UsageError

_TAG = (
    "add the tag management, or policymaker to set policies (`rabbitmqctl set_user_tags` replaces all tags: name those it "
    "has too)"
)
#: Waiting for one answer, in seconds.
TIMEOUT = 15.0


class ManagementError(DeadLetterError):
    """The management API refuses a request."""


class ManagementDeniedError(ManagementError):
    """The user lacks a tag or a permission; nothing was done."""


class Management:
    """One user's view of one virtual host.

    ``url`` may carry credentials, which win over ``user`` and ``password``; they never show in an error.
    TLS is verified against the system's certificates; ``context`` replaces that (a private authority).
    """

    def __init__(
        self,
        url: str,
        user: str,
        password: str,
        vhost: str,
        timeout: float = TIMEOUT,
        context: ssl.SSLContext | None = None,
    ) -> None:
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname or "", parts.port
            self._host.encode("idna")
        except ValueError:
            parts = urlsplit("")  # the error's own text may hold a piece of the password
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(
                "topology.management_url: expected http://HOST:PORT or https://…; write # / @ in credentials as %23 %2F %40"
            )
        self._https, self._path = parts.scheme == "https", parts.path.rstrip("/")
        self.user = unquote(parts.username) if parts.username else user
        secret = unquote(parts.password) if parts.password else password
        token = base64.b64encode(f"{self.user}:{secret}".encode()).decode()
        self._headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json"}
        self.vhost = vhost
        self._timeout, self._context = timeout, context
        self._connection: http.client.HTTPConnection | None = None
        port = f":{self._port}" if self._port else ""
        #: For people: without credentials.
        self.url = f"{parts.scheme}://{self._host}{port}{self._path}"
        #: The server's clock minus ours, in seconds; known after the first answer.
        self.clock_skew: float | None = None
        #: How many requests were made.
        self.requests = 0

    def get(self, *path: str, query: str = "") -> Any:
        """``get("queues", vhost)``: each part is quoted. ``None`` for what does not exist."""
        return self._ask("GET", path, query=query)

    def put(self, *path: str, body: dict[str, Any]) -> None:
        self._ask("PUT", path, body)

    def delete(self, *path: str) -> None:
        """Delete; what is not there is fine."""
        self._ask("DELETE", path)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _ask(self, method: str, path: tuple[str, ...], body: dict[str, Any] | None = None, query: str = "") -> Any:
        where = f"{self._path}/api/" + "/".join(quote(part, safe="") for part in path) + (f"?{query}" if query else "")
        status, data = self._exchange(method, where, None if body is None else json.dumps(body))
        what = f"{self.url}: {method} {'/'.join(path)}"
        if status == 404 and method != "PUT":
            return None
        if status == 401:
            # RabbitMQ answers 401 both to a wrong password and to a user without any management tag.
            reason = _reason(data)
            if "not_authorised" in data and "management" in reason.lower():
                raise ManagementDeniedError(
                    f"{self.url}: user {self.user!r} may not use the management API ({reason}); {_TAG}"
                )
            raise ManagementDeniedError(
                f"{self.url}: the management API refuses user {self.user!r}: wrong password, or no tag; {_TAG}"
            )
        if status == 403:
            raise ManagementDeniedError(f"{what}: user {self.user!r} may not do that: {_reason(data)}")
        if not 200 <= status < 300:
            raise ManagementError(f"{what}: {status} {_reason(data)}; is this RabbitMQ's management API?")
        if not data:
            return None
        try:
            return json.loads(data)
        except ValueError:
            raise ManagementError(
                f"{what}: expected JSON, found {data[:60]!r}; is this RabbitMQ's management API?"
            ) from None

    def _exchange(self, method: str, where: str, body: str | None) -> tuple[int, str]:
        """One request; a connection that the server closed between two of them is opened again, once."""
        fresh = self._connection is None
        try:
            if self._connection is None:
                self._connection = self._connect()
            self._connection.request(method, where, body, self._headers)
            response = self._connection.getresponse()
            data = response.read().decode("utf-8", "replace")
            self.requests += 1
            if date := response.getheader("Date"):
                with suppress(ValueError, TypeError):
                    self.clock_skew = parsedate_to_datetime(date).timestamp() - time.time()
            return response.status, data
        except (http.client.HTTPException, OSError) as exc:
            self.close()
            if not fresh and isinstance(
                exc, (http.client.RemoteDisconnected, ConnectionError, http.client.CannotSendRequest)
            ):
                return self._exchange(method, where, body)  # all requests here may be repeated
            raise _unreachable(self.url, exc) from exc

    def _connect(self) -> http.client.HTTPConnection:
        if self._https:
            context = self._context or ssl.create_default_context()
            return http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout, context=context)
        return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)


def _reason(data: str) -> str:
    try:
        answer = json.loads(data)
        return str(answer.get("reason") or answer.get("error") or "")
    except (ValueError, AttributeError):
        return data[:100].replace("\n", " ")


def _unreachable(url: str, exc: Exception) -> BrokerUnreachableError:
    if isinstance(exc, ssl.SSLCertVerificationError):
        return BrokerUnreachableError(
            f"{url}: the certificate cannot be verified ({exc.verify_message}); add its authority to the system's, or "
            "name it in SSL_CERT_FILE"
        )
    reason = str(getattr(exc, "strerror", None) or str(exc) or type(exc).__name__).splitlines()[0]
    return BrokerUnreachableError(f"{url}: the management API does not answer: {reason}; check `topology.management_url`")


def management_of(connection: Any, url: str, timeout: float = TIMEOUT) -> Management:
    """The management API with the user, password and virtual host of a `kombu.Connection`, which need not be open."""
    user, password = connection.userid or "guest", connection.password or "guest"
    return Management(url, user, password, connection.virtual_host or "/", timeout=timeout)
