"""Starts and stops private brokers: own ports, own data, nothing shared with what else runs on the machine."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import redis

RABBITMQ = "/usr/lib/rabbitmq/bin/rabbitmq-server"
_REMEDY = "{what} was not found and cannot be installed here. Install it (Debian: apt-get install {package})"
_NAME_ONE = ", or name one that runs: DLX_TEST_{variable}=<url>"


_given: set[int] = set()


def free_port() -> int:
    """One that stays free: each process of pytest-xdist has a share of the ports, and gives none out twice."""
    share, shares = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]), os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")
    while True:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = int(sock.getsockname()[1])
        # Linux gives out odd ones first.
        if port // 2 % int(shares) == share and port not in _given:
            _given.add(port)
            return port


def wait_for(check, what: str, timeout: float = 60.0, every: float = 0.05):
    """Poll until ``check()`` is true and return its value; fail with ``what`` at the deadline."""
    deadline = time.monotonic() + timeout
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:.0f}s: {what() if callable(what) else what}")
        time.sleep(every)


def is_listening(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=0.5):
            return True
    except OSError:
        return False


def install(package: str, variable: str | None, what: str) -> None:
    """Install a Debian package where we may; else fail with the remedy. ``variable`` could name a broker instead."""
    remedy = (_REMEDY if variable is None else _REMEDY + _NAME_ONE).format(what=what, package=package, variable=variable)
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise RuntimeError(remedy)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # Tests run side by side: the second waits for the first, and then finds it installed.
    with open(Path(tempfile.gettempdir()) / "dlx-install.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        log = subprocess.run(
            f"apt-get update -qq && apt-get install -y -qq --no-install-recommends {package}",
            shell=True,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
    if log.returncode:
        raise RuntimeError(remedy + "\n" + log.stderr[-2000:])


def stop_process(process: subprocess.Popen, timeout: float = 20.0) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout)


class Redis:
    """A redis-server of our own; ``arguments`` as on its command line."""

    kind = "redis"

    def __init__(self, *arguments: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.arguments = arguments
        self.home = Path(tempfile.mkdtemp(prefix="dlx-redis-"))
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> Redis:
        return self.run()

    def run(self) -> Redis:
        """Start it on what data it has."""
        if shutil.which("redis-server") is None:
            install("redis-server", "REDIS", "redis-server")
        log = open(self.home / "log", "ab")  # noqa: SIM115 - the child keeps it
        self.process = subprocess.Popen(self._command(), stdout=log, stderr=log, start_new_session=True)
        wait_for(self._answers, lambda: (self.home / "log").read_text()[-2000:])
        return self

    def _command(self) -> list[str]:
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.home)]
        return [*command, "--save", "", "--appendonly", "yes", *self.arguments]

    def _answers(self) -> bool:
        """Not while it reads its data."""
        try:
            with redis.Redis.from_url(self.url) as client:
                return bool(client.ping())
        except redis.exceptions.AuthenticationError:
            return True  # it wants a password, so it is there
        except redis.exceptions.ConnectionError:
            return False

    def crash(self) -> None:
        """SIGKILL; `run` goes on with what is on disk."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(20)

    def stop(self) -> None:
        if self.process is not None:
            stop_process(self.process)
        shutil.rmtree(self.home, ignore_errors=True)


class Sentinel(Redis):
    """Watches a master, and decides alone that it is down."""

    name = "shop"

    def __init__(self, master: Redis) -> None:
        super().__init__()
        (self.home / "sentinel.conf").write_text(
            f"bind 127.0.0.1\nport {self.port}\ndir {self.home}\n"
            f"sentinel monitor {self.name} 127.0.0.1 {master.port} 1\n"
            f"sentinel down-after-milliseconds {self.name} 500\nsentinel failover-timeout {self.name} 5000\n"
        )

    def _command(self) -> list[str]:
        return ["redis-server", str(self.home / "sentinel.conf"), "--sentinel"]

    def master(self) -> int:
        """The port of the one in charge."""
        with redis.Redis(port=self.port) as client:
            return int(client.sentinel_get_master_addr_by_name(self.name)[1])

    def replicas(self) -> list[int]:
        """The ports of those that could be next."""
        with redis.Redis(port=self.port) as client:
            found = client.sentinel_slaves(self.name)
        return [each["port"] for each in found if each["flags"] == "slave" and each["master-link-status"] == "ok"]


