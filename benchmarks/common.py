"""What benchmarks share: private brokers, modes that take turns, and a table of what is wanted beside what was found."""

from __future__ import annotations

import operator
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "integration"))

import servers  # noqa: E402

_WANTED = {"≥": operator.ge, "≤": operator.le}


@contextmanager
def private(kind: str) -> Iterator[Any]:
    """A broker of our own, or the one that ``DLX_TEST_REDIS`` or ``DLX_TEST_RABBITMQ`` names."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # in good order: nothing that was started stays
    broker = servers.start_broker(kind)
    try:
        yield broker
    finally:
        broker.stop()


def hiccup(seconds: float = 20.0) -> float:
    """The longest time, in seconds, that the machine does something else: what `redis-cli --intrinsic-latency` measures."""
    longest, last = 0.0, time.perf_counter()
    end = last + seconds
    while last < end:
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


def turns(rounds: int, modes: Sequence[str], measure: Callable[[str], float], label: str) -> dict[str, list[float]]:
    """What each mode reached in each round; every other round goes backwards."""
    found: dict[str, list[float]] = {mode: [] for mode in modes}
    for turn in range(rounds):
        for mode in modes if turn % 2 == 0 else reversed(modes):
            found[mode].append(measure(mode))
            print(f"  {label}, {mode}: {_text(found[mode][-1])}", file=sys.stderr)
    return found


def ratio(found: dict[str, list[float]], mode: str, other: str) -> float:
    """The median of each round's ratio: the machine drifts between rounds more than within one."""
    return statistics.median(a / b for a, b in zip(found[mode], found[other], strict=True))


def _text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Table:
    """Collects figures; nothing is asserted of them."""

    def __init__(self) -> None:
        self._rows = [("measured", "found", "unit", "wanted", "")]

    def add(self, what: str, found: float, unit: str = "", wanted: str = "", note: str = "") -> None:
        """``wanted``: ``≥ 0.9`` or ``≤ 50``, or nothing where only the figure is of interest."""
        if wanted:
            relation, limit = wanted.split()
            met = "yes" if _WANTED[relation](found, float(limit)) else "NO"
            note = f"{met}  {note}".rstrip()
        self._rows.append((what, _text(found), unit, wanted, note))
        print(f"  {what}: {_text(found)} {unit}", file=sys.stderr)

    def print(self) -> None:
        widths = [max(len(row[at]) for row in self._rows) for at in range(4)]
        for row in self._rows:
            cells = [
                row[0].ljust(widths[0]),
                row[1].rjust(widths[1]),
                row[2].ljust(widths[2]),
                row[3].ljust(widths[3]),
                row[4],
            ]
            print("  ".join(cells).rstrip())
