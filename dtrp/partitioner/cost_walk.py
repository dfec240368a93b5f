"""One pass over the train graph: what each node gives, costs and saves, and who made which memory.

Values are `TensorSpec`: shapes that know their storage, so that views and in-place results are recognised.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from dtrp.memory import strides_of
from dtrp.partitioner.capture.ambient import quiet
from dtrp.partitioner.capture.gradients import is_gradient, region_of
from dtrp.partitioner.capture.graph import Captured
from dtrp.partitioner.capture.left import Left
from dtrp.partitioner.capture.modes import in_mode
from dtrp.partitioner.node_cost import NodeCost, NodeRunner, OutputSpec
from dtrp.partitioner.node_key import TensorSpec
from dtrp.partitioner.peak import NodeMemory

log = logging.getLogger(__name__)

COMPUTED = ("call_function", "call_method", "call_module", "get_attr")


class CostWalk:
    """One pass over the nodes in order: values as `TensorSpec`, costs by node, and who made which storage."""

    def __init__(
        self,
        captured: Captured,
        dtype: torch.dtype | None,
        inputs: Sequence[torch.Tensor] | None = None,  # of other sizes than the example's
    ) -> None:
        self.captured, self.inputs = captured, inputs
        self.module = captured.train.module
        self.runner = NodeRunner(dtype)
        self.values: dict[fx.Node, Any] = {}
        self.costs: dict[fx.Node, NodeCost] = {}
        self.saves: dict[fx.Node, list[int]] = {}  # which storages of others, or of its outputs, a node saves
        self.maker: list[fx.Node | None] = []  # of each storage; None: a parameter's or buffer's
        self.size: list[int] = []  # bytes of each storage
        self.of_tensor: dict[int, int] = {}  # id of a parameter or buffer -> its storage
        self.failed: list[tuple[fx.Node, Exception]] = []  # nodes that could not be run alone
        self.names: dict[int, str] = {}  # id of a parameter or buffer -> its first name in the model
        for name, tensor in [*captured.model.named_parameters(), *captured.model.named_buffers()]:
            self.names.setdefault(id(tensor), name)

    def run(self) -> CostWalk:
        """Takes in all nodes."""
        inputs = iter(self.inputs or ())
        with quiet(), in_mode(self.captured.model, self.captured.flags):
            for node in self.module.graph.nodes:
                if node.op == "placeholder":
                    value = next(inputs, node.meta.get("val"))
                    self.values[node] = self._given(value, node, requires_grad=False)
                elif node.op == "get_attr":
                    self.values[node] = self._attribute(node)
                elif node.op in COMPUTED:
                    self._call(node)
        if self.failed:
            node, e = self.failed[0]
            where = node.meta.get("location") or node.meta.get("module") or "no location"
            log.warning("%d nodes count as free, such as %s (%s): %s", len(self.failed), node.name, where, e)
        return self

    def _call(self, node: fx.Node) -> None:
        args = fx.node.map_arg(node.args, self.values.__getitem__)
        kwargs = dict(fx.node.map_arg(node.kwargs, self.values.__getitem__))
        try:
            if is_gradient(node):
                cost = self._gradient(node, args, kwargs)
            elif isinstance(node.target, Left):
                cost = replace(self._unknown(node, args, kwargs), exact=True)
            elif node.op == "call_module":
                cost = self.runner.module(self.module.get_submodule(str(node.target)), args, kwargs)
            elif node.op == "call_method":
                cost = self._method(str(node.target), args, kwargs)
            else:
                cost = self.runner.function(node.target, args, kwargs)  # type: ignore[arg-type]
        except Exception as e:  # whatever the user's code raises on fakes: planning goes on without its cost
            if self.inputs is not None:  # what it gives is known for the example alone
                where = node.meta.get("location") or node.meta.get("module") or "no location"
                raise ValueError(
                    f"node {node.name!r} ({where}) can be priced for the example's sizes alone: {e}"
                ) from e
            cost = self._on_samples(node, args, kwargs, e)
        leaves = pytree.tree_leaves((args, kwargs))
        first = len(self.maker)
        for size in cost.fresh:
            self._storage(node, size)

        def place(out: OutputSpec) -> TensorSpec:
            if isinstance(out.alias_of, int):
                storage = leaves[out.alias_of].storage
            elif out.alias_of is not None:
                storage = self._tensor(self._state(node)[out.alias_of])
            else:
                storage = first + out.fresh
            return TensorSpec(out.shape, out.stride, out.dtype, out.requires_grad, storage)

        self.values[node] = pytree.tree_map_only(OutputSpec, place, cost.outputs)
        self.costs[node] = cost
        self.saves[node] = [leaves[i].storage for i in cost.saved_inputs]
        self.saves[node] += [first + i for i in cost.saved_fresh]
        if cost.grad_inputs:
            self._now_differentiable({leaves[i].storage for i in cost.grad_inputs})

    def _now_differentiable(self, storages: set[int]) -> None:
        """After ``x[:, 0] = y`` every name of x's memory stands for a value that requires a gradient."""

        def mark(spec: TensorSpec) -> TensorSpec:
            grows = spec.storage in storages and spec.dtype.is_floating_point
            return replace(spec, requires_grad=True) if grows else spec

        for node, value in self.values.items():
            self.values[node] = pytree.tree_map_only(TensorSpec, mark, value)

    def _on_samples(self, node: fx.Node, args: Any, kwargs: Any, error: Exception) -> NodeCost:
        """The cost of a node that does not run on fake tensors."""
        given = self._unknown(node, args, kwargs)
        if node.op == "call_module":
            with contextlib.suppress(Exception):
                module = self.module.get_submodule(str(node.target))
                samples = self.captured.runs.inputs(module)
                return self.runner.module_on_samples(module, args, kwargs, given, samples)
        self.failed.append((node, error))
        return given

    def _gradient(self, node: fx.Node, args: Any, kwargs: Any) -> NodeCost:
        """The cost of ``torch.autograd.grad``: the backward pass of what it differentiates."""
        inside = [self.costs[n] for n in region_of(node, self.module) if n in self.costs]
        forward = tuple(op for cost in inside for op in cost.backward)
        twice = tuple(op for cost in inside for op in (*cost.forward, *cost.backward))
        return replace(self._unknown(node, args, kwargs), forward=forward, backward=twice)

    def _unknown(self, node: fx.Node, args: Any, kwargs: Any) -> NodeCost:
        grad = any(isinstance(t, TensorSpec) and t.requires_grad for t in pytree.tree_leaves((args, kwargs)))
        leaves, structure = pytree.tree_flatten(node.meta.get("val"))
        fresh: list[int] = []
        outputs: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                outputs.append(
                    OutputSpec(
                        tuple(leaf.shape), strides_of(leaf), leaf.dtype, grad and leaf.is_floating_point(),
                        None, len(fresh),
                    )
                )  # fmt: skip
                fresh.append(leaf.numel() * leaf.element_size())
            else:
                outputs.append(leaf)
        value = pytree.tree_unflatten(outputs, structure)
        return NodeCost((), (), tuple(fresh), (), (), 0, (), value, exact=False)

    def _method(self, name: str, args: Any, kwargs: Any) -> NodeCost:
        def called(this: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(this, name)(*args, **kwargs)

        return self.runner.function(called, args, kwargs, ("method", name))

    def _attribute(self, node: fx.Node) -> Any:
        value = operator.attrgetter(str(node.target))(self.module)
        self.costs[node] = NodeCost((), (), (), (), (), 0, (), None)
        self.saves[node] = []
        if not isinstance(value, torch.Tensor):
            return value
        return _spec(value, value.requires_grad, self._tensor(value))

    def _given(self, value: Any, node: fx.Node, *, requires_grad: bool) -> Any:
        def place(tensor: torch.Tensor) -> TensorSpec:
            return _spec(tensor, requires_grad, self._storage(node, tensor.numel() * tensor.element_size()))

        return pytree.tree_map_only(torch.Tensor, place, value)

    def _state(self, node: fx.Node) -> dict[str, torch.Tensor]:
        """Parameters and buffers that a node uses, by the name that its module has for them."""
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.module)
            return {str(node.target): value} if isinstance(value, torch.Tensor) else {}
        if node.op != "call_module":
            return {}
        module = self.module.get_submodule(str(node.target))
        return dict([*module.named_parameters(), *module.named_buffers()])

    def used(self, node: fx.Node) -> dict[str, torch.Tensor]:
        """Parameters and buffers that a node uses, also those that it gets from attribute nodes."""
        used = {f"{node.target}.{name}": tensor for name, tensor in self._state(node).items()}
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                used |= self._state(source)
        return used

    def _tensor(self, tensor: torch.Tensor) -> int:
        if id(tensor) not in self.of_tensor:
            self.of_tensor[id(tensor)] = self._storage(None, nbytes(tensor))
        return self.of_tensor[id(tensor)]

    def _storage(self, maker: fx.Node | None, size: int) -> int:
        self.maker.append(maker)
        self.size.append(size)
        return len(self.maker) - 1

    def activations(self) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
        """Saved bytes at their maker, and saved bytes of model inputs at the first that saves them."""
        kept = {node: cost.saved_inside for node, cost in self.costs.items()}
        inputs = dict.fromkeys(self.costs, 0)
        seen: set[int] = set()
        for node, storages in self.saves.items():
            for storage in storages:
                maker = self.maker[storage]
                if maker is None or storage in seen:
                    continue
                seen.add(storage)
                if maker.op == "placeholder":
                    inputs[node] += self.size[storage]
                else:
                    kept[maker] += self.size[storage]
        return kept, inputs

    def memory(self, node: fx.Node, cost: NodeCost) -> NodeMemory:
        """What a node does to memory."""
        reads = {t.storage for n in node.all_input_nodes for t in self.tensors(n)}
        gives = {t.storage for t in self.tensors(node)}
        return NodeMemory(
            reads=tuple(sorted(reads)),
            makes=tuple(sorted(s for s in gives if self.maker[s] is node)),
            saves=tuple(dict.fromkeys(self.saves[node])),
            gives=tuple(sorted(gives)),
            inside=cost.saved_inside,
            forward_peak=cost.forward_peak,
            backward_peak=cost.backward_peak,
        )

    def tensors(self, node: fx.Node) -> list[TensorSpec]:
        """The tensors that a node gives."""
        return [t for t in pytree.tree_leaves(self.values[node]) if isinstance(t, TensorSpec)]


def _spec(tensor: torch.Tensor, requires_grad: bool, storage: int) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), strides_of(tensor), tensor.dtype, requires_grad, storage)


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
