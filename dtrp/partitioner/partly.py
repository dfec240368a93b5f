"""Which nodes of a stage that keeps its graphs are computed again in the backward pass (ours).

Where memory only just lacks, a stage need not recompute all of its forward pass: a run of neighbouring nodes
keeps nothing but its inputs, and is computed again when its gradients come, on the same weights and with the
same random numbers (activation checkpointing, Chen et al. 2016, "Training deep nets with sublinear memory
cost"). The rest of the stage keeps its graph, so that results are those of a stage that keeps all.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from itertools import accumulate

import networkx as nx
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dtrp.partitioner.capture.graph import Captured
from dtrp.partitioner.capture.operators import Access
from dtrp.partitioner.hazards import is_foreign
from dtrp.partitioner.partition import Partition
from dtrp.partitioner.peak import kept_bytes, leaving
from dtrp.partitioner.stage_cost import Recompute, StageCost
from dtrp.partitioner.training import Training

_CALLS = ("call_function", "call_method", "call_module")

_TRIES = 20  # runs of nodes that are looked at closely


def as_needed(
    captured: Captured,
    graph: nx.DiGraph,
    result: Partition,
    keeping: Sequence[StageCost],
    limits: Sequence[float | None],
    training: Training,
) -> tuple[Recompute, ...]:
    """What each stage of a partition computes again, so that its memory is enough; all where no part is.

    ``keeping``: what the stages cost if they keep their graphs.
    """
    stage_of = {str(n): result.stage_of[n] for n in graph}
    found: list[Recompute] = []
    for cost, limit in zip(keeping, limits, strict=True):
        graphs = training.in_flight(cost.stage, result.n_stages) - 1 / training.micro_batches
        excess = 0.0 if limit is None else max(cost.peak - limit, 0.0)
        again: Recompute = excess > 0 and cost.stage < result.n_stages - 1
        if again and graphs > 0:
            leave = leaving(graph, stage_of, cost.nodes)
            again = cheapest(captured, graph, cost.nodes, leave, excess / graphs) or True
        found.append(again)
    return tuple(found)


def cheapest(
    captured: Captured, graph: nx.DiGraph, nodes: Sequence[str], leaving: Collection[str], need: float
) -> tuple[str, ...]:
    """The neighbours among a stage's nodes that are soonest computed again, of those that keep ``need`` bytes
    of a batch less if they are; none if there are no such."""
    able = repeatable(captured, nodes)
    kept = kept_bytes(graph, nodes, leaving)
    data = [graph.nodes[n] if n in able else {"kept_bytes": 0, "forward_time": 0.0} for n in nodes]
    saved = list(accumulate((d["kept_bytes"] for d in data), initial=0))
    spent = list(accumulate((d["forward_time"] for d in data), initial=0.0))
    ends = ((start, bisect_left(saved, saved[start] + need)) for start in range(len(nodes)))
    runs = sorted((spent[end] - spent[start], start, end) for start, end in ends if end <= len(nodes))
    found: list[tuple[float, tuple[str, ...]]] = []
    for _, start, end in runs[:_TRIES]:
        while end <= len(nodes):  # their inputs stay, so that it may take some more
            again = tuple(n for n in nodes[start:end] if n in repeatable(captured, nodes[start:end]))
            if kept - kept_bytes(graph, nodes, leaving, again) >= need:
                found.append((sum(graph.nodes[n]["forward_time"] for n in again), again))
                break
            end += 1 + len(nodes) // 50
    return min(found, default=(0.0, ()))[1]


def repeatable(captured: Captured, among: Collection[str]) -> set[str]:
    """Those of these nodes that do the same again: that change nothing that anything else sees."""
    root, walk = captured.train.module, captured.train.walk
    accesses = {access.node.name: access for access in walk.accesses}
    nodes = {n: accesses[n].node for n in among if n in accesses}
    found = {n for n, node in nodes.items() if node.op in _CALLS and not is_foreign(node, root)}
    found -= {
        n for n in found if accesses[n].writes & walk.state and not keeps_statistics(accesses[n].node, root)
    }
    written = {
        s
        for access in accesses.values()
        for s in access.writes
        if s not in walk.state or not keeps_statistics(access.node, root)
    }
    while True:  # what is written has to be made, written and read in here alone
        others = {s for name, access in accesses.items() if name not in found for s in _touched(access)}
        seen = {n for n in found if _touched(accesses[n]) & written & others}
        if not seen:
            return found
        found -= seen


def keeps_statistics(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node is a batch norm, whose statistics are not to be updated twice."""
    if node.op == "call_module":
        return isinstance(root.get_submodule(str(node.target)), _BatchNorm)
    return node.target is F.batch_norm


def _touched(access: Access) -> set[int]:
    return access.reads | access.makes | access.writes
