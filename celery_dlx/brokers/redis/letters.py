"""Between kombu's Redis messages and dead letters."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from math import isfinite
from typing import Any

from celery_dlx.letters import DeadLetter, Original, read_record, text_or_none, whole
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
    try:
        return _original(payload, item)
    except RecursionError:  # what could just be read need not be written again
        return Original(body=item, raw=item)


def _original(payload: dict[str, Any], item: bytes) -> Original:
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
        parsed=payload,
    )


def _body(body: object, encoding: object) -> bytes:
    text = body if isinstance(body, str) else "" if body is None else json.dumps(body)
    if encoding == "base64":
        try:
            return base64.b64decode(text)
        except ValueError:
            pass  # undecodable: its text is all there is
    return text.encode("utf-8", "surrogatepass")


def _encoded(body: bytes, encoding: object) -> str:
    return base64.b64encode(body).decode() if encoding == "base64" else body.decode()


def _set_body(payload: dict[str, Any], original: Original) -> None:
    payload["body"] = _encoded(original.body, payload["properties"].get("body_encoding"))
    if payload.get("content-encoding"):
        payload["content-encoding"] = original.properties.get("content_encoding")


def with_body(item: bytes, original: Original) -> bytes:
    """A list item with another body and other headers."""
    payload = parse_item(item)
    if payload is None:
        return item
    _set_body(payload, original)
    payload["headers"] = {**payload["headers"], **original.headers} if isinstance(payload.get("headers"), dict) else {}
    return json.dumps(payload).encode()


def to_json(letter: DeadLetter) -> str:
    """The stored record: the death, and what listing shows of the message."""
    record = {key: value for key, value in letter.as_dict().items() if key != "died_at"}
    if letter.redacted:
        record["redacted"] = letter.redacted
    return json.dumps(record, separators=(",", ":"), default=str)


def read_fields(record: bytes | None) -> dict[str, Any] | None:
    """What a stored record says; ``None`` if it is none."""
    try:
        fields = json.loads(record or b"{}")
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


_DESCRIBED = ("task", "task_id", "root_id", "parent_id", "args", "kwargs")


def letter_of(record: bytes | None, item: bytes | None, score: float, dlq: str) -> DeadLetter:
    """The letter of a stored record; with its payload, if that was read too."""
    fields = read_fields(record) or {}
    if item is not None:
        letter = read_record(fields, original_of(item), dlq)
    else:
        original = Original(exchange=str(fields.get("exchange") or ""), routing_key=str(fields.get("routing_key") or ""))
        original.properties = {"priority": whole(fields.get("priority"), 0)}
        described: dict[str, Any] = {name: text_or_none(fields.get(name)) for name in _DESCRIBED}
        described["retries"] = whole(fields.get("retries"), 0)
        letter = read_record(fields, original, dlq, described)
    letter.died_at = int(score) if isfinite(score) else 0
    return letter


def revived(item: bytes, letter: DeadLetter, replay: str | None = None) -> tuple[bytes, list[str], dict[str, Any] | None]:
    """The item a letter is replayed as, what changed in it, and what it parses to. Raw garbage goes back as it is."""
    parsed = letter.original.parsed if letter.original.raw is item else None
    payload = parse_item(item) if parsed is None else {**parsed, "properties": dict(parsed["properties"])}
    if payload is None:
        return item, [], None
    payload["headers"], changes = revive_headers(letter, replay=replay)
    if letter.edited is not None:
        _set_body(payload, letter.original)
    info = payload["properties"].get("delivery_info")
    if isinstance(info, dict) and "redelivered" in info:
        payload["properties"]["delivery_info"] = {key: value for key, value in info.items() if key != "redelivered"}
    _, more = revive_expiration(letter)
    try:
        return json.dumps(payload).encode(), changes + more, payload
    except RecursionError:
        return item, [], parsed
