"""Batch compensation: consecutive batches travel as one (the DTRP paper names it; the rule is ours).

Small batches leave a device idle and pay the price of a tick, and of the delay, once per batch. With m
batches joined along their first dimension there are m times fewer ticks, and one update where there were m,
with the learning rate scaled as Goyal et al. (2017) do for large batches: linearly, warmed up.

    update u over c batches:  lr * (1 + (c - 1) * min(1, (u + 1) / warmup))

- The joint loss is a mean over all samples; it is reported for each of the c batches, in order.
- A group is closed early by a flush (the end of an epoch, evaluation, saving), or by a batch whose samples
  have another shape: then c < m, and the scale is that of c.
- A scheduler that steps per update takes c steps, so that a schedule written for single batches keeps its
  length in epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .arguments import n_samples
from .batch import Update, WithExtra


class Mini(NamedTuple):
    """A mini-batch: one batch of the user's, or several that travel as one."""

    tensors: Sequence[Tensor]
    target: Any
    update: Update


class Joiner:
    """Gathers batches until they are ``size``."""

    def __init__(self, size: int, warmup: int = 100) -> None:
        self.size, self.warmup = size, warmup
        self.updates = 0
        self._waiting: list[tuple[tuple[Tensor, ...], Any]] = []

    def add(self, tensors: Sequence[Tensor], target: Any) -> Mini | None:
        """Take in a batch; the joint batch that is ready now, if there is one."""
        if self.size == 1:
            self.updates += 1
            return Mini(tensors, target, Update())
        batch = pytree.tree_map_only(Tensor, torch.clone, (tuple(tensors), target))  # the caller's are theirs
        if self._waiting and _form(batch) != _form(self._waiting[0]):
            joint = self.rest()
            self._waiting.append(batch)
            return joint
        self._waiting.append(batch)
        return self.rest() if len(self._waiting) >= self.size else None

    def rest(self) -> Mini | None:
        """What waits, as a smaller joint batch."""
        if not self._waiting:
            return None
        waiting, self._waiting = self._waiting, []
        count = len(waiting)
        tensors, target = waiting[0] if count == 1 else _joined(waiting)
        ramp = min(1.0, (self.updates + 1) / self.warmup)
        self.updates += 1
        return Mini(tensors, target, Update(1.0 + (count - 1) * ramp, count))


def _form(batch: Any) -> list[Any]:
    """What must agree for batches to be joined: all of a tensor but its first dimension, and other values."""
    leaves, spec = pytree.tree_flatten(batch)
    return [
        spec,
        *((v.shape[1:], v.dtype, v.device, v.dim()) if isinstance(v, Tensor) else v for v in leaves),
    ]


def _joined(batches: list[tuple[tuple[Tensor, ...], Any]]) -> tuple[tuple[Tensor, ...], Any]:
    """Tensors one after the other along their first dimension.

    Raises
    ------
    ValueError
        A tensor has no dimension along which to join, and differs between the batches.
    """
    if isinstance(batches[0][1], WithExtra):
        sizes = [n_samples(tensors) for tensors, _ in batches]
        tensors, target = _joined([(tensors, target.target) for tensors, target in batches])
        return tensors, WithExtra(target, _joined_trees([target.extra for _, target in batches], sizes))
    made: tuple[tuple[Tensor, ...], Any] = _joined_trees(batches)
    return made


def _joined_trees(trees: Sequence[Any], sizes: list[int] | None = None) -> Any:
    """``sizes``: of the batches, where only tensors that are as long are joined."""
    flat = [pytree.tree_flatten(tree) for tree in trees]
    leaves = [_join([leaves[i] for leaves, _ in flat], sizes) for i in range(len(flat[0][0]))]
    return pytree.tree_unflatten(leaves, flat[0][1])


def _join(values: list[Any], sizes: list[int] | None) -> Any:
    first = values[0]
    if not isinstance(first, Tensor):
        return first
    if first.dim() > 0 and sizes in (None, [len(v) for v in values]):
        return torch.cat(values)
    if all(torch.equal(first, v) for v in values):
        return first
    raise ValueError(
        "batch_compensation joins batches along their first dimension, but a tensor without that dimension "
        "differs between them; give it a batch dimension, or use batch_compensation=1"
    )
