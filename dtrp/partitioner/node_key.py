"""Which calls cost the same: the code, its settings, and the shapes of what it takes, but no values."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the graph without its contents. ``storage`` names the memory that it lies in."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    storage: int

    @property
    def nbytes(self) -> int:
        """Bytes of its elements (an expanded dimension counts in full: that is what would be sent)."""
        n = self.dtype.itemsize
        for size in self.shape:
            n *= size
        return n

    @property
    def kind(self) -> Hashable:
        """All of it that matters to what a node costs."""
        return (self.shape, self.stride, self.dtype, self.requires_grad)


def call_key(target: Hashable, args: Any, kwargs: Any) -> Hashable:
    """Identifies a call up to what changes its cost; ``None`` if that cannot be told."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    parts: list[Hashable] = []
    first: dict[int, int] = {}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, TensorSpec):
            part: Hashable = (leaf.kind, first.setdefault(id(leaf), i))
        else:
            part = (type(leaf), leaf)
        if isinstance(leaf, slice):
            part = ("slice", str(leaf))
        try:
            hash(part)
        except TypeError:
            return None
        parts.append(part)
    return (target, str(structure), tuple(parts))


_SIMPLE = (int, float, str, bool, type(None), torch.dtype, torch.Size)


def module_key(module: nn.Module) -> Hashable:
    """Code, settings and parameter shapes of a module and all below; ``None`` if it keeps anything else."""
    parts: list[Hashable] = []
    for name, m in module.named_modules():
        settings: list[Hashable] = []
        for attribute, value in m.__dict__.items():
            if attribute in _PLUMBING:
                continue
            if attribute == "forward" or not _is_simple(value):
                return None
            settings.append((attribute, _frozen(value)))
        tensors = tuple(
            (key, tuple(t.shape), t.dtype, t.requires_grad)
            for key, t in [*m._parameters.items(), *m._buffers.items()]
            if t is not None
        )
        hooks = any(m.__dict__[key] for key in _HOOKS if key in m.__dict__)
        if hooks:
            return None
        parts.append((name, type(m), tuple(settings), tensors))
    return tuple(parts)


_HOOKS = tuple(key for key in nn.Module().__dict__ if "hooks" in key)
_PLUMBING = {*nn.Module().__dict__, "_flat_weights", "_flat_weight_refs"} - {"training"}


def _frozen(value: Any) -> Hashable:
    return tuple(map(_frozen, value)) if isinstance(value, (tuple, list)) else (type(value), value)


def _is_simple(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_simple(v) for v in value)
    return isinstance(value, _SIMPLE)
