"""The stored records of deaths: JSON, without what goes without saying, and tracebacks deflated.

Redis holds a record for each letter. Most of one was its traceback, which nobody searches; filters look for other words in
the record's own text, and scripts for its fingerprint, reason and task. Records that hold everything are read as well.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from celery_dlx.letters import MAX_TRACEBACK, DeadLetter

#: Reads the JSON value at a position of a text; returns it and where it ends, or raises StopIteration or ValueError.
decode: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().scan_once  # type: ignore[attr-defined]

#: What is left out where it is so.
_USUAL = {"parent_id": None, "service": None, "retries": 0, "deliveries": 1, "replays": 0, "exchange": "", "priority": 0}
#: A deflated traceback, after the type and the message of its exception.
_DEFLATED = "traceback_1"
#: What many tracebacks hold. Stored ones cannot be read without it: it never changes; another one gets another key.
_KNOWN = (
    b'", line ,  in \n    return self.\n    raise \n    await \n'
    b'  File "/usr/local/lib/python3.12/site-packages/File "/usr/lib/python3/dist-packages/File "/app/\n'
    b"The above exception was the direct cause of the following exception:\n\n"
    b"During handling of the above exception, another exception occurred:\n\n"
    b"Traceback (most recent call last):\n"
    b'  File "/usr/local/lib/python3.12/site-packages/celery/app/autoretry.py", line 38, in run\n'
    b"    return task._orig_run(*args, **kwargs)\n"
    b'  File "/usr/local/lib/python3.12/site-packages/celery/app/trace.py", line 453, in trace_task\n'
    b"    R = retval = fun(*args, **kwargs)\n                 ^^^^^^^^^^^^^^^^^^^^\n"
    b'  File "/usr/local/lib/python3.12/site-packages/celery/app/trace.py", line 736, in __protected_call__\n'
    b"    return self.run(*args, **kwargs)\n           ^^^^^^^^^^^^^^^^^^^^^^^^^\n"
)


def to_json(letter: DeadLetter) -> str:
    """The stored record: the death, and what listing shows of the message."""
    record = {key: value for key, value in letter.as_dict().items() if key not in _USUAL or value != _USUAL[key]}
    # The id is the record's own key, the score tells when, and its place in which DLQ.
    for key in ("id", "dlq", "died_at"):
        del record[key]
    for key, other in (("root_id", "task_id"), ("routing_key", "queue")):
        if record[key] == record[other]:
            del record[key]
    if letter.exception:
        record["exception"] = _deflated(letter.exception)
    if letter.redacted:
        record["redacted"] = letter.redacted
    return json.dumps(record, separators=(",", ":"), default=str)


def _deflated(exception: Mapping[str, str]) -> dict[str, str]:
    text = exception["traceback"].encode("utf-8", "surrogatepass")
    if len(text) < 64:
        return dict(exception)
    squeeze = zlib.compressobj(wbits=-zlib.MAX_WBITS, zdict=_dictionary(exception))
    packed = base64.b64encode(squeeze.compress(text) + squeeze.flush()).decode()
    return {"type": exception["type"], "message": exception["message"], _DEFLATED: packed}


def _dictionary(exception: Mapping[str, Any]) -> bytes:
    """What the traceback's last line says is in it too."""
    name = str(exception["type"]).rsplit(".", 1)[-1]
    return _KNOWN + f"{name}: {exception['message']}\n".encode("utf-8", "surrogatepass")


def inflated(exception: Any) -> Any:
    """An exception as a record holds it, with its traceback; what cannot be read has none."""
    if not isinstance(exception, dict) or not isinstance(packed := exception.get(_DEFLATED), str):
        return exception
    kept = {"type": exception.get("type", ""), "message": exception.get("message", "")}
    try:
        stretch = zlib.decompressobj(wbits=-zlib.MAX_WBITS, zdict=_dictionary(kept))
        # Of four bytes each at most: somebody else may have written it, to fill our memory.
        text = stretch.decompress(base64.b64decode(packed), 4 * MAX_TRACEBACK)
    except (ValueError, zlib.error):
        return kept
    return {**kept, "traceback": text.decode("utf-8", "replace")}


def read_fields(record: bytes | None) -> dict[str, Any] | None:
    """What a stored record says, its exception apart (see `inflated`); ``None`` if it is none."""
    try:
        fields, end = decode(text := (record or b"{}").decode(), 0)
        if end != len(text):
            raise ValueError
    except (ValueError, StopIteration, RecursionError):
        try:  # not written as we do, but perhaps with blanks around it, or in another encoding
            fields = json.loads(record or b"{}")
        except (ValueError, RecursionError):
            return None
    if not isinstance(fields, dict):
        return None
    if fields:
        for key, other in (("root_id", "task_id"), ("routing_key", "queue")):
            if key not in fields:
                fields[key] = fields.get(other)
    return fields
