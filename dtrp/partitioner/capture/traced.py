"""What a way of capturing gives for one mode, before it is checked and accepted."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph_module import _assign_attr
from torch.utils import _pytree as pytree

from .graph import KeptWhole, ModeGraph
from .operators import Walk


@dataclass(frozen=True)
class Traced:
    """A graph over the original model's modules and parameters, and its output's structure."""

    graph: Graph
    out_spec: pytree.TreeSpec
    kept_whole: tuple[KeptWhole, ...] = ()
    notes: tuple[str, ...] = ()
    asks_grad: bool = False  # the model's code asks whether gradients are enabled
    asks_mode: str = ""  # what asks for the mode: "code" that was recorded, or only "layers"
    left: Mapping[str, torch.Tensor] = field(default_factory=dict)  # in attributes, by their full names
    # What is no part of the model, by the names that nodes give it: tensors, and methods that are kept whole.
    held: Mapping[str, torch.Tensor | nn.Module] = field(default_factory=dict)

    def module(self, model: nn.Module, name: str) -> nn.Module:
        """The module that a ``call_module`` node calls."""
        held = self.held.get(name)
        return held if isinstance(held, nn.Module) else model.get_submodule(name)

    def graph_module(self, model: nn.Module) -> GraphModule:
        """The graph with the model's own modules, parameters and buffers."""
        names = [str(n.target) for n in self.graph.nodes if n.op in ("call_module", "get_attr")]
        parts = {n: self.held[n] if n in self.held else operator.attrgetter(n)(model) for n in names}
        return assembled(parts, self.graph, type(model).__name__)

    def mode_graph(self, model: nn.Module, walk: Walk) -> ModeGraph:
        """What capturing gives for the mode."""
        return ModeGraph(self.graph_module(model), self.out_spec, walk)


def assembled(parts: Mapping[str, Any], graph: Graph, name: str) -> GraphModule:
    """A graph with these parts. What is inside of a part that is called is there with it, as itself: fx would
    make a buffer of it, on the user's own layer."""
    called = {str(node.target) for node in graph.find_nodes(op="call_module")}
    module = GraphModule(nn.Module(), Graph(), name)
    for target in sorted(parts, key=lambda t: t.count(".")):
        if not any(target.startswith(f"{other}.") for other in called):
            _assign_attr(parts[target], module, target)
    module.graph = graph
    return module


def same_graph(a: Traced, b: Traced) -> bool:
    """Whether two traces are equal node by node, in targets, arguments and output structure."""
    return a.out_spec == b.out_spec and len(a.graph.nodes) == len(b.graph.nodes) and differs_at(a, b) is None


def differs_at(a: Traced, b: Traced) -> Node | None:
    """The first node of ``a`` that has another target or other arguments than that of ``b`` in its place."""
    position: dict[Node, int] = {}
    x: Node
    for i, (x, y) in enumerate(zip(a.graph.nodes, b.graph.nodes, strict=False)):
        position[x] = position[y] = i
        if x.op != y.op or (x.target is not y.target and x.target != y.target):
            return x
        if not _same_value((x.args, x.kwargs), (y.args, y.kwargs), position):
            return x
    return None


def _same_value(a: Any, b: Any, position: dict[Node, int]) -> bool:
    if isinstance(a, Node) or isinstance(b, Node):
        return isinstance(a, Node) and isinstance(b, Node) and position[a] == position[b]
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same_value(x, y, position) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same_value(a[k], b[k], position) for k in a)
    if isinstance(a, slice):
        return _same_value((a.start, a.stop, a.step), (b.start, b.stop, b.step), position)
    return a is b or repr(a) == repr(b)
