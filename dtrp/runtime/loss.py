"""The loss of a batch: the user's function of output and target, or what the model gives itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


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
