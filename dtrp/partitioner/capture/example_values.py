"""What the example's own numbers are at a point of a recording: lengths, indices, masks, probabilities.

A module that is kept whole really runs when the model is captured. Not any numbers will do for it: lengths
must not be zero, split sizes must add up, probabilities lie between 0 and 1. The part of the graph that leads
to its arguments is run on the example's inputs; only what large layers would compute is random. What a check
in the model's own code says of the example is found in the same way, but exactly or not at all.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from dtrp.partitioner.sketch import Sketch

from .fakes import FakeWorld
from .real import random_tensor
from .snapshot import preserved_randomness, untouched
from .structure import Step, tensors_in
from .writer import GraphWriter

_LARGE = 2**22  # elements that a node gives or is given; more are not worth computing


class ExampleValues(Interpreter):
    """Values of the nodes of a growing graph for given inputs, each computed when it is asked for."""

    def __init__(
        self,
        model: nn.Module,
        world: FakeWorld,
        writer: GraphWriter,
        inputs: Sequence[torch.Tensor],
        exact: bool = False,  # nothing random: what layers with parameters compute is not told
    ) -> None:
        super().__init__(model, garbage_collect_values=False, graph=writer.graph)
        self.extra_traceback = False
        self._world, self._writer, self._exact = world, writer, exact
        self._inputs = None if any(t.is_meta for t in inputs) else inputs

    def of(self, node: Node, steps: tuple[Step, ...] = ()) -> Any:
        """The value of a node, or the part of it that the steps lead to; None if it cannot be told."""
        if self._inputs is None:
            return None
        try:
            sketch = nullcontext() if self._exact else Sketch()
            with _disable_current_modes(), preserved_randomness(), torch.no_grad(), sketch:
                torch.manual_seed(0)
                needed = self._missing(node)
                for each in node.graph.nodes if needed else ():
                    if each in needed:
                        self.env[each] = self.run_node(each)
                value = self.env[node]
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
            if current not in found and current not in self.env:
                found.add(current)
                waiting.extend(() if _is_large(current) else current.all_input_nodes)
        return found

    def run_node(self, n: Node) -> Any:
        if n.op == "placeholder":
            assert self._inputs is not None
            position = list(n.graph.find_nodes(op="placeholder")).index(n)
            return self._inputs[position].detach().clone()
        if n.op == "call_module":
            module = self.fetch_attr(str(n.target))
            large = _is_large(n)
            if self._exact and (large or next(module.parameters(), None) is not None):
                raise ValueError("too dear to be computed")
            if large:
                return pytree.tree_map_only(torch.Tensor, _drawn, n.meta["val"])
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            with self._world.left_by(module), untouched(module, tensors=True):
                return module(*args, **kwargs)
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        tensor = self.fetch_attr(target)
        if tensor.numel() > _LARGE:
            raise ValueError("too large to be copied")
        return self._world.originals.get(id(tensor), tensor).detach().clone()

    def fetch_attr(self, target: str) -> Any:
        held = self._writer.held
        return held[target] if target in held else operator.attrgetter(target)(self.module)


def _is_large(node: Node) -> bool:
    """Whether it is a layer too large to be computed: what it would give is drawn, whatever it is given."""
    if node.op != "call_module":
        return False
    tensors = pytree.tree_leaves([n.meta.get("val") for n in (node, *node.all_input_nodes)])
    return sum(t.numel() for t in tensors if isinstance(t, torch.Tensor)) > _LARGE


class ExampleCalls:
    """The example's call, and others with other samples of it; together they tell what sizes depend on."""

    def __init__(
        self, model: nn.Module, world: FakeWorld, writer: GraphWriter, example: Sequence[torch.Tensor]
    ) -> None:
        self._world, self._writer = world, writer
        size, batch = batch_of(example)
        last = size - 1
        with _disable_current_modes():
            calls = [
                _repeated(example, batch, rows)  # the samples in another order, or one for all
                for rows in (range(size), range(last, -1, -1), [0] * size, [last] * size)
            ]
        self._calls = [ExampleValues(model, world, writer, tensors) for tensors in calls]
        self.exact = ExampleValues(model, world, writer, example, exact=True)

    def forget(self) -> None:
        """All values: sizes in what was recorded may hold on to the recording, and so to these."""
        for call in (*self._calls, self.exact):
            call.env.clear()

    def meet(self, arguments: Any) -> None:
        """Tell the world what the tensors among a module's arguments are in each."""
        for _, tensor in tensors_in(arguments):
            source = self._writer.source(tensor)
            if source is not None:
                real, *others = [partial(call.of, *source) for call in self._calls]
                self._world.meet(tensor, real, others)


def batch_of(tensors: Sequence[torch.Tensor]) -> tuple[int, tuple[int, ...]]:
    """The batch size (the most common first dimension) and the indices of the tensors that have it."""
    rows = {i: t.shape[0] for i, t in enumerate(tensors) if t.dim() > 0 and t.layout == torch.strided}
    sizes = Counter(rows.values())
    if not sizes:
        return 0, ()
    # Among equally common ones, the first tensor's.
    size = max(sizes, key=lambda s: sizes[s])
    return size, tuple(i for i, n in rows.items() if n == size)


def _repeated(
    tensors: Sequence[torch.Tensor], batch: Sequence[int], rows: Sequence[int]
) -> list[torch.Tensor]:
    chosen = list(tensors)
    for i in batch:
        if len(tensors[i]):
            chosen[i] = tensors[i].detach()[[r % len(tensors[i]) for r in rows]]
    return chosen


def _drawn(fake: torch.Tensor) -> torch.Tensor:
    return random_tensor(tuple(fake.shape), fake.dtype, fake.device)
