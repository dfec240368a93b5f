"""What a stage did when: the raw material of statistics and tests of the schedule, and a file to look at."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import NamedTuple

from ..files import write_text


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


def write_timeline(path: str | os.PathLike[str], events: Iterable[Event]) -> None:
    """Write events for Perfetto or chrome://tracing (complete "X" ones of Chrome's format), a track
    per stage; times in microseconds."""
    events = sorted(events, key=lambda e: (e.stage, e.start))
    origin = min((e.start for e in events), default=0.0)
    rows: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": k, "args": {"name": f"stage {k}"}}
        for k in sorted({e.stage for e in events})
    ]
    rows += [
        {
            "ph": "X",
            "name": e.kind if e.batch < 0 else f"{e.kind} {e.batch}",
            "cat": e.kind,
            "pid": e.stage,
            "tid": 0,
            "ts": (e.start - origin) * 1e6,
            "dur": (e.end - e.start) * 1e6,
            "args": {"tick": e.tick, "batch": e.batch, "version": e.version, "stashed": e.stashed},
        }
        for e in events
    ]
    write_text(path, json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"}))
