"""Messages and letters that nobody should send: seeded, so that a number and a seed make one again."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from decimal import Decimal
from random import Random
from typing import Any

#: Headers that Celery, kombu, RabbitMQ or we read.
KEYS = (
    "task", "id", "root_id", "parent_id", "group", "group_index", "retries", "eta", "expires", "timelimit", "lang", "shadow",
    "argsrepr", "kwargsrepr", "origin", "ignore_result", "stamped_headers", "stamps", "replaced_task_nesting", "priority",
    "delivery_info", "compression", "x-death", "x-first-death-reason", "x-first-death-queue", "x-celery-dlx", "celery-dlx",
    "x-delivery-count", "x-acquired-count", "redelivered", "reply_to", "correlation_id", "chord", "callbacks", "chain",
    "is_eager", "called_directly", "headers", "properties", "hostname", "args", "kwargs", "", "\x00", "_schema", "CC", "BCC",
)  # fmt: skip
EMBED = ("callbacks", "errbacks", "chain", "chord")
#: Those that never come to their time wait, and are no letters.
LATER = "2999-01-01T00:00:00+00:00"
TEXTS = (
    "", "\x00", "\ud800", "x\udcffy", "\u202e", "😀", "a" * 300, "b" * 70_000, "None", "NaN", "-1", "1e999",
    "\x1b[2J\x07", "'; --",
    "2020-01-01T00:00:00", LATER, "9999-12-31T23:59:59-12:00", "0001-01-01T00:00:00+14:00", "2020-13-45", "{queue}", "%s%n",
    "quorum", "failure", "0" * 32, "f" * 32, '", "', "]", ', "", "x"]', "a b\nc\r\n", "../../x", "application/json", "utf-8",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 255, 256, -(2**31), 2**31, 2**53 + 1, 2**63 - 1, -(2**63), 0.0, -0.0, 0.001, 1.5, -1.5, 1e308, 5e-324,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
TYPES = (
    "application/json", "application/x-python-serialize", "application/x-yaml", "application/x-msgpack", "text/plain",
    "application/data", "", "nope", "application/json; charset=utf-8", None,
)  # fmt: skip
ENCODINGS = (
    "utf-8",
    "binary",
    "utf-16",
    "ascii",
    "latin-1",
    "nope",
    "base64",
    "hex",
    "rot13",
    "zlib",
    "idna",
    "",
    "\x00",
    None,
)
COMPRESSIONS = (
    "application/x-gzip", "gzip", "zlib", "application/x-bz2", "bzip2", "lzma", "application/x-lzma", "brotli", "zstd",
    "application/zstd", "no-such",
)  # fmt: skip


def wild(random: Random, depth: int = 3) -> Any:
    """A value that JSON can hold, of any type."""
    kind = random.randrange(9 if depth else 6)
    if kind == 0:
        return None
    if kind == 1:
        return random.random() < 0.5
    if kind == 2:
        return random.choice(NUMBERS)
    if kind < 6:
        return random.choice(TEXTS)
    if kind == 6:
        return [wild(random, depth - 1) for _ in range(random.randrange(4))]
    found = {random.choice((*KEYS, *TEXTS[:6])): wild(random, depth - 1) for _ in range(random.randrange(4))}
    if random.random() < 0.2:  # what kombu's JSON takes for a value of another type
        found = {
            "__type__": random.choice(("datetime", "uuid", "bytes", "base64", "decimal", "date", "x")),
            "__value__": wild(random, 1),
        }
    return found


def nested(random: Random) -> bytes:
    """Deeper than some parser may go."""
    depth = random.choice((50, 400, 900, 1_100, 5_000, 100_000))
    opening, closing = random.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return opening * depth + b"1" * (opening != b"[") + closing * depth


@dataclass
class Message:
    """``number`` stands in its headers and its arguments, while these last."""

    number: int
    body: bytes
    headers: Any
    properties: dict[str, Any] = field(default_factory=dict)
    #: Only Redis has one: what a list holds, where it is not made of the rest.
    item: bytes | None = None
    late: bool = False
    what: list[str] = field(default_factory=list)

    def as_item(self) -> bytes:
        if self.item is None:
            self.item = dumps(envelope(self))
        return self.item


def dumps(value: Any) -> bytes:
    return json.dumps(_text_keys(value), default=repr).encode()


def _text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key if isinstance(key, str) else repr(key): _text_keys(part) for key, part in value.items()}
    return [_text_keys(part) for part in value] if isinstance(value, list) else value


def envelope(message: Message) -> dict[str, Any]:
    """As kombu puts it into a Redis list."""
    properties = dict(message.properties)
    return {
        "body": base64.b64encode(message.body).decode(),
        "content-encoding": properties.pop("content_encoding", None),
        "content-type": properties.pop("content_type", None),
        "headers": message.headers,
        "properties": {
            "delivery_info": {"exchange": "", "routing_key": "fuzz"},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": f"tag-{message.number}",
            **properties,
        },
    }


def healthy(number: int, task: str = "fuzz.work") -> Message:
    headers = {
        "lang": "py", "task": task, "id": f"id-{number}", "root_id": f"id-{number}", "parent_id": None, "retries": 0,
        "argsrepr": "()", "kwargsrepr": "{}", "eta": None, "expires": None, "timelimit": [None, None], "fuzz": number,
    }  # fmt: skip
    body = dumps([[f"k{number}"], {}, dict.fromkeys(EMBED)])
    properties = {"content_type": "application/json", "content_encoding": "utf-8", "correlation_id": f"id-{number}"}
    return Message(number, body, headers, properties)


# -- what is done to them


def _header(random: Random, message: Message) -> None:
    key = random.choice(KEYS)
    value = wild(random)
    if key == "timelimit" and random.random() < 0.7:
        value = [random.choice((None, *NUMBERS)), random.choice((None, *NUMBERS))]
    if key in ("eta", "expires") and random.random() < 0.7:
        value = random.choice([text for text in TEXTS if text[4:5] == "-"])
    if key == "id" and random.random() < 0.5:
        value = f"{random.choice(TEXTS)}{message.number}"
    if key == "task" and random.random() < 0.5:
        value = random.choice(("fuzz.fail", "fuzz.gone", "FUZZ.WORK", "fuzz.work\x00"))
    message.headers[key] = value


def _drop(random: Random, message: Message) -> None:
    message.headers.pop(random.choice([key for key in message.headers if key != "fuzz"] or [""]), None)


def _arguments(random: Random, message: Message) -> None:
    parts = [[f"k{message.number}"], {}, dict.fromkeys(EMBED)]
    parts[random.randrange(3)] = wild(random)
    message.body = dumps(parts[: random.choice((3, 3, 3, 2, 1))])


def _embed(random: Random, message: Message) -> None:
    embed = dict.fromkeys(EMBED)
    signature = {"task": "fuzz.gone", "args": wild(random), "kwargs": wild(random), "options": wild(random)}
    embed[random.choice(EMBED)] = random.choice((wild(random), signature, [signature], [wild(random), signature]))
    message.body = dumps([[f"k{message.number}"], {}, embed])


def _cut(random: Random, message: Message) -> None:
    message.body = message.body[: random.randrange(len(message.body) + 1)]


def _flip(random: Random, message: Message) -> None:
    body = bytearray(message.body)
    for _ in range(min(random.randrange(1, 5), len(body))):
        body[random.randrange(len(body))] = random.randrange(256)
    message.body = bytes(body)


def _raw(random: Random, message: Message) -> None:
    message.body = random.choice((
        random.randbytes(random.randrange(64)), nested(random), b"9" * 5_000, b"[NaN, Infinity, -Infinity]",
        b"\xff\xfe[\x00]\x00",
        b"\xef\xbb\xbf[[], {}, null]", b"null", b'"\\ud800"', b"\x80\x04N.", b"!!python/object/apply:os.getpid []",
        b"\x93\x90\x80\xc0",
        b"[[" + nested(random) + b"], {}, null]", b"[[" + b"9" * 5_000 + b"], {}, null]", b"[[1e999], {}, null]",
        b'[["\\u0000"], {}, null]',
        dumps(wild(random)),
    ))  # fmt: skip


def _huge(random: Random, message: Message) -> None:
    message.body = dumps([[f"k{message.number}", "x" * random.randrange(1_000_000)], {}, None])


def _huge_header(random: Random, message: Message) -> None:
    message.headers[random.choice(("custom", "argsrepr", "shadow", "x-celery-dlx", "eta"))] = "h" * random.randrange(126_000)


def _protocol_1(random: Random, message: Message) -> None:
    body = {"task": "fuzz.work", "id": f"id-{message.number}", "args": [f"k{message.number}"], "kwargs": {}, "retries": 0,
            "eta": None, "expires": None, "utc": True, "timelimit": [None, None]}  # fmt: skip
    for _ in range(random.randrange(3)):
        body[random.choice((*body, *KEYS))] = wild(random)
    if random.random() < 0.2:
        body.pop(random.choice(list(body)))
    message.body = dumps(body)
    if random.random() < 0.8:
        message.headers = {"fuzz": message.number}


def _content(random: Random, message: Message) -> None:
    if random.random() < 0.6:
        message.properties["content_type"] = random.choice(TYPES)
    if random.random() < 0.6:
        message.properties["content_encoding"] = random.choice(ENCODINGS)


def _compression(random: Random, message: Message) -> None:
    message.headers["compression"] = random.choice(COMPRESSIONS)
    if random.random() < 0.4:
        message.headers["compression"], message.body = "application/x-gzip", zlib.compress(message.body)


def _lineage(random: Random, message: Message) -> None:
    """A producer that forges what we write."""
    message.headers["x-celery-dlx"] = record(random)


def _death(random: Random, message: Message) -> None:
    message.headers["x-death"] = deaths(random)


def _property(random: Random, message: Message) -> None:
    key = random.choice(
        (
            "priority",
            "correlation_id",
            "reply_to",
            "expiration",
            "message_id",
            "type",
            "app_id",
            "timestamp",
            "delivery_mode",
        )
    )
    message.properties[key] = wild(random, 1)
    if random.random() < 0.6:
        message.properties["expiration"] = random.choice(("0", "1", "60000"))
    if random.random() < 0.6:
        message.properties["priority"] = random.randrange(256)


def _odd_types(random: Random, message: Message) -> None:
    """What AMQP's tables hold and JSON does not; JSON texts on Redis."""
    if random.random() < 0.2:
        message.headers[b"\xff\xfe"] = {b"\xfe": [{b"\xfd": 1}]}
    message.headers[random.choice(KEYS)] = random.choice((
        b"\xff\xfe", Decimal("1.5"), datetime(2020, 1, 1, tzinfo=timezone.utc), [b"\xff", Decimal(1)],
        {"a": {"b": [b"\xff"]}},
    ))  # fmt: skip


