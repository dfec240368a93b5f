"""Runs the engines one after the other on a problem: best partition so far, and how good it can get."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .bounds import Bound, simple_bound
from .clock import Clock
from .chains import ChainProgram, OutOfTime
from .downsets import enumerate_downsets
from .windows import Windows
from .intervals import IntervalProgram
from .loads import evaluate
from .orders import good_orders
from .problem import Ints, Problem

ENGINES = ("auto", "interval", "search")

# Two loads closer than this (relative) are the same load: what sums in another order differ by.
TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Solution:
    """The best partition found, if any, and a bound that holds for every partition."""

    stage: Ints | None
    load: float  # inf without a partition
    bound: Bound
    engine: str
    least_memory: Solution | None = None  # without a partition: the one that needs the smallest limits

    @property
    def optimal(self) -> bool:
        """Whether the bound says that no partition is better."""
        return self.load <= self.bound.value * (1 + TOLERANCE)


def solve(problem: Problem, *, engine: str, clock: Clock, seed: int) -> Solution:
    """Minimise the largest stage load.

    Parameters
    ----------
    problem : Problem
    engine : str
        One of `ENGINES`. ``"interval"`` cuts the given order only.
    clock : Clock
        The search stops when it expires, but not before one order has been cut.
    seed : int
        Of the random orders.

    Returns
    -------
    Solution
        Where the search for speed met no partition that fits, memory is minimised instead: ``stage is None``
        says that not even that one fits, and ``least_memory`` holds it. Its ``load`` is the factor by
        which the limits would have to grow.
    """
    solution = _minimise(problem, engine=engine, clock=clock, seed=seed)
    if solution.stage is not None or problem.kind == "memory":
        return solution
    fit = _minimise(replace(problem, kind="memory"), engine="auto", clock=Clock(clock.limit), seed=seed)
    if fit.stage is not None:
        load = evaluate(problem, fit.stage).max_load
        if np.isfinite(load):
            return Solution(fit.stage, load, solution.bound, "memory")
    return replace(solution, least_memory=fit)


def _minimise(problem: Problem, *, engine: str, clock: Clock, seed: int) -> Solution:
    bound = simple_bound(problem)
    best: Ints | None = None
    load, name = np.inf, "interval"
    for tried, order in enumerate(good_orders(problem, seed)):
        if tried and (engine == "interval" or clock.expired or load <= bound.value * (1 + TOLERANCE)):
            break
        if tried >= 12:
            break
        found = IntervalProgram(problem, order).solve(clock if tried else Clock(np.inf), below=load)
        if found is not None:
            exact = evaluate(problem, found[1]).max_load
            if exact < load:
                best, load = found[1], exact
                name = "interval" if tried == 0 else "search"
    if engine == "interval" or load <= bound.value * (1 + TOLERANCE):
        return Solution(best, load, bound, name)
    windows = Windows(problem)
    floor = bound.value
    for share in (0.02, 0.1, 0.3, 1.0):
        wanted = floor + share * (load - floor) if np.isfinite(load) else np.inf
        if wanted <= bound.value: continue
        member = enumerate_downsets(problem, windows, wanted, cap=300_000, clock=clock)
        if DEBUG: print("  wanted", wanted, "load", load, "family", None if member is None else len(member), clock.seconds)
        if member is None:
            break
        try:
            found = ChainProgram(problem, windows, member).solve(wanted, clock)
        except OutOfTime:
            break
        if DEBUG: print("  ->", None if found is None else found[0], clock.seconds)
        if found is not None:
            exact = evaluate(problem, found[1]).max_load
            if exact < load:
                best, load, name = found[1], exact, "downsets"
            bound = Bound(min(found[0],load), "downsets")
            break
        bound = Bound(min(wanted,load), "downsets")
    return Solution(best, load, bound, name)
DEBUG = False
