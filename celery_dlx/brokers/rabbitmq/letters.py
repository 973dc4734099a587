"""Between RabbitMQ's messages and dead letters."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import lru_cache
from struct import Struct
from typing import Any, NamedTuple

import amqp
from amqp.serialization import decode_properties_basic

from celery_dlx.brokers.rabbitmq.deliveries import Taken
from celery_dlx.brokers.rabbitmq.framing import encode_properties, encode_table
from celery_dlx.brokers.rabbitmq.resting import Resting, headers_of, resting
from celery_dlx.brokers.rabbitmq.returns import BROKER_COUNTERS, RETURNS, route_of
from celery_dlx.brokers.rabbitmq.splicing import entries, layout, says_user, spliced
from celery_dlx.errors import UsageError
from celery_dlx.lazy import source_of
from celery_dlx.letters import HEADER, UNDECODED, DeadLetter, Original, clip, read_broker_death, read_record, stable_id
from celery_dlx.policy.settings import Policy
from celery_dlx.replaying import BROKER_HEADERS, CHANGED, lineage, revive, revive_expiration, revive_headers

#: Added on the way: not the producer's.
_COUNTERS = frozenset((*BROKER_COUNTERS, RETURNS))
#: What a replay does not carry, as it is encoded.
_DROPPED = frozenset(name.encode() for name in (*BROKER_HEADERS, *_COUNTERS, HEADER))
_CHANGED, _UNDECODED = [name.encode() for name in CHANGED], UNDECODED.encode()
#: Characters of our ids; and the times, in milliseconds since the epoch, that are encoded alike, as 64-bit numbers.
_ID, _OLD, _FAR, _TIME = 32, 1 << 31, 1 << 62, Struct(">q")
#: Room left in the header frame for what we do not measure, in bytes (frame overhead and the method's own arguments).
_HEADROOM = 1024
#: Lengths a traceback is cut to, in characters, until it fits: a frame is 128 KiB by default, and may be 8 KiB.
_CUTS = (16_384, 8_192, 2_048, 512, 0)


def decode_body(raw: amqp.Message) -> bytes | None:
    """Do what py-amqp does where a channel's ``auto_decode`` is on; returns the body's bytes if encoding it again may
    give others (a byte order mark left out, another way to write a character).
    """
    encoding = raw.properties.get("content_encoding")
    body = raw.body
    if not encoding or not isinstance(body, bytes):
        return None
    try:
        raw.body = body.decode(encoding)
    except Exception:  # noqa: BLE001 - as py-amqp does: a codec may raise anything
        return None
    return None if encoding.lower() in ("utf-8", "utf8") else body


def original_of(raw: amqp.Message | Taken, exact: bytes | None = None) -> Original:
    """What the producer sent, out of a delivered message. ``exact``: its body, where the message has it no more."""
    properties = dict(raw.properties)
    headers = properties.pop("application_headers", None) or {}
    route = route_of(headers)
    if not _COUNTERS.isdisjoint(headers):
        headers = {key: value for key, value in headers.items() if key not in _COUNTERS}
    if route is None:
        info = raw.delivery_info or {}
        route = info.get("exchange") or "", info.get("routing_key") or ""
    body = raw.body if exact is None else exact
    return Original(
        body=body.encode("utf-8", "surrogateescape") if isinstance(body, str) else bytes(body or b""),
        headers=headers,
        properties=properties,
        exchange=route[0],
        routing_key=route[1],
    )


def strip_for_rest(letter: DeadLetter, user: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Headers and properties a letter rests with; what had to leave is noted in ``letter.stripped``.

    ``expiration`` would make the letter vanish from its DLQ; ``user_id`` must be the publisher's own (RabbitMQ:
    "Validated User-ID"); ``CC`` would route copies elsewhere ("Sender-selected Distribution").
    """
    headers, properties = dict(letter.original.headers), dict(letter.original.properties)
    for source, key in ((properties, "expiration"), (properties, "user_id"), (headers, "CC"), (headers, "BCC")):
        if key in source and not (key == "user_id" and source[key] == user):
            letter.stripped[key] = source.pop(key)
    return headers, properties


