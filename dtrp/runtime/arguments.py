"""A batch as the user hands it over, taken apart: inputs, named inputs, target; and what each stage gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ..wiring import Wiring
from .batch import Feed, Update

Call = tuple[tuple[Any, ...], dict[str, Any]]


def take_target(
    args: tuple[Any, ...], kwargs: dict[str, Any], *, has_target: bool
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Inputs, inputs by name and target of a call of `Trainer.step`.

    Raises
    ------
    TypeError
        There is no target where there should be one.
    """
    if not has_target:
        return args, kwargs, None
    if "target" in kwargs:
        named = {k: v for k, v in kwargs.items() if k != "target"}
        return args, named, kwargs["target"]
    if not args:
        raise TypeError(
            "step() got no target: the last positional argument is the target; pass loss_fn=None to "
            "trainer() if the model gives its own loss"
        )
    return args[:-1], kwargs, args[-1]


def as_call(item: Any) -> Call:
    """One item of a loader as arguments of `Trainer.step`."""
    if isinstance(item, Mapping):
        return (), dict(item)
    if isinstance(item, (tuple, list)):
        return tuple(item), {}
    return (item,), {}


def feeds(
    wiring: Wiring, batch: int, tensors: Sequence[Tensor], target: Any, update: Update | None = None
) -> list[Feed]:
    """What each stage gets of a batch: the model inputs that it uses; the last stage also the target."""
    last = wiring.n_stages - 1
    update = update or Update()
    return [
        Feed(batch, [tensors[i] for i in wiring.caller_inputs(k)], target if k == last else None, update)
        for k in range(wiring.n_stages)
    ]


def split_batch(
    tensors: Sequence[Tensor], target: Any, parts: int
) -> Iterator[tuple[Sequence[Tensor], Any, float]]:
    """A mini-batch as ``parts`` micro-batches of equal size (the last may be smaller), with their shares.

    Tensors are cut along their first dimension if it is as long as the batch; others go with every part.
    """
    samples = n_samples(tensors)
    if parts == 1 or samples == 1:
        yield tensors, target, 1.0
        return
    leaves, spec = pytree.tree_flatten((list(tensors), target))
    size = -(-samples // parts)
    for start in range(0, samples, size):
        part = slice(start, min(start + size, samples))
        cut = [
            x[part] if isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == samples else x for x in leaves
        ]
        inputs, wanted = pytree.tree_unflatten(cut, spec)
        yield inputs, wanted, (part.stop - part.start) / samples


def n_samples(tensors: Sequence[Tensor]) -> int:
    """Samples in a batch, as far as its first tensor with a dimension says."""
    return next((t.shape[0] for t in tensors if t.dim() > 0), 1)
