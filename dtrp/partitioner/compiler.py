"""The compiler's pipe, from model to stages: capture -> hazards -> costs -> plan -> split -> report."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import networkx as nx
import torch
from torch import nn

from ..errors import CaptureError, DtrpError, PlanMismatchError
from .align import align
from .calibration import available_cores
from .capture import Captured, capture
from .costs import cost_graph
from .devices import DeviceSpec, LoopCost, device_spec
from .hazards import Hazards, find_hazards
from .heavy import heavy_linears, heavy_wholes
from .links import Links
from .other_sizes import graph_at
from .plan import Plan, fingerprint
from .planner import arrange, device_indices, make_plan, nodes_of
from .profile import make_profile
from .report import PartitionReport
from .split import Split, split
from .training import ASSUMED, Training

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What the user asked `dtrp.compile` for."""

    devices: tuple[torch.device, ...]
    memory_limit: Any
    recompute: bool | Literal["auto"]
    costs: str
    links: Links
    plan: Plan | None
    training: Training = ASSUMED
    loop: LoopCost | None = None
    split_linear: bool = False
    speed: tuple[float, ...] = ()  # of each device; empty: as they are
    arranged: bool = False  # the order of devices is that of the stages
    placement: tuple[int, ...] = ()  # which of the devices that the user gave each stage then has
    groups: tuple[tuple[torch.device, ...], ...] = ()  # all devices of each stage, where some have several
    named: str = ""  # the devices are not here: all are of this kind
    dtype: torch.dtype | None = None  # of autocast, where that is known
    spread: bool = False  # fewer stages may have several devices each; decided once the stages are planned

    @property
    def replicas(self) -> tuple[int, ...]:
        """How many devices each stage has; empty: one each."""
        return tuple(map(len, self.groups))

    def specs(self) -> list[DeviceSpec]:
        """What the devices can do, with their links, one entry per stage."""
        n = sum(self.replicas) or len(self.devices)
        specs = device_specs(self.devices, self.loop, n, self.named)
        specs = [spec.with_link(self.links.node) for spec in specs]
        if not self.speed:
            return specs
        return [spec.with_speed(speed) for spec, speed in zip(specs, self.speed, strict=True)]

    def in_order(self, placement: Sequence[int]) -> Request:
        """The same with the devices in the stages' order, and what goes with each; for good."""
        if self.arranged or not placement:
            return replace(self, arranged=True)
        limit = self.memory_limit
        return replace(
            self,
            devices=tuple(self.devices[i] for i in placement),
            speed=tuple(self.speed[i] for i in placement) if self.speed else (),
            memory_limit=[limit[i] for i in placement] if isinstance(limit, list | tuple) else limit,
            arranged=True,
            placement=tuple(placement),
        )


@dataclass(frozen=True)
class Compiled:
    """What the compiler's pipe gave."""

    captured: Captured
    hazards: Hazards
    graph: nx.DiGraph
    plan: Plan
    split: Split
    report: PartitionReport


