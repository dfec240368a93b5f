"""Runs a graph on fake tensors of other sizes, and tidies what only the nodes' values show."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Interpreter, Node
from torch.utils import _pytree as pytree

from .custom import guard, same_size
from .fakes import FakeWorld

_KEPT = (same_size, guard)
_CONSTANT_TYPES = (torch.device, torch.dtype, torch.layout, torch.memory_format, str)


class _Propagator(Interpreter):
    """Runs a graph node by node."""

    def __init__(
        self, model: nn.Module, graph: Graph, world: FakeWorld, constants: Mapping[str, Any]
    ) -> None:
        super().__init__(model, garbage_collect_values=True, graph=graph)
        self._world = world
        self._constants = constants
        self.extra_traceback = False

    def fetch_attr(self, target: str) -> Any:
        return self._constants[target] if target in self._constants else super().fetch_attr(target)

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
    constants: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Run ``graph`` on fake ``inputs``, and give the flat output.

    Nothing is computed, and the model's parameters and buffers are not touched.
    """
    with world.inhabited_by(model), torch.enable_grad():
        return _Propagator(model, graph, world, constants).run(*inputs)


def without_unused(graph: Graph) -> None:
    """Leave out questions that nobody uses the answers of (a size that was only looked at)."""
    for node in reversed(graph.nodes):
        value = node.meta.get("val")
        asked = not isinstance(value, torch.Tensor) and node.op in ("call_function", "call_method")
        if asked and not node.users and node.target not in _KEPT and not _holds_tensors(value):
            graph.erase_node(node)


def _holds_tensors(value: Any) -> bool:
    return value is None or any(isinstance(x, torch.Tensor) for x in pytree.tree_leaves(value))


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


def open_outputs(graph: Graph, spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """Give the output a node for each leaf, where a node's value is a container (an LSTM's state).

    ``spec`` is the structure over the output's present nodes; the result is the one over the leaves.
    """
    (output,) = graph.find_nodes(op="output")
    leaves: list[Any] = []
    specs: list[pytree.TreeSpec] = []
    for leaf in output.args[0]:
        if not isinstance(leaf, Node):
            leaves.append(leaf)
            specs.append(pytree.tree_structure(None))
            continue
        paths, inner = pytree.tree_flatten_with_path(leaf.meta.get("val"))
        with graph.inserting_before(output):
            leaves += [_taken(graph, leaf, path) for path, _ in paths]
        specs.append(inner)
    output.args = (tuple(leaves),)
    output.meta["val"] = tuple(x.meta.get("val") if isinstance(x, Node) else x for x in leaves)
    return _with_leaves(spec, iter(specs))


def _taken(graph: Graph, node: Node, path: tuple[Any, ...]) -> Node:
    """A node for the part of ``node``'s value at a pytree path."""
    value = node.meta["val"]
    for key in path:
        value = key.get(value)
        function, index = (
            (getattr, key.name) if isinstance(key, pytree.GetAttrKey) else (operator.getitem, _index(key))
        )
        taken = graph.call_function(function, (node, index))
        taken.meta = {**node.meta, "val": value}
        node = taken
    return node


def _index(key: Any) -> Any:
    return key.idx if isinstance(key, pytree.SequenceKey) else key.key


def _with_leaves(spec: pytree.TreeSpec, leaves: Iterator[pytree.TreeSpec]) -> pytree.TreeSpec:
    """``spec`` with a structure in each leaf's place."""
    if spec.is_leaf():
        return next(leaves)
    return pytree.TreeSpec(spec.type, spec.context, [_with_leaves(c, leaves) for c in spec.children()])
