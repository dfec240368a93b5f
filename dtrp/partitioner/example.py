"""A few samples of the call that was planned for: real inputs to try things with later."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .capture.sizes import batch_of

SAMPLES = 8


def keep_example(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """The first samples of a call's tensors, on the CPU; None for tensors without data, and sparse ones."""
    _, batched = batch_of(tensors)

    def keep(i: int, t: torch.Tensor) -> torch.Tensor | None:
        if t.is_meta or isinstance(t, FakeTensor) or t.layout is not torch.strided:
            return None
        return (t[:SAMPLES] if i in batched else t).detach().cpu().clone()

    return [keep(i, t) for i, t in enumerate(tensors)]
