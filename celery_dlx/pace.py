"""So many letters per second, and no more (pure)."""

from __future__ import annotations

import time
from collections.abc import Callable

#: What may be made up for, in seconds; as many letters share a batch.
_MADE_UP = 0.1
#: Between looks at whether it is over, in seconds.
_LOOK_EVERY = 0.1


class Pace:
    """The turns of letters. ``rate``: letters per second; ``None``: as fast as they go."""

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self._next_at = 0.0

    def batch(self, most: int) -> int:
        """How many letters may leave at once."""
        return max(1, min(most, int(self.rate * _MADE_UP))) if self.rate else most

    def wait(self, over: Callable[[], bool]) -> bool:
        """Wait for the next letter's turn; whether it may go, for ``over`` may say that none may any more."""
        if self.rate:
            now = time.monotonic()
            # What waiting for the broker cost is made up for, but not the time before the first letter.
            earliest = now - max(_MADE_UP, 1 / self.rate)
            self._next_at = max(self._next_at + 1 / self.rate, earliest) if self._next_at else now
            while (left := self._next_at - time.monotonic()) > 0:
                if over():
                    return False
                time.sleep(min(left, _LOOK_EVERY))
        return not over()
