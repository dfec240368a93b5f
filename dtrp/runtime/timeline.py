"""What each stage did when, as a file for Perfetto or chrome://tracing (Chrome's trace-event format)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

from ..files import write_text
from .events import Event


def write_timeline(path: str | os.PathLike[str], events: Iterable[Event]) -> None:
    """Write events as complete ("X") trace events, one track per stage; times in microseconds."""
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
