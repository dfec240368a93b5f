"""How the values of one pass travel between stages: what the compiler says and the runtime obeys.

Immutable and free of graphs, modules and processes, so that both halves can share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch.utils import _pytree as pytree

CALLER = -1
"""The "stage" that model inputs come from."""


@dataclass(frozen=True, order=True)
class Source:
    """Where a value comes from: output ``index`` of ``stage``, or model input ``index`` of the caller."""

    stage: int
    index: int


@dataclass(frozen=True)
class Constant:
    """A leaf of the model's output that is no tensor and never changes."""

    value: Any


@dataclass(frozen=True)
class StageWires:
    """One stage's ends: where each argument of its module comes from, and what it gives."""

    inputs: tuple[Source, ...]
    outputs: tuple[str, ...]  # names, for people
    differentiable: tuple[bool, ...]  # which outputs carry gradient back


@dataclass(frozen=True)
class Wiring:
    """The ends of all stages, and where the leaves of the model's output come from.

    The loss is computed on the last stage, so output leaves that are made earlier are sent there.
    """

    stages: tuple[StageWires, ...]
    result: tuple[Source | Constant, ...]
    out_spec: pytree.TreeSpec

    @cached_property
    def n_stages(self) -> int:
        return len(self.stages)

    @cached_property
    def sends(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """``(i, j) -> outputs of stage i that stage j needs``, in the order in which they travel."""
        needed: dict[tuple[int, int], set[int]] = {}
        for j, stage in enumerate(self.stages):
            for source in stage.inputs:
                if source.stage != CALLER:
                    needed.setdefault((source.stage, j), set()).add(source.index)
        last = self.n_stages - 1
        for leaf in self.result:
            if isinstance(leaf, Source) and leaf.stage not in (CALLER, last):
                needed.setdefault((leaf.stage, last), set()).add(leaf.index)
        return {pair: tuple(sorted(indices)) for pair, indices in sorted(needed.items())}

    @cached_property
    def gradients(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """``(i, j) -> outputs of stage i whose gradient stage j sends back``.

        Only a stage that gets a gradient itself has any to send: the last one, and those that reach it by
        values that carry gradient (not by indices alone, nor from behind ``no_grad``).
        """
        back: dict[tuple[int, int], tuple[int, ...]] = {}
        takes_part = {self.n_stages - 1}
        for (i, j), sent in sorted(self.sends.items(), key=lambda item: -item[0][1]):
            carrying = tuple(n for n in sent if self.stages[i].differentiable[n])
            if carrying and j in takes_part:
                back[i, j] = carrying
                takes_part.add(i)
        return dict(sorted(back.items()))

    @cached_property
    def trained(self) -> frozenset[int]:
        """Stages that take part in the backward pass."""
        return frozenset({self.n_stages - 1, *(i for i, _ in self.gradients)})

    def caller_inputs(self, stage: int) -> tuple[int, ...]:
        """Model inputs that go straight from the caller to ``stage``, in the order in which they travel."""
        return self._from_caller[stage]

    @cached_property
    def _from_caller(self) -> list[tuple[int, ...]]:
        needed = [{s.index for s in stage.inputs if s.stage == CALLER} for stage in self.stages]
        needed[-1] |= {s.index for s in self.result if isinstance(s, Source) and s.stage == CALLER}
        return [tuple(sorted(indices)) for indices in needed]

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The model's output in its own structure."""
        return pytree.tree_unflatten(list(leaves), self.out_spec)
