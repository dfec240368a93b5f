"""What evaluation computes of each batch, on the last stage, and how batches add up."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import WorkerError
from .batch import WithExtra
from .loss import scalar_loss

Metric = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Failed:
    """A metric raised: what it said. The run itself is none the worse for it."""

    message: str
    trace: str


@dataclass(frozen=True)
class Measure:
    """Maps ``(output, target)`` of a batch to ``{name: (mean, weight)}``; the weight is the batch size."""

    loss_fn: Callable[..., Tensor] | None
    metrics: Mapping[str, Metric]
    accuracy: bool

    @classmethod
    def of(cls, loss_fn: Callable[..., Tensor] | None, metric: Any) -> Measure:
        """From what the user passed as ``metric``: nothing, a callable, or callables by name.

        Raises
        ------
        TypeError
            Something else.
        """
        if metric is None:
            return cls(loss_fn, {}, True)
        if callable(metric):
            return cls(loss_fn, {getattr(metric, "__name__", type(metric).__name__): metric}, False)
        if isinstance(metric, Mapping) and all(callable(m) for m in metric.values()):
            return cls(loss_fn, dict(metric), False)
        raise TypeError(
            f"metric={metric!r}: expected a callable (output, target) -> number, a dict of such callables by "
            f"name, or None"
        )

    def with_loss(self, loss_fn: Callable[..., Tensor]) -> Measure:
        """The same with another loss: the last stage's own module."""
        return replace(self, loss_fn=loss_fn)

    def __call__(self, output: Any, target: Any) -> dict[str, tuple[float, float]] | Failed:
        loss = float(scalar_loss(self.loss_fn, output, target))
        if isinstance(target, WithExtra):
            target = target.target
        size = float(_batch_size(target if target is not None else output))
        found = {"loss": (loss, size)}
        for name, metric in self.metrics.items():
            try:
                found[name] = (float(metric(output, target)), size)
            except Exception as e:
                return Failed(f"metric {name!r} failed: {type(e).__name__}: {e}", traceback.format_exc())
        if self.accuracy and (hits := class_hits(output, target)) is not None and hits.numel():
            found["accuracy"] = (float(hits.double().mean()), float(hits.numel()))
        return found


def combine(batches: Iterable[Mapping[str, tuple[float, float]] | Failed]) -> dict[str, float]:
    """Weighted means over all batches; empty for no batch.

    Raises
    ------
    WorkerError
        A metric failed on one of them.
    """
    total: dict[str, list[float]] = {}
    for batch in batches:
        if isinstance(batch, Failed):
            raise WorkerError(batch.message, remote_traceback=batch.trace)
        for name, (mean, weight) in batch.items():
            entry = total.setdefault(name, [0.0, 0.0])
            entry[0] += mean * weight
            entry[1] += weight
    return {name: value / weight for name, (value, weight) in total.items() if weight > 0}


def class_hits(output: Any, target: Any) -> Tensor | None:
    """For scores of classes and integer targets: which predictions are right (negative targets left out).

    The classes lie along the last dimension, or along dimension 1 as ``cross_entropy`` has it for images.
    """
    scores = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(scores, Tensor) or not isinstance(target, Tensor):
        return None
    if target.is_floating_point() or target.dtype == torch.bool or scores.dim() != target.dim() + 1:
        return None
    if scores.shape[:-1] == target.shape:
        guess = scores.argmax(-1)
    elif scores.shape[:1] + scores.shape[2:] == target.shape:
        guess = scores.argmax(1)
    else:
        return None
    return (guess == target)[target >= 0]


def _batch_size(tree: Any) -> int:
    sizes = [t.shape[0] for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.dim() > 0]
    return sizes[0] if sizes else 1
