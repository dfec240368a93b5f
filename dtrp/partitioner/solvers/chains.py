"""Exact dynamic program over a family of down-sets: the best chain from nothing to everything.

    D[k][I] = min over J in the family, J <= I, of max(D[k-1][J], load_k(I \\ J))

With all down-sets as the family this is exact for the problem; with some of them (see `search`) it
combines the cuts of many partitions into the best that they contain.

**Loads of all pairs by matrix products.** For J <= I every term is a sum of products of a number that
depends on J and one that depends on I. Work and memory are differences. A value with producer u and
consumers C stays inside I \\ J if {u} + C lies in I and misses J, so

    sent(I \\ J) = sum_u t_u ([u in I] - [u in J] - [{u} + C in I] [{u} + C misses J]).

It is received if u is outside and I \\ J holds some consumer, that is, if I holds more of C than J does; with
c the number of consumers held,

    received(I \\ J) = sum_u t_u ([u in J] + [u not in I]) (1 - sum_c [c_u(J) = c] [c_u(I) = c]).

J <= I itself is one more product (members of J missing in I). What is the same for all of a block of pairs
is left out of the products; since families are sorted by size, that is most of it.

Complexity: O(sum over k of |W_k| |W_{k+1}| f) for window sizes W and f values that vary within a block.

Dynamic programming over down-sets ("ideals") for placement: Tarnawski, Phanishayee, Devanur, Mahajan,
Nina Paravecino, "Efficient Algorithms for Device Placement of DNN Graph Operators", NeurIPS 2020. Windows,
joint options under memory limits and the products are ours.
"""

from __future__ import annotations

import numpy as np

from .clock import Clock
from .loads import option_loads
from .problem import Bools, Floats, Ints, Problem, product
from .windows import Windows

_ROWS, _COLUMNS = 512, 4096  # pairs per block


class OutOfTime(Exception):
    """The clock expired before the program was through; nothing is proven."""


class Family:
    """Distinct down-sets, sorted by size: nothing first, everything last."""

    def __init__(self, problem: Problem, member: Bools) -> None:
        trivial = member.all(axis=1) | ~member.any(axis=1)
        ends = np.zeros((2, problem.n), dtype=bool)
        ends[1] = True
        member = np.concatenate([ends[:1], member[~trivial], ends[1:]])
        weight = problem.work(0)[0][0]
        self.member = member[
            np.argsort(product(member, weight / max(float(weight.sum()), 1e-300) + 1.0 / problem.n))
        ]
        self._sums: dict[int, Floats] = {}

    def __len__(self) -> int:
        return len(self.member)

    def total(self, column: Floats) -> Floats:
        """Sum of a column over every down-set."""
        if id(column) not in self._sums:
            self._sums[id(column)] = product(self.member, column)
        return self._sums[id(column)]


class Traffic:
    """What some down-sets (rows) and some others (columns) say about the values that differ among them.

    ``inside``: holds the producer; ``held``: number of consumers held; ``full``: all of both;
    ``none``: nothing.
    """

    def __init__(self, problem: Problem, member: Bools) -> None:
        values = problem.values
        varies: Bools = np.logical_or.reduce(member, axis=0) & ~np.logical_and.reduce(member, axis=0)
        concerned = varies[values.producer] if len(values) else np.zeros(0, dtype=bool)
        np.logical_or.at(concerned, values.owner, varies[values.consumer])
        self.which = np.flatnonzero(concerned)
        entries = np.flatnonzero(concerned[values.owner])
        degree = np.diff(values.start)[self.which]
        self.transfer, self.size = values.transfer[self.which], values.size[self.which]
        if len(self.which) == 0:
            self.inside = self.full = self.none = np.zeros((len(member), 0), dtype=bool)
            self.held = np.zeros((len(member), 0), dtype=np.int16)
            self.precedes = np.zeros(0, dtype=np.int64)
            return
        starts = np.concatenate(([0], np.cumsum(degree)[:-1]))
        producer, consumer = values.producer[self.which], values.consumer[entries]
        by_group = np.ascontiguousarray(member.T)  # reducing over rows runs along memory
        held = np.add.reduceat(by_group[consumer], starts, axis=0, dtype=np.int16)
        self.inside = np.ascontiguousarray(by_group[producer].T)
        self.held = np.ascontiguousarray(held.T)
        self.full = self.inside & (self.held == degree)
        self.none = ~self.inside & (self.held == 0)
        # Only a consumer that may come before its producer can make a value flow backwards.
        later = problem.descendants[np.repeat(producer, degree), consumer]
        self.precedes = np.flatnonzero(~np.logical_and.reduceat(later, starts))


