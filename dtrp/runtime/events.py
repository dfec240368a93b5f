"""What a stage did when: the raw material of timelines, statistics and tests of the schedule."""

from __future__ import annotations

from typing import NamedTuple


class Event(NamedTuple):
    """One thing that a stage did.

    ``kind`` is ``forward``, ``recompute``, ``backward``, ``step``, ``send`` or ``wait``; ``version`` is the
    paper's index of the weights that it used (W_j: after j - 1 local updates, filling included).
    """

    stage: int
    tick: int
    kind: str
    batch: int  # -1 where no batch is meant
    version: int
    start: float  # seconds, time.perf_counter of the stage's process
    end: float
    stashed: int  # batches in flight when it ended
    graphs: int  # live autograd graphs when it ended