class RabbitMQ:
    """A RabbitMQ node of our own, with an epmd of its own; or, ``beside`` another, one that can be its cluster's member."""

    kind = "rabbitmq"

    def __init__(self, *, beside: RabbitMQ | None = None, settings: str = "") -> None:
        self.port, self.dist_port = free_port(), free_port()
        self.beside, self.settings = beside, settings
        self.epmd_port = beside.epmd_port if beside is not None else free_port()
        self.management_port = free_port()
        self.home = Path(tempfile.mkdtemp(prefix="dlx-rabbitmq-"))
        self.node = f"dlx{self.port}@localhost"
        self.process: subprocess.Popen | None = None
        self.epmd: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    @property
    def management_url(self) -> str:
        return f"http://127.0.0.1:{self.management_port}"

    @property
    def environment(self) -> dict[str, str]:
        home = str(self.home)
        return {
            **{key: value for key, value in os.environ.items() if not key.startswith("RABBITMQ_")},
            "HOME": home,
            "LANG": "C.UTF-8",
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_DIST_PORT": str(self.dist_port),
            "RABBITMQ_CONFIG_FILE": f"{home}/rabbit.conf",
            "RABBITMQ_CONF_ENV_FILE": f"{home}/env.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{home}/plugins",
            "RABBITMQ_MNESIA_BASE": f"{home}/data",
            "RABBITMQ_LOG_BASE": f"{home}/log",
        }

    def start(self) -> RabbitMQ:
        if not os.path.exists(RABBITMQ):
            install("rabbitmq-server", "RABBITMQ", "RabbitMQ")
        (self.home / "rabbit.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\ndisk_free_limit.absolute = 50MB\n"
            f"management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {self.management_port}\n{self.settings}"
        )
        if self.beside is not None:
            shutil.copy(self.beside.home / ".erlang.cookie", self.home)  # with its mode, which Erlang insists on
        (self.home / "plugins").write_text("[rabbitmq_management].\n")
        (self.home / "env.conf").write_text("")
        return self.run()

    def run(self) -> RabbitMQ:
        """Start the node on what data it has."""
        log = open(self.home / "out", "ab")  # noqa: SIM115 - the children keep it
        if self.epmd is None and self.beside is None:
            self.epmd = subprocess.Popen(
                ["epmd", "-port", str(self.epmd_port), "-address", "127.0.0.1"], stdout=log, stderr=log
            )
        self.process = subprocess.Popen(
            [RABBITMQ], env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        for port in (self.port, self.management_port):
            wait_for(lambda port=port: is_listening(port), lambda: (self.home / "out").read_text()[-2000:], timeout=120)
        return self

    def halt(self) -> None:
        """Stop the node, keeping its data."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(60)
        wait_for(lambda: not is_listening(self.port), "RabbitMQ stopped listening")

    def crash(self) -> None:
        """SIGKILL the node; `run` goes on with what is on disk."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)
        wait_for(lambda: not is_listening(self.port), "RabbitMQ stopped listening")

    def alarms(self) -> set[str]:
        """What the node says it is short of: memory, disk space."""
        request = urllib.request.Request(f"{self.management_url}/api/health/checks/local-alarms")
        request.add_header("Authorization", "Basic " + base64.b64encode(b"guest:guest").decode())
        try:
            with urllib.request.urlopen(request, timeout=30):
                return set()
        except urllib.error.HTTPError as exc:
            assert exc.code == 503, exc
            return {alarm["resource"] for alarm in json.load(exc)["alarms"]}

    def ctl(self, *arguments: str) -> str:
        command = [RABBITMQ.replace("rabbitmq-server", "rabbitmqctl"), "-n", self.node, *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: {done.stderr or done.stdout}")
        return done.stdout

    @contextlib.contextmanager
    def frozen(self, queue: str) -> Iterator[None]:
        """The process of a quorum queue does nothing, as one that prepares thousands of deliveries."""
        process = f"whereis('%2F_{queue}')"
        self.ctl("eval", f"sys:suspend({process}).")
        try:
            yield
        finally:
            self.ctl("eval", f"sys:resume({process}).")

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.halt()
        if self.epmd is not None:
            stop_process(self.epmd)
        shutil.rmtree(self.home, ignore_errors=True)


class Foreign:
    """A broker that somebody else runs, named by an environment variable: only used, never stopped."""

    def __init__(self, url: str, kind: str) -> None:
        self.url, self.kind = url, kind
        #: Where the management API is, for the tests of the topology.
        self.management_url = os.environ.get("DLX_TEST_RABBITMQ_MANAGEMENT", "")

    def stop(self) -> None:
        """Not ours."""


def start_broker(kind: str):
    variable = f"DLX_TEST_{kind.upper()}"
    if os.environ.get(variable):
        return Foreign(os.environ[variable], kind)
    return {"redis": Redis, "rabbitmq": RabbitMQ}[kind]().start()
