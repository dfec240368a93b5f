"""Every contiguous partition of a small graph, one by one, by the definition; no code of the solvers'."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx

from dtrp.partitioner import StageModel, StageOption


@dataclass
class Case:
    """A graph and the arguments of `partition`."""

    graph: nx.DiGraph
    n_stages: int
    kwargs: dict[str, Any] = field(default_factory=dict)


def stage_costs(case: Case, stage_of: dict[Any, int], stage: int) -> list[tuple[float, float, float, float]]:
    """``(compute, time in, time out, memory)`` of one stage with each of its options."""
    graph, kwargs = case.graph, case.kwargs
    inside = [u for u in graph if stage_of[u] == stage]
    time_in = time_out = bytes_in = 0.0
    for u in graph:
        users = {stage_of[v] for v in graph.successors(u)}
        edges = [graph.edges[u, v] for v in graph.successors(u)]
        transfer = max([graph.nodes[u].get("transfer", 0), *(e.get("transfer", 0) for e in edges)])
        size = max([graph.nodes[u].get("bytes", 0), *(e.get("bytes", 0) for e in edges)])
        if stage_of[u] == stage and users - {stage}:
            time_out += transfer
        if stage_of[u] != stage and stage in users:
            time_in += transfer
            bytes_in += size
    models = kwargs.get("stage_models")
    options = models[stage].options if models else [StageOption("default", {"time": 1}, {"memory": 1})]
    costs = []
    for option in options:
        compute = option.fixed_time
        compute += sum(w * graph.nodes[u].get(a, 0) for a, w in option.time.items() for u in inside)
        memory = sum(w * graph.nodes[u].get(a, 0) for a, w in option.memory.items() for u in inside)
        costs.append((compute, time_in, time_out, memory + option.input_memory * bytes_in))
    return costs


def limit_of(case: Case, stage: int) -> float:
    """Memory limit of a stage."""
    limits = [math.inf]
    models, limit = case.kwargs.get("stage_models"), case.kwargs.get("memory_limit")
    if models and models[stage].memory_limit is not None:
        limits.append(models[stage].memory_limit)
    if isinstance(limit, list):
        limit = limit[stage]
    return min([*limits, limit] if limit is not None else limits)


def max_load(case: Case, stage_of: dict[Any, int], devices: Sequence[int] | None = None) -> float:
    """The objective of one assignment; inf if a memory limit is broken. ``devices`` of a stage share its
    values out."""
    worst = 0.0
    for stage in range(case.n_stages):
        if stage not in stage_of.values():
            continue
        limit = limit_of(case, stage) * (1 + 1e-9)
        r = devices[stage] if devices else 1
        loads = [
            max(c, i / r, o / r) if case.kwargs.get("overlap", True) else c + i / r + o / r
            for c, i, o, m in stage_costs(case, stage_of, stage)
            if m <= limit
        ]
        worst = max(worst, min(loads, default=math.inf))
    return worst


def max_memory(case: Case, stage_of: dict[Any, int]) -> float:
    """The smallest common limit that an assignment meets."""
    return max(
        min(c[3] for c in stage_costs(case, stage_of, stage))
        for stage in range(case.n_stages)
        if stage in stage_of.values()
    )


def violations(case: Case, stage_of: dict[Any, int]) -> list[str]:
    """Which constraints an assignment breaks, memory aside."""
    kwargs, broken = case.kwargs, []
    if set(stage_of) != set(case.graph):
        return ["nodes missing"]
    for u, v, data in case.graph.edges(data=True):
        if data.get("precedence", True) and stage_of[u] > stage_of[v]:
            broken.append(f"edge {u}->{v}")
    broken += [f"order {u}->{v}" for u, v in kwargs.get("order", ()) if stage_of[u] > stage_of[v]]
    broken += [f"colocate {g}" for g in kwargs.get("colocate", ()) if len({stage_of[u] for u in g}) > 1]
    broken += [f"fixed {u}" for u, s in kwargs.get("fixed", {}).items() if stage_of[u] != s]
    used = set(stage_of.values())
    if not used <= set(range(case.n_stages)):
        broken.append("stage out of range")
    if not kwargs.get("allow_empty") and len(used) < case.n_stages:
        broken.append("empty stage")
    return broken


def assignments(case: Case) -> Any:
    """Every assignment that breaks no constraint."""
    precedence = nx.DiGraph()
    precedence.add_nodes_from(case.graph)
    precedence.add_edges_from((u, v) for u, v, d in case.graph.edges(data=True) if d.get("precedence", True))
    precedence.add_edges_from(case.kwargs.get("order", ()))
    nodes = list(nx.topological_sort(precedence))
    stage_of: dict[Any, int] = {}

    def place(i: int) -> Any:
        if i == len(nodes):
            if not violations(case, stage_of):
                yield dict(stage_of)
            return
        first = max((stage_of[p] for p in precedence.predecessors(nodes[i])), default=0)
        for stage in range(first, case.n_stages):
            stage_of[nodes[i]] = stage
            yield from place(i + 1)
        stage_of.pop(nodes[i], None)

    yield from place(0)


def random_case(rng: random.Random, max_nodes: int = 7) -> Case:
    """A small problem with every feature switched on now and then."""
    n = rng.randint(1, max_nodes)
    graph = nx.DiGraph()
    names = list(range(n))
    rng.shuffle(names)
    whole = rng.random() < 0.5  # ties matter as much as generic numbers
    draw = (lambda: float(rng.choice([0, 1, 1, 2, 3]))) if whole else (lambda: rng.random() ** 2)
    scale = rng.choice([0.0, 0.2, 1.0])
    for name in names:
        graph.add_node(name, time=draw(), extra=draw(), memory=draw(), transfer=scale * draw(), bytes=draw())
    density = rng.choice([0.15, 0.3, 0.6])
    for i in range(n):
        for j in range(i + 1, n):
            if rng.random() < density:
                graph.add_edge(names[i], names[j])
                if rng.random() < 0.2:
                    graph.edges[names[i], names[j]]["transfer"] = draw()
    if rng.random() < 0.2:  # values that impose no precedence, also backwards
        for _ in range(3):
            u, v = rng.choice(names), rng.choice(names)
            if u != v and not graph.has_edge(u, v):
                graph.add_edge(u, v, precedence=False)
    k = rng.randint(1, min(4, n)) if n <= 6 else rng.randint(2, 3)
    kwargs: dict[str, Any] = {"overlap": rng.random() < 0.5}
    if rng.random() < 0.3:
        kwargs["allow_empty"] = True
    if rng.random() < 0.4:
        kwargs["memory_limit"] = total_memory(graph) / k * rng.choice([0.7, 1.0, 1.3, 2.0]) + 1e-3
        if rng.random() < 0.3:
            kwargs["memory_limit"] = [
                rng.choice([None, kwargs["memory_limit"] * rng.uniform(0.5, 2)]) for _ in range(k)
            ]
    if rng.random() < 0.3 and n > 2:
        kwargs["colocate"] = [rng.sample(names, 2) for _ in range(rng.randint(1, 2))]
    if rng.random() < 0.2 and n > 2:
        i, j = sorted(rng.sample(range(n), 2))
        kwargs["order"] = [(names[i], names[j])]
    if rng.random() < 0.2:
        kwargs["fixed"] = {rng.choice(names): rng.randrange(k) for _ in range(rng.randint(1, 2))}
    if rng.random() < 0.5:
        kwargs["stage_models"] = [_stage_model(rng) for _ in range(k)]
        if rng.random() < 0.5:
            kwargs["stage_models"] = [kwargs["stage_models"][0]] * (k - 1) + [kwargs["stage_models"][-1]]
    return Case(graph, k, kwargs)


def total_memory(graph: nx.DiGraph) -> float:
    """Bytes of all nodes."""
    return sum(graph.nodes[u]["memory"] for u in graph)


def _stage_model(rng: random.Random) -> StageModel:
    speed = rng.choice([0.5, 1.0, 1.0, 2.0])
    keep = StageOption("keep", {"time": speed}, {"memory": 1.0, "extra": rng.choice([0.0, 1.0])})
    recompute = StageOption(
        "recompute",
        {"time": speed, "extra": speed},
        {"memory": 0.6},
        input_memory=rng.choice([0.0, 0.5]),
        fixed_time=rng.choice([0.0, 0.1]),
    )
    options = rng.choice([(keep,), (recompute,), (keep, recompute), (recompute, keep)])
    return StageModel(options, rng.choice([None, None, None, 5.0]))
