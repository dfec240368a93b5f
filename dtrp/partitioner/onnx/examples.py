"""Inputs to verify an export with: the user's, or made up for the shapes that the model was compiled for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .study import Study


def example_call(
    study: Study, kept: Sequence[torch.Tensor | None], sizes: Mapping[str, int]
) -> list[torch.Tensor]:
    """One call's tensors, with these sizes of the axes.

    ``kept`` are the tensors of a real call (repeated along the axes as needed), or None where there are none:
    floating-point values are then drawn from a normal distribution, integers are 0 or 1, which are valid as
    indices of any table with two rows.
    """
    generator = torch.Generator().manual_seed(0)
    at = {member: sizes[axis.name] for axis in study.axes for member in axis.members}
    made = []
    for i, (end, real) in enumerate(zip(study.inputs, kept, strict=True)):
        shape = [at.get((i, d), size) for d, size in enumerate(end.example)]
        if real is not None:
            tensor = real
            for d, size in enumerate(shape):
                if size != tensor.shape[d]:
                    rows = torch.arange(size, device=real.device) % tensor.shape[d]
                    tensor = tensor.index_select(d, rows)
        elif end.dtype.is_floating_point or end.dtype.is_complex:
            tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        else:
            tensor = torch.randint(0, 2, shape, generator=generator)
        made.append(tensor.detach().to(device=end.device, dtype=end.dtype))
    return made
