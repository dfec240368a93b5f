"""Wall-clock budget of an anytime search."""

from __future__ import annotations

import time


class Clock:
    """Time since construction against a limit in seconds."""

    def __init__(self, limit: float) -> None:
        self._start = time.perf_counter()
        self.limit = limit

    @property
    def seconds(self) -> float:
        """Seconds since construction."""
        return time.perf_counter() - self._start

    @property
    def left(self) -> float:
        """Seconds left, 0 if none."""
        return max(0.0, self.limit - self.seconds)

    @property
    def expired(self) -> bool:
        """Whether the limit has passed."""
        return self.seconds >= self.limit

    def within(self, share: float) -> Clock:
        """A clock for a part of what is left."""
        return Clock(self.left * share)
