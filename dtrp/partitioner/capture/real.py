"""Modules that cannot run on fake tensors run on real random ones, for the shapes of what they give."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .snapshot import untouched
from .structure import flatten_output, map_tensors

_SIMPLE = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class RealRun:
    """What a module gave for two random inputs of the same shapes."""

    module: nn.Module  # held so that its id is not given to another
    inputs: tuple[torch.Tensor, ...]  # the first ones, in order; they may come out again in the result
    result: Any
    other: Any


class RealRuns:
    """Runs modules, and remembers it: each recording of a model asks for the same runs again."""

    def __init__(self) -> None:
        self._made: dict[Hashable, RealRun] = {}

    def of(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RealRun:
        """Run ``module`` with its present parameters on tensors like those given. Nothing of it is changed.

        Raises
        ------
        RuntimeError
            It changes its inputs.
        """
        key = _key(module, args, kwargs)
        if key in self._made:
            return self._made[key]
        result, inputs = _run(module, args, kwargs, seed=0)
        other, _ = _run(module, args, kwargs, seed=1)
        run = RealRun(module, inputs, result, other)
        if key is not None:
            self._made[key] = run
        return run


def plain_values(result: Any) -> list[Any]:
    """Numbers, texts and the like in a result."""
    return [leaf for leaf in flatten_output(result)[0] if isinstance(leaf, _SIMPLE)]


def _key(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable | None:
    """Equal for calls that give the same; None if that cannot be told."""
    leaves, spec = flatten_output((args, kwargs))
    seen: dict[int, int] = {}
    described: list[Hashable] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            place = seen.setdefault(id(leaf), len(seen))  # the same tensor may be given twice
            described.append((place, tuple(leaf.shape), leaf.dtype, leaf.device, leaf.requires_grad))
        elif isinstance(leaf, _SIMPLE):
            described.append((type(leaf), leaf))
        else:
            return None
    modes = tuple(m.training for m in module.modules())
    return id(module), modes, torch.is_grad_enabled(), repr(spec), tuple(described)


def _run(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int
) -> tuple[Any, tuple[torch.Tensor, ...]]:
    given: list[torch.Tensor] = []

    def real(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            given.append(_random_like(x))
            return given[-1]
        return x

    def without_history(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or any(x is y for y in given):
            return x
        return x.detach().requires_grad_(x.requires_grad)

    with untouched(module, tensors=True):
        torch.manual_seed(seed)
        inputs = map_tensors(real, (args, kwargs))
        versions = [int(tensor._version) for tensor in given]
        result = module(*inputs[0], **inputs[1])
        if [int(tensor._version) for tensor in given] != versions:
            raise RuntimeError("the module changes its inputs in place")
        return map_tensors(without_history, result), tuple(given)


def _random_like(fake: torch.Tensor) -> torch.Tensor:
    """A real tensor such as a model might meet: normal, or zeros where it may be an index, or all true."""
    shape, dtype, device = tuple(fake.shape), fake.dtype, fake.device
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype, device=device)
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.randn(shape, device=device).to(dtype).requires_grad_(fake.requires_grad)
