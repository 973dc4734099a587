"""Between kombu's Redis messages and dead letters."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from math import isfinite
from typing import Any

from celery_dlx.letters import DeadLetter, Original, read_record
from celery_dlx.replaying import revive_expiration, revive_headers


def parse_item(item: bytes) -> dict[str, Any] | None:
    """A list item as kombu's envelope, or ``None`` if it is not one."""
    try:
        payload = json.loads(item)
    except (ValueError, RecursionError):
        return None
    if not isinstance(payload, dict) or not isinstance(payload.get("properties"), dict):
        return None
    return payload


def original_of(item: bytes) -> Original:
    """What the producer sent, out of a list item; raw garbage is its own body."""
    payload = parse_item(item)
    if payload is None:
        return Original(body=item, raw=item)
    properties = dict(payload["properties"])
    info = properties.pop("delivery_info", None)
    info = info if isinstance(info, Mapping) else {}
    identity, encoding = properties.pop("delivery_tag", ""), properties.pop("body_encoding", None)
    for key in ("content-type", "content-encoding"):
        if payload.get(key) is not None:
            properties[key.replace("-", "_")] = payload[key]
    headers = payload.get("headers")
    headers = {key: value for key, value in headers.items() if key != "redelivered"} if isinstance(headers, dict) else {}
    return Original(
        body=_body(payload.get("body"), encoding),
        headers=headers,
        properties=properties,
        exchange=str(info.get("exchange") or ""),
        routing_key=str(info.get("routing_key") or ""),
        identity=str(identity),
        raw=item,
    )


def _body(body: object, encoding: object) -> bytes:
    text = body if isinstance(body, str) else "" if body is None else json.dumps(body)
    if encoding == "base64":
        try:
            return base64.b64decode(text)
        except ValueError:
            pass  # undecodable: its text is all there is
    return text.encode("utf-8", "surrogatepass")


def to_json(letter: DeadLetter) -> str:
    """The stored record: the death, and what listing shows of the message."""
    record = {key: value for key, value in letter.as_dict().items() if key != "died_at"}
    return json.dumps(record, separators=(",", ":"), default=str)


def letter_of(record: bytes | None, item: bytes | None, score: float, dlq: str) -> DeadLetter:
    """The letter of a stored record; with its payload, if that was read too."""
    try:
        fields = json.loads(record or b"{}")
    except ValueError:
        fields = {}
    if not isinstance(fields, dict):
        fields = {}
    original = original_of(item) if item is not None else Original()
    letter = read_record(fields, original, dlq)
    letter.died_at = int(score) if isfinite(score) else 0
    if item is None:
        for name in ("task", "task_id", "root_id", "parent_id", "args", "kwargs"):
            setattr(letter, name, fields.get(name))
        letter.retries = fields.get("retries") or 0
        original.exchange, original.routing_key = fields.get("exchange") or "", fields.get("routing_key") or ""
        original.properties = {"priority": fields.get("priority") or 0}
    return letter


def revived(item: bytes, letter: DeadLetter, replay: str | None = None) -> tuple[bytes, list[str]]:
    """The item a letter is replayed as, and what changed in it. Raw garbage goes back as it is."""
    payload = parse_item(item)
    if payload is None:
        return item, []
    payload["headers"], changes = revive_headers(letter, replay=replay)
    info = payload["properties"].get("delivery_info")
    if isinstance(info, dict):
        info.pop("redelivered", None)
    _, more = revive_expiration(letter)
    return json.dumps(payload).encode(), changes + more
