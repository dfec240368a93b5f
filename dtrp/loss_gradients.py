"""Tells a loss that asks for gradients through the model: what lies between runs in other stages.

``torch.autograd.grad(y, h)`` in a loss, of two outputs of the model of which one is made from the other (or
of an output and an input, or a parameter), would get what flows through the last stage alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class ThroughTheModel(Exception):
    """With respect to what such a gradient is asked for."""


class AsksGradients(TorchFunctionMode):
    """Inside, a loss that asks for a gradient through the model raises `ThroughTheModel`.

    Parameters
    ----------
    leaves : sequence
        Of the output: what stands for it, with the node of the model's graph that gives it.
    parameters, targets
        The model's own, by name; what stands for tensors of the target that ask for gradients.
    """

    def __init__(
        self, leaves: Sequence[tuple[Any, Any]], parameters: Mapping[str, Tensor], targets: Sequence[Tensor]
    ) -> None:
        super().__init__()
        self._leaves = [
            (x, node) for x, node in leaves if isinstance(x, Tensor) and isinstance(node, fx.Node)
        ]
        self._parameters = {id(p): name for name, p in parameters.items()}
        self._targets = {id(t) for t in targets}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            self._look(*(args + tuple(kwargs[k] for k in ("outputs", "inputs") if k in kwargs))[:2])
        return func(*args, **kwargs)

    def _look(self, outputs: Any, inputs: Any) -> None:
        reached = graph_of(*(t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)))
        behind = [node for x, node in self._leaves if x.grad_fn in reached]
        for tensor in pytree.tree_leaves(inputs):
            if id(tensor) in self._parameters:
                raise ThroughTheModel(f"the model's parameter {self._parameters[id(tensor)]!r}")
            if id(tensor) in self._targets:
                raise ThroughTheModel("a tensor of its target")
            for node in (node for x, node in self._leaves if x is tensor):
                if any(made is not node and _makes(node, made) for made in behind):
                    raise ThroughTheModel("a part of the output from which the model makes another")


def graph_of(*tensors: Tensor) -> set[Any]:
    """The nodes of autograd's graph behind tensors; nothing is computed."""
    seen: set[Any] = set()
    stack: list[Any] = [t.grad_fn for t in tensors]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions]
    return seen


def _makes(node: fx.Node, other: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    stack = [other]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source is node:
                return True
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return False
