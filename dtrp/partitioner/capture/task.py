"""What a way of capturing is asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

from .graph import Signature
from .modes import Flags, in_mode, training_flags
from .real import RealRuns


@dataclass(frozen=True)
class Task:
    """A model with an example call, and which of its modules to treat otherwise than usual."""

    model: nn.Module
    signature: Signature
    tensors: Sequence[torch.Tensor]  # of the example call, one for each placeholder
    opened: Collection[str] = ()  # qualified names of modules that must not be one node
    closed: Mapping[str, str] = field(default_factory=dict)  # of those that must be, and why
    runs: RealRuns = field(default_factory=RealRuns)  # shared by all that is tried
    flags: Flags = ()  # of training
    grad: bool = True  # whether gradients are enabled around the model

    def __post_init__(self) -> None:
        if not self.flags:
            object.__setattr__(self, "flags", training_flags(self.model))

    def in_mode(self, training: bool) -> AbstractContextManager[None]:
        """Inside, the model is in that mode."""
        return in_mode(self.model, self.flags if training else None)
