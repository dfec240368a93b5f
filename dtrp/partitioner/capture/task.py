"""What a way of capturing is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from .fakes import FakeWorld
from .graph import Signature
from .in_parts import in_parts
from .modes import Flags, evaluation_flags, set_flags, training_flags
from .real import RealRuns
from .snapshot import Found


@dataclass(frozen=True)
class Task:
    """A model with an example call, and which of its modules to treat otherwise than usual."""

    model: nn.Module
    signature: Signature
    tensors: Sequence[torch.Tensor]  # of the example call, one for each placeholder
    opened: Collection[str] = ()  # qualified names of modules that must not be one node
    divided: Mapping[str, int] = field(default_factory=dict)  # of Linear layers, and in how many parts
    closed: Mapping[str, str] = field(default_factory=dict)  # of those that must be, and why
    runs: RealRuns = field(default_factory=RealRuns)  # shared by all that is tried
    flags: Flags = ()  # of training
    grad: bool = True  # whether gradients are enabled around the model
    settled: bool = False  # the flags are those that the model itself leaves behind

    def __post_init__(self) -> None:
        if not self.flags:
            object.__setattr__(self, "flags", training_flags(self.model))

    @cached_property
    def found(self) -> Found:
        """The model before anything was run."""
        return Found(self.model)

    @cached_property
    def _evaluation(self) -> Flags:
        return evaluation_flags(self.model)

    @cached_property
    def _worlds(self) -> list[FakeWorld]:
        return []

    def world(self) -> FakeWorld:
        """Fake twins for one run of the model: those of the run before, where it has not changed them."""
        self._worlds[:] = [FakeWorld(runs=self.runs, earlier=next(iter(self._worlds), None))]
        return self._worlds[0]

    @contextmanager
    def run(self, training: bool, *, tensors: bool = False) -> Iterator[None]:
        """Inside, the model is in that mode and may run; on leaving it is put back as `untouched` does."""
        flags = self.flags if training else self._evaluation
        with self.found.again(tensors=tensors), in_parts(self.model, self.divided):
            set_flags(self.model, flags)
            yield
