"""What a simulation found, as plain data; printed as a table, drawn as throughput over numbers of stages."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table

from dtrp.errors import InfeasiblePlanError
from dtrp.names import one_of
from dtrp.partitioner.report_text import open_table, printed
from dtrp.partitioner.units import duration, size
from dtrp.schedule import ORDERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ALL = 0.97  # of the time: as good as always
_SHOWN = 24  # stages in the table


@dataclass(frozen=True)
class SimulatedStage:
    """One stage; of several replicas, the one that is busiest and holds most.

    Attributes
    ----------
    index : int
    busy, idle : float
        Shares of the time, 0 to 1: it works; it waits.
    work_time : float
        Seconds of work per mini-batch.
    staleness : int
        Updates between the two passes of a batch, at most.
    in_flight : int
        The most slots whose inputs it holds.
    recompute : bool
    peak_bytes : int
        At the fullest moment.
    """

    index: int
    busy: float
    work_time: float
    staleness: int
    in_flight: int
    recompute: bool
    peak_bytes: int

    @property
    def idle(self) -> float:
        """The share of the time in which it waits."""
        return 1.0 - self.busy


@dataclass(frozen=True)
class SimulatedLink:
    """One direction between two stages, and the share of the time in which it is busy."""

    source: int
    target: int
    busy: float


@dataclass(frozen=True)
class Simulation:
    """How a plan would train.

    Attributes
    ----------
    schedule, micro_batches, n_stages, replicas
        What was simulated.
    batch_time : float
        Seconds between two updates.
    throughput : float
        Mini-batches per second, of all replicas together.
    speedup : float
        Over one device of the kind that was planned for.
    fill_time : float
        Seconds until the first mini-batch has been through all stages.
    stages : tuple of SimulatedStage
    links : tuple of SimulatedLink
    memory : float or None
        Bytes that the cluster's devices have.
    """

    schedule: str
    micro_batches: int
    n_stages: int
    replicas: int
    batch_time: float
    throughput: float
    speedup: float
    fill_time: float
    stages: tuple[SimulatedStage, ...]
    links: tuple[SimulatedLink, ...] = field(repr=False)
    memory: float | None = None
    _over: Callable[[int, str], Simulation] | None = field(default=None, repr=False, compare=False)

    @property
    def idle(self) -> float:
        """The share of the time in which stages wait, on average."""
        return sum(s.idle for s in self.stages) / self.n_stages

    @property
    def limit(self) -> str:
        """What keeps it from being faster, in a sentence."""
        stage = max(self.stages, key=lambda s: s.busy)
        link = max(self.links, key=lambda s: s.busy, default=None)
        if stage.busy >= _ALL:
            return f"stage {stage.index} works all the time"
        if link is not None and link.busy >= _ALL:
            return f"the link from stage {link.source} to {link.target} is busy all the time"
        if self.schedule in ("1f1b", "gpipe", "bp"):
            more = "" if self.schedule == "bp" else "; more micro-batches shorten that"
            return f"stages wait while the pipeline fills and drains for each mini-batch{more}"
        hint = "; 'fig1' has more" if self.schedule == "lean" and self.n_stages > 2 else ""
        waits = "stages wait for messages, or for replicas"
        return f"{waits}: too few batches are in flight to hide that{hint}"

    def over(self, ks: Iterable[int], *, schedule: str | None = None) -> tuple[Simulation, ...]:
        """The same model on the same cluster, planned for other numbers of stages.

        Parameters
        ----------
        ks : iterable of int
            Numbers of stages; those that the model cannot be cut into, or that do not fit, are left out.
        schedule : str, optional
            Another order.

        Raises
        ------
        ValueError
            It was made from a bare plan or profile, which know one cut only.
        """
        if self._over is None:
            raise ValueError(
                "other numbers of stages need other plans, and a saved plan knows its own cut only: simulate "
                "the pipeline, or its report"
            )
        found, schedule = [], schedule or self.schedule
        one_of("schedule", schedule, ORDERS)
        for k in ks:
            try:
                found.append(self._over(k, schedule))
            except (InfeasiblePlanError, ValueError):
                continue
        return tuple(found)

    def plot(
        self, path: str | os.PathLike[str] | None = None, *, ks: Iterable[int] = (1, 2, 4, 8, 16)
    ) -> Figure:
        """A matplotlib figure of throughput over the number of stages, a line for each order; also saved to
        ``path`` if one is given.

        Raises
        ------
        ImportError
            matplotlib is missing; the message says what to install.
        ValueError
            As for `over`.
        """
        from .plot import figure

        drawn = figure(self, ks)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            drawn.savefig(path)
        return drawn

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; with ``idle`` and ``limit``."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "_over"}
        stages = [dataclasses.asdict(s) | {"idle": s.idle} for s in self.stages]
        links = [dataclasses.asdict(link) for link in self.links]
        return plain | {"stages": stages, "links": links, "idle": self.idle, "limit": self.limit}

    def __str__(self) -> str:
        parts = f" in {self.micro_batches} parts" if self.micro_batches > 1 else ""
        times = f"{self.replicas} times " if self.replicas > 1 else ""
        lines: list[RenderableType] = [
            f"{times}{self.n_stages} stages, {self.schedule}{parts}: one mini-batch per "
            f"{duration(self.batch_time / self.replicas)} (simulated), "
            f"{self.speedup:.2f} times as fast as one device",
            self._table(),
            f"idle {self.idle:.1%}   filled in {duration(self.fill_time)}   {self.limit}",
        ]
        if self.memory is not None and (full := [s for s in self.stages if s.peak_bytes > self.memory]):
            names = ", ".join(str(s.index) for s in full[:8]) + (", ..." if len(full) > 8 else "")
            lines.append(f"more memory than the {size(int(self.memory))} there are: stages {names}")
        return printed(*lines)

    __repr__ = __str__  # at a prompt, too

    def _table(self) -> Table:
        table = open_table()
        for name in ("stage", "work", "idle", "updates behind", "in flight", "peak", "recompute"):
            table.add_column(name, justify="right", no_wrap=True)
        slowest = max(self.stages, key=lambda s: s.busy).index
        half = _SHOWN // 2
        for stage in self.stages:
            near_end = stage.index < half or stage.index >= self.n_stages - half
            if self.n_stages > _SHOWN + 1 and not near_end and stage.index != slowest:
                if stage.index == half:
                    table.add_row("...")
                continue
            table.add_row(
                f"{stage.index}{' *' if stage.index == slowest else ''}",
                duration(stage.work_time),
                f"{stage.idle:.1%}",
                str(stage.staleness),
                str(stage.in_flight),
                size(stage.peak_bytes),
                "yes" if stage.recompute else "no",
            )
        return table
