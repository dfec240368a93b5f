"""Joins what planning needs: the cost graph, the rules for cutting, what stages cost, and the solver."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import networkx as nx

from dtrp.errors import InfeasiblePlanError
from dtrp.partitioner.capture.graph import Captured
from dtrp.partitioner.devices import DeviceSpec, parse_bytes
from dtrp.partitioner.fit import Choice, Fit, Fitted, Limits
from dtrp.partitioner.hazards import Hazards
from dtrp.partitioner.links import Links
from dtrp.partitioner.partition import DeviceClass, Partition, partition
from dtrp.partitioner.plan import Plan, fingerprint
from dtrp.partitioner.profile import make_profile
from dtrp.partitioner.stage_cost import overlaps, transfer_attribute
from dtrp.partitioner.stage_models import stage_models
from dtrp.partitioner.training import ASSUMED, Training

log = logging.getLogger(__name__)

USABLE_MEMORY = 0.9
"""The share of a device's memory that a plan may fill; the rest is for the allocator and the libraries."""


def make_plan(
    captured: Captured,
    graph: nx.DiGraph,
    hazards: Hazards,
    n_stages: int,
    *,
    devices: Sequence[DeviceSpec] | None = None,
    memory_limit: float | str | Sequence[float | str | None] | None = None,
    recompute: bool | str | Sequence[bool] = "auto",
    training: Training = ASSUMED,
    time_limit: float = 5.0,
) -> Plan:
    """The plan with the smallest tick time that fits the memory.

    Parameters
    ----------
    captured, graph, hazards
        The model, its cost graph (each node's ``stage`` is set here) and the rules for cutting it.
    n_stages
        K.
    devices
        What each stage runs on, one for each stage. Default: all on the graph's first device.
    memory_limit
        Bytes or text such as ``"16GB"``; one for all or one per stage. ``None``: what the device has; a
        plan that does not fit there is still made, with as little memory as recomputation allows, and says
        so in the log.
    recompute
        ``True``, ``False``, ``"auto"`` or one truth value per stage.
    training
        How it will go.
    time_limit
        For `dtrp.partitioner.partition.partition`.

    Raises
    ------
    InfeasiblePlanError
        The memory limit cannot be met.
    ValueError
        A wrong argument, such as more stages than there are nodes to share out.
    """
    specs: Sequence[DeviceSpec] = graph.graph["specs"]
    index = device_indices(graph, devices, n_stages)
    limits = memory_limits(memory_limit, n_stages)
    groups, order = _of_graph(graph, hazards)

    def attempt(choice: Choice, limit: Limits) -> Partition:
        return solve(
            graph,
            n_stages,
            groups=groups,
            order=order,
            recompute=choice,
            devices=index,
            memory_limit=limit,
            training=training,
            time_limit=time_limit,
        )

    fit = Fit(captured, graph, index, training, recompute, attempt)
    try:
        result, again = fit.into(limits or default_limits([specs[i] for i in index]))
    except InfeasiblePlanError as e:
        if limits is not None:
            raise
        log.warning("no plan fits the devices' memory; planning without that limit. %s", e)
        most = True if recompute == "auto" else recompute
        result, again = Fitted.as_solved(attempt(most, [None] * n_stages))
    edges = [(u, v) for u, v, data in graph.edges(data=True) if data.get("precedence", True)]
    plan = Plan(
        n_stages=n_stages,
        stage_of={str(n): result.stage_of[n] for n in graph},
        recompute=again,
        fingerprint=fingerprint(captured),
        modules=dict(graph.nodes(data="module")),
        edges=tuple(dict.fromkeys([*edges, *order])),
        groups=_merged(groups),
        lower_bound=result.lower_bound,
        engine=result.engine,
        reason=result.reason,
        costs=cost_digest(graph, training),
        node_of=result.node_of,
        opened=captured.opened,
        divided=captured.divided,
        profile=make_profile(
            graph, result.stage_of, n_stages, devices=index, node_of=result.node_of, recompute=again
        ),
    )
    nx.set_node_attributes(graph, dict(plan.stage_of), "stage")
    return plan


def solve(
    graph: nx.DiGraph,
    n_stages: int,
    *,
    groups: Iterable[Collection[str]],
    order: Iterable[tuple[str, str]],
    fixed: Mapping[Hashable, int] | None = None,
    recompute: bool | str | Sequence[bool] = "auto",
    devices: Sequence[int] | None = None,
    memory_limit: Sequence[float | None] | None = None,
    training: Training = ASSUMED,
    time_limit: float = 5.0,
) -> Partition:
    """The best partition of a cost graph under the costs of stages; arguments as for `make_plan`."""
    specs: Sequence[DeviceSpec] = graph.graph["specs"]
    models = stage_models(
        n_stages,
        recompute=recompute,
        devices=devices,
        memory_limit=memory_limit,
        training=training,
        specs=[specs[i] for i in devices or [0] * n_stages],
    )
    overlapping = overlaps(graph, devices)
    links: Links = graph.graph.get("links", Links())
    transfer = transfer_attribute(overlapping)
    return partition(
        graph,
        n_stages,
        transfer=transfer,
        far=f"net_{transfer}",
        nodes=links.count(n_stages),
        per_node=links.per_node,
        overlap=overlapping,
        size="transfer_bytes",
        stage_models=models,
        colocate=[group for group in groups if len(group) > 1],
        order=order,
        fixed=fixed,
        time_limit=time_limit,
    )


