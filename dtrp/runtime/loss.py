"""The loss of a batch: the user's function of output and target, or what the model gives itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import accelerators
from .batch import Loss, WithExtra


def held_loss(output: Any, target: Any) -> Tensor:
    """Stands for a loss that is a module with tensors of its own, and as such a part of the last stage."""
    raise AssertionError("the last stage calls its own module")


def scalar_loss(loss_fn: Callable[..., Tensor] | None, output: Any, target: Any) -> Tensor:
    """The loss of a batch; ``target`` may be one `WithExtra`.

    Raises
    ------
    TypeError
        It is not a scalar tensor.
    """
    if loss_fn is None:
        return as_scalar(None, own_loss(output))
    return as_scalar(loss_fn, call_loss(loss_fn, output, target))


def call_loss(loss_fn: Callable[..., Any], output: Any, target: Any) -> Any:
    """Whatever ``loss_fn`` gives."""
    target, extra = target if isinstance(target, WithExtra) else (target, {})
    return loss_fn(output, target, **extra)


def ignored_target(loss_fn: Any) -> int:
    """The class target that a loss leaves out of its mean, as torch's losses name it."""
    given = loss_fn.keywords if isinstance(loss_fn, partial) else {}
    ignored = given.get("ignore_index", getattr(loss_fn, "ignore_index", -100))
    return ignored if isinstance(ignored, int) else -100


def as_scalar(loss_fn: Callable[..., Tensor] | None, loss: Any) -> Tensor:
    """``loss``, which ``loss_fn`` (or the model) gave, without dimensions; refused as by `scalar_loss`."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        origin = "the model (loss_fn=None)" if loss_fn is None else told(loss_fn)
        raise TypeError(f"{origin} gave {got}, expected a scalar tensor; {_remedy(loss_fn, loss)}")
    return loss.reshape(())


def told(loss_fn: Any) -> str:
    """A loss's name, for messages."""
    return f"loss_fn {getattr(loss_fn, '__name__', loss_fn)!r}"


def _remedy(loss_fn: Any, given: Any) -> str:
    if loss_fn is None and isinstance(given, dict):
        return (
            "losses by name are added up by loss_fn=lambda losses, _: sum(losses.values()), in "
            "trainer.step(..., None): its last argument is the target, and nobody reads it"
        )
    if loss_fn is None:
        return "pass a loss_fn such as F.cross_entropy where the model does not compute its loss itself"
    if isinstance(given, Tensor):
        return "reduce it, for example with .mean()"
    if given is None:
        return "is there a return in it?"
    if isinstance(given, (tuple, list, dict)):
        return "return the loss alone; trainer.evaluate(metric=...) is for other numbers"
    return "return the tensor itself, without .item(), float() or numpy: a number has no gradient"


def own_loss(output: Any) -> Any:
    """The loss that a model gives itself: its output, its ``loss`` entry, or the first of ``(loss, ...)``."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)) and output and not hasattr(output, "loss"):
        return output[0] if isinstance(output[0], Tensor) and output[0].numel() == 1 else output
    if isinstance(output, dict) and "loss" in output:
        return output["loss"]
    if getattr(output, "loss", None) is not None:
        return output.loss
    return output


@dataclass
class Report:
    """The loss of a mini-batch on its way to the caller."""

    batch: int
    loss: Tensor  # in host memory; on its way there where it comes from an accelerator
    arrival: torch.Event | None = None

    @classmethod
    def of(cls, batch: int, loss: Tensor) -> Report:
        """Starts the loss on its way to the host without waiting for the device."""
        if loss.device.type == "cpu":
            return cls(batch, loss)
        host = torch.empty_like(loss, device="cpu", pin_memory=True).copy_(loss, non_blocking=True)
        return cls(batch, host, accelerators.mark(loss.device))

    def ready(self) -> bool:
        """Whether the loss can be read without waiting."""
        return self.arrival is None or bool(self.arrival.query())

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
