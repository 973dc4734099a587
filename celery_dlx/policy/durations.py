"""Durations and sizes as people write them in a policy file."""

from __future__ import annotations

import re

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}

DURATION_PATTERN = r"^\d[\d_]*(\.\d+)?\s*[smhd]?$"
SIZE_PATTERN = r"^\d[\d_]*\s*(B|KiB|MiB|GiB)?$"

_DURATION = re.compile(r"(?P<number>\d[\d_]*(?:\.\d+)?)\s*(?P<unit>[smhd]?)")
_SIZE = re.compile(r"(?P<number>\d[\d_]*)\s*(?P<unit>B|KiB|MiB|GiB|)")


def parse_duration(value: object) -> float:
    """Return seconds for ``30s``, ``5m``, ``12h``, ``30d`` or a plain number of seconds.

    Raises:
        ValueError: what was expected and what was found.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(value) if abs(value) < 1e12 else float("inf")
    else:
        found = _DURATION.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            hint = " (YAML 1.1 reads that as 60-based; write 90s or 2m)" if _is_sexagesimal(value) else ""
            raise ValueError(f"expected a duration such as 30s, 5m, 12h, 30d or seconds, found {value!r}{hint}")
        seconds = float(found["number"].replace("_", "")[:30]) * _SECONDS[found["unit"] or "s"]
    if not 0 < seconds < 1e10:
        raise ValueError(f"expected a duration above zero, found {value!r}")
    return seconds


def parse_size(value: object) -> int:
    """Return bytes for ``64KiB``, ``1GiB`` or a plain number of bytes.

    Raises:
        ValueError: what was expected and what was found.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        found = _SIZE.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            raise ValueError(f"expected a size such as 64KiB, 1GiB or bytes, found {value!r}")
        size = int(found["number"].replace("_", "")) * _BYTES[found["unit"]]
    if size <= 0:
        raise ValueError(f"expected a size above zero, found {value!r}")
    return size


def format_duration(seconds: float) -> str:
    """The shortest exact way to write a duration: ``30d``, ``90s``."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{int(seconds // length)}{unit}"
    return f"{seconds:g}s"


def _is_sexagesimal(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\d+(:\d\d?)+", value) is not None
