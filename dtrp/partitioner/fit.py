"""Fits a plan into memory. The solver adds up what each stage needs; what decides is the most that it has at
one moment, which is simulated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import networkx as nx

from dtrp.errors import InfeasiblePlanError
from dtrp.partitioner.capture.graph import Captured
from dtrp.partitioner.partition import Partition
from dtrp.partitioner.partly import as_needed
from dtrp.partitioner.stage_cost import RECOMPUTE, Recompute, StageCost, stage_costs
from dtrp.partitioner.training import Training

log = logging.getLogger(__name__)

Choice = bool | str | Sequence[bool]
Limits = Sequence[float | None]

_TIGHTENINGS = 3

Solve = Callable[[Choice, Limits], Partition]
"""The best partition for a choice of what recomputes, within so many bytes of each stage."""


class Fitted(NamedTuple):
    """A partition, and what each of its stages computes again."""

    partition: Partition
    recompute: tuple[Recompute, ...]

    @classmethod
    def as_solved(cls, partition: Partition) -> Fitted:
        """Whole stages, as the solver chose them."""
        return cls(partition, tuple(option == RECOMPUTE for option in partition.options))


@dataclass(frozen=True)
class Fit:
    """What is to be fitted. ``devices``: each stage's number in the graph; ``recompute``: as asked for."""

    captured: Captured
    graph: nx.DiGraph
    devices: Sequence[int]
    training: Training
    recompute: Choice
    solve: Solve

    def into(self, limits: Limits) -> Fitted:
        """The fastest that fits; where a simulated peak is more than the sum, its limit is drawn tighter.

        Raises
        ------
        InfeasiblePlanError
            Not even the sums fit.
        """
        best = Fitted.as_solved(self.solve(self.recompute, [None] * len(limits)))
        excess = self._overdrawn(best, limits)
        if not any(excess):
            return best
        best = Fitted.as_solved(self.solve(self.recompute, limits))
        excess = self._overdrawn(best, limits)
        tight = limits
        for _ in range(_TIGHTENINGS):
            if not any(excess):
                break
            tight = [None if t is None else t - e for t, e in zip(tight, excess, strict=True)]
            try:
                found = Fitted.as_solved(self.solve(self.recompute, tight))
            except (InfeasiblePlanError, ValueError):
                break
            before, excess = excess, self._overdrawn(found, limits)
            if sum(excess) < sum(before):
                best = found
        if self.recompute == "auto":
            best = self._in_part(best, limits)
        if any(self._overdrawn(best, limits)):
            log.warning(
                "at its fullest moment a stage needs more memory than its limit; the report says how much"
            )
        return best

    def _in_part(self, whole: Fitted, limits: Limits) -> Fitted:
        """The same, or another partition, where stages compute no more again than they need to."""
        candidates: list[Fitted] = [] if any(self._overdrawn(whole, limits)) else [whole]
        with suppress(InfeasiblePlanError):
            for found in (whole.partition, self.solve("partly", limits)):
                keeping = self._costs(Fitted(found, (False,) * len(limits)))
                again = as_needed(self.captured, self.graph, found, keeping, limits, self.training)
                if not any(self._overdrawn(candidate := Fitted(found, again), limits)):
                    candidates.append(candidate)
        best = min(candidates, key=lambda c: max(cost.tick for cost in self._costs(c)), default=whole)
        if best.recompute == Fitted.as_solved(best.partition).recompute:
            return best
        bound = min(whole.partition.lower_bound, self.solve("at best", limits).lower_bound)
        return best._replace(partition=replace(best.partition, lower_bound=bound, reason=""))

    def _costs(self, fitted: Fitted) -> list[StageCost]:
        stage_of = {str(n): fitted.partition.stage_of[n] for n in self.graph}
        again = fitted.recompute
        return stage_costs(self.graph, stage_of, again, devices=self.devices, training=self.training)

    def _overdrawn(self, fitted: Fitted, limits: Limits) -> list[float]:
        """Bytes by which each stage's simulated peak exceeds its limit."""
        pairs = zip(self._costs(fitted), limits, strict=True)
        return [0.0 if most is None else max(cost.peak - most, 0.0) for cost, most in pairs]
