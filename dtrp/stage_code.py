"""A stage's graph as Python source, in which runs of nodes that are computed again are functions."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import Any, NoReturn

import torch
from torch import fx

from .partitioner.partly import keeps_statistics
from .runtime.again import again as run_again
from .runtime.program import Code


def stage_code(
    module: fx.GraphModule,
    device: torch.device,
    again: Collection[str] = (),
    drawing: Collection[str] = (),
) -> Code:
    """A graph's generated code, with device constants set to ``device``; behind each line the user's.

    ``again``: nodes that are computed again in the backward pass; ``drawing``: that draw random numbers.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        if any(isinstance(a, torch.device) for a in (*node.args, *node.kwargs.values())):
            node.args = tuple(device if isinstance(a, torch.device) else a for a in node.args)
            node.kwargs = {k: device if isinstance(a, torch.device) else a for k, a in node.kwargs.items()}
    parts = [_taken_out(graph, run, i) for i, run in enumerate(_runs(graph, set(again)))]
    code = graph.python_code("self")
    source, scope = _with_places(code.src, graph), dict(code.globals)
    name = next((name for name, value in scope.items() if value is _part), "")
    for i, part in enumerate(parts):
        nodes = list(part.nodes)
        draws = not {n.name for n in nodes}.isdisjoint(drawing)
        how = f"part_{i}, self, {_statistics(part, module)!r}, {draws}, "
        source = source.replace(f"{name}({i}, ", f"{run_again.__name__}({how}")
        own = part.python_code("self")
        source += _with_places(own.src, part).replace("def forward(", f"def part_{i}(", 1)
        scope |= {**own.globals, run_again.__name__: run_again}
    return Code(source, scope)


def _with_places(source: str, graph: fx.Graph) -> str:
    at = {node.name: f"  # {place}" for node in graph.nodes if (place := node.meta.get("location"))}
    lines = [
        line + at.get(line.split(maxsplit=1)[0], "") if line.strip() else "" for line in source.splitlines()
    ]
    return "\n".join(lines) + "\n"


def _part(number: int, *inputs: Any) -> NoReturn:
    """Stands in the graph where a function of the source is called."""
    raise AssertionError(number)


def _runs(graph: fx.Graph, again: Collection[str]) -> Iterator[Sequence[fx.Node]]:
    """Neighbours that are computed again; a parameter that is read between them stands anywhere."""
    calls = [node for node in graph.nodes if node.op != "get_attr"]
    for is_again, run in groupby(calls, key=lambda node: node.name in again):
        if is_again:
            yield list(run)


def _taken_out(graph: fx.Graph, run: Sequence[fx.Node], number: int) -> fx.Graph:
    """The graph of a run, in whose place the run's graph is called."""
    part, there = fx.Graph(), dict[fx.Node, fx.Node]()
    given = dict.fromkeys(a for n in run for a in n.all_input_nodes if a not in set(run))
    for node in given:
        there[node] = part.node_copy(node) if node.op == "get_attr" else part.placeholder(node.name)
    for node in run:
        there[node] = part.node_copy(node, there.__getitem__)
    results = [node for node in run if any(user not in set(run) for user in node.users)]
    part.output(tuple(there[node] for node in results))
    with graph.inserting_before(run[0]):
        inputs = (node for node in given if node.op != "get_attr")
        called = graph.call_function(_part, (number, *inputs))
        for i, node in enumerate(results):
            item = graph.call_function(operator.getitem, (called, i))
            node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in set(run))
    for node in reversed((*given, *run)):
        if not node.users and node.op != "placeholder":
            graph.erase_node(node)
    return part


def _statistics(part: fx.Graph, module: fx.GraphModule) -> tuple[str, ...]:
    """Names of the buffers that batch norms update."""
    names: dict[str, None] = {}
    for node in part.nodes:
        if node.op in ("call_module", "call_function") and keeps_statistics(node, module):
            if node.op == "call_module":
                held = module.get_submodule(str(node.target))
                names |= dict.fromkeys(f"{node.target}.{name}" for name, _ in held.named_buffers())
            else:
                names |= dict.fromkeys(str(a.target) for a in node.all_input_nodes if a.op == "get_attr")
    return tuple(names)
