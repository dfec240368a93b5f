"""How many devices each stage has, where that is left to dtrp: ``replicas="auto"`` (ours)."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .orders import least_parts
from .partitioner.compiler import Compiled, Request, cut, reprice
from .partitioner.planner import default_limits, memory_limits
from .partitioner.replication import Layout, layouts
from .partitioner.training import ASSUMED, Training
from .partitioner.units import duration
from .parts_check import differs_in_parts
from .runtime.arguments import n_samples
from .runtime.config import TrainConfig
from .trial import mean_of_outputs

log = logging.getLogger("dtrp")

TOLD = 4
"""Layouts that the report names."""


def grouped(
    devices: Sequence[torch.device], replicas: Sequence[int]
) -> tuple[tuple[torch.device, ...], tuple[tuple[torch.device, ...], ...]]:
    """The devices shared out in order: each stage's first, and, where any has several, all of each."""
    ends = itertools.accumulate(replicas, initial=0)
    groups = tuple(tuple(devices[start:end]) for start, end in itertools.pairwise(ends))
    return tuple(group[0] for group in groups), groups if max(replicas) > 1 else ()


def assumed(replicas: Sequence[int]) -> Training:
    """How training is taken to go until there is a trainer; ``replicas``: empty for one device each."""
    return replace(ASSUMED, replicas=tuple(replicas), micro_batches=least_parts(replicas))


def as_one(request: Request) -> Request:
    """Data parallelism on all devices."""
    firsts, groups = grouped(request.devices, [len(request.devices)])
    return replace(request, devices=firsts, groups=groups, training=assumed(list(map(len, groups))))


def share_out(made: Compiled, request: Request, inputs: Sequence[Tensor]) -> tuple[Compiled, Request]:
    """The model cut for the best layout of the devices that the request names, from any plan of it.

    Stages of several devices need batches that may be cut into parts: whether the model treats samples one
    by one is tried here, and the loss, which is not known yet, before the first batch.
    """
    stand_in = TrainConfig(mean_of_outputs, partial(torch.optim.SGD, lr=0.0))
    real = not any(t.is_meta for t in (*made.captured.model.parameters(), *inputs))
    whole = differs_in_parts(made, stand_in, inputs, None) if real else ""
    devices = request.devices
    n, specs = len(devices), made.graph.graph["specs"][:1]
    limits = memory_limits(request.memory_limit, n) or default_limits(specs * n)
    found = layouts(
        made.graph,
        n,
        groups=made.plan.groups,
        order=made.plan.edges,
        training=request.training,
        recompute=request.recompute,
        memory_limit=limits[0],
        most_parts=1 if whole else n_samples(inputs),
    )
    firsts, groups = grouped(devices, found[0].replicas if found else (1,) * made.plan.n_stages)
    request = replace(request, devices=firsts, groups=groups, spread=False)
    request = replace(request, training=assumed(request.replicas))
    if made.plan.n_stages != len(firsts) or groups:
        made = cut(made.captured, request)
    why = _why(found, n, whole) if found else ""
    log.info("%s", why)
    made = replace(made, plan=replace(made.plan, layout=why))
    return replace(made, report=reprice(made, request)), request


def _why(found: Sequence[Layout], n_devices: int, whole: str) -> str:
    best, *others = found
    left = n_devices - sum(best.replicas)
    plain = [layout for layout in others[TOLD:] if layout.replicas == (1,) * n_devices]
    text = f"Devices are shared out as {best.name}: {duration(best.exact_seconds)} per batch times epochs"
    if others:
        listed = (f"{o.name} {duration(o.exact_seconds)}" for o in (*others[:TOLD], *plain))
        text += f" (other ways: {', '.join(listed)})"
    text += f"; {left} of {n_devices} are left out" if left else ""
    return text + (f"; each has a stage of its own, as batches are not cut: {whole}." if whole else ".")
