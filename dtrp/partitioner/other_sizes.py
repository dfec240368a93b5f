"""What the stages of a plan cost for inputs of other sizes: `PartitionReport.at`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import networkx as nx
import torch

from .capture.fits import Fits
from .capture.graph import Captured
from .costs import cost_graph
from .example import call_arguments

_SCALED = ("forward_time", "backward_time", "transfer_time", "exchange_time")


def graph_at(captured: Captured, graph: nx.DiGraph, sizes: Any) -> nx.DiGraph:
    """The cost graph for other sizes; nothing is computed.

    Where the times in ``graph`` were measured, each node's is scaled as its analytic time is.

    Raises
    ------
    TypeError, ValueError
        As `PartitionReport.at` says.
    """
    tensors = _inputs(captured, sizes)
    Fits(captured).check(tensors, training=True, run=True)
    specs = graph.graph["specs"]
    found = cost_graph(captured, device=specs, bandwidth=graph.graph["links"], inputs=tensors)
    if graph.graph["mode"] != "analytic":
        known = cost_graph(captured, device=specs, bandwidth=graph.graph["links"])
        for node, data in found.nodes(data=True):
            for name in data:
                kind = name.partition("@")[0]
                if kind in _SCALED:
                    before = known.nodes[node][name]
                    data[name] = graph.nodes[node][name] * (data[name] / before if before else 1.0)
                elif kind == "sweep_time":
                    data[name] = graph.nodes[node][name]
        found.graph["mode"] = graph.graph["mode"]
    nx.set_node_attributes(found, dict(graph.nodes(data="stage")), "stage")
    return found


def _inputs(captured: Captured, sizes: Any) -> list[torch.Tensor]:
    """The model's tensor inputs with these sizes, without data."""
    signature = captured.signature
    placeholders = captured.train.module.graph.find_nodes(op="placeholder")
    example = dict(zip(signature.tensor_names, (n.meta["val"] for n in placeholders), strict=True))
    if isinstance(sizes, Mapping) and all(map(_is_shape, sizes.values())):
        if unknown := [name for name in sizes if name not in example]:
            raise ValueError(
                f"the model has no tensor input {unknown[0]!r}; its inputs are "
                f"{', '.join(f'{n!r} {tuple(t.shape)}' for n, t in example.items())}"
            )
        shapes = [tuple(sizes.get(name, t.shape)) for name, t in example.items()]
        dtypes = [t.dtype for t in example.values()]
    else:
        given = signature.flatten(*call_arguments(sizes))
        shapes, dtypes = [tuple(t.shape) for t in given], [t.dtype for t in given]
    return [torch.empty(s, dtype=d, device="meta") for s, d in zip(shapes, dtypes, strict=True)]


def _is_shape(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(type(n) is int and n >= 0 for n in value)
