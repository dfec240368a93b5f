"""The most memory that one pass through a stage has alive: forward with a graph, then backward, node by node.

Followed storage by storage: a value dies after its last reader unless autograd saved it; in the backward pass
what was saved dies with its first saver's backward, while gradients of values come and go and those of
parameters stay. Within a node, what it takes for itself was measured when it ran alone on fake tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import networkx as nx


@dataclass(frozen=True)
class NodeMemory:
    """What a node does to memory; storages are numbers, their sizes are in ``graph.graph["storages"]``."""

    reads: tuple[int, ...]
    makes: tuple[int, ...]
    saves: tuple[int, ...]
    gives: tuple[int, ...]  # storages that its value lies in
    inside: int  # bytes saved that are no value of the graph
    forward_peak: int  # bytes that it makes and has alive at once, its results included
    backward_peak: (
        int  # likewise in backward, with what is left of ``inside`` and the gradients that it gives
    )


def pass_peak(
    graph: nx.DiGraph, nodes: Sequence[str], leaving: Collection[str], *, is_last: bool
) -> tuple[int, int]:
    """Bytes at the fullest moment of a pass, parameter gradients included, and bytes when it turns.

    Parameters
    ----------
    graph
        From `cost_graph`.
    nodes
        The stage's, in the graph's order.
    leaving
        Those of them whose values other stages or the caller get.
    is_last
        Whether the stage computes the loss.

    Returns
    -------
    peak, kept
        Without weights, optimizer state and the stage's inputs. ``kept``: what is alive between forward and
        backward, which is what a stage that keeps its graphs has of every batch in flight.
    """
    size: Mapping[int, int] = graph.graph["storages"]
    memory: list[NodeMemory] = [graph.nodes[n]["memory"] for n in nodes]
    made = {s for m in memory for s in m.makes}
    last_read = {s: i for i, m in enumerate(memory) for s in (*m.makes, *m.reads) if s in made}
    held = {s for n in leaving for s in graph.nodes[n]["memory"].gives}
    saved = {s for m in memory for s in m.saves}
    dies: list[list[int]] = [[] for _ in nodes]
    for s, i in last_read.items():
        if s not in held and s not in saved:
            dies[i].append(s)
    now = peak = 0
    for i, m in enumerate(memory):
        peak = max(peak, now + m.forward_peak)
        now += sum(size[s] for s in m.makes) + m.inside - sum(size[s] for s in dies[i])
        peak = max(peak, now)
    kept = now
    # Gradients that were sent stay until the pass is over, beside what is summed up from users in the stage.
    sent = {n: _gradient(graph, n) for n in leaving}
    now += sum(sent.values())
    if is_last:
        # A loss such as cross entropy keeps a copy of what it is given, and its backward makes another.
        peak = max(peak, now + 2 * sum(sent.values()))
    gradients: dict[str, int] = {}  # of values, by the node that made them
    if is_last:
        gradients, sent = sent, {}
    freed = {
        s: i for i, m in reversed(list(enumerate(memory))) for s in m.saves if s in made and s not in held
    }
    frees: list[list[int]] = [[] for _ in nodes]
    for s, i in freed.items():
        frees[i].append(s)
    for i in range(len(nodes) - 1, -1, -1):
        n, m = nodes[i], memory[i]
        data = graph.nodes[n]
        if n in gradients or n in sent or not data["transfer_bytes"]:
            peak = max(peak, now - m.inside + m.backward_peak)
            now += data["gradient_bytes"]
            for source in graph.predecessors(n):
                if source not in gradients:  # those of other stages' values stay: they go upstream
                    gradients[source] = _gradient(graph, source)
                    now += gradients[source]
            now -= gradients.get(n, 0)
        now -= m.inside + sum(size[s] for s in frees[i])
        peak = max(peak, now)
    return peak, kept


def leaving(graph: nx.DiGraph, stage_of: Mapping[str, int], nodes: Sequence[str]) -> set[str]:
    """Those of a stage's nodes whose values other stages or the caller get."""
    return {
        n
        for n in nodes
        if n in graph.graph["results"]
        or (
            graph.nodes[n]["transfer_bytes"]
            and any(stage_of[user] != stage_of[n] for user in graph.successors(n))
        )
    }


def kept_bytes(
    graph: nx.DiGraph, nodes: Sequence[str], leaving: Collection[str], again: Collection[str] = ()
) -> int:
    """What a stage has of a batch between its forward and its backward pass, as `pass_peak` has it, where
    some nodes are computed ``again``."""
    size: Mapping[int, int] = graph.graph["storages"]
    memory: Mapping[str, NodeMemory] = {n: graph.nodes[n]["memory"] for n in nodes}
    stays = {s for n in leaving for s in memory[n].gives}
    calls = (n for n in nodes if graph.nodes[n]["kind"] != "get_attr")  # a parameter stands anywhere
    for is_again, run in groupby(calls, key=set(again).__contains__):
        members = [memory[n] for n in run]
        own = {s for m in members for s in m.makes}
        stays.update(*(set(m.reads) - own if is_again else m.saves for m in members))
    made = {s for m in memory.values() for s in m.makes}
    inside = sum(memory[n].inside for n in nodes if n not in again)
    return sum(size[s] for s in stays & made) + inside


def _gradient(graph: nx.DiGraph, node: str) -> int:
    data = graph.nodes[node]
    return int(data["transfer_bytes"]) if data["differentiable"] else 0
