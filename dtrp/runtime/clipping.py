"""Gradient clipping by the norm over all stages."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn


def squared_norm(parameters: Collection[nn.Parameter]) -> float:
    """Of one stage's gradients; the stages' values add up to the square of the norm over the whole model."""
    norms = [p.grad.norm().double() for p in parameters if p.grad is not None]
    return float(torch.stack(norms).square().sum()) if norms else 0.0


def clip(parameters: Collection[nn.Parameter], norm: float, limit: float, *, alone: bool) -> None:
    """Scale gradients by ``min(1, limit / (norm + 1e-6))``, as `torch.nn.utils.clip_grad_norm_` does.

    Parameters
    ----------
    parameters : collection of nn.Parameter
        One stage's.
    norm : float
        The norm over all stages.
    limit : float
        What it is not to exceed.
    alone : bool
        Whether these are all parameters there are: then to the bit what the plain loop does.
    """
    if alone:
        torch.nn.utils.clip_grad_norm_(parameters, limit)
        return
    factor = min(1.0, limit / (norm + 1e-6))
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(factor)
