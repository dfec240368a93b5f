"""What a way of capturing gives for one mode, before it is checked and accepted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Traced:
    """A graph over the original model's modules and parameters, and its output's structure."""

    graph: Graph
    out_spec: pytree.TreeSpec


def same_graph(a: Traced, b: Traced) -> bool:
    """Whether two traces are equal node by node, in targets, arguments and output structure."""
    if a.out_spec != b.out_spec or len(a.graph.nodes) != len(b.graph.nodes):
        return False
    position: dict[Node, int] = {}
    for i, (x, y) in enumerate(zip(a.graph.nodes, b.graph.nodes, strict=True)):
        position[x] = position[y] = i
        if x.op != y.op or (x.target is not y.target and x.target != y.target):
            return False
        if not _same_value((x.args, x.kwargs), (y.args, y.kwargs), position):
            return False
    return True


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
