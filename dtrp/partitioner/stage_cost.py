"""What a stage costs per tick, in time and in memory.

With F and B the forward and backward time of a stage's nodes, P its parameters' bytes, G those of them that
train (each has a gradient), A what autograd keeps, I its inputs, o the optimizer's bytes per parameter
byte, and K - k stages behind stage k:

==========================  =======================================  ======================================
stage                       time per tick                            memory
==========================  =======================================  ======================================
k < K, recomputing          2F + B + update + predictions            P + G(1+o) (+ G) + 2(K-k) I + A
k < K, keeping its graphs   F + B + update + prediction              P + G(1+o) + 2(K-k) (G + I + A)
k = K                       F + B + update (+ prediction)            P + G(1+o) (+ G) + I + A
==========================  =======================================  ======================================

A stage that keeps its graphs may compute some of its nodes again all the same (`partly`): their F counts
twice, and of batches in flight it keeps what the others do.

2(K-k) batches are in flight when stage k begins its backward pass, the one that is passed back included; the
next one comes when that is done.

Gradients of tied weights are sent and received, too; the solver does not see them, so that a plan of stages
that share a weight may take a little longer than it counted on, and than its bound says.

Sending and receiving overlap with computing where a device can do that: the tick is then the longest of
computing, receiving and sending. On the CPU the same cores do all three, so that they add up, gradients on
their way back included (`overlaps`).

Planning adds up the memory as in the table; `stage_costs` simulates G + A instead, storage by storage (see
`pass_peak`). The G in brackets is a copy for predicted weights, which a stage that predicts keeps for good.
A counts no stage inputs (they are I), so a stage that keeps its graphs has both. An update sweeps over the
trainable parameters 3 + 2o times (weight, gradient and state read, weight and state written), a prediction
2 + o times (weight and state read, prediction written).

`stage_costs` evaluates a given assignment exactly (parameters that several stages hold, inputs that several
nodes read), which is what the report shows; stage_models.py has the same as weights for planning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx

from dtrp.partitioner.devices import DeviceSpec
from dtrp.partitioner.peak import kept_bytes, pass_peak
from dtrp.partitioner.training import ASSUMED, Training

RECOMPUTE, KEEP, LAST, PARTLY = "recompute", "keep", "last", "partly"

Recompute = bool | tuple[str, ...]
"""Whether a stage recomputes its forward pass, or the names of the nodes of which alone it does."""


def predictions(k: int, n_stages: int, *, recompute: bool, training: Training) -> int:
    """How many passes of stage ``k`` (0-based) in a tick run on predicted weights.

    With the common horizon, a recomputing stage predicts for its first forward and, unless it is the first
    stage (whose backward is the moment that all aim at), for the recomputation; the last stage predicts for
    its only pass. With the stage's own horizon, only first forwards are predicted.
    """
    last = k == n_stages - 1
    if not training.predicts or n_stages == 1:
        return 0
    if training.horizon == "stage":
        return 0 if last else 1
    return 1 if last or not recompute or k == 0 else 2


def copies_of(passes: int, *, recomputes: bool, is_last: bool) -> int:
    """How many sets of predicted weights a stage holds; one that keeps its graphs has stashed them."""
    return int(passes > 0 and (recomputes or is_last))


def average_seconds(gradient_bytes: float, devices: int, spec: DeviceSpec) -> float:
    """Until all devices of a stage have the sum of their gradients, by a ring; once per batch."""
    return 2 * (1 - 1 / devices) * gradient_bytes / spec.link_bandwidth


def overlaps(graph: nx.DiGraph, devices: Sequence[int] | None = None) -> bool:
    """Whether the pipeline computes while it sends and receives: not if any of its stages is on the CPU.

    The solver knows one rule for all stages; of a pipeline over both kinds of device, this one says too much
    rather than too little.
    """
    specs: Sequence[DeviceSpec] = graph.graph["specs"]
    return all(specs[i].overlaps for i in set(devices or [0]))


def transfer_attribute(overlapping: bool) -> str:
    """The node attribute with the seconds that a value on a cut takes."""
    return "transfer_time" if overlapping else "exchange_time"


@dataclass(frozen=True)
class StageCost:
    """What one stage costs: seconds per tick and bytes, and what they are made of.

    Attributes
    ----------
    forward, recompute, backward, update, prediction, loop : float
        Seconds of each part of a tick; ``loop`` is what the runtime itself takes, and what the batch's parts
        cost besides computing: launches, weights read again, messages.
    slot : float
        Seconds that one more part costs.
    average : float
        Seconds until the stage's devices have the sum of their gradients; all else is of one of them.
    time_in, time_out : float
        Seconds for the values that arrive and for those that leave. Where ``overlaps``, of one direction:
        gradients take as long, the other way at the same time. Else there and back.
    overlaps : bool
        Whether the stage computes while it sends and receives.
    weights, gradients, tied, optimizer, copies, stashed_inputs, stashed_weights, activations : float
        Bytes: parameters and buffers; their gradients; those of tied weights on their way; the optimizer's
        state; predicted weights; inputs of batches in flight; weight versions and further graphs of batches
        in flight, without recomputation.
    input_bytes, output_bytes : int
        Of one batch: what arrives (model inputs too) and what leaves to later stages.
    """

    stage: int
    nodes: tuple[str, ...] = field(repr=False)
    recomputes: bool
    forward: float
    recompute: float
    backward: float
    update: float
    prediction: float
    loop: float
    slot: float
    average: float
    time_in: float
    time_out: float
    overlaps: bool
    weights: float
    gradients: float
    tied: float
    optimizer: float
    copies: float
    stashed_inputs: float
    stashed_weights: float
    activations: float
    flops: int
    backward_flops: int
    params: int
    params_bytes: int
    activation_bytes: int
    input_bytes: int
    output_bytes: int

    @property
    def compute(self) -> float:
        """Seconds of a tick in which the device computes."""
        passes = self.forward + self.recompute + self.backward
        return passes + self.update + self.prediction + self.loop + self.average

    @property
    def tick(self) -> float:
        """Seconds of a tick."""
        return self.compute + self.transfer if not self.overlaps else max(self.compute, self.transfer)

    @property
    def transfer(self) -> float:
        """Seconds of a tick in which the stage sends or receives."""
        return max(self.time_in, self.time_out) if self.overlaps else self.time_in + self.time_out

    @property
    def peak(self) -> float:
        """Bytes at the fullest moment."""
        return (
            self.weights
            + self.gradients
            + self.tied
            + self.optimizer
            + self.copies
            + self.stashed_inputs
            + self.stashed_weights
            + self.activations
        )


def stage_costs(
    graph: nx.DiGraph,
    stage_of: Mapping[str, int],
    recompute: Sequence[Recompute],
    *,
    devices: Sequence[int] | None = None,
    training: Training = ASSUMED,
    node_of: Sequence[int] = (),
) -> list[StageCost]:
    """What each stage of a given assignment costs.

    Parameters
    ----------
    graph
        From `cost_graph`.
    stage_of
        Node -> stage, 0-based.
    recompute
        Per stage, whether it does, or the names of the nodes that alone do; its length is the number of
        stages.
    devices, training
        As for `stage_models`.
    node_of
        Per stage, its node; between two, values take the graph's ``net_`` times.
    """
    n_stages = len(recompute)
    overlapping = overlaps(graph, devices)
    specs: Sequence[DeviceSpec] = graph.graph["specs"]
    nodes: list[list[str]] = [[] for _ in range(n_stages)]
    arriving: list[dict[str, float]] = [{} for _ in range(n_stages)]  # with what it takes
    leaving: list[dict[str, float]] = [{} for _ in range(n_stages)]
    attribute = transfer_attribute(overlapping)
    for node, data in graph.nodes(data=True):
        stage = stage_of[node]
        nodes[stage].append(node)
        for target in {stage_of[user] for user in graph.successors(node)} - {stage}:
            if data["transfer_bytes"]:
                far = bool(node_of) and node_of[stage] != node_of[target] and f"net_{attribute}" in data
                seconds = data[f"net_{attribute}" if far else attribute]
                leaving[stage][node] = max(seconds, leaving[stage].get(node, 0.0))
                arriving[target][node] = seconds
    ties = tied_weights(graph, stage_of)
    return [
        _evaluate(
            graph,
            k,
            n_stages,
            nodes[k],
            arriving[k],
            leaving[k],
            recompute[k] if k < n_stages - 1 and (training.recompute or recompute[k] is not True) else False,
            training.tied_bytes(k, ties),
            [(owner == k, size) for owner, guest, size in ties if k in (owner, guest)],
            suffix_of(0 if devices is None else devices[k]),
            overlapping,
            training,
            specs[0 if devices is None else devices[k]],
        )
        for k in range(n_stages)
    ]


def tied_weights(graph: nx.DiGraph, stage_of: Mapping[Any, int]) -> list[tuple[int, int, int]]:
    """Of parameters that train and that several stages hold: the first of these, another one, bytes."""
    holders: dict[str, set[int]] = {}
    for node, names in graph.nodes(data="params"):
        for name in graph.graph["trainable"].intersection(names):
            holders.setdefault(name, set()).add(stage_of[node])
    found: Counter[tuple[int, int]] = Counter()
    for name, stages in holders.items():
        owner, *guests = sorted(stages)
        for guest in guests:
            found[owner, guest] += graph.graph["params"][name][1]
    return [(owner, guest, size) for (owner, guest), size in sorted(found.items())]


def _evaluate(
    graph: nx.DiGraph,
    k: int,
    n_stages: int,
    nodes: Sequence[str],
    arriving: Mapping[str, float],
    leaving: Mapping[str, float],
    recompute: Recompute,
    tied: float,
    ties: Sequence[tuple[bool, int]],
    suffix: str,
    overlapping: bool,
    training: Training,
    spec: DeviceSpec,
) -> StageCost:
    def total(attribute: str, of: Iterable[str] = nodes) -> float:
        return float(sum(graph.nodes[n][attribute] for n in of))

    recomputes = recompute is True
    named = set(recompute) if isinstance(recompute, tuple) else set()
    twice = nodes if recomputes else [n for n in nodes if n in named]
    optimizer_bytes, last, devices = training.optimizer_bytes, k == n_stages - 1, training.devices(k)
    parts, share = training.micro_batches, 1 / devices
    passes = predictions(k, n_stages, recompute=recomputes, training=training)
    in_flight = training.in_flight(k, n_stages)
    held = {name for n in nodes for name in graph.nodes[n]["params"]}
    sizes: Mapping[str, tuple[int, int]] = graph.graph["params"]
    params_bytes = sum(sizes[name][1] for name in held)
    gradients = sum(sizes[name][1] for name in held & graph.graph["trainable"])
    inputs: dict[str, int] = {}
    for n in nodes:
        inputs |= graph.nodes[n]["model_inputs"]
    input_bytes = int(total("transfer_bytes", arriving)) + sum(inputs.values())
    forward, sweep = share * total(f"forward_time{suffix}"), total(f"sweep_time{suffix}")
    prediction = passes * (2 + optimizer_bytes) * sweep
    runs = 2 if recomputes else 1
    launches = total("forward_ops") + total("forward_ops", twice) + total("backward_ops")
    swept = runs * params_bytes + 3 * gradients  # weights are read, gradients added to
    again = launches * spec.launch_overhead + swept / spec.memory_bandwidth
    if not overlapping:  # each part is a message of its own
        returns = graph.nodes(data="differentiable")
        again += spec.link_latency * sum(2 if returns[n] else 1 for n in (*arriving, *leaving))
        again += sum(spec.transfer_time(size) for _, size in ties) / share
    # A guest sends the gradient of each part, the owner their sum once.
    gradient = parts if overlapping else 1
    arrives = sum(spec.transfer_time(size) * (gradient if owns else 1) for owns, size in ties)
    leaves = sum(spec.transfer_time(size) * (1 if owns else gradient) for owns, size in ties)
    loss = share * training.loss_time / 2 if last else 0.0
    results = {n for n in nodes if n in graph.graph["results"]}
    peak, kept = pass_peak(graph, nodes, leaving.keys() | results, is_last=last)
    activations = max(peak - gradients, 0) / parts
    if not recomputes:
        if twice:
            kept = kept_bytes(graph, nodes, leaving.keys() | results, twice)
        activations += kept * max(in_flight - 1 / parts, 0)
    return StageCost(
        stage=k,
        nodes=tuple(nodes),
        recomputes=recomputes,
        forward=forward + loss,
        recompute=share * total(f"forward_time{suffix}", twice),
        backward=share * total(f"backward_time{suffix}") + loss,
        update=(3 + 2 * optimizer_bytes) * sweep,
        prediction=prediction,
        loop=share * (spec.tick_overhead * max(parts, spec.parts) + again * max(0, parts - spec.parts)),
        slot=share * (spec.tick_overhead + again),
        average=average_seconds(gradients, devices, spec),
        time_in=share * sum(arriving.values()) + arrives,
        time_out=share * sum(leaving.values()) + leaves,
        overlaps=overlapping,
        weights=params_bytes + total("buffer_bytes"),
        gradients=gradients,
        tied=tied,
        optimizer=optimizer_bytes * gradients,
        copies=gradients * copies_of(passes, recomputes=recomputes, is_last=last),
        stashed_inputs=max(in_flight, 1 / parts) * input_bytes,
        stashed_weights=training.versions(k, n_stages, recompute=recomputes) * gradients,
        activations=activations,
        flops=int(total("flops")),
        backward_flops=int(total("backward_flops")),
        params=sum(sizes[name][0] for name in held),
        params_bytes=params_bytes,
        activation_bytes=int(total("activation_bytes")),
        input_bytes=input_bytes,
        output_bytes=int(total("transfer_bytes", leaving)),
    )


def suffix_of(device: int) -> str:
    return f"@{device}" if device else ""
