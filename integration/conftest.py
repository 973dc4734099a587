"""Brokers for the session. One that cannot be had is a failure with a remedy, never a skip."""

from __future__ import annotations

import sys
from pathlib import Path
from uuid import uuid4

import kombu
import pytest
import redis

sys.path.insert(0, str(Path(__file__).parent))

import servers
from certificates import make


@pytest.fixture
def watched():
    """A Redis master, its replica and their Sentinel."""
    from watched import Watched

    found = Watched()
    try:
        yield found.start()
    finally:
        found.stop()


@pytest.fixture(scope="session")
def rabbitmq():
    broker = servers.start_broker("rabbitmq")
    yield broker
    broker.stop()


@pytest.fixture(scope="session")
def redis_server():
    broker = servers.start_broker("redis")
    yield broker
    broker.stop()


@pytest.fixture(scope="session", params=["rabbitmq", "redis"])
def broker(request):
    """Each broker in turn."""
    return request.getfixturevalue("rabbitmq" if request.param == "rabbitmq" else "redis_server")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """Where a server's certificate, its authority's and a stranger's are."""
    return make(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def queue() -> str:
    """A queue name nobody else uses."""
    return f"q{uuid4().hex[:10]}"


@pytest.fixture
def readings(monkeypatch):
    """DLQs of RabbitMQ that were read, one entry each time."""
    from celery_dlx.brokers.rabbitmq.reader import Reader

    seen = []
    begin = Reader.__init__

    def counted(self, connection, dlq, few=None, **options):
        seen.append(dlq)
        begin(self, connection, dlq, few, **options)

    monkeypatch.setattr(Reader, "__init__", counted)
    return seen


@pytest.fixture
def pools():
    """Kombu's pools in this process are emptied afterwards: others would find connections in them that were ended."""
    yield
    kombu.pools.reset()


@pytest.fixture
def end_connections(redis_server, pools):
    """Ends all connections to this session's Redis, those of kombu's pools among them."""
    client = redis.Redis.from_url(redis_server.url)
    yield lambda: client.client_kill_filter(_type="normal", skipme=True)
    client.close()
