"""The partitioning problem as arrays: groups that stay together, precedence, values, and what stages offer.

A user's graph becomes a `Problem` once (`compile_problem`); every engine works on that alone. Nodes that must
share a stage (colocation groups, nodes pinned to one stage, and whatever a cycle between groups ties
together) are one *group*; groups are numbered in a topological order. What crosses between stages is a
*value*: the result of one producing node, needed by a set of consumer groups, charged once to the stage that
sends it and once to every stage that receives it, however many of its consumers sit there.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from dtrp.errors import InfeasiblePlanError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def product(left: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
    """``left @ right``, silent: some BLAS warn of what lies beside the arrays (numpy issue 24067)."""
    with np.errstate(all="ignore"):
        result: NDArray[Any] = left @ right
    return result


@dataclass(frozen=True, eq=False)
class Option:
    """One way to run a stage, per group: seconds and bytes are sums over the stage's groups."""

    label: str
    time: Floats  # seconds, shape (n,)
    fixed_time: float
    memory: Floats  # bytes, shape (n,)
    input_memory: float  # bytes of memory per byte of the stage's inputs
    share: float = 1.0  # of the values' seconds: 1 / r on each of r devices


@dataclass(frozen=True, eq=False)
class Values:
    """What producers hand to consumers. Value ``i`` goes from ``producer[i]`` to its ``consumers``.

    ``consumer[start[i]:start[i + 1]]`` are the consumers of value ``i``: sorted, distinct,
    without its producer.
    """

    producer: Ints
    start: Ints
    consumer: Ints
    transfer: Floats  # seconds
    size: Floats  # bytes
    far: Floats | None = None  # seconds between nodes, no less than ``transfer``; None: as ``transfer``

    def __len__(self) -> int:
        return len(self.producer)

    def consumers(self, i: int) -> Ints:
        """The groups that need value ``i``."""
        return self.consumer[self.start[i] : self.start[i + 1]]

    @property
    def owner(self) -> Ints:
        """For every entry of `consumer`, the value that it belongs to."""
        return np.repeat(np.arange(len(self.producer)), np.diff(self.start))


@dataclass(frozen=True, eq=False)
class Problem:
    """Cut ``n`` groups, numbered in a topological order, into ``n_stages`` consecutive stages.

    ``kind`` says what the load of a stage is made of: ``"overlap"``, max(compute, time in, time out);
    ``"sum"``, compute + time in + time out; ``"memory"``, bytes of the stage divided by its limit (used to
    find the smallest limits that can be met).
    """

    n_stages: int
    predecessors: tuple[tuple[int, ...], ...]
    successors: tuple[tuple[int, ...], ...]
    options: tuple[tuple[Option, ...], ...]  # per stage; stages that offer the same share one tuple
    limits: Floats  # bytes per stage, inf for none
    values: Values
    pinned: Ints  # stage of a group, -1 if free
    kind: str = "overlap"
    allow_empty: bool = False
    members: tuple[tuple[Hashable, ...], ...] = field(default=(), repr=False)  # original nodes per group

    @property
    def n(self) -> int:
        """Number of groups."""
        return len(self.predecessors)

    @cached_property
    def descendants(self) -> Bools:
        """``[u, v]``: v may not come in an earlier stage than u; the diagonal is True."""
        below = np.eye(self.n, dtype=bool)
        for u in range(self.n - 1, -1, -1):
            for v in self.successors[u]:
                below[u] |= below[v]
        return below

    @property
    def stage_types(self) -> list[list[int]]:
        """Stages that are alike (same options, same limit), as lists of stage numbers."""
        types: dict[tuple[int, float], list[int]] = {}
        for k, options in enumerate(self.options):
            types.setdefault((id(options), float(self.limits[k])), []).append(k)
        return list(types.values())

    def work(self, stage: int) -> list[tuple[Floats, float]]:
        """Per option of a stage, the part of its load that is a sum over groups, and what it adds once."""
        if self.kind == "memory":
            return [(o.memory / self.limits[stage], 0.0) for o in self.options[stage]]
        return [(o.time, o.fixed_time) for o in self.options[stage]]


