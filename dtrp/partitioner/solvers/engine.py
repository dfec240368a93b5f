"""Runs the engines one after the other on a problem: best partition so far, and how good it can get."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from .bounds import Bound
from .clock import Clock
from .exact import bound_by_cores, certify
from .intervals import IntervalProgram
from .loads import evaluate
from .orders import good_orders
from .problem import Ints, Problem
from .reduce import reduce_problem
from .search import local_search
from .state import TOLERANCE, State
from .windows import Windows

ENGINES = ("auto", "interval", "search", "downsets")

_FIRST_ORDERS = 6
_PATIENCE = 12  # rounds of local search without success before other engines get their turn
_LARGE = 20_000  # groups beyond which tables of pairs would fill the memory
_SMALL = 40  # groups up to which nothing is gained by reducing first


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
    solution = _minimise(problem, engine, clock, seed)
    if solution.stage is not None:
        return solution
    fit = _minimise(replace(problem, kind="memory"), "auto", Clock(clock.limit), seed)
    if fit.stage is not None:
        load = evaluate(problem, fit.stage).max_load
        if np.isfinite(load):
            return Solution(fit.stage, load, solution.bound, "memory")
    return replace(solution, least_memory=fit)


def _minimise(problem: Problem, engine: str, clock: Clock, seed: int) -> Solution:
    state = State(problem)
    if engine == "interval":
        _cut_orders(state, [np.arange(problem.n)], clock)
    elif problem.n > _LARGE:
        orders = good_orders(problem, seed)
        _cut_orders(state, (order for order, _ in zip(orders, range(_FIRST_ORDERS), strict=False)), clock)
    elif problem.n <= _SMALL and not problem.allow_empty:
        _run(state, engine, clock, seed)
    else:
        # Reducing is safe where stages may stay empty; that they may only lowers the bound.
        reduced = reduce_problem(replace(problem, allow_empty=True))
        inner = State(reduced.problem)
        _run(inner, engine, clock.within(0.9) if not problem.allow_empty else clock, seed)
        state.raise_bound(inner.bound)
        stage = None if inner.stage is None else reduced.lift(inner.stage)
        if stage is not None and (problem.allow_empty or len(np.unique(stage)) == problem.n_stages):
            state.offer(stage, inner.engine)
        elif problem.n >= problem.n_stages:
            if stage is not None:  # an order in which its cuts exist; others may fill the empty stages
                _cut_orders(state, [np.lexsort((np.arange(problem.n), stage))], clock)
            _run(state, engine, clock, seed)
    return Solution(state.stage, state.load, state.bound, state.engine)


def _run(state: State, engine: str, clock: Clock, seed: int) -> None:
    """All engines on one problem."""
    orders = good_orders(state.problem, seed)
    _cut_orders(state, (order for order, _ in zip(orders, range(_FIRST_ORDERS), strict=False)), clock)
    if engine in ("auto", "downsets"):
        certify(state, clock, at_once=engine == "auto")
    if engine == "auto" and not state.optimal:
        bound_by_cores(state, clock.within(0.6))
    if engine in ("auto", "search") and state.stage is not None and not state.optimal:
        windows = Windows(state.problem)
        local_search(state, windows, clock.within(0.5), seed, patience=_PATIENCE)
        if engine == "auto":
            certify(state, clock.within(0.6))
        local_search(state, windows, clock, seed + 1, patience=100 * _PATIENCE)
    elif engine == "auto":
        certify(state, clock)


def _cut_orders(state: State, orders: Iterable[Ints], clock: Clock) -> None:
    """Best cuts of some orders; the first is cut whatever the clock says."""
    for tried, order in enumerate(orders):
        if state.optimal or (tried and clock.expired):
            return
        first = state.stage is None and tried == 0
        found = IntervalProgram(state.problem, order).solve(
            Clock(np.inf) if first else clock, below=state.load
        )
        if found is not None:
            state.offer(found[1], "interval" if tried == 0 else "search")
