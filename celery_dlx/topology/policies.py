"""RabbitMQ policies: which one a queue has, and how ours takes its place without taking anything away.

One policy applies to a queue: the one with the highest priority. Ours therefore carries over what the one beneath it says.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from celery_dlx.topology.live import LivePolicy

PREFIX = "celery-dlx."
#: From this version on a policy can be for one type of queues only (https://www.rabbitmq.com/docs/policies#apply-to).
TYPED_SINCE = (3, 12)
#: One of these makes a whole policy inapplicable to classic queues (seen on 3.10 to 4.3).
_QUORUM_ONLY = frozenset({"delivery-limit", "dead-letter-strategy", "max-in-memory-length", "max-in-memory-bytes"})
_BY_TYPE = {"classic_queues": "classic", "quorum_queues": "quorum", "streams": "stream"}


def policy_name(queue: str) -> str:
    return PREFIX + queue


def exact_pattern(queue: str) -> str:
    """An Erlang regular expression (PCRE) that matches this name and no other."""
    return f"^{re.escape(queue)}$"


def applies(policy: LivePolicy, queue: str, kind: str) -> bool:
    """Whether a policy is one for this queue of this type.

    Erlang's expressions are PCRE, ours Python's: the same for what people write in queue patterns.
    """
    if policy.apply_to not in ("all", "queues") and _BY_TYPE.get(policy.apply_to) != kind:
        return False
    if kind == "classic" and _QUORUM_ONLY & policy.definition.keys():
        return False
    compiled = _compiled(policy.pattern)
    return compiled is not None and compiled.search(queue) is not None


@lru_cache(maxsize=8192)
def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern)
    except re.error:
        return None


def _is_ours(policy: LivePolicy) -> bool:
    queue = policy.name.removeprefix(PREFIX)
    return queue != policy.name and policy.pattern == exact_pattern(queue)


def beneath(policies: Iterable[LivePolicy], queue: str, kind: str) -> tuple[LivePolicy | None, bool]:
    """The policy that would apply were ours not there, and whether a second one has the same priority (undefined then)."""
    # Those of other queues that are ours match one name each: with hundreds of them, looking would take seconds.
    others = [policy for policy in policies if not _is_ours(policy) and applies(policy, queue, kind)]
    if not others:
        return None, False
    highest = max(policy.priority for policy in others)
    best = [policy for policy in others if policy.priority == highest]
    return min(best, key=lambda policy: policy.name), len(best) > 1


def apply_to(kind: str | None, version: tuple[int, ...]) -> str:
    """The narrowest value for a queue of this type; ``None``: not known yet."""
    return f"{kind}_queues" if kind in ("classic", "quorum") and version >= TYPED_SINCE else "queues"


def merged(
    queue: str, wanted: Mapping[str, Any], under: LivePolicy | None, kind: str | None, version: tuple[int, ...]
) -> LivePolicy:
    """Our policy for a queue: all that the one beneath says, and what is wanted besides."""
    definition = {**(under.definition if under else {}), **wanted}
    priority = (under.priority if under else 0) + 1
    return LivePolicy(policy_name(queue), exact_pattern(queue), apply_to(kind, version), definition, priority)


def same(one: LivePolicy, other: LivePolicy) -> bool:
    """Whether two policies do the same; a wider ``apply_to`` makes no difference to a pattern that names one queue."""
    return (
        one.pattern == other.pattern
        and dict(one.definition) == dict(other.definition)
        and one.priority == other.priority
        and (one.apply_to == other.apply_to or "queues" in (one.apply_to, other.apply_to))
    )


def as_command(policy: LivePolicy, vhost: str) -> str:
    """The `rabbitmqctl` line that an operator can run instead."""
    words = ["rabbitmqctl", "set_policy", "-p", vhost, policy.name, policy.pattern, json.dumps(dict(policy.definition))]
    words += ["--apply-to", policy.apply_to, "--priority", str(policy.priority)]
    return " ".join(shlex.quote(word) for word in words)


def clear_command(policy: LivePolicy, vhost: str) -> str:
    return " ".join(shlex.quote(word) for word in ("rabbitmqctl", "clear_policy", "-p", vhost, policy.name))
