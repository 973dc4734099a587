"""Reads YAML and remembers where everything stood, so that errors can say `file:line:column`.

Scalars follow YAML 1.2's core schema: `no`, `on` and `1:30` are text, not booleans and sexagesimal numbers
(https://yaml.org/spec/1.2.2/#103-core-schema). Duplicate keys are problems, not silently the last one.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from celery_dlx.errors import Problem

Path = tuple[Any, ...]
_MAX_DEPTH = 20
#: Values in all, those of an alias counted each time: aliases of aliases make billions out of a few lines.
_MAX_VALUES = 50_000


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789"),
    ("float", r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$", "-+0123456789."),
    ("merge", r"^(?:<<)$", "<"),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), [*_first] + [""] * (_tag == "null"))


class Document:
    """A YAML document as plain data, with the position of every key and value."""

    def __init__(self) -> None:
        self.data: Any = None
        self.problems: list[Problem] = []
        self.values = 0
        self._keys: dict[Path, yaml.Mark] = {}
        self._values: dict[Path, yaml.Mark] = {}

    def position(self, path: Path, *, key: bool = False) -> tuple[int, int]:
        """Line and column, from 1, of the value at a path (or of its key); of the nearest parent if it has none."""
        for marks in (self._keys, self._values) if key else (self._values, self._keys):
            if path in marks:
                mark = marks[path]
                return mark.line + 1, mark.column + 1
        return self.position(path[:-1]) if path else (1, 1)

    def problem(self, path: Path, message: str, *, key: bool = False) -> None:
        self.problems.append(Problem(*self.position(path, key=key), message))


def read_document(text: str) -> Document:
    """Parse one YAML document; what is wrong with it is in ``problems``, never raised."""
    document = Document()
    try:
        loader = _CoreLoader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                document.data = _walk(document, loader, node, ())
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        document.problems.append(Problem(line, column, f"not valid YAML: {exc.problem or exc.context}"))
    except RecursionError:  # PyYAML's own, before we see a node
        document.problems.append(Problem(1, 1, f"nested more than {_MAX_DEPTH} levels deep"))
    except (yaml.YAMLError, ValueError) as exc:  # e.g. control characters, which have no mark
        document.problems.append(Problem(1, 1, f"not valid YAML: {str(exc).splitlines()[0]}"))
    return document


def _walk(document: Document, loader: _CoreLoader, node: yaml.Node, path: Path) -> Any:
    document._values.setdefault(path, node.start_mark)
    _count(document, node)
    if len(path) > _MAX_DEPTH:  # an alias that contains itself, or nesting no policy needs
        document.problem(path, f"nested more than {_MAX_DEPTH} levels deep")
        return None
    if isinstance(node, yaml.MappingNode):
        return _walk_mapping(document, loader, node, path)
    if isinstance(node, yaml.SequenceNode):
        return [_walk(document, loader, item, (*path, index)) for index, item in enumerate(node.value)]
    try:
        return loader.construct_object(node)
    except yaml.YAMLError:
        raise
    except Exception as exc:  # noqa: BLE001 - PyYAML's constructors fail in their own ways, e.g. `!!bool maybe`
        document.problem(path, f"{node.value!r} is no {node.tag.rsplit(':', 1)[-1]} ({type(exc).__name__})")
        return None


def _count(document: Document, node: yaml.Node) -> None:
    document.values += 1
    if document.values > _MAX_VALUES:
        raise yaml.MarkedYAMLError(problem=f"more than {_MAX_VALUES} values", problem_mark=node.start_mark)


def _walk_mapping(document: Document, loader: _CoreLoader, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            merged |= _merge(document, loader, value_node, path)
            continue
        # Keys are taken as written: a queue may be called `no`, `1e3` or `0123`.
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if key is None:
            line, column = key_node.start_mark.line + 1, key_node.start_mark.column + 1
            document.problems.append(Problem(line, column, "expected a name as key, found a list or mapping"))
            continue
        inner = (*path, key)
        if key in found:
            first_line, first_column = document.position(inner, key=True)
            line, column = key_node.start_mark.line + 1, key_node.start_mark.column + 1
            document.problems.append(
                Problem(line, column, f"duplicate key {key!r}, first used at {first_line}:{first_column}")
            )
            continue
        document._keys[inner] = key_node.start_mark
        document._values[inner] = value_node.start_mark
        found[key] = _walk(document, loader, value_node, inner)
    return {**merged, **found}


def _merge(document: Document, loader: _CoreLoader, node: yaml.Node, path: Path) -> dict[str, Any]:
    """`<<: *anchor` and `<<: [*a, *b]`, earlier ones winning (https://yaml.org/type/merge.html)."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    merged: dict[str, Any] = {}
    for part in reversed(nodes):
        _count(document, part)
        if isinstance(part, yaml.MappingNode) and len(path) <= _MAX_DEPTH:
            merged |= _walk_mapping(document, loader, part, path)
        else:
            document.problem(path, "expected a mapping to merge with <<")
    return merged
