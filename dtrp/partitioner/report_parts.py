"""What the report says of one stage, of one cut and of the whole, from costs and a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from dtrp.partitioner.plan import Plan
from dtrp.partitioner.solvers.explain import slowest
from dtrp.partitioner.stage_cost import StageCost
from dtrp.partitioner.training import Training


@dataclass(frozen=True)
class StageReport:
    """One stage: what it holds, what it costs. Times in seconds, sizes in bytes.

    ``flops`` are of the forward pass; ``params`` counts elements; ``activation_bytes`` is what autograd
    saves for one batch; ``time`` and ``memory`` say what ``tick_time`` and ``peak_bytes`` are made of.
    """

    index: int
    device: str
    recompute: bool
    recompute_share: float  # of its forward pass; below 1 where a stage keeps its graphs but for a part
    submodules: tuple[str, ...]
    holds: tuple[str, ...]  # the same, with modules that lie in the stage as a whole summed up
    nodes: int
    flops: int
    backward_flops: int
    params: int
    params_bytes: int
    activation_bytes: int
    input_bytes: int
    output_bytes: int
    forward_time: float
    backward_time: float
    tick_time: float
    slot_time: float  # what one more micro-batch of the same batch costs
    peak_bytes: int
    memory_limit: int | None
    time: Mapping[str, float]
    memory: Mapping[str, int]
    heaviest: str  # the module that takes the longest


@dataclass(frozen=True)
class CutTensor:
    """A value that crosses a cut: made in one stage, used in later ones."""

    name: str
    module: str
    source: int
    targets: tuple[int, ...]
    shapes: tuple[str, ...]
    bytes: int
    gradient: bool


@dataclass(frozen=True)
class OrderPrice:
    """What an order with so many micro-batches would give: seconds per batch, bytes of the fullest stage, and
    updates between the two passes of a batch in the first stage."""

    order: str
    micro_batches: int
    seconds: float
    peak_bytes: int
    staleness: int


@dataclass(frozen=True)
class Scaling:
    """What a number of stages would give."""

    n_stages: int
    tick_time: float
    speedup: float
    balance: float
    orders: tuple[OrderPrice, ...] = ()


class Outline:
    """Names the modules that a set of nodes consists of, as high up in the model as is true."""

    def __init__(self, graph: nx.DiGraph) -> None:
        self.modules: dict[str, str] = dict(graph.nodes(data="module"))
        self.count: dict[str, int] = {}
        for module in self.modules.values():
            for prefix in _prefixes(module):
                self.count[prefix] = self.count.get(prefix, 0) + 1

    def leaves(self, nodes: Iterable[str]) -> tuple[str, ...]:
        """The modules that the nodes themselves come from."""
        return tuple(dict.fromkeys(m for n in nodes if (m := self.modules[n])))

    def holds(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """The highest modules that lie in ``nodes`` as a whole; of the others, "name (part)"."""
        inside: dict[str, int] = {}
        for n in nodes:
            for prefix in _prefixes(self.modules[n]):
                inside[prefix] = inside.get(prefix, 0) + 1
        whole = {prefix for prefix, n in inside.items() if n == self.count[prefix]}
        found: dict[str, None] = {}
        for n in nodes:
            prefixes = _prefixes(self.modules[n])
            name = next((p for p in prefixes if p in whole), None)
            if name is None and prefixes:
                name = f"{prefixes[-1]} (part)"
            if name is not None:
                found[name] = None
        return tuple(found)


def recomputes(stage: StageReport) -> str:
    """Whether it does, in a word."""
    share = stage.recompute_share
    return "yes" if stage.recompute else f"{share:.0%}" if share else "no"


def _prefixes(module: str) -> list[str]:
    """``"a.b.c"`` -> ``["a", "a.b", "a.b.c"]``."""
    parts = module.split(".") if module else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def stage_report(
    cost: StageCost, graph: nx.DiGraph, outline: Outline, device: str, limit: float | None
) -> StageReport:
    """What the report says of one stage."""
    by_module: dict[str, float] = {}
    for n in cost.nodes:
        data = graph.nodes[n]
        key = data["module"] or n
        by_module[key] = by_module.get(key, 0.0) + data["forward_time"] + data["backward_time"]
    return StageReport(
        index=cost.stage,
        device=device,
        recompute=cost.recomputes,
        recompute_share=cost.recompute / cost.forward if cost.forward else float(cost.recomputes),
        submodules=outline.leaves(cost.nodes),
        holds=outline.holds(cost.nodes),
        nodes=len(cost.nodes),
        flops=cost.flops,
        backward_flops=cost.backward_flops,
        params=cost.params,
        params_bytes=cost.params_bytes,
        activation_bytes=cost.activation_bytes,
        input_bytes=cost.input_bytes,
        output_bytes=cost.output_bytes,
        forward_time=cost.forward,
        backward_time=cost.backward,
        tick_time=cost.tick,
        slot_time=cost.slot,
        peak_bytes=int(cost.peak),
        memory_limit=None if limit is None else int(limit),
        time={
            "forward": cost.forward,
            "recompute": cost.recompute,
            "backward": cost.backward,
            "update": cost.update,
            "prediction": cost.prediction,
            "loop": cost.loop,
            "average": cost.average,
            "transfer": cost.transfer,
        },
        memory={
            "weights": int(cost.weights),
            "gradients": int(cost.gradients + cost.tied),
            "optimizer": int(cost.optimizer),
            "predictions": int(cost.copies),
            "stash": int(cost.stashed_inputs + cost.stashed_weights),
            "activations": int(cost.activations),
        },
        heaviest=max(by_module, key=by_module.__getitem__, default=""),
    )


def cut_tensors(graph: nx.DiGraph, plan: Plan) -> Iterable[CutTensor]:
    """Every value that crosses a cut, in the graph's order."""
    for n, data in graph.nodes(data=True):
        source = plan.stage_of[n]
        targets = sorted({plan.stage_of[user] for user in graph.successors(n)} - {source})
        if targets and data["transfer_bytes"]:
            yield CutTensor(
                name=n,
                module=data["module"],
                source=source,
                targets=tuple(targets),
                shapes=tuple("x".join(map(str, shape)) + f" {dtype}" for shape, dtype in data["shapes"]),
                bytes=data["transfer_bytes"],
                gradient=data["differentiable"],
            )


