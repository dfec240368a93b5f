"""Running real code on real tensors without paying for its heavy products.

Where shapes depend on values, a module must really run to learn what it gives. What it is given then is
random anyway, and so is the outcome of its layers: heavy matrix products and convolutions need not be
computed for it. They give random numbers of the right shape instead, and all else takes its usual course.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from .op_cost import FlopCount, has_flops, op_flops

_HEAVY = 1e7  # FLOPs of one operator; milliseconds
_DRAWN = 65_537  # random numbers; a prime, so that rows and columns do not repeat with them


class Sketch(FlopCount):  # type: ignore[no-untyped-call]
    """Under it, operators of many FLOPs give normal random numbers; ``flops`` counts them as if computed."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not has_flops(func):
            return func(*args, **kwargs)
        shapes, named = pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
        out = func(*shapes, **named)
        flops = op_flops(func, shapes, named, out)
        self.flops += flops
        if flops < _HEAVY or not all(_is_real_number(leaf) for leaf in pytree.tree_leaves(out)):
            return func(*args, **kwargs)
        device = next(t.device for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        return pytree.tree_map_only(torch.Tensor, lambda t: _random_like(t, device), out)


def _random_like(shape: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Random numbers with the sizes and strides of a meta tensor."""
    made = torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=device)
    fill_normal(made.as_strided((made.numel(),), (1,)))
    return made


def fill_normal(flat: torch.Tensor) -> None:
    """Normal random numbers; many of them repeat, as drawing all takes long."""
    dtype = torch.complex64 if flat.is_complex() else torch.float32  # not every type of flat's can be drawn
    drawn = torch.randn(min(_DRAWN, len(flat)), dtype=dtype, device=flat.device)
    flat[: len(drawn)] = drawn
    done = len(drawn)
    while done < len(flat):
        more = min(done, len(flat) - done)
        flat[done : done + more] = flat[:more]
        done += more


def _is_real_number(leaf: Any) -> bool:
    return leaf is None or (isinstance(leaf, torch.Tensor) and leaf.is_floating_point())
