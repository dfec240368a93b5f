"""Modules that take too large a share of a stage's time to stand in the graph as one node."""

from __future__ import annotations

import math

import networkx as nx

from .capture import Captured, divisible


def heavy_wholes(captured: Captured, graph: nx.DiGraph, n_stages: int) -> list[str]:
    """Modules that were kept whole and take more than a stage's even share."""
    shares = _shares(graph, n_stages)
    return sorted({kept.module for kept in captured.kept_whole if shares.get(kept.module, 0.0) > 1})


def heavy_linears(captured: Captured, graph: nx.DiGraph, n_stages: int, least: float = 0.5) -> dict[str, int]:
    """Linear layers that take more than ``least`` of a stage's even share, and in how many parts to compute
    each (`capture.in_parts`), so that none takes more than a third of one."""
    return {
        module: math.ceil(3 * share)
        for module, share in _shares(graph, n_stages).items()
        if share > least and divisible(captured.model.get_submodule(module))
    }


def advice(captured: Captured, graph: nx.DiGraph, n_stages: int) -> list[str]:
    """What to try where Linear layers bound the tick."""
    heavy = heavy_linears(captured, graph, n_stages, 1.0) if n_stages > 1 else {}
    return [
        f"{name} takes more than a stage's share of the time by itself; with split_linear=True stages can "
        f"share it, if that makes a tick shorter."
        for name in heavy
    ]


def _shares(graph: nx.DiGraph, n_stages: int) -> dict[str, float]:
    """Of each module that stands as one node: its most expensive call, in even shares of a stage."""
    seconds = {node: d["forward_time"] + d["backward_time"] for node, d in graph.nodes(data=True)}
    even = sum(seconds.values()) / n_stages or math.inf
    shares: dict[str, float] = {}
    for node, data in graph.nodes(data=True):
        if data["kind"] == "call_module":
            shares[data["module"]] = max(shares.get(data["module"], 0.0), seconds[node] / even)
    return shares