def _envelope(random: Random, message: Message) -> None:
    """Redis: the message's own wrapping."""
    whole = envelope(message)
    inner = whole["properties"]
    for _ in range(random.randrange(1, 3)):
        place, keys = random.choice((
            (whole, ("body", "content-encoding", "content-type", "headers", "properties")),
            (inner, ("delivery_info", "priority", "body_encoding", "delivery_tag", "correlation_id", "reply_to", "x")),
        ))  # fmt: skip
        key = random.choice(keys)
        if random.random() < 0.25:
            place.pop(key, None)
        else:
            place[key] = wild(random)
    if random.random() < 0.3:
        message.headers["redelivered"] = True
    message.item = dumps(whole)


def _item(random: Random, message: Message) -> None:
    """Redis: anything at all."""
    item = bytearray(dumps(envelope(message)))
    kind = random.randrange(5)
    if kind == 0:
        del item[random.randrange(len(item)) :]
    elif kind == 1:
        item[random.randrange(len(item))] = random.randrange(256)
    elif kind == 2:
        item = bytearray(random.randbytes(random.randrange(1, 64)))
    elif kind == 3:
        item = bytearray(nested(random))
    else:
        item = bytearray(dumps(wild(random)))
    message.item = bytes(item)


BOTH: tuple[Callable[[Random, Message], None], ...] = (
    _header, _header, _header, _drop, _arguments, _embed, _cut, _flip, _raw, _huge_header, _protocol_1, _content,
    _compression,
    _lineage, _death, _property, _odd_types,
)  # fmt: skip
REDIS = (_envelope, _envelope, _item)