class ChainProgram:
    """The dynamic program over one family."""

    def __init__(self, problem: Problem, windows: Windows, member: Bools) -> None:
        self.problem = problem
        self.windows = windows
        self.family = Family(problem, member)
        self.reached = member[:0]  # after solving: the down-sets that are boundaries of partial partitions
        self._needs_bytes = any(o.input_memory for options in problem.options for o in options)

    def solve(self, wanted: float, clock: Clock) -> tuple[float, Ints] | None:
        """The best partition whose boundaries are in the family, if its loads are at most ``wanted``.

        Returns
        -------
        (load, stage) or None
            None: there is none within ``wanted``.

        Raises
        ------
        OutOfTime
            The clock expired first.
        """
        family, k = self.family, self.problem.n_stages
        admitted = self.windows.admitted(family.member, wanted)
        rows, best = np.zeros(1, dtype=np.int64), np.zeros(1)
        trail: list[tuple[Ints, Ints]] = []  # per boundary: down-sets reached, and from where
        for s in range(k):
            last = s == k - 1
            columns = np.array([len(family) - 1]) if last else np.flatnonzero(admitted[s])
            reached, origin = self._extend(s, rows, best, columns, wanted, clock)
            alive = (reached <= wanted) & np.isfinite(reached)
            if not alive.any():
                return None
            rows, best = columns[alive], reached[alive]
            trail.append((rows, origin[alive]))
        self.reached = family.member[np.unique(np.concatenate([r for r, _ in trail]))]
        stage = np.empty(self.problem.n, dtype=np.int64)
        at = len(family) - 1
        for s in range(k - 1, -1, -1):
            rows, origin = trail[s]
            before = int(origin[np.searchsorted(rows, at)])
            stage[family.member[at] & ~family.member[before]] = s
            at = before
        return float(best[-1]), stage

    def _extend(
        self, s: int, rows: Ints, best: Floats, columns: Ints, wanted: float, clock: Clock
    ) -> tuple[Floats, Ints]:
        """``D`` after stage ``s`` for ``columns``, from ``D`` before it, and the down-sets it came from."""
        family, problem = self.family, self.problem
        reached = np.full(len(columns), np.inf)
        origin = np.full(len(columns), -1, dtype=np.int64)
        traffic = Traffic(problem, family.member[np.concatenate([rows, columns])])
        work = [(family.total(c), fixed) for c, fixed in problem.work(s)]
        for i in range(0, len(rows), _ROWS):
            r = np.arange(i, min(i + _ROWS, len(rows)))
            # No option may take longer than wanted from the row of the block that has done most.
            near = np.zeros(len(columns), dtype=bool)
            for total, fixed in work:
                near |= total[columns] - total[rows[r]].max() <= wanted - fixed + 1e-9 * abs(wanted)
            chosen = np.flatnonzero(near)
            for start in range(0, len(chosen), _COLUMNS):
                if clock.expired:
                    raise OutOfTime
                c = chosen[start : start + _COLUMNS]
                block = self.pair_loads(s, rows[r], columns[c], traffic, r, c + len(rows))
                np.maximum(block, best[r, None], out=block)
                at = np.argmin(block, axis=0)
                found = block[at, np.arange(len(c))]
                better = found < reached[c]
                reached[c[better]] = found[better]
                origin[c[better]] = rows[r[at[better]]]
        return reached, origin

    def pair_loads(self, s: int, rows: Ints, columns: Ints, traffic: Traffic, r: Ints, c: Ints) -> Floats:
        """Load of stage ``s`` if it runs what ``columns`` hold more than ``rows``; inf where they do not.

        ``r`` and ``c`` are the places of these down-sets in ``traffic``.
        """
        family, problem = self.family, self.problem
        inside, outside = family.member[rows], ~family.member[columns]
        both = inside.any(axis=0) & outside.any(axis=0)
        extra = product(inside[:, both].astype(np.float32), outside[:, both].astype(np.float32).T)
        time_in = time_out = bytes_in = np.zeros(1)
        if problem.kind != "memory":
            time_in = _received(traffic, r, c, traffic.transfer)
            time_out = _sent(traffic, r, c, traffic.transfer)
        if self._needs_bytes and (problem.kind == "memory" or np.isfinite(problem.limits[s])):
            bytes_in = _received(traffic, r, c, traffic.size)
        time, memory = [], []
        for option in problem.options[s]:
            seconds, held = family.total(option.time), family.total(option.memory)
            time.append(seconds[columns][None, :] - seconds[rows][:, None] + option.fixed_time)
            memory.append(held[columns][None, :] - held[rows][:, None])
        loads = option_loads(problem, s, time, memory, time_in, time_out, bytes_in)
        load = loads[0]
        for other in loads[1:]:
            load = np.minimum(load, other)
        load = np.where(extra > 0.5, np.inf, load)
        load[rows[:, None] == columns[None, :]] = 0.0 if problem.allow_empty else np.inf
        return load