def at_rest(letter: DeadLetter, user: str | None, frame_max: int | None = None) -> amqp.Message:
    """The message that carries a letter to its DLQ. With ``frame_max``, its headers fit that: the traceback gives way.

    Raises:
        ValueError: not even the shortest record fits beside the original's own headers.
    """
    headers, properties = strip_for_rest(letter, user)
    record = letter.record()
    if frame_max is not None:
        taken = len(encode_table(headers)) + sum(len(str(value)) * 4 for value in properties.values())
        record = _fit(record, frame_max - _HEADROOM - taken)
    headers[HEADER] = record
    return amqp.Message(letter.original.body, application_headers=headers, **properties)


def bare(letter: DeadLetter) -> amqp.Message:
    """The body alone with the shortest record: for an original whose headers cannot be encoded again."""
    record: dict[str, Any] = {"v": 1, "id": letter.id, "reason": letter.reason, "queue": letter.queue}
    record["died_at"] = letter.died_at
    if letter.redacted:
        record["redacted"] = letter.redacted
    return amqp.Message(letter.original.body, application_headers={HEADER: record}, delivery_mode=2)


def _fit(record: dict[str, Any], room: int) -> dict[str, Any]:
    if len(encode_table(record)) <= room:
        return record
    exception = record.get("exception") or {}
    for cut in _CUTS if exception else ():
        record["exception"] = {
            "type": clip(exception["type"], max(cut, 64)),
            "message": clip(exception["message"], cut // 8),
            "traceback": clip(exception["traceback"], cut, keep="tail"),
        }
        if len(encode_table(record)) <= room:
            return record
    record = {key: record[key] for key in ("v", "id", "reason", "queue", "died_at", "replays", "redacted") if key in record}
    if len(encode_table(record)) <= room:
        return record
    raise ValueError(f"{room} bytes left for the record in the header frame")


def letter_of(raw: amqp.Message | Taken, queue: str, dlq: str) -> DeadLetter:
    """The letter that a message in a DLQ is, whoever put it there."""
    if isinstance(raw, Taken) and (late := resting(raw, queue, dlq, original_of)) is not None:
        return late
    original = original_of(raw)
    record = original.headers.get(HEADER)
    if isinstance(record, Mapping) and record.get("reason"):
        original.headers = dict(original.headers)
        del original.headers[HEADER]
        original.exchange = str(record.get("exchange") or "")
        original.routing_key = str(record.get("routing_key") or "")
        letter = read_record(record, original, dlq)
        letter.queue = letter.queue or queue
        # By its id a replay knows a letter that the broker returns: anybody may have written a record without one.
        letter.id = letter.id or stable_id(letter)
        return letter
    letter = read_broker_death(original.headers, original, dlq, queue)
    route = route_of(raw.properties.get("application_headers") or {})
    if route is not None:  # what the broker noted is how its copy came
        letter.original.exchange, letter.original.routing_key = route
    return letter


def exported(raw: amqp.Message | Taken, letter: DeadLetter, queue: str) -> dict[str, Any]:
    """A letter as JSON: headers and properties as AMQP encodes them, for JSON has not all their types."""
    if isinstance(raw, Taken) and UNDECODED not in letter.original.headers:
        content = raw.content
    else:  # what cannot be decoded could not be imported, but for the header that it stands in
        properties = {key: value for key, value in raw.properties.items() if key != "delivery_info"}
        content = encode_properties(properties, amqp.Message.PROPERTIES)
    body = raw.body.encode("utf-8", "surrogateescape") if isinstance(raw.body, str) else bytes(raw.body or b"")
    return {
        "v": 1,
        "broker": "rabbitmq",
        "queue": queue,
        "id": letter.id,
        "properties": base64.b64encode(content).decode(),
        "body": base64.b64encode(body).decode(),
    }


def imported(line: Mapping[str, Any], policy: Policy) -> tuple[amqp.Message, DeadLetter]:
    """The message of an exported line, and the letter it is.

    Raises:
        UsageError: it is not one of RabbitMQ's, or cannot be read.
    """
    if line["broker"] != "rabbitmq":
        raise UsageError(f"letter {line['id']} was exported from {line['broker']}, this broker is RabbitMQ")
    try:
        properties, _ = decode_properties_basic(base64.b64decode(line["properties"], validate=True), 0)
        body = base64.b64decode(line["body"], validate=True)
        line["queue"].encode()  # lone surrogates name no queue
    except Exception as exc:  # noqa: BLE001 - a decoder over a stranger's bytes
        raise UsageError(f"letter {line['id']}: not as it was exported ({type(exc).__name__})") from None
    message = amqp.Message(body, **properties)
    letter = letter_of(message, line["queue"], policy.dlq(line["queue"]))
    letter.id, letter.queue = line["id"], line["queue"]
    return message, letter


def revived_bytes(raw: Taken, letter: DeadLetter, user: str | None, replay: str | None) -> tuple[bytes, list[str]] | None:
    """The properties a letter is replayed with: the very bytes it rests with, but for our header; and what changed.

    ``None`` where `revived` has to look closer: at what was stripped, edited, undecodable, or changes in its place.
    """
    if letter.stripped or letter.edited is not None:
        return None
    source = source_of(letter)
    found = source.layout if isinstance(source, Resting) else layout(raw.content)
    if found is None or _UNDECODED in found.spans:
        return None
    if not isinstance(source, Resting) and UNDECODED in letter.original.headers:
        return None
    if says_user(raw.content) and letter.original.properties.get("user_id") != user:
        return None
    few = headers_of(raw.content, found, _CHANGED)
    if few is None:
        return None
    new, changes = revive(few, letter, replay=replay)
    if changes:
        return None
    return spliced(raw.content, found, _DROPPED, _lineage(letter, replay, new[HEADER])), changes


class _Pattern(NamedTuple):
    """What is alike in the encoded lineages of letters that died of the same for the first time: all but id and time."""

    before: bytes
    between: bytes
    after: bytes
    end: bytes


@lru_cache(maxsize=256)
def _pattern(reason: str, fingerprint: str, replays: int, replay: str | None, id_bytes: int) -> _Pattern | None:
    # An id that stands nowhere else, and a time that is encoded as those of this age are.
    letter_id, died_at = "\x01" * id_bytes, 1 << 40
    example = DeadLetter(letter_id, "", "", reason, died_at, Original(), fingerprint=fingerprint, replays=replays)
    encoded = entries({HEADER: lineage(example, replay)})
    parts = encoded.split(letter_id.encode())
    time = parts[-1].split(_TIME.pack(died_at)) if len(parts) == 3 else []
    return _Pattern(parts[0], parts[1], *time) if len(time) == 2 else None


def _lineage(letter: DeadLetter, replay: str | None, told: Mapping[str, Any]) -> bytes:
    """The header with a letter's lineage, encoded: of the same few causes again and again."""
    if not letter.deaths and len(letter.id) == _ID and letter.id.isascii() and _OLD <= letter.died_at < _FAR:
        found = _pattern(letter.reason, letter.fingerprint, letter.replays, replay, _ID)
        if found is not None:
            letter_id, time = letter.id.encode(), _TIME.pack(letter.died_at)
            return b"".join((found.before, letter_id, found.between, letter_id, found.after, time, found.end))
    return entries({HEADER: told})


def revived(letter: DeadLetter, user: str | None, replay: str | None = None) -> tuple[amqp.Message, list[str]]:
    """The message a letter is replayed as, and what changed in it."""
    headers, changes = revive_headers(letter, replay=replay)
    properties = dict(letter.original.properties)
    expiration, more = revive_expiration(letter)
    changes += more
    if expiration is not None:
        properties["expiration"] = expiration
    claimed = letter.stripped.get("user_id", properties.get("user_id"))
    if claimed is not None and claimed != user:
        properties.pop("user_id", None)
        changes.append(f"user_id {claimed} dropped: the broker accepts only {user}")
    if "CC" in letter.stripped:
        changes.append("CC dropped: a replay goes to the source queue alone")
    return amqp.Message(letter.original.body, application_headers=headers, **properties), changes
