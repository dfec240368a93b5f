"""Parts of a stage that keep nothing but their inputs, and are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def again(
    part: Callable[..., Any], module: nn.Module, statistics: Sequence[str], draws: bool, *inputs: Any
) -> Any:
    """``part(module, *inputs)``, of which autograd keeps the inputs alone, by `torch.utils.checkpoint`.

    ``module`` is the one that this pass runs on: its parameters do not change until it is passed back. What
    the first run does to the buffers named in ``statistics`` counts, the second leaves no trace there.
    ``draws``: it draws random numbers, the same ones again.
    """
    if not torch.is_grad_enabled():
        return part(module, *inputs)
    if torch.compiler.is_compiling():  # which writes no statistics in the second run
        return checkpoint(part, module, *inputs, use_reentrant=False)
    buffers = [attrgetter(name)(module) for name in statistics]
    return checkpoint(
        part,
        module,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=draws,
        context_fn=lambda: (nullcontext(), _put_back([b for b in buffers if b is not None])),
    )


@contextmanager
def _put_back(buffers: Sequence[Tensor]) -> Iterator[None]:
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.data.copy_(value)  # other graphs may hold it: no change that autograd is told of
