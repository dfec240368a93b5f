"""What the eval graph asks of a cut of the train graph.

Parameters and buffers are where the train graph uses them, and the eval graph must be able to run from stage
to stage too. Where a model's code reads ``self.training`` it may use one layer's result for another in eval
alone: then the one must not be behind the other, though in training nothing says so.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator
from itertools import chain

import networkx as nx
from torch import fx

from .capture.graph import ModeGraph


def keyed(graph: ModeGraph) -> Iterator[tuple[Hashable, fx.Node]]:
    """Nodes by what both modes' graphs have in common: operation, place in the model, occurrence."""
    seen: Counter[Hashable] = Counter()
    for node in graph.module.graph.nodes:
        if node.op in ("call_function", "call_module", "call_method"):
            key = (node.op, str(node.target), node.meta.get("module", ""))
            yield (*key, seen[key]), node
            seen[key] += 1


def state_of(node: fx.Node) -> dict[int, str]:
    """The parameters and buffers that a node uses: their names, by the tensors' ids (they may be tied)."""
    root = node.graph.owning_module
    assert root is not None
    found: dict[int, str] = {}
    for a in node.all_input_nodes:
        if a.op == "get_attr":
            found[id(operator.attrgetter(str(a.target))(root))] = str(a.target)
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        for name, tensor in chain(module.named_parameters(), module.named_buffers()):
            found[id(tensor)] = f"{node.target}.{name}"
    return found


def units(graph: ModeGraph, groups: Iterable[frozenset[str]], order: Iterable[tuple[str, str]]) -> nx.DiGraph:
    """Nodes that must share a stage as one (``members``), and which unit needs which before it."""
    nodes = {node.name: node for _, node in keyed(graph)}
    needs = nx.DiGraph()
    needs.add_nodes_from(nodes)
    needs.add_edges_from(
        (a.name, n.name) for n in nodes.values() for a in n.all_input_nodes if a.name in nodes
    )
    needs.add_edges_from((u, v) for u, v in order if u in nodes and v in nodes)
    for group in groups:
        ring = sorted(group & nodes.keys())
        needs.add_edges_from(zip(ring, ring[1:] + ring[:1], strict=True))
    return nx.condensation(needs)


def rules_of_eval(
    train: ModeGraph, evaluate: ModeGraph, eval_units: nx.DiGraph
) -> tuple[list[frozenset[str]], list[tuple[str, str]]]:
    """Groups and order of train nodes under which every unit of the eval graph finds a stage."""
    same = dict(keyed(train))
    users: dict[int, list[str]] = defaultdict(list)
    for node in same.values():
        for tensor in state_of(node):
            users[tensor].append(node.name)
    counterparts: dict[str, set[str]] = {}
    for key, node in keyed(evaluate):
        twin = same.get(key)
        state = state_of(node)
        if twin is not None and state.keys() <= state_of(twin).keys():
            counterparts[node.name] = {twin.name} if state else set()
        else:
            counterparts[node.name] = {name for tensor in state for name in users[tensor]}

    groups: list[frozenset[str]] = []
    order: dict[tuple[str, str], None] = {}
    nearest: dict[int, dict[str, None]] = {}  # by unit: the last train nodes that its own may not precede
    for unit in nx.topological_sort(eval_units):
        before = dict.fromkeys(name for u in eval_units.predecessors(unit) for name in nearest[u])
        held = frozenset(name for n in eval_units.nodes[unit]["members"] for name in counterparts[n])
        nearest[unit] = before
        if held:
            first = min(held)
            order.update(dict.fromkeys((name, first) for name in before if name not in held))
            groups.append(held)
            nearest[unit] = {first: None}
    return [group for group in groups if len(group) > 1], list(order)


def without_cycles(
    graph: ModeGraph, groups: Iterable[frozenset[str]], order: Iterable[tuple[str, str]]
) -> tuple[list[frozenset[str]], list[tuple[str, str]]]:
    """The same rules with each cycle of order and data as a group."""
    groups, order = list(groups), list(order)
    joined = units(graph, groups, order)
    home = {name: unit for unit in joined for name in joined.nodes[unit]["members"]}
    merged = [frozenset(joined.nodes[unit]["members"]) for unit in joined]
    kept = [(u, v) for u, v in order if u not in home or v not in home or home[u] != home[v]]
    return [group for group in merged if len(group) > 1], kept
