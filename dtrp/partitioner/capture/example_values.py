"""What the example's own numbers are at a point of a recording: lengths, indices, masks, probabilities.

A module that is kept whole really runs when the model is captured. Not any numbers will do for it: lengths
must not be zero, split sizes must add up, probabilities lie between 0 and 1. The part of the graph that leads
to its arguments is run on the example's inputs; only what large layers would compute is random.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import Node, map_arg
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from dtrp.partitioner.sketch import Sketch

from .fakes import FakeWorld
from .real import random_tensor
from .snapshot import preserved_randomness, untouched
from .structure import Step, tensors_in
from .writer import GraphWriter

_LARGE = 2**22  # elements that a node gives or is given; more are not worth computing


class ExampleValues:
    """Values of the nodes of a growing graph for given inputs, each computed when it is asked for."""

    def __init__(
        self,
        model: nn.Module,
        world: FakeWorld,
        held: Sequence[Mapping[str, Any]],  # by name: what is no attribute of the model
        inputs: Sequence[torch.Tensor],
    ) -> None:
        self._model, self._world, self._held, self._inputs = model, world, held, inputs
        self._known = not any(t.is_meta for t in (*inputs, *model.parameters(), *model.buffers()))
        self._values: dict[Node, Any] = {}

    def of(self, node: Node, steps: tuple[Step, ...] = ()) -> Any:
        """The value of a node, or the part of it that the steps lead to; None if it cannot be told."""
        if not self._known:
            return None
        try:
            with _disable_current_modes(), preserved_randomness(), torch.no_grad(), Sketch():
                torch.manual_seed(0)
                needed = self._missing(node)
                for each in node.graph.nodes if needed else ():
                    if each in needed:
                        self._values[each] = self._run(each)
                value = self._values[node]
                for function, key in steps:
                    value = function(value, key)
                return value
        except Exception:  # whatever the user's code raises on them: another number will have to do
            return None

    def _missing(self, node: Node) -> set[Node]:
        found: set[Node] = set()
        waiting = [node]
        while waiting:
            current = waiting.pop()
            if current not in found and current not in self._values:
                found.add(current)
                waiting.extend(current.all_input_nodes)
        return found

    def _run(self, node: Node) -> Any:
        if node.op == "placeholder":
            position = list(node.graph.find_nodes(op="placeholder")).index(node)
            return self._inputs[position].detach().clone()
        args = map_arg(node.args, self._values.__getitem__)
        kwargs = map_arg(node.kwargs, self._values.__getitem__)
        if node.op == "get_attr":
            tensor = self._named(str(node.target))
            if tensor.numel() > _LARGE:
                raise ValueError("too large to be copied")
            return self._world.originals.get(id(tensor), tensor).detach().clone()
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_module":
            if sum(t.numel() for t in _tensors((node.meta.get("val"), args, kwargs))) > _LARGE:
                return pytree.tree_map_only(torch.Tensor, _drawn, node.meta["val"])
            module = self._named(str(node.target))
            with self._world.left_by(module), untouched(module, tensors=True):
                return module(*args, **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _named(self, name: str) -> Any:
        for held in self._held:
            if name in held:
                return held[name]
        return operator.attrgetter(name)(self._model)


class ExampleCalls:
    """The example's call, and others with other samples of it; together they tell what sizes depend on."""

    def __init__(
        self, model: nn.Module, world: FakeWorld, writer: GraphWriter, calls: Sequence[Sequence[torch.Tensor]]
    ) -> None:
        held = writer.constants, writer.methods
        self._world, self._writer = world, writer
        self._calls = [ExampleValues(model, world, held, tensors) for tensors in calls]

    def meet(self, arguments: Any) -> None:
        """Tell the world what the tensors among a module's arguments are in each."""
        for _, tensor in tensors_in(arguments):
            source = self._writer.source(tensor)
            if source is not None:
                real, *others = [partial(call.of, *source) for call in self._calls]
                self._world.meet(tensor, real, others)


def batch_of(tensors: Sequence[torch.Tensor]) -> tuple[int, tuple[int, ...]]:
    """The batch size (the most common first dimension) and the indices of the tensors that have it."""
    sizes = Counter(t.shape[0] for t in tensors if t.dim() > 0)
    if not sizes:
        return 0, ()
    # Among equally common ones, the first tensor's.
    size = max(sizes, key=lambda s: sizes[s])
    return size, tuple(i for i, t in enumerate(tensors) if t.dim() > 0 and t.shape[0] == size)


def repeated(
    tensors: Sequence[torch.Tensor], batch: Sequence[int], rows: Sequence[int]
) -> list[torch.Tensor]:
    """A call's tensors with the samples ``rows`` of the example in place of its own."""
    chosen = list(tensors)
    for i in batch:
        if len(tensors[i]):
            chosen[i] = tensors[i].detach()[[r % len(tensors[i]) for r in rows]]
    return chosen


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor))


def _drawn(fake: torch.Tensor) -> torch.Tensor:
    return random_tensor(tuple(fake.shape), fake.dtype, fake.device)
