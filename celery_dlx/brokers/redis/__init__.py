"""Redis: a kombu transport that knows deliveries and deaths, and dead-letter queues as sorted sets.

Keys, each behind the transport's `global_keyprefix`:

- ``dlx:{<dlq>}``: the sorted set of letter ids, scored by the death in milliseconds of the server's clock;
- ``dlx:{<dlq>}:payloads``: id → the message as it lay in its list, byte for byte;
- ``dlx:{<dlq>}:records``: id → the record of its death, as JSON, so that listing never reads payloads;
- ``dlx:{<dlq>}:stats``: counters (captured, replayed, discarded, evicted_…, bytes);
- ``dlx:{<queue>}:deliveries``: a message's delivery tag → how often it went back to its list, and started since;
- ``dlx:queues``: source queue → DLQ, of every queue a worker or producer declared.

The Lua rules: never encode a payload (empty arrays would become objects, numbers lose digits), only move its bytes;
all of a move in one script.
"""

import kombu.transport

_ALIASES = {
    "redis": "celery_dlx.brokers.redis.transport:Transport",
    "rediss": "celery_dlx.brokers.redis.transport:Transport",
    "sentinel": "celery_dlx.brokers.redis.transport:SentinelTransport",
}


def install() -> None:
    """Make this process's Redis connections use our transport. Idempotent; imports no client before one is needed."""
    for alias, path in _ALIASES.items():
        kombu.transport.TRANSPORT_ALIASES[alias] = path
        kombu.transport._transport_cache.pop(alias, None)
