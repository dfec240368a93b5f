"""What a search knows: the best partition so far and the best bound so far."""

from __future__ import annotations

import numpy as np

from .bounds import Bound, simple_bound
from .loads import evaluate
from .problem import Bools, Ints, Problem

# Two loads closer than this (relative) are the same load; plans are not made to more digits than that.
TOLERANCE = 1e-7


class State:
    """The best partition of a problem so far, its load, who found it, and a lower bound for all."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.stage: Ints | None = None
        self.load = np.inf
        self.engine = ""
        self.bound: Bound = simple_bound(problem)
        self.downsets: Bools = np.zeros((0, problem.n), dtype=bool)  # boundaries met when it was solved

    @property
    def optimal(self) -> bool:
        """Whether no partition can be better."""
        return self.load <= self.bound.value * (1 + TOLERANCE)

    def offer(self, stage: Ints, engine: str) -> bool:
        """Take a partition if it is allowed and better; whether it was."""
        load = evaluate(self.problem, stage).max_load
        if not load < self.load:
            return False
        if not self.problem.allow_empty and len(np.unique(stage)) < self.problem.n_stages:
            return False  # engines that solve a relaxed problem may leave stages empty
        self.stage, self.load, self.engine = stage, load, engine
        return True

    def raise_bound(self, bound: Bound) -> None:
        """Take a lower bound if it is higher."""
        if bound.value > self.bound.value:
            self.bound = bound
