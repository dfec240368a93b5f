"""The partition report as text, by rich."""

from __future__ import annotations

import io
import shutil
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dtrp.partitioner.report_parts import recomputes
from dtrp.partitioner.units import count, duration, size

if TYPE_CHECKING:
    from dtrp.partitioner.report import PartitionReport
    from dtrp.partitioner.report_parts import Scaling, StageReport

_WIDTH, _NARROW = 120, 80


def _width() -> int:
    return min(_WIDTH, max(_NARROW, shutil.get_terminal_size((_WIDTH, 24)).columns))


def open_table() -> Table:
    """A table, without lines between its columns where the terminal is narrow."""
    narrow: dict[str, Any] = {"box": None, "padding": (0, 1, 0, 0), "pad_edge": False}
    return Table(**narrow if _width() < _WIDTH else {})


def printed(*parts: RenderableType) -> str:
    """As text without colours, no wider than the terminal, if that has at least 80 columns."""
    out = io.StringIO()
    console = Console(file=out, width=_width(), color_system=None, highlight=False, emoji=False, markup=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def text(report: PartitionReport) -> str:
    """The report without colours."""
    return printed(renderable(report))


def renderable(report: PartitionReport) -> RenderableType:
    """The report for a rich console."""
    table = open_table()
    table.add_column("stage", justify="right", no_wrap=True)
    table.add_column("device", overflow="fold", max_width=14)
    narrow = _width() < _WIDTH  # what stages hold stands below the table then
    if not narrow:
        table.add_column("holds", ratio=1, overflow="fold", max_width=34)
    for name in ("params", "GFLOP", "in", "out", "tick", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("recompute", no_wrap=True)
    for stage in report.stages:
        slowest = stage.index == report.bottleneck and len(report.stages) > 1
        table.add_row(
            f"{stage.index}{' *' if slowest else ''}",
            Text(stage.device),
            *([] if narrow else [Text(_holds(stage))]),
            count(stage.params),
            f"{stage.flops / 1e9:.2f}",
            size(stage.input_bytes),
            size(stage.output_bytes),
            duration(stage.tick_time),
            size(stage.peak_bytes),
            recomputes(stage),
            style="bold" if slowest else "",
        )
    head = Text(f"{report.model}: {len(report.stages)} stage{'s' if len(report.stages) != 1 else ''}, ")
    head.append(f"one batch per {duration(report.tick_time)} (predicted), ")
    head.append(f"{report.speedup:.2f} times as fast as one device")
    lines: list[RenderableType] = [head, table]
    if narrow:
        lines += [Text(f"stage {stage.index} holds {_holds(stage)}") for stage in report.stages]
    lines.append(
        Text(
            f"balance {report.balance:.3f}   lower bound {duration(report.lower_bound)}   "
            f"gap {gap(report)}   over cuts {size(report.cut_bytes)} per batch"
        )
    )
    if len(report.stages) > 1:
        lines.append(Text(f"* {explained(report)}"))
    how = f"Captured by {report.method}; costs {report.costs}; planned by {report.engine or '-'}."
    lines.append(Text(how))
    for module, reason in report.kept_whole:
        lines.append(Text(f"Kept whole: {module}: {reason}"))
    lines += [Text(f"Note: {note}") for note in report.notes]
    return Group(*lines)


def _holds(stage: StageReport) -> str:
    names = stage.holds
    if len(names) <= 6:
        return ", ".join(names)
    return f"{', '.join(names[:3])}, ... {len(names) - 5} more ..., {', '.join(names[-2:])}"


def explained(report: PartitionReport) -> str:
    """Why it is not faster."""
    if report.speedup >= 1:
        return report.reason
    return (
        f"{report.reason} Training on one device would be faster: sending, and what the stages do besides "
        f"computing, costs more than sharing the work saves."
    )


def shares_cores(report: PartitionReport) -> bool:
    """Whether a batch takes longer than the slowest stage, since not all of them run at a time."""
    return report.tick_time > 1.001 * max(stage.tick_time for stage in report.stages)


def gap(report: PartitionReport) -> str:
    """The gap in percent; certified optimal plans say so. What sharing cores costs no other cut can save."""
    value = report.gap
    if shares_cores(report):
        return "- (cores are shared)"
    if value <= 1e-6:
        return "0 % (optimal)"
    percent = f"{100 * value:.2g}" if value < 1 else f"{100 * value:.0f}"
    return "unknown" if value == float("inf") else f"{percent} %"


def comparison(points: Sequence[Scaling], impossible: Collection[int]) -> str:
    """Other numbers of stages, one per line."""
    lines = ["stages     one batch per   speed-up   balance"]
    lines += [
        f"{p.n_stages:6d} {duration(p.tick_time):>17} {p.speedup:10.2f} {p.balance:9.3f}" for p in points
    ]
    for p in points:
        if len(p.orders) > 1:
            lines.append(
                f"\n{p.n_stages} stages: order, micro-batches   one batch per   stale by   fullest stage"
            )
            lines += [
                f"{o.order:>22} {o.micro_batches:>10d} {duration(o.seconds):>17} {o.staleness:10d} "
                f"{size(o.peak_bytes):>15}"
                for o in p.orders
            ]
    lines += [f"{k:6d}   impossible: too few nodes, or too little memory" for k in sorted(impossible)]
    return "\n".join(lines)
