"""A stage's clock and counters: what it is doing (for the watchdog), what it did (events), what it cost."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections import Counter, defaultdict, deque
from pathlib import Path

import torch

from .. import accelerators
from .events import Event
from .links import Channel
from .stats import WORK, StageStats

Mark = float | tuple[float, torch.Event]
Wait = tuple[float, float]  # when it began; processor time when this stage was last at it
_before_stages: dict[int, int] = {}  # by process: bytes that it held before its first one


class Meter:
    """Measures one stage.

    Work on an accelerator goes on after the call that started it has returned: there it is timed by events
    on the device, which are read when they have passed, never waited for.
    """

    def __init__(
        self, stage: int, n_stages: int, device: torch.device, *, record: bool, holds: int = 0
    ) -> None:
        self.stage, self.is_last, self.device = stage, stage == n_stages - 1, device
        self.events: list[Event] | None = [] if record else None
        self.doing: str | Channel = "idle"
        self.done = 0  # things, for whoever wants to know whether it goes on
        self.rounds = 0
        self.stashed = self.graphs = 0  # now
        self.most_stashed = self.most_graphs = 0
        self._on_device = accelerators.is_one(device)
        # A stage that takes the place of another meets a process that has held that one.
        before = 0 if self._on_device else max(0, resident("VmRSS:") - holds)
        self._before = _before_stages.setdefault(os.getpid(), before)
        self._seconds: defaultdict[str, float] = defaultdict(float)  # by kind
        self._counts: Counter[str] = Counter()
        self._working_rounds = 0
        self._worked = False
        self._depths = 0
        self._began: float | None = None
        self._round = self._ended = 0.0  # when it began; when the last one ended
        self._cpu = self._cpu_round = 0.0  # processor time: of all rounds; when this one began
        self._apart = 0.0  # seconds of this round that are not the loop's own
        self._marks: deque[tuple[torch.Event, torch.Event, str]] = deque()

    @property
    def phase(self) -> str:
        """What the stage is doing, in words."""
        doing = self.doing
        if isinstance(doing, Channel):
            return f"waiting for stage {doing.source} ({doing.kind})"
        return doing

    def begin_round(self, depth: int) -> None:
        """A round begins, with ``depth`` messages at hand."""
        self._round, self._cpu_round, self._apart = time.perf_counter(), time.thread_time(), 0.0
        if self._began is None:
            self._began = self._round
        self._depths += depth
        self._worked = False

    def end_round(self) -> None:
        """The round is over."""
        self._working_rounds += self._worked
        self._ended = time.perf_counter()
        self._seconds["loop"] += self._ended - self._round - self._apart
        self._cpu += time.thread_time() - self._cpu_round
        self.rounds += 1
        self.doing = "idle"

    def stash(self, slots: int) -> None:
        """So many slots' inputs are held."""
        self.stashed = slots
        self.most_stashed = max(self.most_stashed, slots)

    def graph(self, change: int) -> None:
        """A graph came into being (+1) or went (-1)."""
        self.graphs += change
        self.most_graphs = max(self.most_graphs, self.graphs)

    def start(self, kind: str) -> Mark:
        """Work of one kind begins."""
        self.doing = kind
        self._worked = True
        now = time.perf_counter()
        return (now, accelerators.mark(self.device, timed=True)) if self._on_device else now

    def stop(self, mark: Mark, kind: str, batch: int) -> None:
        """It ends."""
        end = time.perf_counter()
        self.done += 1
        if isinstance(mark, tuple):
            start = mark[0]
            self._marks.append((mark[1], accelerators.mark(self.device, timed=True), kind))
            self._read_marks()
        else:
            start = mark
            self._seconds[kind] += end - start
        self._counts[kind] += 1
        self._apart += end - start
        if self.events is not None:
            # W_j: after j - 1 local updates; local time also advances while the pipeline fills. A first
            # forward comes after its round's update, all else before it.
            version = self.rounds + (2 if kind == "forward" and not self.is_last else 1)
            self._note(kind, batch, version, start, end)

    def loss(self, begun: float) -> None:
        """A loss has been computed, which is a part of the last stage's forward."""
        self._counts["loss"] += 1
        self._seconds["loss"] += time.perf_counter() - begun

    def wait(self, channel: Channel) -> Wait:
        """Waiting for what another stage sends."""
        self.doing = channel
        return time.perf_counter(), time.thread_time()

    def resumed(self, since: Wait) -> Wait:
        """Other stages of this process have had their turn meanwhile."""
        now = time.thread_time()
        self._cpu -= now - since[1]
        return since[0], now

    def waited(self, since: Wait) -> None:
        """It has come; what that took of the processor was copying it out."""
        end, copied = time.perf_counter(), time.thread_time() - since[1]
        self._seconds["receive"] += copied
        self._seconds["wait"] += max(0.0, end - since[0] - copied)  # two clocks, of different steps
        self._counts["wait"] += 1
        self._apart += end - since[0]
        if self.events is not None:
            self._note("wait", -1, 0, since[0], end)

    def take_events(self) -> list[Event]:
        """What was noted since the last call."""
        taken, self.events = self.events or [], [] if self.events is not None else None
        return taken

    def stats(self) -> StageStats:
        """The measurements so far."""
        self._read_marks()
        wall = self._ended - self._began if self._began is not None else 0.0
        work = sum(seconds for kind, seconds in self._seconds.items() if kind in WORK)
        return StageStats(
            stage=self.stage,
            device=str(self.device),
            ticks=self.rounds,
            tick_time=work / max(1, self._working_rounds),
            busy=min(1.0, work / wall) if wall > 0 else 0.0,
            wait_time=self._seconds["wait"] / max(1, self.rounds),
            peak_memory=peak_memory(self.device),
            queue_depth=self._depths / max(1, self.rounds),
            most_stashed=self.most_stashed,
            most_graphs=self.most_graphs,
            seconds=dict(self._seconds),
            counts={**self._counts, "loop": self.rounds},
            cpu_time=self._cpu,
            memory_before=self._before,
        )

    def _note(self, kind: str, batch: int, version: int, start: float, end: float) -> None:
        assert self.events is not None
        tick = self.rounds + self.stage
        self.events.append(
            Event(self.stage, tick, kind, batch, version, start, end, self.stashed, self.graphs)
        )

    def _read_marks(self) -> None:
        while self._marks and self._marks[0][1].query():
            start, end, kind = self._marks.popleft()
            self._seconds[kind] += accelerators.seconds(start, end)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most allocated on a device by this process; on CPU its largest resident size."""
    if accelerators.is_one(device):
        return accelerators.most_allocated(device)
    return resident("VmHWM:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def resident(what: str) -> int:
    """Bytes of this process's memory, as Linux counts them; 0 elsewhere. (getrusage's figure there includes
    what the parent process had.)"""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(what):
                return int(line.split()[1]) * 1024
    return 0