def make_values(entries: Iterable[tuple[int, Collection[int], float, float, float]]) -> Values:
    """Values from ``(producer, consumers, transfer, size, far)``.

    The producer's own group is no consumer. Values with the same producer and consumers are one (their
    costs add up); those that cost nothing are left out.
    """
    merged: dict[tuple[int, tuple[int, ...]], list[float]] = {}
    for producer, consumers, *costs in entries:
        others = tuple(sorted(set(consumers) - {producer}))
        if others and any(cost > 0 for cost in costs):
            known = merged.get((producer, others), [0.0, 0.0, 0.0])
            merged[producer, others] = [a + b for a, b in zip(known, costs, strict=True)]
    lengths = [len(c) for _, c in merged]
    return Values(
        producer=np.array([p for p, _ in merged], dtype=np.int64),
        start=np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).astype(np.int64),
        consumer=np.array([c for _, cs in merged for c in cs], dtype=np.int64),
        transfer=np.array([costs[0] for costs in merged.values()], dtype=np.float64),
        size=np.array([costs[1] for costs in merged.values()], dtype=np.float64),
        far=np.array([costs[2] for costs in merged.values()], dtype=np.float64),
    )


def compile_problem(
    graph: nx.DiGraph,
    n_stages: int,
    stage_models: Sequence[Any],
    *,
    limits: Floats,
    transfer: str,
    size: str,
    far: str,
    kind: str,
    devices: int = 1,
    colocate: Iterable[Collection[Hashable]],
    order: Iterable[tuple[Hashable, Hashable]],
    fixed: Mapping[Hashable, int],
    allow_empty: bool,
) -> Problem:
    """Translate a checked graph (acyclic, every node and number valid) into arrays.

    Values are shared out among a stage's ``devices``.

    Raises
    ------
    InfeasiblePlanError
        Colocation, precedence and pinned stages contradict each other.
    """
    nodes = list(graph.nodes)
    precedence = nx.DiGraph()
    precedence.add_nodes_from(nodes)
    precedence.add_edges_from((u, v) for u, v, d in graph.edges(data=True) if d.get("precedence", True))
    precedence.add_edges_from(order)
    group_of, members = _groups(nodes, precedence, colocate, fixed)

    n = len(members)
    successors: list[set[int]] = [set() for _ in range(n)]
    for u, v in precedence.edges:
        if group_of[u] != group_of[v]:
            successors[group_of[u]].add(group_of[v])
    pinned = np.full(n, -1, dtype=np.int64)
    for node, stage in fixed.items():
        pinned[group_of[node]] = stage
    by_stage = sorted((int(s), g) for g, s in enumerate(pinned) if s >= 0)
    for (_, u), (_, v) in itertools.pairwise(by_stage):
        successors[u].add(v)
    predecessors: list[list[int]] = [[] for _ in range(n)]
    for u, followers in enumerate(successors):
        for v in followers:
            predecessors[v].append(u)

    entries = []
    for u in nodes:
        data = graph.nodes[u]
        edges = [graph.edges[u, v] for v in graph.successors(u)]
        near, bytes_, between = (
            max(float(d.get(name, 0.0)) for d in (data, *edges)) for name in (transfer, size, far)
        )
        users = {group_of[v] for v in graph.successors(u)}
        entries.append((group_of[u], users, near, bytes_, max(near, between)))
    return Problem(
        n_stages=n_stages,
        predecessors=tuple(tuple(sorted(p)) for p in predecessors),
        successors=tuple(tuple(sorted(s)) for s in successors),
        options=_options(graph, nodes, group_of, n, stage_models, 1 / devices),
        limits=limits,
        values=make_values(entries),
        pinned=pinned,
        kind=kind,
        allow_empty=allow_empty,
        members=members,
    )


