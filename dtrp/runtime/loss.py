"""The loss of a batch: the user's function of output and target, or what the model gives itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .batch import Loss


def held_loss(output: Any, target: Any) -> Tensor:
    """Stands for a loss that is a module with tensors of its own, and as such a part of the last stage."""
    raise AssertionError("the last stage calls its own module")


def scalar_loss(loss_fn: Callable[[Any, Any], Tensor] | None, output: Any, target: Any) -> Tensor:
    """The loss of a batch.

    Raises
    ------
    TypeError
        It is not a scalar tensor.
    """
    return as_scalar(loss_fn, own_loss(output) if loss_fn is None else loss_fn(output, target))


def as_scalar(loss_fn: Callable[[Any, Any], Tensor] | None, loss: Any) -> Tensor:
    """``loss``, which ``loss_fn`` (or the model) gave, without dimensions; refused as by `scalar_loss`."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        origin = "the model (loss_fn=None)"
        if loss_fn is not None:
            origin = f"loss_fn {getattr(loss_fn, '__name__', loss_fn)!r}"
        raise TypeError(f"{origin} gave {got}, expected a scalar tensor; reduce it, for example with .mean()")
    return loss.reshape(())


def own_loss(output: Any) -> Any:
    """The loss that a model gives itself: its output, or the output's ``loss`` entry."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict) and "loss" in output:
        return output["loss"]
    if getattr(output, "loss", None) is not None:
        return output.loss
    return output


@dataclass
class Report:
    """The loss of a mini-batch on its way to the caller."""

    batch: int
    loss: Tensor  # in host memory; on its way there where it comes from a CUDA device
    arrival: torch.cuda.Event | None = None

    @classmethod
    def of(cls, batch: int, loss: Tensor) -> Report:
        """Starts the loss on its way to the host without waiting for the device."""
        if not loss.is_cuda:
            return cls(batch, loss)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        host = torch.empty_like(loss, device="cpu", pin_memory=True).copy_(loss, non_blocking=True)
        arrived.record()
        return cls(batch, host, arrived)

    def ready(self) -> bool:
        """Whether the loss can be read without waiting."""
        return self.arrival is None or bool(self.arrival.query())  # type: ignore[no-untyped-call]

    def value(self) -> Loss:
        """The loss; waits for it."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return Loss(self.batch, float(self.loss))


def check_finite(value: float, what: str) -> None:
    """Refuse a loss or a norm that is NaN or infinite.

    Raises
    ------
    FloatingPointError
    """
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{what} is {value}; look at the batch and the learning rate, or pass on_nonfinite='skip' to "
            f"leave such batches out"
        )
