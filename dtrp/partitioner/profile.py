"""What a plan's stages cost, free of graph and model: what a simulation needs, small enough for a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import networkx as nx

from .devices import DeviceSpec
from .links import Links
from .peak import kept_bytes, leaving, pass_peak
from .stage_cost import Recompute, StageCost, stage_costs, tied_weights
from .training import Training


@dataclass(frozen=True)
class StageProfile:
    """One stage and one mini-batch. Seconds on the device that the plan was made for, sizes in bytes.

    Attributes
    ----------
    forward, backward : float
        Seconds of one pass.
    sweep : float
        Seconds to read or write once what trains: an update takes 3 + 2o of them, a prediction 2 + o, with
        o the optimizer's state per parameter.
    loop : float
        Seconds that each slot takes besides, however small it is.
    weights, gradients : int
        Of parameters and buffers; of the parameters that train.
    inputs : int
        Of what arrives, model inputs included.
    activations, kept : int
        What one pass has alive at its fullest moment (without weights, gradients and inputs), and what of
        that stays between forward and backward.
    """

    forward: float
    backward: float
    sweep: float
    loop: float = 0.0
    weights: int = 0
    gradients: int = 0
    inputs: int = 0
    activations: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Message:
    """Bytes per mini-batch from one stage to a later one, and what comes back as their gradient."""

    source: int
    target: int
    bytes: int
    gradient_bytes: int = 0


@dataclass(frozen=True)
class Profile:
    """All stages, what they send each other, and the device that the times hold for.

    Attributes
    ----------
    stages : tuple of StageProfile
    messages : tuple of Message
        At most one per pair of stages.
    bandwidth, latency : float
        Bytes per second and seconds of the links that were planned with.
    overlaps : bool
        Whether a stage computes while it sends and receives.
    cores : float
        How many stages compute at a time, where they share cores; 0: all do.
    net : float or None
        Bytes per second between nodes.
    node_of : tuple of int
        Per stage, its node; empty: all are in one.
    ties : tuple of (int, int, int)
        Two stages that hold the same weights, and these weights' bytes.
    """

    stages: tuple[StageProfile, ...]
    messages: tuple[Message, ...] = ()
    bandwidth: float = float("inf")
    latency: float = 0.0
    overlaps: bool = True
    cores: float = 0.0
    net: float | None = None
    node_of: tuple[int, ...] = ()
    ties: tuple[tuple[int, int, int], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Profile:
        """The inverse of `to_dict`."""
        stages = tuple(StageProfile(**stage) for stage in data["stages"])
        return cls(
            **{
                **data,
                "node_of": tuple(data.get("node_of", ())),
                "ties": tuple(map(tuple, data.get("ties", ()))),
                "stages": stages,
                "messages": tuple(Message(**m) for m in data["messages"]),
            }
        )


def make_profile(
    graph: nx.DiGraph,
    stage_of: Mapping[Any, int],
    n_stages: int,
    *,
    devices: Sequence[int] | None = None,
    node_of: Sequence[int] = (),
    recompute: Sequence[Recompute] = (),
) -> Profile:
    """The profile of an assignment.

    Parameters
    ----------
    graph
        From `cost_graph`.
    stage_of
        Node -> stage, 0-based.
    n_stages
        K.
    devices
        For each stage, which of the graph's devices it runs on. Default: the first.
    node_of
        For each stage, its node. Default: all are in one.
    recompute
        For each stage; of those that recompute in part, that counts as backward.
    """
    specs: Sequence[DeviceSpec] = graph.graph["specs"]
    recompute = [again if isinstance(again, tuple) else True for again in recompute or [True] * n_stages]
    costs = stage_costs(graph, stage_of, recompute, devices=devices, training=Training(0.0))
    sent: dict[tuple[int, int], list[int]] = {}
    for n, data in graph.nodes(data=True):
        for target in {stage_of[user] for user in graph.successors(n)} - {stage_of[n]}:
            if data["transfer_bytes"]:
                pair = sent.setdefault((stage_of[n], target), [0, 0])
                pair[0] += data["transfer_bytes"]
                pair[1] += data["transfer_bytes"] if data["differentiable"] else 0
    return Profile(
        stages=tuple(
            _stage(graph, stage_of, cost, n_stages, again if isinstance(again, tuple) else ())
            for cost, again in zip(costs, recompute, strict=True)
        ),
        messages=tuple(Message(i, j, *sizes) for (i, j), sizes in sorted(sent.items())),
        bandwidth=min(spec.link_bandwidth for spec in specs),
        latency=max(spec.link_latency for spec in specs),
        overlaps=costs[0].overlaps,
        cores=specs[0].shared(n_stages),
        net=graph.graph.get("links", Links()).net,
        node_of=tuple(node_of),
        ties=tuple(tied_weights(graph, stage_of)),
    )


def _stage(
    graph: nx.DiGraph, stage_of: Mapping[str, int], cost: StageCost, n_stages: int, again: Sequence[str]
) -> StageProfile:
    leave = leaving(graph, stage_of, cost.nodes)
    peak, kept = pass_peak(graph, cost.nodes, leave, is_last=cost.stage == n_stages - 1)
    return StageProfile(
        forward=cost.forward,
        backward=cost.backward + (0.0 if cost.recomputes else cost.recompute),
        sweep=cost.update / 3,
        loop=cost.loop,
        weights=int(cost.weights),
        gradients=int(cost.gradients),
        inputs=cost.input_bytes,
        activations=max(peak - int(cost.gradients), 0),
        kept=kept_bytes(graph, cost.nodes, leave, again) if again else kept,
    )
