"""Between kombu's Redis messages and dead letters."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from typing import Any

from celery_dlx.brokers.redis.records import decode
from celery_dlx.letters import Original

_STRING = r'"(?P<{}>[^"\\\x00-\x1f]*)"'
_BETWEEN = re.compile(f', "content-encoding": {_STRING}, "content-type": {_STRING}, "headers": '.format("encoding", "type"))
_PROPERTIES = ', "properties": '


def parse_item(item: bytes) -> dict[str, Any] | None:
    """A list item as kombu's envelope, or ``None`` if it is not one."""
    try:
        payload = json.loads(item)
    except (ValueError, RecursionError):
        return None
    if not isinstance(payload, dict) or not isinstance(payload.get("properties"), dict):
        return None
    return payload


def parsed_item(item: bytes) -> tuple[dict[str, Any] | None, tuple[int, int] | None]:
    """What `parse_item` returns, and where its headers stand in the item's text, if it is as kombu writes it."""
    try:
        found = _enveloped(item.decode())
    except (ValueError, StopIteration, RecursionError):
        found = None
    return found or (parse_item(item), None)


def _enveloped(text: str) -> tuple[dict[str, Any], tuple[int, int]] | None:
    """kombu's envelope by its members, for the decoder says where each ends; ``None`` for anything unusual."""
    if not text.startswith('{"body": "'):
        return None
    body, end = decode(text, 9)
    between = _BETWEEN.match(text, end)
    if between is None:
        return None
    headers, end = decode(text, between.end())
    if type(headers) is not dict or not text.startswith(_PROPERTIES, end):
        return None
    properties, last = decode(text, end + len(_PROPERTIES))
    if type(properties) is not dict or text[last:] != "}":
        return None
    kinds = {"content-encoding": between["encoding"], "content-type": between["type"]}
    return {"body": body, **kinds, "headers": headers, "properties": properties}, (between.end(), end)


def original_of(item: bytes, payload: dict[str, Any] | None = None) -> Original:
    """What the producer sent, out of a list item (``payload``: parsed already); raw garbage is its own body."""
    if payload is None:
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


def set_body(payload: dict[str, Any], original: Original) -> None:
    """Another body for an item that was parsed."""
    payload["body"] = _encoded(original.body, payload["properties"].get("body_encoding"))
    if payload.get("content-encoding"):
        payload["content-encoding"] = original.properties.get("content_encoding")


def with_body(item: bytes, original: Original) -> bytes:
    """A list item with another body and other headers."""
    payload = parse_item(item)
    if payload is None:
        return item
    set_body(payload, original)
    payload["headers"] = {**payload["headers"], **original.headers} if isinstance(payload.get("headers"), dict) else {}
    return json.dumps(payload).encode()
