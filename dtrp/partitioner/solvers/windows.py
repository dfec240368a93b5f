"""Which down-sets can be the first k stages of a partition whose loads are all at most L.

A partition into K contiguous stages is a chain of down-sets (sets closed under predecessors)
``{} = S_0 <= S_1 <= .. <= S_K = everything``; stage ``k`` runs ``S_{k+1} \\ S_k``. If no load exceeds L, the
first k stages together have done the work of ``S_k`` in k times L, the others do the rest in (K - k) times L,
and every value that crosses is sent once and received once, by someone, on either side. Stages that differ
are weighed as in `bounds.balance_bound`: for any weights ``w`` of the stages before the cut,
``sum_v min_k w_k c_k(v) <= L sum_k w_k``. These tests are necessary only, but cheap, and they leave few
candidates when L is near the best load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .bounds import balance_weights, stage_work
from .problem import Bools, Floats, Ints, Problem, product

# Sums are taken in single precision, for speed; that much more than wanted is still admitted.
_ROUNDING = 1e-5


@dataclass(frozen=True, eq=False)
class Side:
    """The work of the stages on one side of a boundary.

    A set with work ``w = column . set`` on this side, and ``x`` crossing it, needs
    ``w + fixed + charge * x <= L * capacity``.
    """

    column: Floats
    capacity: float
    fixed: float
    charge: float
    barred: Ints  # groups that no stage on this side may hold
    memory: Floats | None  # least bytes per group, if all these stages are limited
    memory_capacity: float


class Windows:
    """The tests for every boundary of a problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        k = problem.n_stages
        work, fixed = stage_work(problem)
        types = np.empty(k, dtype=np.int64)
        for i, alike in enumerate(problem.stage_types):
            types[alike] = i
        cache: dict[Any, Floats] = {}

        def side(stages: range) -> Side:
            # One column for all sides of one type saves products; pins make stages of one type differ.
            kinds = set(types[stages].tolist())
            key = kinds.pop() if len(kinds) == 1 and np.all(problem.pinned < 0) else stages
            return _side(problem, stages, work[stages], fixed[stages], cache, key)

        self.before = [side(range(s)) for s in range(1, k)]
        self.after = [side(range(s, k)) for s in range(1, k)]
        columns = [c for s in (*self.before, *self.after) for c in (s.column, s.memory) if c is not None]
        distinct = {id(c): c for c in columns}
        self._place = {key: i for i, key in enumerate(distinct)}
        stacked = np.array(list(distinct.values())).reshape(len(distinct), problem.n)
        self._columns = stacked.T.astype(np.float32)

    def crossing(self, inside: Bools, outside: Bools) -> tuple[Floats, Floats]:
        """Per row: the transfer of what surely crosses from ``inside`` to ``outside``, and back."""
        values = self.problem.values
        forward, backward = np.zeros(len(inside)), np.zeros(len(inside))
        if len(values) == 0 or self.problem.kind == "memory":
            return forward, backward
        priced = values.transfer > 0
        step = max(8, (1 << 27) // (len(values.consumer) + 1))
        for i in range(0, len(inside), step):
            # A bit per down-set and a row per group: reducing over rows runs along memory.
            within = np.packbits(inside[i : i + step].T, axis=1)
            beyond = np.packbits(outside[i : i + step].T, axis=1)
            for source, target, out in ((within, beyond, forward), (beyond, within, backward)):
                users = np.bitwise_or.reduceat(target[values.consumer], values.start[:-1], axis=0)
                crosses = users & source[values.producer]
                some = np.flatnonzero(priced & crosses.any(axis=1))
                part = out[i : i + step]
                bits = np.unpackbits(crosses[some], axis=1, count=len(part)).astype(np.float32)
                part += product(values.transfer[some].astype(np.float32), bits)
        return forward, backward

    def admitted(self, member: Bools, wanted: float) -> Bools:
        """Whether each down-set may be the boundary ``k = 1 .. K - 1``; shape (K - 1, len(member))."""
        return self.reachable(member, ~member, wanted)

    def reachable(self, inside: Bools, outside: Bools, wanted: float) -> Bools:
        """The same for down-sets of which only a part is decided: what is in, and what is out."""
        problem = self.problem
        k = problem.n_stages
        ok = np.ones((k - 1, len(inside)), dtype=bool)
        if k == 1:
            return ok
        wanted = wanted * (1 + _ROUNDING)
        forward, backward = self.crossing(inside, outside)
        both = forward + backward
        for sides, part, first in ((self.before, inside, True), (self.after, outside, False)):
            size = part.sum(axis=1)
            sums = product(self._columns.T, part.T.astype(np.float32))
            for i, side in enumerate(sides):
                stages = i + 1 if first else k - i - 1
                if not problem.allow_empty:  # the stages on the other side need a group each
                    ok[i] &= size <= problem.n - (k - stages)
                work = sums[self._place[id(side.column)]]
                if problem.kind == "sum":
                    ok[i] &= work + side.fixed + side.charge * both <= wanted * side.capacity
                else:
                    ok[i] &= work + side.fixed <= wanted * side.capacity
                    ok[i] &= (forward <= wanted * stages) & (backward <= wanted * stages)
                if side.memory is not None:
                    ok[i] &= sums[self._place[id(side.memory)]] <= side.memory_capacity
                if len(side.barred):
                    ok[i] &= ~part[:, side.barred].any(axis=1)
        return ok


def _side(
    problem: Problem, stages: range, work: Floats, fixed: Floats, cache: dict[Any, Floats], key: Any
) -> Side:
    barred = np.flatnonzero(np.all(np.isinf(work), axis=0))
    weights = balance_weights(work, fixed)
    column = np.min(weights[:, None] * work, axis=0)
    column[barred] = 0.0  # tested apart: inf times 0 is no number
    memory, capacity = None, np.inf
    if problem.kind != "memory" and np.all(np.isfinite(problem.limits[stages])):
        options = {id(o): o for s in stages for o in problem.options[s]}.values()
        memory = cache.setdefault(("memory", key), np.min([o.memory for o in options], axis=0))
        capacity = float(problem.limits[stages].sum()) * (1 + _ROUNDING)
    return Side(
        column=cache.setdefault(key, column),
        capacity=float(weights.sum()),
        fixed=float(weights @ fixed),
        charge=float(weights.min()),
        barred=barred,
        memory=memory,
        memory_capacity=capacity,
    )
