"""Costs from running stages: what ``costs="measured"`` adds to node times on the CPU (ours).

Nodes timed one by one in a quiet process are faster than the same nodes in training, unevenly: there, graphs
of batches in flight fill the caches, other stages use the same memory bus, and each process has an allocator
of its own. So the planned stages run for a moment on worker processes, on the example, with an optimizer that
changes nothing; what they take corrects the costs of their nodes, and the model is planned again. They get
the example in the order and the parts that training would choose for it, as far as that shows without the
loss: early layers of ResNet-20 take a sixth less in parts of 32 that fit the caches than in a whole batch of
128, late ones do not.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .orders import decide
from .partitioner.calibration import identity, read_cache, write_cache
from .partitioner.compiler import Compiled, Request, device_specs, reprice
from .partitioner.feedback import StageTimes, corrected
from .partitioner.plan import Plan
from .partitioner.planner import device_indices, make_plan
from .partitioner.split import split
from .programs import make_programs
from .rebalancing import stage_times
from .runtime.arguments import feeds, split_batch
from .runtime.config import TrainConfig
from .runtime.stats import StageStats

log = logging.getLogger("dtrp")

ROUNDS = 2  # trials, of the first plan and of what was planned then
WINDOWS = 3  # in which one measures; the median counts, as another process may have had the core in one
SECONDS = 1.0  # of a window
BATCHES = (2, 66)  # least and most in it
GAIN = 0.01  # by which another cut must be faster


def tried(made: Compiled, request: Request, model: nn.Module, inputs: Sequence[Tensor]) -> Compiled:
    """The stages that are best where they run, and their costs there.

    Where stages cannot be tried (a model that cannot be sent to a process), costs stay those of single nodes,
    and the log says so.
    """
    specs = request.specs()
    index = device_indices(made.graph, specs, len(specs))
    threads = max(1, device_specs(request.devices)[0].threads)
    optimizer = partial(torch.optim.SGD, lr=0.0, momentum=0.9)
    config = TrainConfig(mean_of_outputs, optimizer, order="auto", micro_batches="auto", threads=threads)
    known = None
    for _ in range(ROUNDS):
        try:
            how, _ = decide(made, request.training, config, inputs, None)
            if how == known:
                break
            times = _times(made, request, model, inputs, how)
        except Exception as e:
            log.warning("stages could not be tried out, costs are those of nodes run one by one: %s", e)
            return made
        training = replace(request.training, order=how.order, micro_batches=how.parts, optimizer_bytes=1.0)
        graph, _ = corrected(made.graph, made.plan, times, training, index)
        graph.graph["mode"] = "measured"
        made, known = _repriced(replace(made, graph=graph), request), how
        if request.plan is None:
            plan = make_plan(
                made.captured,
                graph,
                made.hazards,
                made.plan.n_stages,
                devices=specs,
                memory_limit=request.memory_limit,
                recompute=request.recompute,
                training=request.training,
            )
            other = _repriced(replace(made, plan=replace(plan, placement=request.placement)), request)
            same = plan.stage_of == made.plan.stage_of and plan.recompute == made.plan.recompute
            better = other.report.tick_time < made.report.tick_time * (1 - GAIN)
            if same or better:
                made = replace(other, split=split(made.captured, plan, made.hazards))
            if better:
                known = None
    return made


def _repriced(made: Compiled, request: Request) -> Compiled:
    return replace(made, report=reprice(made, request))


def _times(
    made: Compiled, request: Request, model: nn.Module, inputs: Sequence[Tensor], config: TrainConfig
) -> list[StageTimes]:
    """What each stage takes: measured once per plan, read from the cache after that.

    One thread has a clock of its own, which stops while others than this pipeline have the core.
    """
    threads = device_specs(request.devices)[0].threads
    how = f"{config.order} {config.parts}"
    key = f"{_digest(made.plan)}|{identity(torch.device('cpu'), threads)}|{how}"
    cached = read_cache("trial", key)
    if cached is not None:
        with suppress(TypeError, KeyError):
            return [StageTimes(*map(float, row)) for row in cached["stages"]]
    windows = [
        [stage_times(one, config.parts, on_cpu=threads == 1)._replace(loss=0.0) for one in stats]
        for stats in _run(made, request, model, inputs, config)
    ]
    times = [
        StageTimes(*map(statistics.median, zip(*stage, strict=True))) for stage in zip(*windows, strict=True)
    ]
    write_cache("trial", key, {"stages": [list(row) for row in times]})
    return times


def _digest(plan: Plan) -> str:
    what = json.dumps([plan.fingerprint, dict(plan.stage_of), plan.recompute])
    return hashlib.sha256(what.encode()).hexdigest()


def _run(
    made: Compiled, request: Request, model: nn.Module, inputs: Sequence[Tensor], config: TrainConfig
) -> list[list[StageStats]]:
    """Train for a moment on worker processes; what each window measured. The model here stays as it is."""
    from .runtime.workers import Workers

    programs = make_programs(made, made, model, request.devices)
    parts = list(split_batch(inputs, None, config.parts, least=config.least_part))
    run = Workers(programs, config, seed=0)
    try:
        done = 0

        def go_on(least: int, most: int, seconds: float) -> None:
            nonlocal done
            end, first = time.monotonic() + seconds, done
            while done - first < least or (time.monotonic() < end and done - first < most):
                for i, (tensors, _, share) in enumerate(parts):
                    slot = feeds(programs[0].train, done, tensors, None)
                    run.feed([feed._replace(part=i, parts=len(parts), share=share) for feed in slot])
                run.throttle()
                done += 1

        go_on(2 * len(programs) + 2, 0, 0.0)  # fills the pipeline, and warms up
        found: list[list[StageStats]] = [run.call("stats")]
        for _ in range(WINDOWS):
            go_on(*BATCHES, SECONDS)
            found.append(run.call("stats"))
        return [
            [now.since(then) for now, then in zip(after, before, strict=True)]
            for before, after in itertools.pairwise(found)
        ]
    finally:
        run.close()


def mean_of_outputs(output: Any, target: Any) -> Tensor:
    """Stands for a loss: every number of the output has a gradient."""
    del target
    found = [
        t
        for t in pytree.tree_leaves(output)
        if isinstance(t, Tensor) and (t.is_floating_point() or t.requires_grad)
    ]
    return torch.stack([torch.nan_to_num(t.float()).mean() for t in found]).sum()
