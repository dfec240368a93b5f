"""Loads of all pairs of a family's down-sets at once, for programs whose prices or devices depend on the way.

`chains` computes loads block by block and forgets them. Where the same pairs are needed again and again
(another border between nodes, another device), they are kept here: a number per pair and part of a load.
"""

from __future__ import annotations

import numpy as np

from .chains import Family, Traffic, _gains, _received, _sent
from .loads import option_loads
from .problem import Bools, Floats, Ints, Problem, product

MOST = 1500  # down-sets: a table of pairs has as many squared entries


class Pairs:
    """All pairs ``(J, I)`` of a family: what stage ``I \\ J`` computes, receives and sends.

    Attributes
    ----------
    member : array of bool, shape (N, n)
        The down-sets: nothing first, everything last.
    within : array of bool, shape (N, N)
        Whether J lies in I and is not the same.
    """

    def __init__(self, problem: Problem, member: Bools) -> None:
        self.problem = problem
        self.family = Family(problem, member)
        self.member = self.family.member
        n = len(self.member)
        every = np.arange(n)
        self.traffic = Traffic(problem, self.member)
        missing = product(self.member.astype(np.float32), (~self.member).astype(np.float32).T)
        self.within = (missing < 0.5) & ~np.eye(n, dtype=bool)
        flat = np.zeros((n, n))
        self.time_in = flat + _received(self.traffic, every, every, self.traffic.transfer)
        self.time_out = flat + _sent(self.traffic, every, every, self.traffic.transfer)
        self.bytes_in = flat + _received(self.traffic, every, every, self.traffic.size)

    def __len__(self) -> int:
        return len(self.member)

    def loads(
        self,
        problem: Problem,
        stage: int,
        rows: Ints,
        time_in: Floats | None = None,
        time_out: Floats | None = None,
    ) -> Floats:
        """Load of a stage for the pairs of some down-sets; inf where J does not lie in I.

        ``problem`` says what the stage offers; ``time_in`` and ``time_out`` of these pairs, where they are
        not those of the problem's own prices.
        """
        block = np.ix_(rows, rows)
        time, memory = [], []
        for option in problem.options[stage]:
            seconds, held = self.family.total(option.time)[rows], self.family.total(option.memory)[rows]
            time.append(seconds[None, :] - seconds[:, None] + option.fixed_time)
            memory.append(held[None, :] - held[:, None])
        time_in = self.time_in[block] if time_in is None else time_in
        time_out = self.time_out[block] if time_out is None else time_out
        best = np.minimum.reduce(
            option_loads(problem, stage, time, memory, time_in, time_out, self.bytes_in[block])
        )
        best = np.where(self.within[block], best, np.inf)
        if problem.allow_empty:
            np.fill_diagonal(best, 0.0)
        loads: Floats = best
        return loads

    def dearer(self, first: int, last: int, rows: Ints) -> tuple[Floats | None, Floats | None]:
        """What pairs between two down-sets receive and send, where all between these two is one node and what
        crosses its borders takes ``far``; ``None``: as ever."""
        values, traffic = self.problem.values, self.traffic
        if values.far is None or len(values) == 0:
            return None, None
        more = (values.far - values.transfer)[traffic.which]
        made = traffic.inside[last] & ~traffic.inside[first]
        degree = np.diff(values.start)[traffic.which]
        needed = traffic.held[last] > traffic.held[first]
        outside = (traffic.held[last] - traffic.held[first] < degree) & made & (more > 0)
        arriving = np.flatnonzero(~made & needed & (more > 0))
        block = np.ix_(rows, rows)
        time_in, time_out = self.time_in[block], self.time_out[block]
        if len(arriving):
            # Each once for every stage that holds more of its consumers at the end than at the beginning.
            time_in = time_in + more[arriving].sum()
            time_in = time_in + _gains(traffic, rows, rows, arriving, more, None, None)
        sent = product(traffic.inside[rows][:, outside], more[outside])
        return time_in, time_out + (sent[None, :] - sent[:, None])


def step(best: Floats, loads: Floats) -> tuple[Floats, Ints]:
    """One more stage: the least bottleneck for every down-set, and from where."""
    reached = np.maximum(best[:, None], loads)
    origin = np.argmin(reached, axis=0)
    found: Floats = reached[origin, np.arange(reached.shape[1])]
    return found, origin
