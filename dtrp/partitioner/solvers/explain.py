"""In words: why a partition is not faster, and what it would take where none fits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from dtrp.errors import InfeasiblePlanError
from dtrp.partitioner.units import duration

from .engine import Solution
from .loads import Loads, evaluate
from .problem import Problem


def reason(problem: Problem, solution: Solution, loads: Loads) -> str:
    """Why the slowest stage is not faster."""
    stage = int(np.argmax(loads.load))
    parts = (float(part[stage]) for part in (loads.compute, loads.time_in, loads.time_out))
    _, text = slowest(stage, loads.max_load, *parts)
    bound = solution.bound
    if bound.kind == "group":
        alone = f"{describe_group(problem, bound.group)} cannot be split"
        if solution.optimal:
            return f"{text}; {alone} and needs that long by itself"
        return f"{text}; {alone} and needs {duration(bound.value)} by itself"
    if solution.optimal:
        return f"{text}; no partition is faster"
    return f"{text}; no partition is faster than {duration(bound.value)}"


def slowest(stage: int, load: float, compute: float, time_in: float, time_out: float) -> tuple[str, str]:
    """What the slowest stage does most of the time, and a sentence that says so; all in seconds."""
    parts = {"computing": compute, "receiving": time_in, "sending": time_out}
    most = max(parts, key=lambda name: parts[name])
    share = f"{100 * parts[most] / load:.0f} % of it {most}" if parts[most] < 0.995 * load else f"all {most}"
    return most, f"stage {stage} is the slowest ({duration(load)}, {share})"


def describe_group(problem: Problem, group: int) -> str:
    """A group by its nodes."""
    nodes = problem.members[group]
    if len(nodes) == 1:
        return f"node {nodes[0]!r}"
    shown = ", ".join(repr(u) for u in nodes[:3])
    return f"the group of {len(nodes)} nodes that stay together ({shown}{', ...' if len(nodes) > 3 else ''})"


def infeasible(problem: Problem, solution: Solution) -> InfeasiblePlanError:
    """The error for a problem without a partition: the smallest limits that can be met, and where."""
    k = problem.n_stages
    fit = solution.least_memory
    if fit is None or fit.stage is None:
        return InfeasiblePlanError(
            f"no partition into {k} stages keeps every pinned node on its stage and every stage non-empty "
            f"under the graph's precedence; drop a pin, use fewer stages or allow empty stages"
        )
    need = evaluate(replace(problem, kind="memory"), fit.stage)
    stage = int(np.argmax(need.load))
    held = problem.options[stage][int(need.option[stage])].memory
    mine = np.flatnonzero(fit.stage == stage)
    heaviest = int(mine[np.argmax(held[mine])])
    where = (
        f"stage {stage} would then hold {need.memory[stage]:,.15g} bytes, the largest part of it "
        f"{describe_group(problem, heaviest)} with {held[heaviest]:,.15g}"
    )
    limits = problem.limits
    if np.all(limits == limits[0]):
        least = _round_up(fit.load * float(limits[0]))
        proven = "" if fit.optimal else f" (proven: not below {fit.bound.value * limits[0]:,.15g})"
        return InfeasiblePlanError(
            f"no partition into {k} stages fits {limits[0]:,.15g} bytes per stage; the smallest limit that "
            f"can be met is {least:,.15g} bytes{proven}: {where}. Raise the limit or use more stages.",
            smallest_limit=least,
        )
    proven = "" if fit.optimal else f" (proven: not less than {fit.bound.value:.6g} times)"
    return InfeasiblePlanError(
        f"no partition into {k} stages fits the stages' memory limits; they would have to be {fit.load:.6g} "
        f"times as large{proven}: {where}, and its limit is {limits[stage]:,.15g}. "
        f"Raise the limits or use more stages."
    )


def _round_up(limit: float) -> float:
    """To a whole number of bytes: a limit of that size can be met for certain."""
    return float(math.ceil(limit)) if limit >= 1024 else limit
