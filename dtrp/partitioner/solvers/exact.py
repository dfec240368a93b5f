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
from .relax import LEVELS, candidates, core, most_wanted, put_back
from .state import State
from .windows import Windows

_FEW = 10_000  # down-sets that are no reason to go slow
_CELLS = 400_000_000  # down-sets times groups: bytes of the largest family


def certify(state: State, clock: Clock, *, at_once: bool = False) -> bool:
    """Improve bound and partition of a state; whether it ended with a proof.

    ``at_once``: only if there are few down-sets at the load known.
    """
    cap = max(1000, min(400_000, _CELLS // state.problem.n))
    step = 0.0  # first, whether there are few down-sets anyway
    while not state.optimal and not clock.expired:
        floor = max(state.bound.value, 1e-300)
        wanted = min(floor * (1 + step), state.load) if step else state.load
        try:
            few = _FEW + 2 * state.problem.n
            found = best_within(state.problem, wanted, cap=cap if step else few, clock=clock)
        except OutOfTime:
            if at_once or clock.expired or 0 < step < 1e-4:
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


def bound_by_cores(state: State, clock: Clock) -> None:
    """Improve a state by the finest core (see `relax`) that can be solved, and by ever finer ones then.

    Every core is solved with proof; then the groups left out that cost the partition most come back, so the
    bound rises and the partition fits better, until the down-sets become too many again.
    """
    problem = state.problem
    for level in range(len(LEVELS)):
        dropped = candidates(problem, level)
        if state.optimal or clock.expired:
            return
        if len(dropped) and _solve_core(state, dropped, clock, at_once=True) is not None:
            break
    else:
        for level in range(len(LEVELS)):  # none is small: see how far the bound can be raised
            _solve_core(state, candidates(problem, level), clock.within(0.4), at_once=False)
        return
    share, at_once = 6, True
    while len(dropped) and not state.optimal and not clock.expired and state.stage is not None:
        finer = np.setdiff1d(dropped, most_wanted(problem, dropped, state.stage, share))
        solved = _solve_core(state, finer, clock, at_once=at_once)
        if solved is not None:
            dropped = finer
        elif share < len(dropped):
            share *= 4
        elif at_once:
            at_once = False
        else:
            return


def _solve_core(state: State, dropped: Ints, clock: Clock, *, at_once: bool) -> Bound | None:
    """Solve the problem without some groups and use what that says; None if it could not be solved."""
    reduced = core(state.problem, dropped)
    inner = State(reduced.problem)
    inner.raise_bound(state.bound)  # what is below the bound known need not be looked at
    inner.load = state.load
    proven = certify(inner, clock, at_once=at_once)
    if inner.bound.kind == "downsets":
        state.raise_bound(Bound(min(inner.bound.value, state.load), "relaxation"))
    if not proven:
        return None
    if inner.stage is not None:  # else the core is as slow as the best partition known
        state.offer(put_back(reduced, inner.stage), "search")
    return inner.bound


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
