"""A model's output as flat leaves and back, for tuples, dicts, dataclasses and model-output classes."""

from __future__ import annotations

from typing import Any

from torch.utils import _pytree as pytree


def flatten_output(output: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves of ``output`` and the spec that puts them together again."""
    return pytree.tree_flatten(output)
