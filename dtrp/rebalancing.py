"""Better cuts for a run that goes on, from what its stages measured: joins trainer and planner (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import networkx as nx

from .partitioner.compiler import Compiled, Request, reprice
from .partitioner.feedback import StageTimes, corrected
from .partitioner.plan import Plan
from .partitioner.planner import device_indices, make_plan
from .partitioner.report import shared
from .partitioner.split import split
from .partitioner.stage_cost import stage_costs
from .runtime.rebalance import Move
from .runtime.stats import WORK, StageStats
from .training_report import work_per_batch

GAIN = 0.03
"""By which the predicted time per batch must become smaller."""

PLANNING = 2.0  # seconds


def better_cut(made: Compiled, request: Request, stats: Sequence[StageStats]) -> Move | None:
    """The move that would gain, if there is one; ``stats``: of the stages as they are, over some time.

    Which stages recompute stays as it is; where some do in part, or have several devices, nothing is moved.
    """
    specs = request.specs()
    index, cores, plan = device_indices(made.graph, specs, len(specs)), shared(specs), made.plan
    if plan.recomputes != plan.recompute or request.replicas:
        return None
    times = [stage_times(one, request.training.micro_batches, on_cpu=bool(cores)) for one in stats]
    graph, training = corrected(made.graph, plan, times, request.training, index)

    def ticks(cut: Plan) -> list[float]:
        costs = stage_costs(
            graph, cut.stage_of, plan.recompute, devices=index, training=training, node_of=cut.node_of
        )
        return [cost.tick for cost in costs]

    before = ticks(plan)
    least = sum(before) / len(before)
    if training.batch_time(before, cores) <= training.batch_time([least] * len(before), cores) * (1 + GAIN):
        return None
    found = make_plan(
        made.captured,
        graph,
        made.hazards,
        plan.n_stages,
        devices=specs,
        memory_limit=request.memory_limit,
        recompute=plan.recomputes,
        training=training,
        time_limit=PLANNING,
    )
    after = ticks(found)
    gain = training.batch_time(before, cores) / training.batch_time(after, cores) - 1
    if gain <= GAIN:
        return None
    return Move(
        before=tuple(before),
        after=tuple(after),
        seconds_before=training.batch_time(before, cores),
        seconds_after=training.batch_time(after, cores),
        nodes=sum(found.stage_of[node] != stage for node, stage in plan.stage_of.items()),
        cut=(graph, found, training),
    )


def recut_model(made: Compiled, request: Request, move: Move) -> tuple[Compiled, Request]:
    """The model in the move's stages, and the request that they answer."""
    graph: nx.DiGraph
    graph, plan, training = move.cut
    plan = replace(plan, placement=request.placement)
    request = replace(request, training=training)
    made = replace(made, graph=graph, plan=plan, split=split(made.captured, plan, made.hazards))
    return replace(made, report=reprice(made, request)), request


def stage_times(stats: StageStats, parts: int, *, on_cpu: bool) -> StageTimes:
    """One stage's work per batch; ``on_cpu``: by the processor's clock, which stops while it is elsewhere."""
    work = work_per_batch(stats, parts)
    scale = 1.0
    if on_cpu:
        wall = sum(stats.seconds.get(kind, 0.0) for kind in (*WORK, "loop"))
        scale = min(1.0, stats.cpu_time / wall) if wall else 1.0
    passes = [work[kind] for kind in ("forward", "recompute") if work[kind] > 0]
    return StageTimes(
        forward=scale * sum(passes) / max(1, len(passes)),
        backward=scale * work["backward"],
        update=scale * work["step"],
        transfer=scale * work["transfer"],
        loop=scale * work["loop"],
        loss=scale * stats.mean("loss") * parts,
    )
