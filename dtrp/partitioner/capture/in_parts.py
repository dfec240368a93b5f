"""Linear layers that are computed in parts, so that several stages can share one (ours).

A vocabulary's head may take longer than a stage's whole share of the time. Its rows (positions of the
sequence, or samples) do not depend on each other, so it is run on parts of them, each a node of its own, with
the same weight: what several stages hold is then a tied weight. The results are the whole layer's but for
rounding, as the sum over rows in the weight's gradient is put together from the parts' sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtrp.errors import CaptureError

from .leaves import has_hooks


@contextmanager
def in_parts(model: nn.Module, divided: Mapping[str, int]) -> Iterator[None]:
    """Inside, each of the ``divided`` layers (by qualified name) computes its rows in so many parts."""
    layers = {name: cast(nn.Linear, model.get_submodule(name)) for name in divided}
    for name, layer in layers.items():
        if type(layer) is not nn.Linear:
            raise CaptureError(
                f"{name!r} was to be computed in parts, as a Linear layer, but is a {type(layer).__name__}: "
                f"plan again"
            )
    try:
        for name, layer in layers.items():
            vars(layer)["forward"] = partial(_by_rows, layer, divided[name])
        yield
    finally:
        for layer in layers.values():
            vars(layer).pop("forward", None)


def divisible(module: nn.Module) -> bool:
    """Whether a module computes ``F.linear`` of its weight and bias, and nothing else."""
    return type(module) is nn.Linear and not has_hooks(module)


def _by_rows(layer: nn.Linear, parts: int, x: Tensor) -> Tensor:
    pieces = [F.linear(rows, layer.weight, layer.bias) for rows in x.tensor_split(parts, dim=-2)]
    return torch.cat(pieces, dim=-2)
