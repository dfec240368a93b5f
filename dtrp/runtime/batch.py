"""One batch, as the caller hands it to a stage, as the stage keeps it, and as the last stage reports it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..wiring import Source
from .weights import Leaves

Arrivals = dict[Source, Any]


@dataclass(frozen=True)
class Update:
    """What is special about the update that a batch brings (batch compensation)."""

    lr_scale: float = 1.0
    batches: int = 1  # of the user's that it stands for: so far the scheduler goes


@dataclass(frozen=True)
class Feed:
    """One batch as the caller hands it to one stage."""

    batch: int
    inputs: tuple[Any, ...]  # the model inputs that this stage asks the caller for
    target: Any = None  # the last stage's
    update: Update = Update()


@dataclass
class InFlight:
    """What a stage keeps of a batch between its first forward and its backward."""

    batch: int
    arrivals: Arrivals
    update: Update
    outputs: tuple[Any, ...] | None = None  # with their graph, where the stage keeps it
    leaves: Leaves = field(default_factory=dict)  # the weights that graph was built on


@dataclass
class Report:
    """What the last stage says of a batch."""

    batch: int
    loss: Tensor  # in host memory; on its way there where it comes from a CUDA device
    skipped: bool = False
    may_be_nonfinite: bool = True
    arrival: torch.cuda.Event | None = None

    @classmethod
    def of(cls, batch: int, loss: Tensor, *, skipped: bool, may_be_nonfinite: bool) -> Report:
        """Starts the loss on its way to the host without waiting for the device."""
        if not loss.is_cuda:
            report = cls(batch, loss, skipped, may_be_nonfinite)
            report.value()  # before anything is trained with it
            return report
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        host = torch.empty_like(loss, device="cpu", pin_memory=True).copy_(loss, non_blocking=True)
        arrived.record()
        return cls(batch, host, skipped, may_be_nonfinite, arrived)

    def ready(self) -> bool:
        """Whether the loss can be read without waiting."""
        return self.arrival is None or bool(self.arrival.query())  # type: ignore[no-untyped-call]

    def value(self) -> float:
        """The loss; waits for it.

        Raises
        ------
        FloatingPointError
            It is NaN or infinite, and the run does not skip such batches.
        """
        if self.arrival is not None:
            self.arrival.synchronize()
        value = float(self.loss)
        if not (self.may_be_nonfinite or math.isfinite(value)):
            raise FloatingPointError(
                f"the loss of batch {self.batch} is {value}; look at the batch and the learning rate, or "
                f"pass on_nonfinite='skip' to leave such batches out"
            )
        return value