def make(seed: int, number: int, kind: str) -> Message:
    """The message of this number: one in ten is healthy, the others have one to three things wrong."""
    random = Random(f"{seed}/{number}")
    message = healthy(number)
    message.late = random.random() < 0.4
    if random.random() < 0.1:
        return message
    changes = [*BOTH, *(REDIS if kind == "redis" else ())]
    for change in random.choices(changes, k=random.choice((1, 1, 2, 3))):
        if random.random() < 0.02:
            change = _huge
        if isinstance(message.headers, dict) and message.item is None:
            change(random, message)
            message.what.append(change.__name__.strip("_"))
    if kind == "rabbitmq" and isinstance(message.headers, dict) and "x-death" in message.headers:
        # RabbitMQ 3.10 itself does not survive its death by TTL: `rabbit_dead_letter:group_by_queue_and_reason` expects
        # tables in the header, and the queue's process ends, for good.
        message.properties.pop("expiration", None)
    if kind == "redis" and message.item is None:
        message.headers = json.loads(dumps(message.headers))
    return message


# -- letters that others wrote


def record(random: Random) -> Any:
    """Like one of ours, with things wrong; or anything."""
    if random.random() < 0.15:
        return wild(random)
    found: dict[str, Any] = {
        "v": 1, "id": random.choice(TEXTS), "reason": "failure", "queue": "fuzz", "died_at": 1_790_000_000_000,
        "deliveries": 1,
        "replays": 0, "fingerprint": "1-0", "worker": "w", "service": None, "exchange": "", "routing_key": "fuzz",
        "exception": {"type": "builtins.ValueError", "message": "m", "traceback": "t"}, "stripped": {"expiration": "5"},
        "last": "0" * 32, "replay": "0" * 12, "died_of": "expired", "task": "fuzz.work", "retries": 0, "priority": 0,
    }  # fmt: skip
    for _ in range(random.randrange(5)):
        found[random.choice(list(found))] = wild(random)
    if random.random() < 0.2:
        found["exception"] = {key: wild(random) for key in ("type", "message", "traceback")}
    return found


