"""From a file's text to a validated `Policy`, with every problem at its `file:line:column`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from celery_dlx.errors import PolicyError, Problem
from celery_dlx.policy.model import REASONS, DeadLetterSection, PolicyFile, QueueSection, TopologySection
from celery_dlx.policy.positions import Document, read_document
from celery_dlx.policy.settings import Policy

_DEAD_LETTER_FIELDS = {
    "enabled": "enabled",
    "on": "reasons",
    "max_length": "dlq_max_length",
    "max_bytes": "dlq_max_bytes",
    "max_age": "dlq_max_age",
    "strategy": "strategy",
    "redact": "redact",
    "redact_stored": "redact_stored",
}
#: Settings are shared: what they hold must not change.
_FROZEN: dict[str, Callable[[Any], Any]] = {"on": frozenset, "redact": tuple}


def load_policy(path: str | Path) -> Policy:
    """Read and validate a policy file.

    Raises:
        PolicyError: the file cannot be read, or all that is wrong with it.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise PolicyError(str(path), [Problem(1, 1, f"cannot be read: {reason}; name an existing policy file")]) from None
    except UnicodeDecodeError as exc:
        raise PolicyError(str(path), [Problem(1, 1, f"expected UTF-8, found byte {exc.object[exc.start]:#04x}")]) from None
    return parse_policy(text, str(path))


def parse_policy(text: str, path: str) -> Policy:
    """Validate a policy's text; ``path`` only names it in errors.

    Raises:
        PolicyError: all that is wrong with it.
    """
    document = read_document(text)
    model = None
    if document.data is None and not document.problems:
        document.problem((), "expected a mapping that starts with `version: 1`, found nothing")
    elif document.data is not None:
        model = _validate(document)
    policy = _policy(model, path) if model else None
    if policy:
        _check_limits(document, policy)
    if document.problems or policy is None:
        raise PolicyError(path, document.problems)
    return policy


def _validate(document: Document) -> PolicyFile | None:
    if not isinstance(document.data, Mapping):
        document.problem((), f"expected a mapping that starts with `version: 1`, found {_found(document.data)}")
        return None
    # An empty section (`emails:`) says nothing, as `{}` does.
    data = _without_empty(document.data)
    try:
        return PolicyFile.model_validate(data)
    except ValidationError as exc:
        for error in exc.errors():
            _report(document, error)
        return None


def _without_empty(data: Mapping[str, Any]) -> dict[str, Any]:
    cleaned = {key: {} if value is None and key in ("topology", "defaults") else value for key, value in data.items()}
    queues = cleaned.get("queues")
    if isinstance(queues, Mapping):
        cleaned["queues"] = {name: {} if entry is None else entry for name, entry in queues.items()}
    elif queues is None and "queues" in cleaned:
        cleaned["queues"] = {}
    return cleaned


def _report(document: Document, error: Any) -> None:
    path = tuple(part for part in error["loc"] if part != "[key]")
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        known = _keys_at(path[:-1])
        document.problem(path, f"unknown key {path[-1]!r}{suggest(str(path[-1]), known)}", key=True)
    elif kind == "missing":
        document.problem(path[:-1], f"missing key {path[-1]!r}{' (write `version: 1`)' * (path == ('version',))}")
    elif kind == "value_error":
        near = suggest(value, REASONS, listed=False) if path[-2:-1] == ("on",) and isinstance(value, str) else ""
        document.problem(path, f"{_label(path)}: {error['ctx']['error']}{near}")
    else:
        document.problem(
            path, f"{_label(path)}: expected {_expected(path, error)}, found {_found(value)}{_hint(value, error)}"
        )


def _expected(path: tuple[Any, ...], error: Any) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "literal_error":
        return f"one of {_choices(path)}"
    if kind == "greater_than_equal":
        return f"a number of at least {context['ge']}"
    if kind == "string_pattern_mismatch":
        return "an http:// or https:// address"
    expected = {
        "bool_type": "true or false",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "string_type": "text",
        "string_too_short": "text that is not empty",
        "string_too_long": f"at most {context.get('max_length')} characters",
        "list_type": "a list",
        "dict_type": "a mapping",
        "model_type": "a mapping",
    }
    return expected.get(kind, str(error["msg"]))


def _choices(path: tuple[Any, ...]) -> str:
    if path and path[0] == "version":
        return "1"
    return {"type": "classic, quorum", "via": "arguments, policy", "strategy": "at-most-once, at-least-once"}.get(
        str(path[-1]), "the known values"
    )


def _hint(value: object, error: Any) -> str:
    if error["type"] == "bool_type" and isinstance(value, str) and value.lower() in ("yes", "on", "no", "off", "y", "n"):
        return f" (YAML 1.1's word; write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'})"
    return ""


def _found(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return repr(value)


def _label(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path) or "the policy"


def _keys_at(path: tuple[Any, ...]) -> Iterable[str]:
    if not path:
        return PolicyFile.model_fields
    model: type[BaseModel] = TopologySection if path[0] == "topology" else QueueSection
    return DeadLetterSection.model_fields if path[-1] == "dead_letter" and len(path) > 1 else model.model_fields


def suggest(word: str, known: Iterable[str], *, listed: bool = True) -> str:
    """`, did you mean 'x'?` for the nearest known word, else (if ``listed``) all of them."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f", did you mean {near[0]!r}?"
    return f", expected one of {', '.join(names)}" if listed else ""


def _policy(model: PolicyFile, path: str) -> Policy:
    topology = model.topology
    return Policy(
        path=path,
        service=model.service,
        exchange=topology.exchange,
        queue_template=topology.queue,
        via=topology.via,
        management_url=topology.management_url,
        defaults=_says(model.defaults),
        queues=None if model.queues is None else {name: _says(entry) for name, entry in model.queues.items()},
    )


def _says(section: QueueSection) -> dict[str, Any]:
    """What a section sets, under the names of `QueueSettings`."""
    says = section.model_dump(exclude_none=True, exclude={"dead_letter"})
    if section.dead_letter is not None:
        for key, value in section.dead_letter.model_dump(exclude_none=True).items():
            says[_DEAD_LETTER_FIELDS[key]] = _FROZEN[key](value) if key in _FROZEN else value
    return says


def _check_limits(document: Document, policy: Policy) -> None:
    if policy.queues is not None and not policy.queues:
        document.problem(("queues",), 'queues: expected at least one queue, found none; write `"*": {}` for every queue')
    entries: dict[tuple[str, ...], Mapping[str, Any]] = {
        ("queues", name): says for name, says in (policy.queues or {}).items()
    }
    places: dict[tuple[str, ...], Mapping[str, Any]] = {("defaults",): {}, **entries}
    for where, says in places.items():
        settings = policy.effective("", says)
        if settings.time_limit and settings.soft_time_limit and settings.soft_time_limit >= settings.time_limit:
            document.problem(
                (*where, "soft_time_limit"),
                f"{_label(where)}: expected soft_time_limit below time_limit ({settings.time_limit:g}s), "
                f"found {settings.soft_time_limit:g}s: the task would be killed before it is told",
            )
