"""The partition report as a matplotlib figure: time and memory per stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dtrp.partitioner.report_svg import MEMORY_COLOURS, TIME_COLOURS
from dtrp.partitioner.report_text import shares_cores

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

    from dtrp.partitioner.report import PartitionReport


def figure(report: PartitionReport) -> Figure:
    """Stacked bars per stage, with the lower bound and the memory limits; tied to no display.

    Raises
    ------
    ImportError
        matplotlib is missing; the message says what to install.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError(
            "the report's figure needs matplotlib: pip install 'dtrp[plot]' (to_html needs nothing)"
        ) from e
    drawn = Figure(figsize=(11, 1.8 + 0.35 * report.n_stages), layout="constrained")
    skip = "transfer" if report.overlaps else ""  # hidden behind computing: no part of the sum
    left, right = drawn.subplots(1, 2, sharey=True)
    _bars(left, [(s.index, s.time) for s in report.stages], TIME_COLOURS, 1e3, skip)
    if not shares_cores(report):  # else it is of the sum over them
        bound = report.lower_bound * 1e3
        left.axvline(bound, color="black", linestyle="--", linewidth=1, label="lower bound")
    left.set(xlabel="ms per tick", ylabel="stage", title=f"{report.model}: balance {report.balance:.3f}")
    left.set_yticks(range(report.n_stages))
    left.invert_yaxis()
    _bars(right, [(s.index, s.memory) for s in report.stages], MEMORY_COLOURS, 1e-9)
    most = max(s.peak_bytes for s in report.stages)
    for stage in report.stages:
        if stage.memory_limit is not None and stage.memory_limit <= 2.5 * most:
            at = stage.memory_limit * 1e-9
            right.plot([at, at], [stage.index - 0.45, stage.index + 0.45], color="firebrick")
    right.set(xlabel="GB", title=f"predicted speed-up {report.speedup:.2f}")
    for axis in (left, right):
        axis.legend(fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=4)
    return drawn


def _bars(
    axis: Any,
    rows: list[tuple[int, Mapping[str, float]]] | list[tuple[int, Mapping[str, int]]],
    colours: Mapping[str, str],
    unit: float,
    skip: str = "",
) -> None:
    start = [0.0] * len(rows)
    for part, colour in colours.items():
        values = [parts.get(part, 0.0) * unit for _, parts in rows]
        if part == skip or not any(values):
            continue
        axis.barh([i for i, _ in rows], values, left=start, color=colour, label=part)
        start = [a + b for a, b in zip(start, values, strict=True)]
