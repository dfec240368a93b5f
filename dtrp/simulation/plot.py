"""Throughput over the number of stages, as a matplotlib figure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dtrp.schedule import ORDERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .result import Simulation

_STYLES = ("o-", "o--", "o-", "o--", "o:")  # of those whose curves are often equal, later ones leave gaps


def figure(simulation: Simulation, ks: Iterable[int]) -> Figure:
    """A line per order; tied to no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("the simulation's figure needs matplotlib: pip install 'dtrp[plot]'") from e
    drawn = Figure(figsize=(7, 4.5), layout="constrained")
    axis = drawn.subplots()
    ks = sorted({*ks, simulation.n_stages})
    for order, style in zip(ORDERS, _STYLES, strict=True):
        points = simulation.over(ks, schedule=order)
        axis.plot([p.n_stages for p in points], [p.throughput for p in points], style, label=order)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, [str(k) for k in ks])
    parts = f", {simulation.micro_batches} micro-batches" if simulation.micro_batches > 1 else ""
    times = f", {simulation.replicas} replicas" if simulation.replicas > 1 else ""
    axis.set(xlabel=f"stages{times}", ylabel="mini-batches per second", title=f"simulated{parts}")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    return drawn