def nodes_of(graph: nx.DiGraph, plan: Plan, devices: Sequence[int]) -> tuple[int, ...]:
    """The best nodes for the stages of a plan that stands."""
    if graph.graph.get("links", Links()).count(plan.n_stages) == 1:
        return ()
    fixed: dict[Hashable, int] = {n: plan.stage_of[n] for n in graph}
    again = plan.recomputes
    return solve(
        graph, plan.n_stages, groups=(), order=(), fixed=fixed, recompute=again, devices=devices
    ).node_of


def arrange(
    graph: nx.DiGraph,
    hazards: Hazards,
    devices: Sequence[DeviceSpec],
    memory_limit: Any,
    recompute: bool | str | Sequence[bool],
    training: Training = ASSUMED,
    *,
    time_limit: float = 5.0,
) -> tuple[int, ...]:
    """Which device each stage should have, by its place in ``devices``; empty: they are all alike.

    Memory limits that are given one by one go with the devices. Exact, for up to four kinds of devices, as
    far as time allows (`dtrp.partitioner.solvers.devices`).
    """
    k = len(devices)
    index = device_indices(graph, devices, k)
    if len(set(index)) == 1:
        return ()
    limits = memory_limits(memory_limit, k) or default_limits(devices)
    kinds = list(dict.fromkeys(zip(index, limits, strict=True)))
    specs: Sequence[DeviceSpec] = graph.graph["specs"]
    classes = [
        DeviceClass(
            sum(kind == mine for mine in zip(index, limits, strict=True)),
            tuple(
                stage_models(
                    k,
                    recompute=recompute,
                    devices=[kind[0]] * k,
                    memory_limit=[kind[1]] * k,
                    training=training,
                    specs=[specs[kind[0]]] * k,
                )
            ),
        )
        for kind in kinds
    ]
    overlapping, (groups, order) = overlaps(graph, index), _of_graph(graph, hazards)
    try:
        found = partition(
            graph,
            k,
            transfer=transfer_attribute(overlapping),
            overlap=overlapping,
            size="transfer_bytes",
            classes=classes,
            colocate=[group for group in groups if len(group) > 1],
            order=order,
            time_limit=time_limit,
        )
    except InfeasiblePlanError as e:
        log.warning("no order of the devices has room for the model, they stay in the order given: %s", e)
        return ()
    places = [[i for i, mine in enumerate(zip(index, limits, strict=True)) if mine == kind] for kind in kinds]
    return tuple(places[c].pop(0) for c in found.class_of)


def _of_graph(graph: nx.DiGraph, hazards: Hazards) -> tuple[list[set[str]], list[tuple[str, str]]]:
    """Which of a graph's nodes stay together, and which come first."""
    groups = [set(group) & set(graph) for group in hazards.groups] + _parameters_with_their_users(graph)
    return groups, [(u, v) for u, v in hazards.order if u in graph and v in graph]


def cost_digest(graph: nx.DiGraph, training: Training = ASSUMED) -> str:
    """Identifies the times that a plan was made under: bounds hold for these only."""
    digest = hashlib.sha256(b"" if training == ASSUMED else repr(training).encode())
    for n, data in graph.nodes(data=True):
        times = [value for key, value in data.items() if "_time" in key]
        digest.update(json.dumps([n, times]).encode())
    return digest.hexdigest()[:16]


def device_indices(graph: nx.DiGraph, devices: Sequence[DeviceSpec] | None, n_stages: int) -> list[int]:
    """For each stage, which of the cost graph's devices it runs on."""
    specs: Sequence[DeviceSpec] = graph.graph["specs"]
    if devices is None:
        return [0] * n_stages
    if len(devices) != n_stages:
        raise ValueError(f"{len(devices)} devices for {n_stages} stages; give one device per stage")
    names = [spec.name for spec in specs]
    unknown = [spec.name for spec in devices if spec.name not in names]
    if unknown:
        raise ValueError(f"the cost graph has no times for {unknown[0]!r}, only for {', '.join(names)}")
    return [names.index(spec.name) for spec in devices]


def memory_limits(
    limit: float | str | Sequence[float | str | None] | None, n_stages: int
) -> list[float | None] | None:
    """A limit in bytes for each stage; ``None`` if the user gave none."""
    if limit is None:
        return None
    if isinstance(limit, (int, float, str)):
        return [float(parse_bytes(limit))] * n_stages
    if len(limit) != n_stages:
        raise ValueError(f"{len(limit)} memory limits for {n_stages} stages; give one, or one per stage")
    return [None if value is None else float(parse_bytes(value)) for value in limit]


def default_limits(devices: Sequence[DeviceSpec]) -> list[float | None]:
    """What the devices have: CUDA stages have one each, CPU stages share the machine's memory."""
    on_cpu = sum(spec.kind == "cpu" for spec in devices)
    return [spec.memory_bytes * USABLE_MEMORY / (on_cpu if spec.kind == "cpu" else 1) for spec in devices]


def _parameters_with_their_users(graph: nx.DiGraph) -> list[set[str]]:
    """A parameter that the graph reads by name goes where it is first used; later users have it too."""
    groups = []
    for node, data in graph.nodes(data=True):
        users = list(graph.successors(node))
        if data["kind"] == "get_attr" and users:
            position = {n: i for i, n in enumerate(graph)} if len(users) > 1 else {}
            groups.append({node, min(users, key=lambda u: position.get(u, 0))})
    return groups


def _merged(groups: Sequence[set[str]]) -> tuple[tuple[str, ...], ...]:
    """Groups that overlap, as one."""
    together = nx.Graph()
    for group in groups:
        nx.add_path(together, sorted(group))
    return tuple(tuple(sorted(part)) for part in nx.connected_components(together) if len(part) > 1)
