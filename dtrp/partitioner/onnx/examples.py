"""Inputs to verify an export with: the user's, or made up for the shapes that the model was compiled for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .batch import Study


def example_batch(study: Study, kept: Sequence[torch.Tensor | None], size: int) -> list[torch.Tensor]:
    """One call's tensors with ``size`` samples.

    ``kept`` are the tensors of a real call (its samples are repeated as needed), or None where there are
    none: floating-point values are then drawn from a normal distribution, integers are 0 or 1, which are
    valid as indices of any table with two rows.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for i, (end, real) in enumerate(zip(study.inputs, kept, strict=True)):
        batched = i in study.batched
        shape = (size, *end.example[1:]) if batched else end.example
        if real is not None:
            tensor = real[torch.arange(size, device=real.device) % real.shape[0]] if batched else real
        elif end.dtype.is_floating_point or end.dtype.is_complex:
            tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        else:
            tensor = torch.randint(0, 2, shape, generator=generator)
        made.append(tensor.detach().to(device=end.device, dtype=end.dtype))
    return made
