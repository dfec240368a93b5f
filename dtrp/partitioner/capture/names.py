"""Qualified names of a model's tensors."""

from __future__ import annotations

import torch
from torch import nn

from .fakes import FakeWorld


def named_tensors(model: nn.Module, world: FakeWorld) -> dict[int, tuple[torch.Tensor, str]]:
    """Qualified names of the model's tensors, by the ids of the tensors and of their fake twins."""
    found: dict[int, tuple[torch.Tensor, str]] = {}
    for prefix, module in model.named_modules():
        for registry in (module._parameters, module._buffers, module.__dict__):
            for name, value in registry.items():
                if isinstance(value, torch.Tensor):
                    full = f"{prefix}.{name}" if prefix else name
                    found.setdefault(id(value), (value, full))
                    found.setdefault(id(world.twin(value)), (world.twin(value), full))
    return found
