"""What people look at after planning: what each stage holds and costs, how good the cut is, and why.

The report is plain data, computed once; `report_text`, `report_html` and `report_plot` draw it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import torch

from dtrp.errors import InfeasiblePlanError
from dtrp.files import write_text
from dtrp.partitioner.capture.graph import Captured
from dtrp.partitioner.devices import DeviceSpec
from dtrp.partitioner.heavy import advice
from dtrp.partitioner.plan import Plan
from dtrp.partitioner.planner import cost_digest, default_limits, device_indices, memory_limits, solve
from dtrp.partitioner.report_parts import (
    CutTensor,
    OrderPrice,
    Outline,
    Scaling,
    StageReport,
    cut_tensors,
    notes,
    stage_report,
    why_not_faster,
)
from dtrp.partitioner.stage_cost import RECOMPUTE, Recompute, stage_costs
from dtrp.partitioner.training import ASSUMED, Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

    from dtrp.partitioner.partition import Partition
    from dtrp.partitioner.replication import Layout

ORDERS = (("fig1", 1), ("lean", 1), ("lean", 4), ("1f1b", 4), ("1f1b", 8), ("gpipe", 8))
"""Orders and numbers of micro-batches that `PartitionReport.compare` prices."""


@dataclass(frozen=True)
class PartitionReport:
    """What was decided and why.

    Attributes
    ----------
    stages : tuple[StageReport, ...]
    cuts : tuple[CutTensor, ...]
    tick_time : float
        Seconds per batch: of the slowest stage's tick, which planning minimised, unless stages share cores
        (then all stages' ticks over the cores, where that is more) or the order drains after every batch.
    balance : float
        Mean over maximum of the stages' tick times; 1 is perfect.
    lower_bound : float
        No partition into this many stages can have a smaller tick time.
    gap : float
        ``tick_time / lower_bound - 1``.
    speedup : float
        Predicted, over training on one such device.
    single_time : float
        Seconds that one device takes for a batch.
    cut_bytes : int
        Bytes that cross cuts per batch and direction (values used in several stages count once for each).
    bottleneck : int
        The slowest stage.
    reason : str
        Why it is not faster.
    overlaps : bool
        Whether stages compute while they send and receive (CUDA), or one after the other (CPU).
    """

    model: str
    stages: tuple[StageReport, ...]
    cuts: tuple[CutTensor, ...]
    tick_time: float
    balance: float
    lower_bound: float
    speedup: float
    single_time: float
    cut_bytes: int
    bottleneck: int
    reason: str
    method: str
    kept_whole: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    costs: str
    overlaps: bool
    engine: str
    bandwidth: float
    _graph: nx.DiGraph = field(repr=False, compare=False)
    _plan: Plan = field(repr=False, compare=False)
    _training: Training = field(repr=False, compare=False)
    _at: Callable[[Any], PartitionReport] | None = field(default=None, repr=False, compare=False)

    @property
    def gap(self) -> float:
        """How far from optimal the plan can be at most: ``tick_time / lower_bound - 1``."""
        return self.tick_time / self.lower_bound - 1 if self.lower_bound else float("inf")

    @property
    def n_stages(self) -> int:
        """Number of stages."""
        return len(self.stages)

    @classmethod
    def of(
        cls,
        captured: Captured,
        graph: nx.DiGraph,
        plan: Plan,
        *,
        devices: Sequence[str | torch.device] | None = None,
        specs: Sequence[DeviceSpec] | None = None,
        memory_limit: float | str | Sequence[float | str | None] | None = None,
        training: Training = ASSUMED,
        split_linear: bool = False,
    ) -> PartitionReport:
        """The report on a plan.

        Parameters
        ----------
        captured, graph, plan
            The model, its cost graph and the plan.
        devices
            For people: where each stage runs. Default: the names of ``specs``.
        specs
            What each stage runs on, one per stage. Default: the graph's first device for all.
        memory_limit, training
            As given to the planner.
        split_linear
            Whether heavy Linear layers were already tried in parts.
        """
        given: Sequence[DeviceSpec] = graph.graph["specs"]
        specs = [given[0]] * plan.n_stages if specs is None else specs
        index = device_indices(graph, specs, plan.n_stages)
        costs = stage_costs(
            graph, plan.stage_of, plan.recompute, devices=index, training=training, node_of=plan.node_of
        )
        limits = memory_limits(memory_limit, plan.n_stages) or default_limits(specs)
        names = [str(d) for d in devices] if devices is not None else [spec.name for spec in specs]
        outline = Outline(graph)
        stages = tuple(
            stage_report(cost, graph, outline, name, limit)
            for cost, name, limit in zip(costs, names, limits, strict=True)
        )
        cuts = tuple(cut_tensors(graph, plan))
        ticks = [cost.tick for cost in costs]
        tick_time = training.batch_time(ticks, cores := shared(specs, training.replicas))
        single = single_time(graph, training)
        bottleneck = max(range(plan.n_stages), key=ticks.__getitem__)
        # A plan may come from a file and have been made under other costs: its bound is then not ours.
        same_costs = plan.lower_bound > 0 and plan.costs == cost_digest(graph, training)
        total = sum(ticks_at_best(graph, len(given), training))
        together = cores or sum(training.replicas) or plan.n_stages
        bound = max(plan.lower_bound if same_costs else 0.0, total / together)
        return cls(
            model=type(captured.model).__name__,
            stages=stages,
            cuts=cuts,
            tick_time=tick_time,
            balance=sum(ticks) / len(ticks) / max(ticks) if max(ticks) > 0 else 1.0,
            lower_bound=min(bound, tick_time),
            speedup=single / tick_time if tick_time > 0 else 1.0,
            single_time=single,
            cut_bytes=sum(cut.bytes * len(cut.targets) for cut in cuts),
            bottleneck=bottleneck,
            reason=why_not_faster(
                costs[bottleneck], stages[bottleneck], plan if same_costs else None, tick_time, cores
            ),
            method=captured.method,
            kept_whole=tuple((kept.module, kept.reason) for kept in captured.kept_whole),
            notes=(
                *captured.notes,
                *notes(graph, stages, plan, training),
                *([] if split_linear else advice(captured, graph, plan.n_stages)),
            ),
            costs=graph.graph["mode"],
            overlaps=costs[0].overlaps,
            engine=plan.engine,
            bandwidth=given[0].link_bandwidth,
            _graph=graph,
            _plan=plan,
            _training=training,
        )

    def at(self, sizes: Any) -> PartitionReport:
        """The same stages for inputs of other sizes. Nothing is computed, and the plan stays as it is.

        Parameters
        ----------
        sizes : mapping or example
            Shapes by the name of the model's tensor input, ``{"x": (8, 3, 320, 320)}`` (of a tensor inside
            an argument: ``"batch['mask']"``); an input that is not named keeps its shape. Or a call's
            arguments, as ``example_inputs`` of `dtrp.compile`, of which only the shapes count.

        Returns
        -------
        PartitionReport
            Times in seconds and sizes in bytes for these inputs. Measured times are scaled, node by node, as
            the analytic ones are.

        Raises
        ------
        ValueError
            No such input; or the model's code takes another course with these sizes, or fails: the error
            names its line.
        TypeError
            The arguments have another structure than the example's; or the report is of a plan alone, and
            does not know the model.

        Examples
        --------
        >>> import dtrp, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> pipe = dtrp.compile(model, devices=["cpu"] * 2, example_inputs=torch.zeros(8, 4))
        >>> pipe.report.at({"input": (16, 4)}).stages[0].flops == 2 * pipe.report.stages[0].flops
        True
        """
        if self._at is None:
            raise TypeError("this report was made of a plan alone: take pipe.report, which knows the model")
        return self._at(sizes)

    def compare(self, ks: Iterable[int], *, time_limit: float = 1.0, orders: bool = False) -> list[Scaling]:
        """What other numbers of stages would give, on the first device's kind and link.

        Where all stages of this plan recompute, so do all of those; else each does if that is faster.

        Parameters
        ----------
        ks
            Numbers of stages; those that the model cannot be cut into, or that do not fit, are left out.
        time_limit
            Seconds of planning for each.
        orders
            Whether to price each under other orders and numbers of micro-batches, too (`Scaling.orders`).
        """
        if isinstance(ks, int):
            raise TypeError(f"compare({ks!r}): expected numbers of stages, such as [2, 4, 8]")
        points, alone = [], replace(self._training, replicas=())  # other numbers are of one device each
        for k in ks:
            if k == 1 < self.n_stages:  # plain training: no loop over stages takes its time
                points.append(Scaling(1, self.single_time, 1.0, 1.0))
                continue
            if k == self.n_stages:
                prices = (
                    self._prices(self._training, self._plan.stage_of, self._plan.recompute) if orders else ()
                )
                points.append(Scaling(k, self.tick_time, self.speedup, self.balance, prices))
                continue
            try:
                result = self._cut_for(k, time_limit)
            except (ValueError, InfeasiblePlanError):
                continue
            seconds = alone.batch_time(result.loads, self._graph.graph["specs"][0].shared(k))
            mean = sum(result.loads) / k
            stage_of = {str(node): stage for node, stage in result.stage_of.items()}
            again = [option == RECOMPUTE for option in result.options]
            prices = self._prices(alone, stage_of, again) if orders else ()
            points.append(Scaling(k, seconds, self.single_time / seconds, mean / result.max_load, prices))
        return points

    def _cut_for(self, n_stages: int, time_limit: float = 1.0) -> Partition:
        """The same model in another number of stages of one device each, like the first stage's; where all
        of this plan's recompute, they do too."""
        before_last = self._plan.recomputes[:-1]
        return solve(
            self._graph,
            n_stages,
            groups=self._plan.groups,
            order=self._plan.edges,
            recompute=True if before_last and all(before_last) else "auto",
            training=replace(self._training, replicas=()),
            time_limit=time_limit,
        )

    def layouts(self, n_devices: int | None = None, *, time_limit: float = 2.0) -> list[Layout]:
        """Other ways to use as many devices: fewer stages on several devices each, down to data parallelism.

        Parameters
        ----------
        n_devices
            How many, all like the first stage's. Default: one per stage of this plan.
        time_limit
            Seconds of planning for each number of stages and of parts.

        Returns
        -------
        list of Layout
            The best for each number of stages, the best of all first: by seconds per batch times what delay
            costs.

        Raises
        ------
        ValueError
            ``n_devices`` is no whole number from 1 on; stages are planned for links of two kinds.
        """
        from dtrp.partitioner.replication import layouts

        limits = [stage.memory_limit for stage in self.stages if stage.memory_limit is not None]
        return layouts(
            self._graph,
            self.n_stages if n_devices is None else n_devices,
            groups=self._plan.groups,
            order=self._plan.edges,
            training=self._training,
            memory_limit=min(limits, default=None),
            time_limit=time_limit,
        )

    def _prices(
        self, how: Training, stage_of: Mapping[str, int], recompute: Sequence[Recompute]
    ) -> tuple[OrderPrice, ...]:
        """The same stages under other orders and numbers of micro-batches, which their devices can share."""
        k, found = len(recompute), []
        cores = self._graph.graph["specs"][0].shared(sum(how.replicas) or k)
        for order, parts in ORDERS if k > 1 else ORDERS[:1]:
            if any(parts % devices for devices in how.replicas):
                continue
            training = replace(how, order=order, micro_batches=parts)
            training = replace(training, predicts=how.predicts and not training.exact)
            costs = stage_costs(self._graph, stage_of, recompute, training=training)
            seconds = training.batch_time([cost.tick for cost in costs], cores)
            peak = int(max(cost.peak for cost in costs))
            found.append(OrderPrice(order, parts, seconds, peak, training.staleness(0, k)))
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; with ``gap`` and ``n_stages``."""
        shown = [f.name for f in dataclasses.fields(self) if not f.name.startswith("_")]
        data: dict[str, Any] = {name: _plain(getattr(self, name)) for name in shown}
        return {"n_stages": self.n_stages, "gap": self.gap} | data

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """JSON of `to_dict`; also written to ``path`` if one is given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            write_text(path, text + "\n")
        return text

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes a page that stands on its own: no network, no scripts from elsewhere."""
        from dtrp.partitioner.report_html import page

        return write_text(path, page(self))

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """A matplotlib figure of time and memory per stage; also saved to ``path`` if one is given.

        Raises
        ------
        ImportError
            matplotlib is missing; the message says what to install.
        """
        from dtrp.partitioner.report_plot import figure

        drawn = figure(self)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            drawn.savefig(path)
        return drawn

    def __str__(self) -> str:
        from dtrp.partitioner.report_text import text

        return text(self)

    __repr__ = __str__  # at a prompt, too

    def __rich__(self) -> RenderableType:
        from dtrp.partitioner.report_text import renderable

        return renderable(self)

    def _repr_html_(self) -> str:
        from dtrp.partitioner.report_html import fragment

        return fragment(self)


def shared(specs: Sequence[DeviceSpec], replicas: Sequence[int] = ()) -> float:
    """How many of the devices of these stages compute at a time, where they share cores; else 0."""
    n = sum(replicas) or len(specs)
    return specs[0].shared(n) if all(spec == specs[0] for spec in specs) else 0.0


def single_time(graph: nx.DiGraph, training: Training) -> float:
    """Seconds that plain training on one device takes for a batch."""
    alone = replace(training, predicts=False, order="bp", micro_batches=1, replicas=())
    (cost,) = stage_costs(graph, dict.fromkeys(graph, 0), (False,), training=alone)
    return cost.compute - cost.loop


def ticks_at_best(graph: nx.DiGraph, n_devices: int, training: Training = ASSUMED) -> list[float]:
    """For each node, the least time that any stage on any of the devices could spend on it per tick."""
    sweeps = 3 + 2 * training.optimizer_bytes
    suffixes = [f"@{i}" if i else "" for i in range(n_devices)]
    return [
        min(
            data[f"forward_time{s}"] + data[f"backward_time{s}"] + sweeps * data[f"sweep_time{s}"]
            for s in suffixes
        )
        for _, data in graph.nodes(data=True)
    ]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value
