"""The capture matrix: every way for a message to end, and the one dead letter it must leave (or none)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from raw import Sender

ALIVE = None


@dataclass(frozen=True)
class Row:
    """``early`` and ``late``: the reason expected with early and with late acknowledgement; ``None``: no letter."""

    name: str
    send: Callable[[Sender, str], object]
    early: str | None
    late: str | None
    #: Lines the tasks note meanwhile, where that is part of the proof: (early, late).
    runs: tuple[int, int] | None = None
    only: str = ""
    #: Needs a pool of processes.
    prefork: bool = False

    def queue(self, run: str) -> str:
        """Each run of the matrix has queues of its own."""
        return f"{run}.{self.name}"

    def expected(self, late: bool) -> str | None:
        return self.late if late else self.early


def task(name: str, *args: object, **headers: object) -> Callable[[Sender, str], object]:
    return lambda sender, queue: sender.task(queue, f"matrix_app.{name}", list(args), **headers)


def raw(**parts: object) -> Callable[[Sender, str], object]:
    return lambda sender, queue: sender.task(queue, **parts)


def item(data: bytes) -> Callable[[Sender, str], object]:
    return lambda sender, queue: sender.item(queue, data)


def both(name: str, send: Callable, reason: str | None, **more: object) -> Row:
    return Row(name, send, reason, reason, **more)  # type: ignore[arg-type]


def no_header(sender: Sender, queue: str) -> None:
    sender.message(queue, b'{"hello": 1}', {}, "application/json", "utf-8", {})


def protocol_1(**changes: object) -> Callable[[Sender, str], object]:
    body = {"task": "matrix_app.fail", "id": "old-1", "args": [], "kwargs": {}, "retries": 0, **changes}
    return lambda sender, queue: sender.message(queue, json.dumps(body).encode(), {}, "application/json", "utf-8", {})


ROWS = [
    # outcomes of tasks
    both("ok", task("ok"), ALIVE),
    both("fail", task("fail"), "failure"),
    both("retries", task("retries"), "retries_exhausted"),
    both("retries_without_exception", task("retries_without_exception"), "retries_exhausted"),
    both("autoretry", task("autoretry"), "retries_exhausted"),
    both("succeeds_at_second_try", task("succeeds_at_second_try"), ALIVE),
    both("publish_fails_in_retry", task("publish_fails_in_retry"), "rejected"),
    both("reject", task("reject"), "rejected"),
    Row("reject_requeue", task("reject_requeue"), "rejected", "max_deliveries"),
    both("ignore", task("ignore"), ALIVE),
    both("soft", task("soft"), "soft_time_limit", prefork=True),
    both("hard", task("hard"), "time_limit", prefork=True),
    both("killed", task("killed"), "worker_lost", prefork=True),
    Row("killed_rwl", task("killed"), "worker_lost", "max_deliveries", prefork=True),
    both("exits", task("exits"), "worker_lost", prefork=True),
    both("memory", task("memory"), "failure"),
    both("not_picklable", task("not_picklable"), "failure"),
    both("not_printable", task("not_printable"), "failure"),
    both("huge_traceback", task("huge_traceback"), "failure"),
    both("deep_traceback", task("deep_traceback"), "failure"),
    both("surrogate", task("surrogate"), "failure"),
    both("base_exception", task("base_exception"), "failure", prefork=True),
    both("wrong_arguments", raw(name="matrix_app.fail", args=[1, 2, 3, 4]), "failure"),
    # messages
    both("bad_json", raw(body=b"{not json"), "undecodable"),
    both("bad_utf8", raw(body=b'["\xff"]'), "undecodable"),
    both("bad_compression", raw(compression="application/x-gzip"), "undecodable"),
    both("unknown_compression", raw(compression="no-such-codec"), "undecodable"),
    both("bad_pickle", raw(content_type="application/x-python-serialize", encoding="binary"), "content_disallowed"),
    both("unknown_content", raw(content_type="application/x-nope"), "content_disallowed"),
    both("no_task_header", no_header, "malformed"),
    both("unregistered", raw(name="shop.gone"), "unregistered"),
    both("task_is_a_number", raw(name=5), "unregistered"),
    both("task_is_a_list", raw(name=[1]), "malformed"),
    both("unregistered_without_id", raw(name="shop.gone", drop=("id",)), "unregistered"),
    both("bad_eta", raw(eta="soon"), "malformed"),
    both("far_eta", raw(eta="9999-12-31T23:59:59-12:00"), "malformed"),
    both("bad_expires", raw(expires="never"), "malformed"),
    both("bad_timelimit", raw(timelimit="abc"), "malformed"),
    both("kwargs_is_a_list", raw(kwargs=[1]), "malformed"),
    both("args_is_a_number", raw(args=5), "malformed"),
    both("embed_is_a_list", raw(body=b"[[], {}, [1]]"), "malformed"),
    both("no_id", raw(drop=("id",)), "malformed"),
    both("id_is_a_list", raw(id=[1]), "malformed"),
    both("body_number", raw(body=b"5"), "malformed"),
    both("body_null", raw(body=b"null"), "malformed"),
    both("body_empty", raw(body=b""), "malformed"),
    both("body_text", raw(body=b'"hello"'), "malformed"),
    both("body_mapping", raw(body=b"{}"), "malformed"),
    both("body_two", raw(body=b"[[], {}]"), "malformed"),
    both("no_content_type", raw(content_type=None, encoding=None), "malformed"),
    both("expired", raw(expires="2020-01-01T00:00:00+00:00"), "expired"),
    both("old_protocol", protocol_1(), "failure"),
    both("old_protocol_args", protocol_1(args=5), "malformed"),
    both("old_protocol_timelimit", protocol_1(timelimit=[1, 2, 3]), "malformed"),
    both("old_protocol_without_id", lambda s, q: s.message(
        q, b'{"task": "matrix_app.ok"}', {}, "application/json", "utf-8", {}), "malformed"),
    # what only a Redis list can hold
    both("item_not_json", item(b"garbage \xff\x00"), "malformed", only="redis"),
    both("item_list", item(b"[1, 2]"), "malformed", only="redis"),
    both("item_number", item(b"5"), "malformed", only="redis"),
    both("item_without_properties", item(b'{"body": "x", "headers": {}}'), "malformed", only="redis"),
    both("item_bad_base64", item(
        b'{"body": "!!", "headers": {}, "properties": {"delivery_tag": "x", "body_encoding": "base64",'
        b' "delivery_info": {}}}'), "malformed", only="redis"),
    both("item_headers_list", item(
        b'{"body": "", "headers": [1], "properties": {"delivery_tag": "x", "delivery_info": {}}}'),
        "malformed", only="redis"),
    both("odd_tag_of_a_returned_one", raw(properties={"delivery_tag": "\ud800"}, redelivered=True), ALIVE, only="redis"),
    both("item_empty", item(b""), "malformed", only="redis"),
]  # fmt: skip


def rows_for(kind: str, pool: str) -> list[Row]:
    return [row for row in ROWS if row.only in ("", kind) and (pool == "prefork" or not row.prefork)]


def policy(run: str) -> str:
    """Every row's queue by name: on RabbitMQ `dlx list` without a queue looks at those that app or policy name."""
    lines = ["version: 1", "service: matrix", "defaults: {max_deliveries: 3}", "queues:"]
    for row in ROWS:
        lines.append(f"  {row.queue(run)}: " + ("{reject_on_worker_lost: true}" if row.name == "killed_rwl" else "{}"))
    return "\n".join(lines) + "\n"
