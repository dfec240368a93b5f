"""The example call that a model is planned for, and a few samples of it to try things with later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .capture.example_values import batch_of

SAMPLES = 8


def call_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``example_inputs`` as positional and keyword arguments."""
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, Mapping):
        return (), {str(k): v for k, v in example.items()}
    return (example,), {}


def keep_example(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """The first samples of a call's tensors, on the CPU; None for tensors without data, and sparse ones."""
    _, batched = batch_of(tensors)

    def keep(i: int, t: torch.Tensor) -> torch.Tensor | None:
        if t.is_meta or isinstance(t, FakeTensor) or t.layout is not torch.strided:
            return None
        return (t[:SAMPLES] if i in batched else t).detach().cpu().clone()

    return [keep(i, t) for i, t in enumerate(tensors)]
