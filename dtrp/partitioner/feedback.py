"""What a run measured, put back into the cost graph: planning again then knows the machine as it is (ours).

Stages are what can be measured, nodes are what can be moved. So each stage's real times scale the costs of
its own nodes: what one node costs in relation to its neighbours stays an estimate, the sums become true. A
node keeps its scale when it goes to another stage; where that was wrong (a slow device, not a heavy node) the
next look says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import networkx as nx

from .plan import Plan
from .stage_cost import StageCost, stage_costs
from .training import Training


class StageTimes(NamedTuple):
    """Seconds per batch of one stage, measured; ``forward`` of one pass, ``loss`` of the last stage's."""

    forward: float
    backward: float
    update: float
    transfer: float
    loop: float
    loss: float = 0.0


def corrected(
    graph: nx.DiGraph,
    plan: Plan,
    times: Sequence[StageTimes],
    training: Training,
    devices: Sequence[int] | None = None,
) -> tuple[nx.DiGraph, Training]:
    """The cost graph and the training under which the plan's stages take what was measured.

    Parameters
    ----------
    graph, plan, training, devices
        What the stages were planned by; nothing of it is changed.
    times
        What each of them takes.
    """
    found = graph.copy()
    nodes_only = replace(training, loss_time=0.0)
    costs = stage_costs(graph, plan.stage_of, plan.recompute, devices=devices, training=nodes_only)
    extra = 0.0
    for cost, measured in zip(costs, times, strict=True):
        scale = _scales(cost, measured)
        extra += (measured.loop - scale["sweep_time"] * cost.prediction) / len(costs)
        for node in cost.nodes:
            data = found.nodes[node]
            for name in data:
                kind = name.partition("@")[0]
                if kind in scale:
                    data[name] *= scale[kind]
    moved = _ratio(sum(t.transfer for t in times), sum(cost.transfer for cost in costs))
    for _, data in found.nodes(data=True):
        data["transfer_time"] *= moved
        data["exchange_time"] *= moved
    overhead = max(0.0, extra) / training.micro_batches
    known = {"tick_overhead": overhead, "parts": training.micro_batches}
    found.graph["specs"] = tuple(replace(spec, **known) for spec in graph.graph["specs"])
    found.graph["mode"] = "corrected by the run"
    return found, replace(training, loss_time=2 * times[-1].loss)  # there and back


def _scales(cost: StageCost, measured: StageTimes) -> Mapping[str, float]:
    forward, backward = measured.forward - measured.loss, measured.backward - measured.loss
    return {
        "forward_time": _ratio(forward, cost.forward),
        "backward_time": _ratio(backward, cost.backward + (0.0 if cost.recomputes else cost.recompute)),
        "sweep_time": _ratio(measured.update, cost.update),
    }


def _ratio(measured: float, predicted: float) -> float:
    return measured / predicted if measured > 0 and predicted > 0 else 1.0