def why_not_faster(
    cost: StageCost, stage: StageReport, plan: Plan | None, tick_time: float, cores: float
) -> str:
    """A sentence on the slowest stage; ``plan`` is given if its own reason holds under these costs."""
    if cores and tick_time > cost.tick:
        return f"The stages share the machine, which runs {cores:g} at a time: more gain nothing here."
    what, reason = slowest(cost.stage, cost.tick, cost.compute, cost.time_in, cost.time_out)
    if plan is not None and plan.reason and not plan.edited:
        reason = plan.reason
    if what == "computing" and stage.heaviest:
        reason += f"; its heaviest module is {stage.heaviest}"
    return reason[:1].upper() + reason[1:] + "."


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def notes(graph: nx.DiGraph, stages: Sequence[StageReport], plan: Plan, training: Training) -> list[str]:
    """What else is to be known: assumptions, limits that are exceeded, edits."""
    found = [f"{name} is computed in {parts} parts of its rows." for name, parts in plan.divided.items()]
    if not training.known:
        found.append(
            "The optimizer is not known yet: memory and update times are those of Adam (two values per "
            "parameter); SGD needs less."
        )
    unknown = [n for n, exact in graph.nodes(data="exact") if not exact]
    if unknown:
        found.append(
            f"{len(unknown)} of {len(graph)} nodes could not be costed and count as free: {_some(unknown)}."
        )
    sampled = [n for n, is_sampled in graph.nodes(data="sampled") if is_sampled]
    if sampled:
        found.append(
            f"The costs of {_some(sampled)} depend on values; they are those of one run on random numbers."
        )
    for stage in stages:
        if stage.memory_limit is not None and stage.peak_bytes > stage.memory_limit:
            found.append(
                f"Stage {stage.index} needs {stage.peak_bytes / 1e9:.2f} GB, more than the "
                f"{stage.memory_limit / 1e9:.2f} GB that it may use."
            )
    if plan.placement:
        order = ", ".join(map(str, plan.placement))
        found.append(f"Devices are unequal; stages have them in this order (of those given): {order}.")
    if plan.layout:
        found.append(plan.layout)
    if plan.node_of:
        runs = [[s for s, at in enumerate(plan.node_of) if at == n] for n in sorted({*plan.node_of})]
        shown = "; ".join(f"{r[0]} to {r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
        found.append(f"Stages of each node: {shown}. Values between nodes take the slower link.")
    if plan.edited:
        found.append("The plan was edited by hand after it was found.")
    return found