def _groups(
    nodes: list[Hashable],
    precedence: nx.DiGraph,
    colocate: Iterable[Collection[Hashable]],
    fixed: Mapping[Hashable, int],
) -> tuple[dict[Hashable, int], tuple[tuple[Hashable, ...], ...]]:
    """Group number of every node, and the nodes of every group, in a topological order of the groups."""
    together = nx.utils.UnionFind(nodes)
    by_stage: dict[int, list[Hashable]] = {}
    for node, stage in fixed.items():
        by_stage.setdefault(stage, []).append(node)
    for alike in (*colocate, *by_stage.values()):
        together.union(*alike)
    # A cycle between groups (a -> b of one group, c -> d back) leaves them no choice but one stage.
    between = nx.DiGraph()
    between.add_nodes_from(together[u] for u in nodes)
    between.add_edges_from((together[u], together[v]) for u, v in precedence.edges)
    pins = [(stage, together[alike[0]]) for stage, alike in sorted(by_stage.items())]
    between.add_edges_from((u, v) for (_, u), (_, v) in itertools.pairwise(pins))
    component = {u: i for i, part in enumerate(nx.strongly_connected_components(between)) for u in part}
    for (s, u), (t, v) in itertools.pairwise(pins):
        if component[u] == component[v]:
            raise InfeasiblePlanError(
                f"node {by_stage[s][0]!r} is pinned to stage {s} and node {by_stage[t][0]!r} to stage {t}, "
                f"but colocation and precedence tie them to one stage, or the other way round; "
                f"pin them to the same stage or drop one of the pins"
            )
    parts: dict[int, list[Hashable]] = {}
    first: dict[int, int] = {}
    for i, u in enumerate(nodes):
        c = component[together[u]]
        parts.setdefault(c, []).append(u)
        first.setdefault(c, i)
    successors: dict[int, set[int]] = {c: set() for c in parts}
    for u, v in between.edges:
        if component[u] != component[v]:
            successors[component[u]].add(component[v])
    waiting = dict.fromkeys(parts, 0)
    for followers in successors.values():
        for c in followers:
            waiting[c] += 1
    ready = [(first[c], c) for c, w in waiting.items() if w == 0]
    heapq.heapify(ready)
    sequence = []
    while ready:
        _, c = heapq.heappop(ready)
        sequence.append(c)
        for d in successors[c]:
            waiting[d] -= 1
            if waiting[d] == 0:
                heapq.heappush(ready, (first[d], d))
    number = {c: i for i, c in enumerate(sequence)}
    group_of = {u: number[component[together[u]]] for u in nodes}
    return group_of, tuple(tuple(parts[c]) for c in sequence)


def _options(
    graph: nx.DiGraph,
    nodes: list[Hashable],
    group_of: Mapping[Hashable, int],
    n: int,
    stage_models: Sequence[Any],
    share: float,
) -> tuple[tuple[Option, ...], ...]:
    """Per-group numbers of every stage's options; equal options become one object."""
    index = np.array([group_of[u] for u in nodes], dtype=np.int64)
    columns: dict[str, Floats] = {}

    def total(weights: Mapping[str, float]) -> Floats:
        out = np.zeros(n)
        for name, weight in weights.items():
            if name not in columns:
                values = np.array([float(graph.nodes[u].get(name, 0.0)) for u in nodes], dtype=np.float64)
                columns[name] = np.bincount(index, weights=values, minlength=n).astype(np.float64)
            out += weight * columns[name]
        return out

    made: dict[Any, tuple[Option, ...]] = {}
    per_stage = []
    for model in stage_models:
        key = tuple(
            (o.label, tuple(o.time.items()), tuple(o.memory.items()), o.input_memory, o.fixed_time)
            for o in model.options
        )
        if key not in made:
            made[key] = tuple(
                Option(
                    o.label,
                    total(o.time),
                    float(o.fixed_time),
                    total(o.memory),
                    float(o.input_memory),
                    share,
                )
                for o in model.options
            )
        per_stage.append(made[key])
    return tuple(per_stage)
