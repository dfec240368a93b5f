"""Exact dynamic program over a family of down-sets: the best chain that starts empty and ends with everything.

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
from numpy.typing import NDArray

from .clock import Clock
from .loads import option_loads
from .problem import Floats, Ints, Problem
from .windows import Bools, Windows

_ROWS, _COLUMNS = 512, 4096  # pairs per block


class OutOfTime(Exception):
    """The clock expired before the program was through; nothing is proven."""


class Family:
    """Down-sets with everything that pair loads need of each alone."""

    def __init__(self, problem: Problem, member: Bools) -> None:
        self.problem = problem
        everything = member.all(axis=1) | ~member.any(axis=1)
        n = problem.n
        ends = np.stack([np.zeros(n, dtype=bool), np.ones(n, dtype=bool)])
        member = np.concatenate([ends[:1], member[~everything], ends[1:]])
        weight = problem.work(0)[0][0]
        key = member @ (weight / max(float(weight.sum()), 1e-300) + 1.0 / n)
        by = np.argsort(key, kind="stable")
        self.member = member[by]
        values = problem.values
        if len(values):
            users = self.member[:, values.consumer]
            inside = self.member[:, values.producer]
            starts = values.start[:-1]
            self.held = np.add.reduceat(users, starts, axis=1, dtype=np.int32)
            degree = np.diff(values.start)
            self.full = inside & (self.held == degree)
            self.none = ~inside & (self.held == 0)
            self.inside = inside
        else:
            empty = np.zeros((len(self.member), 0), dtype=bool)
            self.full = self.none = self.inside = empty
            self.held = np.zeros((len(self.member), 0), dtype=np.int32)
        self._sums: dict[int, Floats] = {}

    def __len__(self) -> int:
        return len(self.member)

    def total(self, column: Floats) -> Floats:
        """Sum of a column over every down-set."""
        if id(column) not in self._sums:
            self._sums[id(column)] = self.member @ column
        return self._sums[id(column)]


class ChainProgram:
    """The dynamic program over one family."""

    def __init__(self, problem: Problem, windows: Windows, member: Bools) -> None:
        self.problem = problem
        self.windows = windows
        self.family = Family(problem, member)
        values = problem.values
        self._needs_bytes = any(o.input_memory for options in problem.options for o in options)
        # Only a consumer that may come before its producer can make a value flow backwards.
        after = problem.descendants[values.producer[values.owner], values.consumer]
        self._may_precede = np.unique(values.owner[~after])

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
        reached = np.full(len(columns), np.inf)
        origin = np.full(len(columns), -1, dtype=np.int64)
        work = [(self.family.total(c), fixed) for c, fixed in self.problem.work(s)]
        for i in range(0, len(rows), _ROWS):
            r = rows[i : i + _ROWS]
            # No option may take longer than wanted from the row of the block that has done most.
            near = np.zeros(len(columns), dtype=bool)
            for total, fixed in work:
                near |= total[columns] - total[r].max() <= wanted - fixed + 1e-9 * abs(wanted)
            
            for chosen in _split(np.flatnonzero(near), _COLUMNS):
                if clock.expired:
                    raise OutOfTime
                c = columns[chosen]
                loads = np.maximum(best[i : i + _ROWS, None], self.pair_loads(s, r, c))
                at = np.argmin(loads, axis=0)
                found = loads[at, np.arange(len(c))]
                better = found < reached[chosen]
                reached[chosen[better]] = found[better]
                origin[chosen[better]] = r[at[better]]
        return reached, origin

    def pair_loads(self, s: int, rows: Ints, columns: Ints) -> Floats:
        """Load of stage ``s`` if it runs what ``columns`` hold more than ``rows``; inf where they do not."""
        family, problem = self.family, self.problem
        inside, outside = family.member[rows], ~family.member[columns]
        both = inside.any(axis=0) & outside.any(axis=0)
        extra = inside[:, both].astype(np.float32) @ outside[:, both].astype(np.float32).T
        values = problem.values
        zero = np.zeros(1)
        time_in = time_out = bytes_in = zero
        if problem.kind != "memory" and len(values):
            time_in = self._received(rows, columns, values.transfer)
            time_out = self._sent(rows, columns, values.transfer)
        if self._needs_bytes and len(values) and (problem.kind == "memory" or np.isfinite(problem.limits[s])):
            bytes_in = self._received(rows, columns, values.size)
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
        same = rows[:, None] == columns[None, :]
        load[same] = 0.0 if problem.allow_empty else np.inf
        return load

    def _sent(self, rows: Ints, columns: Ints, weight: Floats) -> Floats:
        family = self.family
        made_rows, made_columns = family.inside[rows] @ weight, family.inside[columns] @ weight
        misses, holds = family.none[rows], family.full[columns]
        use = misses.any(axis=0) & holds.any(axis=0)
        kept = _product(misses[:, use], holds[:, use], weight[use])
        return made_columns[None, :] - made_rows[:, None] - kept

    def _received(self, rows: Ints, columns: Ints, weight: Floats) -> Floats:
        family = self.family
        held_rows, held_columns = family.held[rows], family.held[columns]
        low = np.minimum(held_rows.min(axis=0), held_columns.min(axis=0))
        high = np.maximum(held_rows.max(axis=0), held_columns.max(axis=0))
        varies = (low < high) & (weight > 0)
        use = np.flatnonzero(varies & family.inside[rows].any(axis=0))
        out = self._more_held(rows, columns, use, weight, made=True)
        back = self._may_precede
        back = back[varies[back]]
        if len(back):
            out = out + self._more_held(rows, columns, back, weight, made=False)
        return out

    def _more_held(self, rows: Ints, columns: Ints, use: Ints, weight: Floats, *, made: bool) -> Floats:
        """Sum over values made by ``rows`` (or: not made in ``columns``) that gain consumers in between."""
        family = self.family
        w = weight[use]
        held_rows, held_columns = family.held[rows][:, use], family.held[columns][:, use]
        ones = np.ones((len(rows), len(use)), dtype=bool)
        row_gate = family.inside[rows][:, use] if made else ones
        column_gate = None if made else ~family.inside[columns][:, use]
        left, right, weights = [], [], []
        top = int(held_rows.max(initial=0))
        for c in range(top + 1):
            x = (held_rows == c) & row_gate
            y = held_columns == c
            if column_gate is not None:
                y &= column_gate
            keep = x.any(axis=0) & y.any(axis=0)
            if keep.any():
                left.append(x[:, keep])
                right.append(y[:, keep])
                weights.append(w[keep])
        total = (row_gate @ w)[:, None] if column_gate is None else (column_gate @ w)[None, :]
        if not left:
            return np.broadcast_to(total, (len(rows), len(columns)))
        same = _product(np.concatenate(left, 1), np.concatenate(right, 1), np.concatenate(weights))
        return total - same


def _product(left: Bools, right: Bools, weight: Floats) -> Floats:
    """``left @ diag(weight) @ right.T``."""
    a: NDArray[np.float64] = left * weight
    return a @ right.T.astype(np.float64)


def _split(indices: Ints, size: int) -> list[Ints]:
    return [indices[i : i + size] for i in range(0, len(indices), size)]
