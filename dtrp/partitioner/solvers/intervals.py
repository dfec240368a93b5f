"""Exact dynamic program over the cuts of one topological order.

With the order ``v_0 .. v_{n-1}`` fixed, a partition is a row of boundaries ``0 <= b_1 <= .. <= b_{K-1} <= n``
and stage ``k`` runs ``v_i .. v_{j-1}`` with ``i = b_k``, ``j = b_{k+1}``. The best bottleneck follows from

    D[k][j] = min over i of max(D[k-1][i], load_k(i, j)).

**Tables.** Traffic of a segment counts each value once per side, so it is no sum over edges. It is still a
sum of weights over points in the plane: a weight ``w`` at ``(lo, hi)`` counts for every segment with
``i <= lo`` and ``hi < j``. A value made at position ``p`` and consumed at ``c_1 < .. < c_d`` is sent by the
segment that holds ``p`` unless that holds everything:

    out:  +t at (p, p),  -t at (min(p, c_1), max(p, c_d)).

It is received by a segment that holds any ``c_m`` but not ``p``. "Any" is the count of consumers minus the
count of consecutive pairs; what also holds ``p`` is taken away through p's nearest consumers ``l < p < r``:

    in:   +t at (c_m, c_m),  -t at (c_m, c_{m+1}),  -t at (l, p),  -t at (p, r),  +t at (l, r).

A table for any rows times columns is then one histogram and two cumulative sums.

**Windows.** Compute and memory (without inputs) only grow with a segment, so for a wanted load ``L`` greedy
filling from the left and from the right bounds every boundary. The program runs inside these windows for
growing ``L`` until its result is at most ``L``, which proves it optimal for the order: narrow windows
make thousands of nodes times dozens of stages cheap.

Complexity: O(sum over k of |window_k| |window_{k+1}| + K (n + edges)) per round, at most O(K n^2).

Chains: Bokhari, "Partitioning problems in parallel, pipelined, and distributed computing", IEEE Trans.
Computers 37(1), 1988; Pinar and Aykanat, "Fast optimal load balancing algorithms for 1D partitioning",
J. Parallel Distrib. Comput. 64, 2004 (bounding the boundaries). The point tables are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .clock import Clock
from .loads import MEMORY_SLACK, option_loads
from .problem import Floats, Ints, Problem

_BLOCK = 1 << 21  # table entries held at once
_ROUNDS = (1.02, 1.1, 1.3, 1.7, 2.5, 5.0, np.inf)


@dataclass(frozen=True, eq=False)
class Points:
    """Weights in the plane: table(i, j) = sum of weights with lo >= i and hi < j."""

    lo: Ints
    hi: Ints
    value: Ints  # whose transfer or size the weight is
    sign: Floats

    def table(self, weight: Floats, rows: range, columns: range) -> Floats:
        """The table for segments that start in ``rows`` and end before ``columns``."""
        shape = (len(rows), len(columns))
        keep = (self.lo >= rows.start) & (self.hi < columns[-1])
        r = np.minimum(self.lo[keep] - rows.start, shape[0] - 1)
        c = np.maximum(self.hi[keep] + 1 - columns.start, 0)
        flat = np.bincount(
            r * shape[1] + c,
            weights=self.sign[keep] * weight[self.value[keep]],
            minlength=shape[0] * shape[1],
        )
        cells = flat.reshape(shape)
        # Entry (i, j) takes all points with row >= i and column <= j.
        cells = np.cumsum(cells[::-1], axis=0)[::-1]
        return np.cumsum(cells, axis=1)


def incoming_points(problem: Problem, position: Ints) -> Points:
    """Points of what segments receive."""
    values = problem.values
    owner, made = values.owner, position[values.producer]
    at = position[values.consumer]
    by = np.lexsort((at, owner))
    owner, at = owner[by], at[by]
    source = made[owner]
    follows = owner[1:] == owner[:-1]
    # Nearest consumers on both sides of the producer: the entry before which, and after which, sides change.
    left_last = (at < source) & np.append(~follows | (at[1:] > source[:-1]), True)
    right_first = (at > source) & np.insert(~follows | (at[:-1] < source[1:]), 0, True)
    around = np.flatnonzero(follows & left_last[:-1] & right_first[1:])
    pairs = np.flatnonzero(follows)
    parts = [
        (at, at, owner, 1.0),
        (at[pairs], at[pairs + 1], owner[pairs], -1.0),
        (at[left_last], source[left_last], owner[left_last], -1.0),
        (source[right_first], at[right_first], owner[right_first], -1.0),
        (at[around], at[around + 1], owner[around], 1.0),
    ]
    return _points(parts)


def outgoing_points(problem: Problem, position: Ints) -> Points:
    """Points of what segments send."""
    values = problem.values
    made, which = position[values.producer], np.arange(len(values))
    if len(values) == 0:
        return _points([])
    at = position[values.consumer]
    first = np.minimum(made, np.minimum.reduceat(at, values.start[:-1]))
    last = np.maximum(made, np.maximum.reduceat(at, values.start[:-1]))
    return _points([(made, made, which, 1.0), (first, last, which, -1.0)])


def _points(parts: list[tuple[Ints, Ints, Ints, float]]) -> Points:
    if not parts:
        none = np.zeros(0, dtype=np.int64)
        return Points(none, none, none, np.zeros(0))
    return Points(
        np.concatenate([p[0] for p in parts]),
        np.concatenate([p[1] for p in parts]),
        np.concatenate([p[2] for p in parts]),
        np.concatenate([np.full(len(p[0]), p[3]) for p in parts]),
    )


class IntervalProgram:
    """The dynamic program for one order of a problem."""

    def __init__(self, problem: Problem, order: Ints) -> None:
        self.problem = problem
        self.order = order
        n = problem.n
        position = np.empty(n, dtype=np.int64)
        position[order] = np.arange(n)
        self.incoming = incoming_points(problem, position)
        self.outgoing = outgoing_points(problem, position)
        sums: dict[int, Floats] = {}

        def prefix(column: Floats) -> Floats:
            if id(column) not in sums:
                sums[id(column)] = np.concatenate(([0.0], np.cumsum(column[order])))
            return sums[id(column)]

        self._time = [[prefix(o.time) for o in options] for options in problem.options]
        self._memory = [[prefix(o.memory) for o in options] for options in problem.options]
        self._needs_bytes = any(o.input_memory for options in problem.options for o in options)
        pinned = problem.pinned[order]
        where = np.flatnonzero(pinned >= 0)
        # Boundary k (where stage k starts) lies after groups pinned to earlier stages, not after later ones.
        gap = 0 if problem.allow_empty else 1
        k = np.arange(problem.n_stages + 1)
        self._floor = k * gap
        self._ceiling = n - (problem.n_stages - k) * gap
        self._floor[-1] = n
        self._ceiling[0] = 0
        for p in where:
            self._floor = np.where(k > pinned[p], np.maximum(self._floor, p + 1), self._floor)
            self._ceiling = np.where(k <= pinned[p], np.minimum(self._ceiling, p), self._ceiling)

    def solve(self, clock: Clock, *, below: float = np.inf) -> tuple[float, Ints] | None:
        """The best boundaries of this order, if they make a load smaller than ``below``.

        Returns
        -------
        (load, stage) or None
            The bottleneck and the stage of every group. None: nothing below ``below``, or out of time.
        """
        floor = self.relaxed()
        if floor >= below:
            return None
        wanted_before = 0.0
        for factor in _ROUNDS:
            wanted = min(max(floor, 1e-300) * factor, below)
            if wanted <= wanted_before:
                continue
            wanted_before = wanted
            result = self._within(wanted, clock)
            if result is not None and (result[0] <= wanted or wanted >= below):
                return result if result[0] < below else None
            if wanted >= below or clock.expired:
                return None
        return None

    def relaxed(self) -> float:
        """Best bottleneck of this order if inputs and outputs were free, to 0.1 % from below."""
        stages = range(self.problem.n_stages)
        high = max(float(column.sum()) + fixed for k in stages for column, fixed in self.problem.work(k))
        low = 0.0
        if self._windows(high) is None:
            return np.inf  # pins or memory leave this order no partition, however slow
        while high - low > 1e-3 * high:
            middle = (low + high) / 2
            if self._windows(middle) is None:
                low = middle
            else:
                high = middle
        return low

    def _work(self, k: int) -> list[Floats]:
        if self.problem.kind == "memory":
            return [m / self.problem.limits[k] for m in self._memory[k]]
        return self._time[k]

    def _windows(self, wanted: float) -> tuple[Ints, Ints] | None:
        """Bounds of every boundary if no stage may exceed ``wanted``; None if no partition is left."""
        problem, k = self.problem, self.problem.n_stages
        low, high = self._floor.copy(), self._ceiling.copy()
        wanted = wanted * (1 + 1e-12)
        for s in range(k):  # furthest end of stage s
            reach = 0
            for i, (sums, option) in enumerate(zip(self._work(s), problem.options[s], strict=True)):
                fixed = 0.0 if problem.kind == "memory" else option.fixed_time
                end = np.searchsorted(sums, sums[high[s]] + (wanted - fixed), side="right") - 1
                if problem.kind != "memory" and np.isfinite(problem.limits[s]):
                    held = self._memory[s][i]
                    limit = problem.limits[s] * (1 + MEMORY_SLACK)
                    end = min(end, np.searchsorted(held, held[high[s]] + limit, side="right") - 1)
                reach = max(reach, int(end))
            if problem.allow_empty:
                reach = max(reach, int(high[s]))
            high[s + 1] = min(high[s + 1], reach)
        for s in range(k - 1, -1, -1):  # earliest start of stage s
            reach = problem.n
            for i, (sums, option) in enumerate(zip(self._work(s), problem.options[s], strict=True)):
                fixed = 0.0 if problem.kind == "memory" else option.fixed_time
                begin = np.searchsorted(sums, sums[low[s + 1]] - (wanted - fixed), side="left")
                if problem.kind != "memory" and np.isfinite(problem.limits[s]):
                    held = self._memory[s][i]
                    limit = problem.limits[s] * (1 + MEMORY_SLACK)
                    begin = max(begin, np.searchsorted(held, held[low[s + 1]] - limit, side="left"))
                reach = min(reach, int(begin))
            if problem.allow_empty:
                reach = min(reach, int(low[s + 1]))
            low[s] = max(low[s], reach)
        return None if np.any(low > high) else (low, high)

    def _within(self, wanted: float, clock: Clock) -> tuple[float, Ints] | None:
        """The best partition inside the windows of ``wanted``, if one has a load of at most that."""
        windows = self._windows(wanted)
        if windows is None:
            return None
        low, high = windows
        best = np.zeros(1)  # D of the boundary before, over `rows`
        rows = range(1)
        came_from: list[Ints] = []
        for s in range(self.problem.n_stages):
            columns = range(int(low[s + 1]), int(high[s + 1]) + 1)
            values, sources = np.empty(len(columns)), np.empty(len(columns), dtype=np.int64)
            step = max(1, _BLOCK // len(rows))
            for start in range(0, len(columns), step):
                part = columns[start : start + step]
                total = np.maximum(best[:, None], self._segment_loads(s, rows, part))
                at = np.argmin(total, axis=0)
                sources[start : start + step] = at + rows.start
                values[start : start + step] = total[at, np.arange(len(part))]
                if clock.expired:
                    return None
            alive = np.flatnonzero((values <= wanted) & np.isfinite(values))
            if len(alive) == 0:
                return None
            first, last = int(alive[0]), int(alive[-1]) + 1
            rows, best = columns[first:last], values[first:last].copy()
            best[best > wanted] = np.inf
            origin = np.full(self.problem.n + 1, -1, dtype=np.int64)
            origin[rows.start : rows.stop] = sources[first:last]
            came_from.append(origin)
        stage = np.empty(self.problem.n, dtype=np.int64)
        end = self.problem.n
        for s in range(self.problem.n_stages - 1, -1, -1):
            begin = int(came_from[s][end])
            stage[self.order[begin:end]] = s
            end = begin
        return float(best[-1]), stage

    def _segment_loads(self, s: int, rows: range, columns: range) -> Floats:
        problem = self.problem
        i = np.arange(rows.start, rows.stop)
        j = np.arange(columns.start, columns.stop)
        values = problem.values
        nothing = np.zeros(1)
        time_in = time_out = bytes_in = nothing
        if problem.kind != "memory":
            time_in = self.incoming.table(values.transfer, rows, columns)
            time_out = self.outgoing.table(values.transfer, rows, columns)
        if self._needs_bytes and (problem.kind == "memory" or np.isfinite(problem.limits[s])):
            bytes_in = self.incoming.table(values.size, rows, columns)
        time = [
            t[j][None, :] - t[i][:, None] + o.fixed_time
            for t, o in zip(self._time[s], problem.options[s], strict=True)
        ]
        memory = [m[j][None, :] - m[i][:, None] for m in self._memory[s]]
        loads = option_loads(problem, s, time, memory, time_in, time_out, bytes_in)
        load = loads[0]
        for other in loads[1:]:
            load = np.minimum(load, other)
        load = np.broadcast_to(load, (len(i), len(j))).copy()
        load[j[None, :] < i[:, None]] = np.inf
        load[j[None, :] == i[:, None]] = 0.0 if problem.allow_empty else np.inf
        return load
