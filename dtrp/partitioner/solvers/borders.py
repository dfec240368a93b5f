"""Stages in nodes: links between nodes are slower, and where the borders fall is part of the search.

A node holds consecutive stages. A value that a stage gets from its own node takes ``transfer`` to receive,
one from another node ``far``; its sender pays ``far`` once if anybody outside its node needs it, else
``transfer``. So the load of a stage ``I \\ J`` depends on its node's ends S <= J and T >= I alone:

    V[n][b][T] = min over S and m of  best chain of m stages from S to T, prices as between S and T,
                                      no better than V[n-1][b-m][S]

is exact over the down-sets of a family. The problem with all links alike bounds it from below, and the
down-sets that can be boundaries there (`windows`) are all that can be here.

Complexity: a chain program for each pair (S, T) that the wanted load leaves; for two nodes, for each S. The
search is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .chains import OutOfTime
from .clock import Clock
from .downsets import enumerate_downsets
from .loads import evaluate
from .orders import good_orders
from .pairs import MOST, Pairs, step
from .problem import Bools, Floats, Ints, Problem
from .search import boundaries, distinct
from .state import TOLERANCE
from .windows import Windows

_ORDERS = 3


@dataclass(frozen=True)
class Nodes:
    """How many nodes there are, and how many stages one may hold."""

    count: int
    most: int


@dataclass(frozen=True, eq=False)
class Placed:
    """A partition, the node of each stage, its load, and whether nothing is better."""

    stage: Ints
    node_of: Ints
    load: float
    proven: bool


def place(
    problem: Problem, nodes: Nodes, start: Ints, clock: Clock, seed: int, *, floor: float = 0.0
) -> Placed:
    """The best partition and borders found, from a partition that was found with all links alike.

    ``floor``: no load can be smaller.
    """
    best = best_borders(problem, nodes, start)
    if best.load <= floor * (1 + TOLERANCE):
        return replace(best, proven=True)
    for order, _ in zip(good_orders(problem, seed), range(_ORDERS), strict=False):
        member = np.tri(problem.n + 1, problem.n, -1, dtype=bool)[:, np.argsort(order)]
        member = distinct(np.concatenate([member, boundaries(problem, start)]))
        if len(member) <= MOST and not clock.expired:
            best, _ = _improve(problem, nodes, member, best, clock.within(0.4))
    windows = Windows(problem)
    member_or_none = enumerate_downsets(problem, windows, best.load, cap=MOST, clock=clock)
    if member_or_none is None:
        return best
    best, complete = _improve(problem, nodes, member_or_none, best, clock)
    return replace(best, proven=complete)


def best_borders(problem: Problem, nodes: Nodes, stage: Ints) -> Placed:
    """The best borders for a partition that stands: a dynamic program over runs of stages."""
    k = problem.n_stages
    slowest = np.full((k + 1, k + 1), np.inf)  # of the stages a .. b - 1, if they are a node
    for a in range(k):
        for b in range(a + 1, min(a + nodes.most, k) + 1):
            run = (np.arange(k) >= a).astype(np.int64) + (np.arange(k) >= b)
            slowest[a, b] = evaluate(problem, stage, run).load[a:b].max()
    best, trail = np.full(k + 1, np.inf), []
    best[0] = 0.0
    for _ in range(nodes.count):
        best, origin = step(best, slowest)
        trail.append(origin)
    ends = [k]
    for origin in trail[::-1]:
        ends.append(int(origin[ends[-1]]))
    node_of = np.searchsorted(np.array(ends[::-1][1:]), np.arange(k), side="right")
    return Placed(stage, node_of, float(best[k]), False)


def _improve(
    problem: Problem, nodes: Nodes, member: Bools, best: Placed, clock: Clock
) -> tuple[Placed, bool]:
    """A better placement with boundaries in a family, if there is one, and whether all were looked at."""
    program = Program(problem, nodes, member, best.load, clock)
    complete = True
    try:
        program.run()
    except OutOfTime:
        complete = False
    found = program.placed()
    return (found if found is not None and found.load < best.load else best), complete


class Program:
    """The dynamic program over one family."""

    def __init__(self, problem: Problem, nodes: Nodes, member: Bools, wanted: float, clock: Clock) -> None:
        self.problem, self.nodes, self.wanted, self.clock = problem, nodes, wanted, clock
        self.pairs = Pairs(problem, member)
        allowed = Windows(problem).admitted(self.pairs.member, wanted)
        ends = np.zeros((1, len(self.pairs)), dtype=bool)
        ends[0, -1] = True
        self.admitted = np.concatenate([allowed, ends])  # after so many stages, less one
        self.best: tuple[float, tuple[int, ...], tuple[int, ...]] | None = None

    def run(self) -> None:
        """Fill ``best``: load, boundaries in order, stages per node."""
        k, count = self.problem.n_stages, self.nodes.count
        everything = len(self.pairs) - 1
        alive: dict[tuple[int, int], tuple[float, tuple[int, ...], tuple[int, ...]]] = {(0, 0): (0.0, (), ())}
        for node in range(count):
            after = count - node - 1  # nodes still to come, which need a stage each
            reached: dict[tuple[int, int], tuple[float, tuple[int, ...], tuple[int, ...]]] = {}
            for (first, begun), (load, path, sizes) in sorted(alive.items(), key=lambda item: item[1][0]):
                most = min(self.nodes.most, k - begun - after)
                least = 1 if after else k - begun
                if load > self.wanted or least > most:
                    continue
                for last in self._ends(first, begun, most) if after else [everything]:
                    for m, found, way in self._chain(first, last, begun, most, load):
                        key, known = (last, begun + m), reached.get((last, begun + m))
                        if m >= least and (known is None or found < known[0]):
                            reached[key] = found, path + way, (*sizes, m)
            alive = reached
        self.best = alive.get((everything, k))

    def _ends(self, first: int, begun: int, most: int) -> list[int]:
        """Down-sets that may end a node that begins at ``first``."""
        possible = self.admitted[begun : begun + most].any(axis=0) & self.pairs.within[first]
        if self.problem.allow_empty:
            possible[first] = True
        ends: list[int] = np.flatnonzero(possible).tolist()
        return ends

    def _chain(
        self, first: int, last: int, begun: int, most: int, load: float
    ) -> list[tuple[int, float, tuple[int, ...]]]:
        """Stages, bottleneck and boundaries of the best chains from ``first`` to ``last``, within what is
        wanted."""
        if self.clock.expired:
            raise OutOfTime
        pairs, problem = self.pairs, self.problem
        between = pairs.within[first] & pairs.within[:, last]
        between[[first, last]] = True
        rows = np.flatnonzero(between)
        time_in, time_out = pairs.dearer(first, last, rows)
        known: dict[tuple[int, float], Floats] = {}
        best = np.full(len(rows), np.inf)
        best[np.searchsorted(rows, first)] = load
        goal = int(np.searchsorted(rows, last))
        trail: list[Ints] = []
        found = []
        for m in range(1, most + 1):
            stage = begun + m - 1
            key = id(problem.options[stage]), float(problem.limits[stage])
            if key not in known:
                known[key] = pairs.loads(problem, stage, rows, time_in, time_out)
            best, origin = step(best, known[key])
            best[~self.admitted[stage][rows] | (best > self.wanted)] = np.inf
            trail.append(origin)
            if not np.isfinite(best).any():
                break
            if np.isfinite(best[goal]):
                at, way = goal, [goal]
                for back in trail[:0:-1]:
                    at = int(back[at])
                    way.append(at)
                found.append((m, float(best[goal]), tuple(int(rows[x]) for x in way[::-1])))
        return found

    def placed(self) -> Placed | None:
        """The best that was found."""
        if self.best is None:
            return None
        _, path, sizes = self.best
        stage = np.full(self.problem.n, -1, dtype=np.int64)
        for s, at in enumerate(path):
            stage[self.pairs.member[at] & (stage < 0)] = s
        node_of = np.repeat(np.arange(len(sizes)), sizes)
        return Placed(stage, node_of, evaluate(self.problem, stage, node_of).max_load, False)
