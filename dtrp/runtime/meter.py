"""A stage's clock and counters: what it is doing (for the watchdog), what it did (events), what it cost."""

from __future__ import annotations

import contextlib
import resource
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .events import Event
from .schedule import weight_version
from .stats import StageStats


class Meter:
    """Measures one stage.

    Work on a CUDA device goes on after the call that started it has returned: there it is timed by events
    on the device, which are read when they have passed, never waited for.
    """

    def __init__(self, stage: int, n_stages: int, device: torch.device, *, record: bool) -> None:
        self.stage, self.is_last, self.device = stage, stage == n_stages - 1, device
        self.events: list[Event] | None = [] if record else None
        self.phase = "idle"
        self.tick = 0
        self.stashed = self.graphs = 0  # now
        self.most_stashed = self.most_graphs = 0
        self._busy = self._waited = 0.0
        self._working_ticks = 0
        self._worked = False
        self._depths = 0
        self._began: float | None = None
        self._ended = 0.0
        self._marks: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def begin_tick(self, depth: int) -> None:
        """A tick begins, with ``depth`` messages at hand."""
        if self._began is None:
            self._began = time.perf_counter()
        self._depths += depth
        self._worked = False

    def end_tick(self) -> None:
        """The tick is over."""
        self._working_ticks += self._worked
        self._ended = time.perf_counter()
        self.tick += 1
        self.phase = "idle"

    def stash(self, batches: int) -> None:
        """So many batches' inputs are held."""
        self.stashed = batches
        self.most_stashed = max(self.most_stashed, batches)

    def graph(self, change: int) -> None:
        """A graph came into being (+1) or went (-1)."""
        self.graphs += change
        self.most_graphs = max(self.most_graphs, self.graphs)

    @contextmanager
    def timed(self, kind: str, batch: int) -> Iterator[None]:
        """Work of one kind."""
        self.phase = kind
        self._worked = True
        mark = self._mark() if self.device.type == "cuda" else None
        start = time.perf_counter()
        yield
        end = time.perf_counter()
        if mark is None:
            self._busy += end - start
        else:
            self._marks.append((mark, self._mark()))
            self._read_marks()
        version = weight_version(self.stage, self.tick)
        self._note(
            kind, batch, version if kind == "forward" and not self.is_last else version - 1, start, end
        )

    @contextmanager
    def waiting(self, kind: str, other: int) -> Iterator[None]:
        """Waiting for what another stage sends."""
        self.phase = f"waiting for stage {other} ({kind})"
        start = time.perf_counter()
        yield
        end = time.perf_counter()
        self._waited += end - start
        self._note("wait", -1, 0, start, end)

    def take_events(self) -> list[Event]:
        """What was noted since the last call."""
        taken, self.events = self.events or [], [] if self.events is not None else None
        return taken

    def stats(self) -> StageStats:
        """The measurements so far."""
        self._read_marks()
        wall = self._ended - self._began if self._began is not None else 0.0
        return StageStats(
            stage=self.stage,
            device=str(self.device),
            ticks=self.tick,
            tick_time=self._busy / max(1, self._working_ticks),
            busy=min(1.0, self._busy / wall) if wall > 0 else 0.0,
            wait_time=self._waited / max(1, self.tick),
            peak_memory=peak_memory(self.device),
            queue_depth=self._depths / max(1, self.tick),
            most_stashed=self.most_stashed,
            most_graphs=self.most_graphs,
        )

    def _note(self, kind: str, batch: int, version: int, start: float, end: float) -> None:
        if self.events is not None:
            self.events.append(
                Event(self.stage, self.tick, kind, batch, version, start, end, self.stashed, self.graphs)
            )

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _read_marks(self) -> None:
        while self._marks and self._marks[0][1].query():  # type: ignore[no-untyped-call]
            start, end = self._marks.popleft()
            self._busy += start.elapsed_time(end) / 1e3


def peak_memory(device: torch.device) -> int:
    """Bytes: the most allocated on a CUDA device by this process; on CPU its largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # Linux; getrusage's figure there includes what the parent process had
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes
