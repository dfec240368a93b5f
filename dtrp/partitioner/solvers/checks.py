"""What a caller of the partitioner can get wrong, said in the caller's words."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import networkx as nx
import numpy as np

from .engine import ENGINES
from .problem import Floats, Problem


def check_arguments(graph: Any, n_stages: Any, engine: str, time_limit: float) -> None:
    """Type of the graph, number of stages, engine, time limit."""
    if not isinstance(graph, nx.DiGraph) or graph.is_multigraph():
        raise TypeError(f"graph must be a networkx.DiGraph, got {type(graph).__name__}")
    if not _is_whole(n_stages):
        raise TypeError(f"n_stages must be a whole number, got {n_stages!r}")
    if n_stages < 1:
        raise ValueError(f"n_stages must be at least 1, got {n_stages}")
    if len(graph) == 0:
        raise ValueError("the graph has no nodes; there is nothing to partition")
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
    if math.isnan(time_limit) or time_limit < 0:
        raise ValueError(f"time_limit must be a number of seconds >= 0, got {time_limit!r}")


def check_models(n_stages: int, stage_models: Sequence[Any]) -> None:
    """One model per stage, each with options of sane numbers."""
    if len(stage_models) != n_stages:
        raise ValueError(f"stage_models must have one entry per stage: {n_stages}, got {len(stage_models)}")
    for k, model in enumerate(stage_models):
        if not model.options:
            raise ValueError(f"stage_models[{k}] has no options; a stage needs at least one way to run")
        for option in model.options:
            numbers_ = {"fixed_time": option.fixed_time, "input_memory": option.input_memory}
            numbers_ |= {f"time[{a!r}]": w for a, w in option.time.items()}
            numbers_ |= {f"memory[{a!r}]": w for a, w in option.memory.items()}
            for name, value in numbers_.items():
                if not _is_cost(value):
                    raise ValueError(
                        f"stage_models[{k}], option {option.label!r}: {name} must be a finite number >= 0, "
                        f"got {value!r}"
                    )


def memory_limits(
    n_stages: int, stage_models: Sequence[Any], memory_limit: float | Sequence[float | None] | None
) -> Floats:
    """Bytes per stage (inf: no limit), from the stage models and the argument, whichever is smaller."""
    given = list(memory_limit) if isinstance(memory_limit, Sequence) else [memory_limit] * n_stages
    if len(given) != n_stages:
        raise ValueError(f"memory_limit must have one entry per stage: {n_stages}, got {len(given)}")
    limits = np.full(n_stages, np.inf)
    for k, (own, extra) in enumerate(zip((m.memory_limit for m in stage_models), given, strict=True)):
        for value in (own, extra):
            if value is None:
                continue
            if not isinstance(value, int | float | np.number) or math.isnan(value) or value <= 0:
                raise ValueError(
                    f"memory limit of stage {k} must be a number of bytes > 0 or None, got {value!r}"
                )
            limits[k] = min(limits[k], float(value))
    return limits


def check_nodes(
    graph: nx.DiGraph,
    n_stages: int,
    colocate: Iterable[Collection[Hashable]],
    order: Iterable[tuple[Hashable, Hashable]],
    fixed: Mapping[Hashable, int],
) -> None:
    """All nodes named are in the graph, all stages in range, and no more stages than nodes."""
    named = [("colocate", u) for alike in colocate for u in alike]
    named += [("order", u) for edge in order for u in edge]
    named += [("fixed", u) for u in fixed]
    for where, node in named:
        if node not in graph:
            raise ValueError(f"{where} names {node!r}, which is not a node of the graph")
    for node, stage in fixed.items():
        if not _is_whole(stage) or not 0 <= stage < n_stages:
            raise ValueError(
                f"fixed pins node {node!r} to stage {stage!r}; stages are numbered 0 to {n_stages - 1}"
            )


def check_classes(n_stages: int, classes: Sequence[Any] | None) -> None:
    """As many devices as stages, or more where stages may have several."""
    if classes is None:
        return
    for c in classes:
        for count in (c.count, *c.replicas):
            if not _is_whole(count) or count < 1:
                raise ValueError(f"a class needs a whole number of devices, at least 1; got {count!r}")
    devices = sum(c.count for c in classes)
    if devices < n_stages or (devices > n_stages and not any(c.replicas for c in classes)):
        raise ValueError(
            f"the classes have {' + '.join(str(c.count) for c in classes)} devices for {n_stages} stages; "
            f"give one device per stage"
        )


def check_nodes_of_stages(n_stages: int, nodes: Any, per_node: Any) -> None:
    """As many nodes as can have a stage each, and room for all stages."""
    for name, value in (("nodes", nodes), ("per_node", per_node)):
        if not (value is None and name == "per_node") and not _is_whole(value):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
    if not 1 <= nodes <= n_stages:
        raise ValueError(f"nodes must be 1 to {n_stages}, the number of stages; got {nodes}")
    if per_node is not None and nodes > 1 and per_node * nodes < n_stages:
        raise ValueError(f"{nodes} nodes of at most {per_node} stages have no room for {n_stages} stages")


def check_enough(problem: Problem, n_nodes: int) -> None:
    """Every stage can get something."""
    if problem.allow_empty or problem.n >= problem.n_stages:
        return
    groups = ""
    if problem.n < n_nodes:
        groups = (
            f", which form {problem.n} group{'s' if problem.n > 1 else ''} that stay together (one "
            f"layer's operations, gradients inside forward, writes in place, colocation, cycles of groups)"
        )
    raise ValueError(
        f"cannot make {problem.n_stages} non-empty stages of {n_nodes} nodes{groups}; "
        f"use at most {problem.n} stage{'s' if problem.n > 1 else ', since nothing here can be cut'}"
    )


def check_numbers(
    graph: nx.DiGraph, node_attributes: set[str], edge_attributes: set[str], needed: set[str]
) -> None:
    """Costs are finite numbers >= 0, and every attribute that is needed is on some node."""
    missing = set(needed)
    for node, data in graph.nodes(data=True):
        for name in node_attributes:
            if name in data:
                missing.discard(name)
                if not _is_cost(data[name]):
                    raise ValueError(
                        f"node {node!r}: {name} must be a finite number >= 0, got {data[name]!r}"
                    )
    for u, v, data in graph.edges(data=True):
        for name in edge_attributes:
            if name in data and not _is_cost(data[name]):
                raise ValueError(
                    f"edge {u!r} -> {v!r}: {name} must be a finite number >= 0, got {data[name]!r}"
                )
    for name in sorted(missing):
        raise ValueError(f"no node of the graph has the attribute {name!r}")


def check_acyclic(graph: nx.DiGraph, order: Iterable[tuple[Hashable, Hashable]]) -> None:
    """Precedence has no cycle."""
    precedence = nx.DiGraph()
    precedence.add_edges_from((u, v) for u, v, d in graph.edges(data=True) if d.get("precedence", True))
    precedence.add_edges_from(order)
    if nx.is_directed_acyclic_graph(precedence):
        return
    cycle = [u for u, _ in nx.find_cycle(precedence)]
    shown = " -> ".join(repr(u) for u in [*cycle, cycle[0]][:12])
    raise ValueError(f"the graph (with the extra order) has a cycle: {shown}; stages need an acyclic graph")


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_cost(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value) and bool(value >= 0)