def _sent(traffic: Traffic, rows: Ints, columns: Ints, weight: Floats) -> Floats:
    made_rows, made_columns = product(traffic.inside[rows], weight), product(traffic.inside[columns], weight)
    misses, holds = traffic.none[rows], traffic.full[columns]
    use = misses.any(axis=0) & holds.any(axis=0)
    kept = _product(misses[:, use], holds[:, use], weight[use])
    sent: Floats = made_columns[None, :] - made_rows[:, None] - kept
    return sent


def _received(traffic: Traffic, rows: Ints, columns: Ints, weight: Floats) -> Floats:
    low, high = traffic.held[rows].min(axis=0), traffic.held[columns].max(axis=0)
    varies = (low < high) & (weight > 0)
    made = np.flatnonzero(varies & traffic.inside[rows].any(axis=0))
    received = _gains(traffic, rows, columns, made, weight, traffic.inside[rows][:, made], None)
    back = traffic.precedes[varies[traffic.precedes]]
    if len(back):
        gate = ~traffic.inside[columns][:, back]
        received = received + _gains(traffic, rows, columns, back, weight, None, gate)
    return received


def _gains(
    traffic: Traffic,
    rows: Ints,
    columns: Ints,
    use: Ints,
    weight: Floats,
    row_gate: Bools | None,
    column_gate: Bools | None,
) -> Floats:
    """Sum of the values ``use`` that pass the one gate and of which columns hold more consumers than rows."""
    weight = weight[use]
    held_rows, held_columns = traffic.held[rows][:, use], traffic.held[columns][:, use]
    left, right, weights = [], [], []
    for count in range(int(held_rows.max(initial=0)) + 1):
        x, y = held_rows == count, held_columns == count
        if row_gate is not None:
            x &= row_gate
        if column_gate is not None:
            y &= column_gate
        keep = x.any(axis=0) & y.any(axis=0)
        left.append(x[:, keep])
        right.append(y[:, keep])
        weights.append(weight[keep])
    every = np.zeros((1, 1))
    if row_gate is not None:
        every = product(row_gate, weight)[:, None]
    if column_gate is not None:
        every = product(column_gate, weight)[None, :]
    same = _product(np.concatenate(left, axis=1), np.concatenate(right, axis=1), np.concatenate(weights))
    difference: Floats = every - same
    return difference


def _product(left: Bools, right: Bools, weight: Floats) -> Floats:
    """``left @ diag(weight) @ right.T``."""
    return product(left * weight, right.T.astype(np.float64))
