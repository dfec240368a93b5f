"""SyncBatchNorm in a stage of several replicas: statistics over the samples of all of them (ours).

torch's own would ask all ranks, of which most are other stages, and knows GPUs alone. This one asks the same
stage of other replicas, on any device, in every training pass, the first forward included: all replicas
follow the same list of actions, so that they ask in the same order. Gradients of the statistics are summed
likewise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .replicas import Replicas

_THEIRS = nn.SyncBatchNorm.forward
_INSIDE: list[None] = []


class JointNorm(nn.SyncBatchNorm):
    """What a stage has in a SyncBatchNorm's place."""

    replicas: Replicas | None

    def forward(self, input: Tensor) -> Tensor:
        if self.replicas is None or not self.training:
            return _BatchNorm.forward(self, input)
        self._check_input_dim(input)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        over, shape = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
        here = x.new_tensor([x.numel() // max(1, x.shape[1])])
        sums = self._joint(torch.cat([x.sum(over), here]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean.view(shape)
        var = self._joint(centred.square().sum(over)) / count
        self._track(mean.detach(), var.detach() * (count / (count - 1)))
        y: Tensor = centred * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    def _joint(self, value: Tensor) -> Tensor:
        total: Tensor = _Sum.apply(value, self.replicas)
        return total

    def _track(self, mean: Tensor, var: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(var.to(self.running_var.dtype), share)


class _Sum(torch.autograd.Function):
    """Over all replicas, forward and backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, replicas: Replicas) -> Tensor:
        ctx.replicas = replicas
        return replicas.sum(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.replicas.sum(gradient), None


def join_norms(stage: nn.Module, replicas: Replicas | None) -> None:
    """Have a stage's SyncBatchNorms ask the stage's replicas; nobody, where there are none."""
    for module in stage.modules():
        if isinstance(module, nn.SyncBatchNorm):
            vars(module)["replicas"] = replicas
            module.__class__ = JointNorm


def synchronises(module: nn.Module) -> bool:
    """Whether any part of it is a SyncBatchNorm."""
    return any(isinstance(m, nn.SyncBatchNorm) for m in module.modules())


@contextmanager
def alone() -> Iterator[None]:
    """Inside, SyncBatchNorm is BatchNorm: what one rank tries with the whole model, others don't."""
    _INSIDE.append(None)
    nn.SyncBatchNorm.forward = _BatchNorm.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        _INSIDE.pop()
        if not _INSIDE:  # whichever of several trainers is left last
            nn.SyncBatchNorm.forward = _THEIRS  # type: ignore[method-assign]
