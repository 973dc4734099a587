"""The workflow a message is part of, and what of it still happens (pure; JSON messages of protocol 2 only)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from celery_dlx.letters import Original


@dataclass(frozen=True)
class Canvas:
    """Names of the tasks around one task, as its message carries them."""

    callbacks: tuple[str, ...] = ()
    errbacks: tuple[str, ...] = ()
    #: The rest of the chain, next one first.
    chain: tuple[str, ...] = ()
    chord: str | None = None
    group: str | None = None

    def __bool__(self) -> bool:
        return bool(self.callbacks or self.errbacks or self.chain or self.chord or self.group)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def explained(self) -> Iterator[tuple[str, str]]:
        """Each part, and whether it still fires."""
        if self.chain:
            yield "chain", f"{' → '.join(self.chain)}: goes on when a replay succeeds"
        if self.callbacks:
            yield "callbacks", f"{', '.join(self.callbacks)}: called when a replay succeeds"
        if self.errbacks:
            yield "errbacks", f"{', '.join(self.errbacks)}: called at this death, and at the next one again"
        if self.chord:
            # A part that failed fails the chord's body (https://docs.celeryq.dev/en/stable/userguide/canvas.html#error-handling)
            yield "chord", f"{self.chord}: was told that this part failed; a replay does not start it"
        if self.group:
            yield "group", self.group


def canvas_of(original: Original) -> Canvas:
    """What can be read of it; an empty one for other messages."""
    group = original.headers.get("group")
    found = Canvas(group=group if isinstance(group, str) else None)
    if original.properties.get("content_type") != "application/json" or original.headers.get("compression"):
        return found
    try:
        body = json.loads(original.body)
        embed = body[2]
    except (ValueError, RecursionError, LookupError, TypeError):
        return found
    if not isinstance(embed, Mapping):
        return found
    chord = _names([embed.get("chord")])
    return Canvas(
        callbacks=_names(embed.get("callbacks")),
        errbacks=_names(embed.get("errbacks")),
        # Celery keeps the rest of a chain last one first.
        chain=tuple(reversed(_names(embed.get("chain")))),
        chord=chord[0] if chord else None,
        group=found.group,
    )


def _names(signatures: Any) -> tuple[str, ...]:
    if not isinstance(signatures, list):
        return ()
    return tuple(str(each.get("task")) for each in signatures if isinstance(each, Mapping) and each.get("task"))
