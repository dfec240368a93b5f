"""One batch, as the caller hands it to a stage, as the stage keeps it, and as the last stage reports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..wiring import Source
from .twins import Twin

Arrivals = dict[Source, Any]


class WithExtra(NamedTuple):
    """What stands in the place of a target that the loss takes together with arguments by name."""

    target: Any
    extra: Mapping[str, Any]


class Update(NamedTuple):
    """The update that a mini-batch brings."""

    lr_scale: float = 1.0
    batches: int = 1  # of the user's that it stands for (batch compensation): so far the scheduler goes


class Feed(NamedTuple):
    """One slot as the caller hands it to one stage."""

    batch: int  # the mini-batch, from 0; in evaluation the number of the batch there
    inputs: Sequence[Any]  # the model inputs that this stage asks the caller for
    target: Any = None  # the last stage's
    update: Update = Update()
    part: int = 0  # which micro-batch of the mini-batch
    parts: int = 1  # of how many
    share: float = 1.0  # of the mini-batch's samples; in evaluation how many they are

    @property
    def closes(self) -> bool:
        """Whether it is the last of its mini-batch: the stage steps after it."""
        return self.part == self.parts - 1


@dataclass
class InFlight:
    """What a stage keeps of a slot between its first forward and its backward."""

    feed: Feed
    arrivals: Arrivals
    outputs: tuple[Any, ...] | None = None  # with their graph, where there is one
    twin: Twin | None = None  # on whose parameters that graph was built
    gradients: dict[int, Tensor] | None = None  # of the outputs, once they have come
    skip: bool = False  # given up
    elsewhere: bool = False  # in another process of the stage
    scale: float = 0.0  # of the loss, where it is scaled


class Loss(NamedTuple):
    """The last stage's word on a mini-batch."""

    batch: int
    value: float
    lr: float | None = None  # of the first of its groups of parameters, as the scheduler has it


class Skip(NamedTuple):
    """A mini-batch was given up, which stands for so many of the user's."""

    batch: int
    batches: int
