"""Certified search: raise the wanted load until a partition exists within it.

For a wanted load L, all down-sets that could be boundaries are enumerated and the chain program runs on them.
If there is no partition within L, L is a lower bound; if there is one, the best found is optimal. Small L
make small families, so L starts at the bound known so far and grows; where the family becomes too large
the step is halved, and the last L that was refuted remains as a bound.
"""

from __future__ import annotations

import numpy as np

from .bounds import Bound
from .chains import ChainProgram, OutOfTime
from .clock import Clock
from .downsets import enumerate_downsets
from .problem import Ints, Problem
from .reduce import Contradiction, merge_dear, reduce_problem
from .relax import candidates, core, most_wanted, put_back
from .state import State
from .windows import Windows

_FEW = 4000  # down-sets that are no reason to go slow
_CELLS = 400_000_000  # down-sets times groups: bytes of the largest family


def certify(state: State, clock: Clock) -> bool:
    """Improve bound and partition of a state; whether it ended with a proof."""
    cap = max(1000, min(400_000, _CELLS // state.problem.n))
    step = 0.0  # first, whether there are few down-sets anyway
    while not state.optimal and not clock.expired:
        floor = max(state.bound.value, 1e-300)
        wanted = min(floor * (1 + step), state.load) if step else state.load
        try:
            found = best_within(
                state.problem, wanted, cap=cap if step else _FEW + 2 * state.problem.n, clock=clock
            )
        except OutOfTime:
            if clock.expired or 0 < step < 1e-4:
                return False
            step = step / 3 if step else 0.004
            continue
        if found is not None:
            state.offer(found[1], "downsets")
            state.raise_bound(Bound(found[0], "downsets"))
            return True
        state.raise_bound(Bound(wanted, "downsets"))
        if np.isinf(wanted):
            return True  # not even without a wanted load
        step *= 1.7
    return state.optimal


def bound_by_core(state: State, level: int, clock: Clock) -> bool:
    """Improve a state by the core of a level (see `relax`), and by finer ones while time allows.

    Every core is solved with proof; then the groups left out that cost the partition most come back, so the
    bound rises and the partition fits better.

    Returns
    -------
    bool
        Whether a core could be solved.
    """
    problem, dropped, solved = state.problem, candidates(state.problem, level), False
    while len(dropped) and not state.optimal and not clock.expired:
        reduced = core(problem, dropped)
        inner = State(reduced.problem)
        inner.raise_bound(state.bound)  # what is below the bound known need not be looked at
        inner.load = state.load
        proven = certify(inner, clock)
        if inner.bound.kind == "downsets":
            state.raise_bound(Bound(inner.bound.value, "relaxation"))
        if not proven:
            return solved
        solved = True
        if inner.stage is None:  # the core is as slow as the best partition known
            return True
        stage = put_back(reduced, inner.stage)
        state.offer(stage, "search")
        back = most_wanted(problem, dropped, stage)
        dropped = np.setdiff1d(dropped, back)
    return solved


def best_within(problem: Problem, wanted: float, *, cap: int, clock: Clock) -> tuple[float, Ints] | None:
    """The best partition if its load is at most ``wanted``; None if there is none.

    Raises
    ------
    OutOfTime
        The clock expired, or there are too many down-sets.
    """
    try:
        dear = merge_dear(problem, wanted)
        smaller = dear.problem
        reduced = reduce_problem(smaller) if smaller.n < problem.n and smaller.allow_empty else None
    except Contradiction:
        return None
    if reduced is not None:
        smaller = reduced.problem
    if smaller.n < smaller.n_stages and not smaller.allow_empty:
        return None
    windows = Windows(smaller)
    member = enumerate_downsets(smaller, windows, wanted, cap=cap, clock=clock)
    if member is None:
        raise OutOfTime
    found = ChainProgram(smaller, windows, member).solve(wanted, clock)
    if found is None:
        return None
    stage = found[1] if reduced is None else reduced.lift(found[1])
    return found[0], dear.lift(stage)
