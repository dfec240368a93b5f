"""Which devices run which stage is part of the search: one of several kinds, or several that take turns.

A *way* to run a stage takes so many devices of one class. With unequal devices it takes one; a stage that is
replicated has r, each of which does every r-th part of a batch. With u the devices of each class used,

    D[k][u][I] = min over ways w and J <= I of
                     max(D[k - 1][u - devices of w][J], load of I \\ J as stage k in that way)

is exact over the down-sets of a family: what is left to do depends on how many devices of each class are
used, not on their order. All down-sets that can be boundaries are among those that some number of devices
could do the work of, and leave the rest for the others (`windows`, with devices for stages).

Complexity: stages times the product of (devices + 1) over the classes, times the ways, times the family
squared.

Replicated stages: Narayanan et al., "PipeDream: generalized pipeline parallelism for DNN training", SOSP
2019, for a chain of layers. The recurrence over down-sets, unequal devices and the proof are ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .bounds import balance_bound, simple_bound, stage_work
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
class Way:
    """So many devices of a class for a stage, and the problem if all stages ran like that."""

    kind: int
    devices: int
    problem: Problem


@dataclass(frozen=True, eq=False)
class Assigned:
    """A partition (None: none was found), the way of each stage, its load, and whether nothing is better."""

    stage: Ints | None
    way_of: tuple[int, ...]
    load: float
    bound: float
    proven: bool


def assign(ways: Sequence[Way], counts: Sequence[int], clock: Clock, seed: int) -> Assigned:
    """The best partition and devices found; ``counts``: devices of each class, of which no more are used."""
    any_way = _any_way(ways)
    if all(way.devices == 1 for way in ways):
        outline, best = any_way, _one_each(ways, counts, any_way, clock, seed)
    else:
        outline = _by_device(ways, sum(counts))
        bound = max(simple_bound(any_way).value, balance_bound(*stage_work(outline)).value)
        best = Assigned(None, (0,) * any_way.n_stages, np.inf, bound, False)
    if best.load <= best.bound * (1 + TOLERANCE):
        return replace(best, proven=True)
    for topological, _ in zip(good_orders(any_way, seed), range(_ORDERS), strict=False):
        member = np.tri(any_way.n + 1, any_way.n, -1, dtype=bool)[:, np.argsort(topological)]
        if best.stage is not None:
            member = distinct(np.concatenate([member, boundaries(any_way, best.stage)]))
        if len(member) <= MOST and not clock.expired:
            best, _ = _improve(ways, counts, outline, member, best, clock.within(0.4))
    every = enumerate_downsets(outline, Windows(outline), best.load, cap=MOST, clock=clock)
    if every is None:
        return best
    best, complete = _improve(ways, counts, outline, every, best, clock)
    return replace(best, proven=complete, bound=best.load if complete else best.bound)


def in_order(ways: Sequence[Way], way_of: Sequence[int]) -> Problem:
    """The problem in which each stage runs in a given way."""
    return replace(
        ways[0].problem,
        options=tuple(ways[w].problem.options[k] for k, w in enumerate(way_of)),
        limits=np.array([ways[w].problem.limits[k] for k, w in enumerate(way_of)]),
    )


def _one_each(
    ways: Sequence[Way], counts: Sequence[int], any_way: Problem, clock: Clock, seed: int
) -> Assigned:
    """The better of two orders of the devices, and a bound: that any stage may have any device."""
    first = [w for w, way in enumerate(ways) for _ in range(counts[way.kind])]
    bound = solve(any_way, engine="auto", clock=clock.within(_SHARE), seed=seed).bound.value
    best = Assigned(None, tuple(first), np.inf, bound, False)
    for order in (tuple(first), tuple(first[::-1])):
        found = solve(in_order(ways, order), engine="auto", clock=clock.within(_SHARE), seed=seed)
        if found.stage is not None and found.load < best.load:
            best = Assigned(found.stage, order, found.load, bound, False)
    return best


def _any_way(ways: Sequence[Way]) -> Problem:
    """The problem in which each stage may run in any way, whatever the others do."""
    first = ways[0].problem
    made: dict[tuple[int, ...], tuple[Option, ...]] = {}
    options = []
    for stage in range(first.n_stages):
        each = [way.problem.options[stage] for way in ways]
        key = tuple(map(id, each))
        if key not in made:
            made[key] = tuple(itertools.chain(*each))
        options.append(made[key])
    limits = np.max([way.problem.limits for way in ways], axis=0)
    return replace(first, options=tuple(options), limits=limits)


def _by_device(ways: Sequence[Way], n_devices: int) -> Problem:
    """What devices, one by one, do of the work at least, for bounds and windows alone.

    A stage of r devices within a load L has done no more than r devices within L could do, if theirs were
    shares of any size: so does every run of stages.
    """
    options = {
        (id(o), way.devices): replace(
            o, time=o.time * way.devices, fixed_time=o.fixed_time * way.devices, share=o.share * way.devices
        )
        for way in ways
        for offer in way.problem.options
        for o in offer
    }
    problem = ways[0].problem
    return replace(
        problem,
        n_stages=n_devices,
        options=(tuple(options.values()),) * n_devices,
        limits=np.full(n_devices, max(float(way.problem.limits.max()) for way in ways)),
        pinned=np.full_like(problem.pinned, -1),
        allow_empty=True,
    )


def _improve(
    ways: Sequence[Way],
    counts: Sequence[int],
    outline: Problem,
    member: Bools,
    best: Assigned,
    clock: Clock,
) -> tuple[Assigned, bool]:
    """A better one with boundaries in a family, if there is one, and whether all were looked at."""
    try:
        found = _program(ways, counts, outline, member, best.load, clock)
    except OutOfTime:
        return best, False
    if found is None or not found[0] < best.load:
        return best, True
    load, stage, way_of = found
    return replace(best, stage=stage, way_of=way_of, load=load), True


def _program(
    ways: Sequence[Way],
    counts: Sequence[int],
    outline: Problem,
    member: Bools,
    wanted: float,
    clock: Clock,
) -> tuple[float, Ints, tuple[int, ...]] | None:
    """The dynamic program: load, stages and ways; None: nothing is within what is wanted."""
    problem = ways[0].problem
    pairs = Pairs(problem, member)
    k, n, most = problem.n_stages, len(pairs), sum(counts)
    admitted = np.ones((most, n), dtype=bool)  # by the number of devices used
    if np.isfinite(wanted):
        admitted[:-1] = Windows(outline).admitted(pairs.member, wanted)
    start = np.full(n, np.inf)
    start[0] = 0.0
    best: dict[tuple[int, ...], Floats] = {(0,) * len(counts): start}
    trail: list[dict[tuple[int, ...], tuple[Ints, Ints]]] = []  # from which down-set, in which way
    tables: dict[tuple[int, int, float], Floats] = {}
    for stage in range(k):
        after: dict[tuple[int, ...], Floats] = {}
        came: dict[tuple[int, ...], tuple[Ints, Ints]] = {}
        pinned = problem.pinned
        allowed = pairs.member[:, (pinned >= 0) & (pinned <= stage)].all(axis=1)
        allowed &= ~pairs.member[:, pinned > stage].any(axis=1)
        for (used, reached), (w, way) in itertools.product(best.items(), enumerate(ways)):
            now = (*used[: way.kind], used[way.kind] + way.devices, *used[way.kind + 1 :])
            if now[way.kind] > counts[way.kind] or sum(now) > most - (k - 1 - stage):
                continue
            if clock.expired:
                raise OutOfTime
            key = w, id(way.problem.options[stage]), float(way.problem.limits[stage])
            if key not in tables:
                tables[key] = pairs.loads(way.problem, stage, np.arange(n))
            found, origin = step(reached, tables[key])
            found[~allowed | ~admitted[sum(now) - 1] | (found > wanted)] = np.inf
            if now not in after:
                after[now] = np.full(n, np.inf)
                came[now] = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
            better = found < after[now]
            after[now][better] = found[better]
            came[now][0][better], came[now][1][better] = origin[better], w
        best = {used: reached for used, reached in after.items() if np.isfinite(reached).any()}
        trail.append(came)
    ends = [(float(reached[-1]), sum(used), used) for used, reached in best.items()]
    load, _, used = min(ends, default=(np.inf, 0, ()))
    if not np.isfinite(load):
        return None
    at, stages, way_of = n - 1, np.empty(problem.n, dtype=np.int64), []
    for stage in range(k - 1, -1, -1):
        before, w = (int(column[at]) for column in trail[stage][used])
        stages[pairs.member[at] & ~pairs.member[before]] = stage
        way_of.append(w)
        kind, taken = ways[w].kind, ways[w].devices
        at, used = before, (*used[:kind], used[kind] - taken, *used[kind + 1 :])
    return load, stages, tuple(way_of[::-1])
