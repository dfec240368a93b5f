"""Unequal devices: which of them runs which stage is part of the search, exact for a few classes of them.

    D[c_1 .. c_m][I] = min over classes i and J <= I of
                       max(D[.. c_i - 1 ..][J], load of I \\ J as stage c_1 + .. + c_m - 1 on class i)

is exact over the down-sets of a family: what is left to do depends on how many devices of each class are
used, not on their order. The problem in which every stage may take any class bounds it from below, and the
down-sets that can be boundaries there are all that can be here.

Complexity: the product of (devices + 1) over the classes, times their number, times the family squared. The
search is ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .chains import OutOfTime
from .clock import Clock
from .downsets import enumerate_downsets
from .engine import solve
from .orders import good_orders
from .pairs import MOST, Pairs, step
from .problem import Bools, Floats, Ints, Option, Problem
from .search import boundaries, distinct
from .state import TOLERANCE
from .windows import Windows

_ORDERS = 3
_SHARE = 0.15  # of the time for each order of devices that is tried as it stands


@dataclass(frozen=True, eq=False)
class Assigned:
    """A partition (None: none was found), the class of each stage's device, its load, and whether nothing is
    better."""

    stage: Ints | None
    class_of: tuple[int, ...]
    load: float
    bound: float
    proven: bool


def assign(problems: Sequence[Problem], counts: Sequence[int], clock: Clock, seed: int) -> Assigned:
    """The best partition and order of devices found.

    Parameters
    ----------
    problems
        For each class, the problem if all stages ran on its devices.
    counts
        Devices of each class; their sum is the number of stages.
    """
    first = [c for c, count in enumerate(counts) for _ in range(count)]
    any_class = _any_class(problems)
    relaxed = solve(any_class, engine="auto", clock=clock.within(_SHARE), seed=seed)
    bound = relaxed.bound.value
    best = Assigned(None, tuple(first), np.inf, bound, False)
    for order in (tuple(first), tuple(first[::-1])):
        found = solve(in_order(problems, order), engine="auto", clock=clock.within(_SHARE), seed=seed)
        if found.stage is not None and found.load < best.load:
            best = Assigned(found.stage, order, found.load, bound, False)
    if best.load <= bound * (1 + TOLERANCE):
        return replace(best, proven=True)
    for topological, _ in zip(good_orders(any_class, seed), range(_ORDERS), strict=False):
        member = np.tri(any_class.n + 1, any_class.n, -1, dtype=bool)[:, np.argsort(topological)]
        if best.stage is not None:
            member = distinct(np.concatenate([member, boundaries(any_class, best.stage)]))
        if len(member) <= MOST and not clock.expired:
            best, _ = _improve(problems, any_class, counts, member, best, clock.within(0.4))
    windows = Windows(any_class)
    every = enumerate_downsets(any_class, windows, best.load, cap=MOST, clock=clock)
    if every is None:
        return best
    best, complete = _improve(problems, any_class, counts, every, best, clock)
    return replace(best, proven=complete, bound=best.load if complete else bound)


def in_order(problems: Sequence[Problem], classes: Sequence[int]) -> Problem:
    """The problem in which each stage has a device of a given class."""
    return replace(
        problems[0],
        options=tuple(problems[c].options[k] for k, c in enumerate(classes)),
        limits=np.array([problems[c].limits[k] for k, c in enumerate(classes)]),
    )


def _any_class(problems: Sequence[Problem]) -> Problem:
    """The problem in which each stage may take a device of any class, as often as it likes."""
    made: dict[tuple[int, ...], tuple[Option, ...]] = {}
    options = []
    for stage in range(problems[0].n_stages):
        each = [p.options[stage] for p in problems]
        key = tuple(map(id, each))
        if key not in made:
            made[key] = tuple(itertools.chain(*each))
        options.append(made[key])
    return replace(problems[0], options=tuple(options), limits=np.max([p.limits for p in problems], axis=0))


def _improve(
    problems: Sequence[Problem],
    any_class: Problem,
    counts: Sequence[int],
    member: Bools,
    best: Assigned,
    clock: Clock,
) -> tuple[Assigned, bool]:
    """A better one with boundaries in a family, if there is one, and whether all were looked at."""
    try:
        found = _program(problems, any_class, counts, member, best.load, clock)
    except OutOfTime:
        return best, False
    if found is None or not found[0] < best.load:
        return best, True
    load, stage, class_of = found
    return replace(best, stage=stage, class_of=class_of, load=load), True


def _program(
    problems: Sequence[Problem],
    any_class: Problem,
    counts: Sequence[int],
    member: Bools,
    wanted: float,
    clock: Clock,
) -> tuple[float, Ints, tuple[int, ...]] | None:
    """The dynamic program: load, stages and classes; None: nothing is within what is wanted."""
    pairs = Pairs(any_class, member)
    k, n = any_class.n_stages, len(pairs)
    admitted = np.ones((k, n), dtype=bool)
    if np.isfinite(wanted):
        admitted[:-1] = Windows(any_class).admitted(pairs.member, wanted)
    start = np.full(n, np.inf)
    start[0] = 0.0
    best: dict[tuple[int, ...], Floats] = {(0,) * len(counts): start}
    trail: dict[tuple[int, ...], tuple[Ints, Ints]] = {}  # from which down-set, by which class
    every = np.arange(n)
    for stage in range(k):
        loads = [pairs.loads(p, stage, every) for p in problems]
        after: dict[tuple[int, ...], Floats] = {}
        for used, reached in best.items():
            for c, most in enumerate(counts):
                if used[c] == most:
                    continue
                if clock.expired:
                    raise OutOfTime
                now = (*used[:c], used[c] + 1, *used[c + 1 :])
                found, origin = step(reached, loads[c])
                found[~admitted[stage] | (found > wanted)] = np.inf
                if now not in after:
                    after[now] = np.full(n, np.inf)
                    trail[now] = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
                better = found < after[now]
                after[now][better] = found[better]
                trail[now][0][better], trail[now][1][better] = origin[better], c
        best = {used: reached for used, reached in after.items() if np.isfinite(reached).any()}
    full = best.get(tuple(counts))
    load = np.inf if full is None else full[-1]
    if not np.isfinite(load):
        return None
    at, used = n - 1, tuple(counts)
    stages = np.empty(any_class.n, dtype=np.int64)
    classes = []
    for stage in range(k - 1, -1, -1):
        before, c = int(trail[used][0][at]), int(trail[used][1][at])
        stages[pairs.member[at] & ~pairs.member[before]] = stage
        classes.append(c)
        at, used = before, (*used[:c], used[c] - 1, *used[c + 1 :])
    return float(load), stages, tuple(classes[::-1])