def compile_model(
    model: nn.Module, request: Request, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Compiled:
    """The compiler's pipe, from model to stages.

    Where a module that was kept whole takes more than a stage's share of the time, or, if the request says
    so, a Linear layer takes much of it, the model is captured again by a way that opens it, and the better
    plan is taken.
    """
    if (plan := request.plan) is not None:
        modules = dict(model.named_modules())
        other = [name for name in plan.divided if type(modules.get(name)) is not nn.Linear]
        if other:
            raise PlanMismatchError(
                f"the plan computes {other[0]!r} in parts, which is no Linear layer of this model: plan again"
            )
        captured = capture(model, args, kwargs, opened=plan.opened, divided=plan.divided)
        plan.check(captured, len(request.devices))
        return cut(captured, request.in_order(plan.placement))

    def finer(found: Compiled, opened: Collection[str], divided: Mapping[str, int]) -> Compiled:
        try:
            other = cut(capture(model, args, kwargs, opened=opened, divided=divided), request)
        except CaptureError as e:
            log.info("%s cannot be opened for a better balance: %s", ", ".join([*opened, *divided]), e)
            return found
        return min(found, other, key=lambda compiled: compiled.report.tick_time)

    n_stages = len(request.devices)
    compiled = cut(capture(model, args, kwargs), request)
    opened = heavy_wholes(compiled.captured, compiled.graph, n_stages)
    if opened:
        compiled = finer(compiled, opened, {})
    divided = heavy_linears(compiled.captured, compiled.graph, n_stages) if request.split_linear else {}
    if divided:
        compiled = finer(compiled, compiled.captured.opened, divided)
    return compiled


def adapt(base: Compiled, captured: Captured, request: Request) -> Compiled:
    """Stages for the same model in other modes, laid over those of ``base``; planned anew if that fails."""
    hazards = find_hazards(captured)
    try:
        stage_of = align(base.captured.train, captured.train, base.plan.stage_of, base.plan.n_stages, hazards)
        plan = replace(
            base.plan, stage_of=stage_of, fingerprint=fingerprint(captured), modules={}, edges=(), groups=()
        )
        return replace(
            base, captured=captured, hazards=hazards, plan=plan, split=split(captured, plan, hazards)
        )
    except (DtrpError, ValueError) as e:
        log.info("in other modes the model is planned anew: %s", e)
        return cut(captured, replace(request, plan=None))


def cut(captured: Captured, request: Request) -> Compiled:
    """The pipe behind capturing."""
    n_stages = len(request.devices)
    hazards = find_hazards(captured)
    devices = request.specs()
    graph = cost_graph(
        captured, device=devices, bandwidth=request.links, mode=request.costs, dtype=request.dtype
    )
    plan = request.plan
    if plan is None:
        if not request.arranged:
            how = request.memory_limit, request.recompute, request.training
            request = request.in_order(arrange(graph, hazards, devices, *how))
            devices = request.specs()
        plan = make_plan(
            captured,
            graph,
            hazards,
            n_stages,
            devices=devices,
            memory_limit=request.memory_limit,
            recompute=request.recompute,
            training=request.training,
        )
        plan = replace(plan, placement=request.placement, replicas=request.replicas)
    else:
        nx.set_node_attributes(graph, dict(plan.stage_of), "stage")
        index = device_indices(graph, devices, n_stages)
        node_of = nodes_of(graph, plan, index)
        profile = make_profile(graph, plan.stage_of, n_stages, devices=index, node_of=node_of)
        plan = replace(plan, node_of=node_of, profile=profile, replicas=request.replicas)
    report = _report(captured, graph, plan, request)
    return Compiled(captured, hazards, graph, plan, split(captured, plan, hazards), report)


def reprice(compiled: Compiled, request: Request) -> PartitionReport:
    """The report on the same stages, for the training that is now known."""
    return _report(compiled.captured, compiled.graph, compiled.plan, request)


def _report(captured: Captured, graph: nx.DiGraph, plan: Plan, request: Request) -> PartitionReport:
    request = request.in_order(plan.placement)
    report = PartitionReport.of(
        captured,
        graph,
        plan,
        devices=None
        if request.named
        else [
            f"{first} x {1 + len(others)}" if others else str(first)
            for first, *others in request.groups or zip(request.devices, strict=True)
        ],
        specs=request.specs(),
        memory_limit=request.memory_limit,
        training=request.training,
        split_linear=request.split_linear,
    )
    return replace(
        report, _at=lambda sizes: _report(captured, graph_at(captured, graph, sizes), plan, request)
    )


def device_specs(
    devices: Sequence[torch.device],
    loop: LoopCost | None = None,
    n_devices: int | None = None,
    named: str = "",
) -> list[DeviceSpec]:
    """What the stages' devices can do, one entry per stage, among so many (default: one per stage);
    ``named``: which kind they stand for."""
    known: dict[torch.device, DeviceSpec] = {}
    threads = threads_per_stage(n_devices or len(devices))
    for device, stages in Counter(devices).items():
        spec = device_spec(named or str(device), threads=threads).with_loop(loop)
        if stages > 1 and device.type != "cpu" and device.index is not None:  # else each rank has its own
            spec = replace(spec, memory_bytes=spec.memory_bytes / stages, cores=len(set(devices)))
        known[device] = spec
    return [known[device] for device in devices]


def threads_per_stage(n_stages: int) -> int:
    """CPU threads of a stage: the cores that this process may use shared out evenly, at least one."""
    return max(1, available_cores() // n_stages)