def deaths(random: Random) -> Any:
    """``x-death``, more or less."""
    if random.random() < 0.2:
        return wild(random)
    death = {"reason": "rejected", "queue": "fuzz", "exchange": "", "routing-keys": ["fuzz"], "count": 1,
             "time": datetime(2026, 1, 1, tzinfo=timezone.utc), "original-expiration": "5"}  # fmt: skip
    for _ in range(random.randrange(4)):
        death[random.choice(list(death))] = wild(random)
    return [death] * random.randrange(3)


@dataclass
class StoredLetter:
    """What Redis may hold of one letter; ``None``: nothing."""

    member: bytes
    score: float
    record: bytes | None
    payload: bytes | None


def stored(seed: int, number: int) -> StoredLetter:
    random = Random(f"{seed}/letter/{number}")
    member = random.choice((b"%032x" % number, b"%032x" % number, random.randbytes(6), b"", b"\xff", f"é{number}".encode()))
    score = random.choice(
        (1.79e12, 1.79e12 + number, 0.0, -1.0, 1e300, -1e300, float("inf"), float("-inf"), 253402300800000.0)
    )
    text = random.choice(
        (dumps(record(random)), dumps(record(random)), nested(random), random.randbytes(20), b"", b"9" * 5_000, None)
    )
    payload = random.choice(
        (make(seed, number, "redis").as_item(), make(seed, number, "redis").as_item(), random.randbytes(9), b"", None)
    )
    return StoredLetter(member, score, text, payload)
