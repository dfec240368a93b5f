"""Lower bounds where there are too many down-sets: leave out what makes them many and costs little.

A group that is unordered with most others multiplies the number of down-sets, whatever it costs: masks and
position tables that are made once, sums of gradients between layers. Without such groups, and without the
values they make or need, every partition of the problem is one of the smaller *core*, with loads that are
no larger (precedence through a group left out is kept). So the core's best load, or any bound on it, bounds
the problem, and is near it if what was left out is cheap. The core's best partition, with the groups put
back one by one where they hurt least, is also a good one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .loads import evaluate
from .problem import Floats, Ints, Problem
from .reduce import Reduced, contract

# (unordered with at least this share of the groups, work and traffic of all that is left out at most this
# share of everything): cores from the finest to the coarsest.
LEVELS = ((0.5, 0.01), (0.25, 0.02), (0.1, 0.03), (0.05, 0.05), (0.02, 0.1), (0.01, 0.2))


def candidates(problem: Problem, level: int) -> Ints:
    """Groups that are cheap and unordered with many, the most troublesome first."""
    share, budget = LEVELS[level]
    below = problem.descendants
    unordered = problem.n - below.sum(axis=0) - below.sum(axis=1) + 1
    price, total = _price(problem)
    groups = np.flatnonzero((unordered >= share * problem.n) & (problem.pinned < 0))
    groups = groups[np.argsort(price[groups] / np.maximum(unordered[groups], 1), kind="stable")]
    dropped: Ints = groups[np.cumsum(price[groups]) <= budget * total]
    return dropped[: problem.n - 1]


def core(problem: Problem, dropped: Ints) -> Reduced:
    """The problem without some groups."""
    label = np.arange(problem.n)
    label[dropped] = -1
    return contract(replace(problem, allow_empty=True), label)


def most_wanted(problem: Problem, dropped: Ints, stage: Ints, share: int) -> Ints:
    """One in ``share`` of the groups left out: those whose values cross most in a partition."""
    values = problem.values
    owner = values.owner
    crossing = stage[values.producer[owner]] != stage[values.consumer]
    cost = np.zeros(problem.n)
    np.add.at(cost, values.producer[owner], crossing * values.transfer[owner])
    np.add.at(cost, values.consumer, crossing * values.transfer[owner])
    price, _ = _price(problem)
    by = np.argsort(-(cost + 1e-3 * price)[dropped], kind="stable")
    return dropped[by[: max(1, len(dropped) // share)]]


def _price(problem: Problem) -> tuple[Floats, float]:
    """What leaving out each group loses at most, and what there is in all."""
    work = np.max([c for alike in problem.stage_types for c, _ in problem.work(alike[0])], axis=0)
    price, total = work.copy(), float(work.sum())
    values = problem.values
    if problem.kind == "sum" and len(values):
        np.add.at(price, values.producer, 0.1 * values.transfer)
    return price, total


def put_back(reduced: Reduced, stage: Ints) -> Ints:
    """A partition of the problem from one of its core: each group left out goes where loads stay smallest."""
    problem = reduced.original
    out = np.where(reduced.group >= 0, stage[reduced.group], -1)
    below = problem.descendants
    left_out = np.flatnonzero(reduced.group < 0)
    for g in left_out:  # in topological order, as early as precedence allows
        out[g] = int(out[below[:, g] & (out >= 0)].max(initial=0))
    for g in left_out[::-1]:
        improve_group(problem, out, int(g))
    return out


def improve_group(problem: Problem, stage: Ints, g: int) -> None:
    """Move one group, in place, to the stage that makes the sorted loads smallest."""
    first = max((int(stage[p]) for p in problem.predecessors[g]), default=0)
    last = min((int(stage[s]) for s in problem.successors[g]), default=problem.n_stages - 1)
    if first == last:
        return
    best: tuple[tuple[float, ...], int] | None = None
    for s in range(first, last + 1):
        stage[g] = s
        loads = tuple(sorted(evaluate(problem, stage).load.tolist(), reverse=True))
        if best is None or loads < best[0]:
            best = (loads, s)
    assert best is not None
    stage[g] = best[1]
