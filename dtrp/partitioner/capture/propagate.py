"""Fills in each node's value on fake tensors, and folds what is constant on every device and batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Interpreter, Node

from .fakes import FakeWorld, light
from .snapshot import untouched

_CONSTANT_TYPES = (torch.device, torch.dtype, torch.layout, torch.memory_format, str)


class _Propagator(Interpreter):
    """Runs a graph node by node, keeping each value in ``meta["val"]``."""

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        world: FakeWorld,
        constants: Mapping[str, torch.Tensor],
        keep: bool,
    ) -> None:
        super().__init__(model, garbage_collect_values=True, graph=graph)
        self._world = world
        self._keep = keep
        self._constants = constants
        self.extra_traceback = False

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if self._keep:
            n.meta["val"] = light(value)
        return value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(target, args, kwargs)
        except Exception as error:
            try:
                return self._world.really_run(self.fetch_attr(target), args, kwargs)
            except Exception:
                raise error from None

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = self._constants.get(target)
        if value is None:
            value = super().get_attr(target, args, kwargs)
        return self._world.twin(value) if isinstance(value, torch.Tensor) else value


def propagate(
    model: nn.Module,
    graph: Graph,
    world: FakeWorld,
    inputs: Sequence[torch.Tensor],
    constants: Mapping[str, torch.Tensor] = MappingProxyType({}),
    keep: bool = True,
) -> Any:
    """Run ``graph`` on fake ``inputs``, fill each ``meta["val"]`` (if ``keep``), and give the flat output.

    Nothing is computed, and the model's parameters and buffers are not touched.
    """
    with untouched(model), world.inhabited_by(model), torch.enable_grad():
        return _Propagator(model, graph, world, constants, keep).run(*inputs)


def fold_constants(graph: Graph) -> None:
    """Replace nodes whose value is a device, dtype or the like by that value.

    Such values are the same for every batch. Left as nodes they would be one more thing to carry from
    stage to stage, and a device carried over would be the wrong stage's.
    """
    for node in reversed(graph.nodes):
        if node.op in ("placeholder", "output"):
            continue
        value = node.meta.get("val")
        if isinstance(value, _CONSTANT_TYPES) or _counts_dimensions(node):
            for user in list(node.users):
                _put_constant(user, node, value)
            graph.erase_node(node)


def _counts_dimensions(node: Node) -> bool:
    """Whether the node asks a tensor for something that does not depend on its sizes."""
    if not isinstance(node.meta.get("val"), (bool, int)):
        return False
    if node.op == "call_method":
        return node.target in ("dim", "ndimension", "is_floating_point", "is_complex")
    return node.target is getattr and node.args[1] in ("ndim", "is_cuda", "requires_grad", "is_sparse")


def _put_constant(user: Node, node: Node, value: Any) -> None:
    user.args = torch.fx.map_arg(user.args, lambda n: value if n is node else n)
    user.kwargs = torch.fx.map_arg(user.kwargs, lambda n: value if n is node else n)
