"""The partition report as a matplotlib figure: time and memory per stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dtrp.partitioner.report_svg import MEMORY_COLOURS, TIME_COLOURS
from dtrp.partitioner.report_text import shares_cores

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

    from dtrp.partitioner.report import PartitionReport

_UNITS = (("GB", 1e-9), ("MB", 1e-6), ("kB", 1e-3), ("B", 1.0))
_LEGEND: Mapping[str, Any] = {"fontsize": "small", "frameon": False, "ncols": 4}


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
    drawn = Figure(figsize=(11, 2.2 + 0.35 * report.n_stages), layout="constrained")
    skip = "transfer" if report.overlaps else ""  # hidden behind computing: no part of the sum
    left, right = drawn.subplots(1, 2, sharey=True)
    _bars(left, [(s.index, s.time) for s in report.stages], TIME_COLOURS, 1e3, skip)
    if not shares_cores(report):  # else it is of the sum over them
        bound = report.lower_bound * 1e3
        left.axvline(bound, color="black", linestyle="--", linewidth=1, label="lower bound")
    title = f"{report.model}: balance {report.balance:.3f}, predicted speed-up {report.speedup:.2f}"
    left.set(xlabel="ms per tick", ylabel="stage", title=title)
    left.set_yticks(range(report.n_stages))
    left.invert_yaxis()
    most = max(s.peak_bytes for s in report.stages)
    unit, scale = next((pair for pair in _UNITS if most * pair[1] >= 1), _UNITS[-1])
    _bars(right, [(s.index, s.memory) for s in report.stages], MEMORY_COLOURS, scale)
    for stage in report.stages:
        if stage.memory_limit is not None and stage.memory_limit <= 2.5 * most:
            at = stage.memory_limit * scale
            right.plot([at, at], [stage.index - 0.45, stage.index + 0.45], color="firebrick")
    right.set(xlabel=f"{unit} at the fullest moment", title="memory")
    for axis, side in ((left, "left"), (right, "right")):
        place: dict[str, Any] = {**_LEGEND, "loc": f"outside lower {side}"}
        drawn.legend(*axis.get_legend_handles_labels(), **place)
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
