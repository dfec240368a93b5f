"""Certified search: raise the wanted load until a partition exists within it.

For a wanted load L, all down-sets that could be boundaries are enumerated and the chain program runs on them.
If there is no partition within L, L is a lower bound; if there is one, the best found is optimal. Small L
make small families, so L starts at the bound known so far and grows; where the family becomes too large
the step is halved, and the last L that was refuted remains as a bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .bounds import Bound
from .chains import ChainProgram, OutOfTime
from .clock import Clock
from .downsets import enumerate_downsets
from .problem import Bools, Ints, Problem
from .reduce import Contradiction, Reduced, merge_dear, reduce_problem
from .relax import LEVELS, candidates, core, most_wanted, put_back
from .search import distinct
from .state import TOLERANCE, State
from .windows import Windows

_FEW = 10_000  # down-sets that are no reason to go slow
_AROUND = 2500  # down-sets of a core to put groups back into
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
        if step > 2 and np.isinf(state.load):
            wanted = np.inf  # is there any at all?
        try:
            few = _FEW + 2 * state.problem.n
            found = best_within(state.problem, wanted, cap=cap if step else few, clock=clock)
        except OutOfTime:
            if at_once or clock.expired or 0 < step < 1e-4:
                return False
            step = step / 3 if step else 0.004
            continue
        if found is not None:
            state.offer(found.stage, "downsets")
            state.raise_bound(Bound(found.load, "downsets"))
            state.downsets = found.downsets
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
        if len(dropped) and _solve_core(state, dropped, clock, at_once=True):
            break
    else:
        for level in range(len(LEVELS)):  # none is small: see how far the bound can be raised
            _solve_core(state, candidates(problem, level), clock.within(0.4), at_once=False)
        return
    share, at_once = 6, True
    while len(dropped) and not state.optimal and not clock.expired and state.stage is not None:
        finer = np.setdiff1d(dropped, most_wanted(problem, dropped, state.stage, share))
        solved = _solve_core(state, finer, clock, at_once=at_once)
        if solved:
            dropped = finer
        elif share < len(dropped):
            share *= 4
        elif at_once:
            at_once = False
        else:
            return


def _solve_core(state: State, dropped: Ints, clock: Clock, *, at_once: bool) -> bool:
    """Solve the problem without some groups and use what that says; whether it could be solved."""
    reduced = core(state.problem, dropped)
    inner = State(reduced.problem)
    inner.raise_bound(state.bound)  # what is below the bound known need not be looked at
    inner.load = state.load
    proven = certify(inner, clock, at_once=at_once)
    if inner.bound.kind == "downsets":
        state.raise_bound(Bound(min(inner.bound.value, state.load), "relaxation"))
    if proven and inner.stage is not None:  # else the core is as slow as the best partition known
        state.offer(put_back(reduced, inner.stage), "search")
        _cut_around(state, reduced, inner.downsets, clock)
    return proven


def _cut_around(state: State, reduced: Reduced, member: Bools, clock: Clock) -> None:
    """The best partition with boundaries of a core, the groups left out put on either side of them."""
    if len(member) > _AROUND:
        member = member[np.random.default_rng(0).choice(len(member), _AROUND, replace=False)]
    family = distinct(np.concatenate([reduced.lift_downsets(member, share) for share in (0.01, 0.5, 1.0)]))
    program = ChainProgram(state.problem, Windows(state.problem), family)
    try:
        found = program.solve(state.load * (1 - TOLERANCE), clock)
    except OutOfTime:
        return
    if found is not None:
        state.offer(found[1], "search")


@dataclass(frozen=True, eq=False)
class Found:
    """A best partition, and the down-sets that were boundaries on the way to it."""

    load: float
    stage: Ints
    downsets: Bools


def best_within(problem: Problem, wanted: float, *, cap: int, clock: Clock) -> Found | None:
    """The best partition if its load is at most ``wanted``; None if there is none.

    Raises
    ------
    OutOfTime
        The clock expired, or there are too many down-sets.
    """
    steps = []
    try:
        steps.append(merge_dear(problem, wanted))
        if steps[0].problem.n < problem.n and problem.allow_empty:
            steps.append(reduce_problem(steps[0].problem))
    except Contradiction:
        return None
    smaller = steps[-1].problem
    if smaller.n < smaller.n_stages and not smaller.allow_empty:
        return None
    windows = Windows(smaller)
    member = enumerate_downsets(smaller, windows, wanted, cap=cap, clock=clock)
    if member is None:
        raise OutOfTime
    program = ChainProgram(smaller, windows, member)
    best = program.solve(wanted, clock)
    if best is None:
        return None
    load, stage = best
    reached = program.reached
    for step in reversed(steps):
        stage, reached = step.lift(stage), step.lift_downsets(reached, 1.0)
    return Found(load, stage, reached)
