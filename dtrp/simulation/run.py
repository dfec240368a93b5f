"""``simulate()``: from a plan's costs and a cluster to throughput, idle shares, memory and staleness."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from dtrp.names import one_of
from dtrp.partitioner.plan import Plan
from dtrp.partitioner.profile import Profile, make_profile
from dtrp.partitioner.report import PartitionReport
from dtrp.partitioner.stage_cost import RECOMPUTE as RECOMPUTES
from dtrp.partitioner.stage_cost import predictions
from dtrp.partitioner.training import ASSUMED, Training
from dtrp.pipeline import Pipeline
from dtrp.runtime.events import Event, write_timeline
from dtrp.schedule import ORDERS, Schedule

from .cluster import Cluster, Link, cluster_of, count_of, number_of
from .engine import BACKWARD, FORWARD, KINDS, RECOMPUTE, STEP, Floats, Lines, Trace, Work, run
from .result import SimulatedLink, SimulatedStage, Simulation


def simulate(
    plan: Plan | PartitionReport | Pipeline | Profile,
    cluster: Cluster | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    schedule: str | None = None,
    micro_batches: int | None = None,
    recompute: bool | Sequence[bool] | None = None,
    predicts: bool | None = None,
    horizon: str | None = None,
    optimizer_bytes: float | None = None,
    batches: int | None = None,
    seed: int = 0,
    timeline: str | os.PathLike[str] | None = None,
) -> Simulation:
    """How a plan would train on a cluster, by following the stages' own lists of actions with a clock.

    Parameters
    ----------
    plan : Plan, PartitionReport, Pipeline or Profile
        What is trained: a plan (also one read from a file) knows what its stages cost, where it has not been
        edited by hand; ``pipe`` and ``pipe.report`` know how to plan for other numbers of stages as well
        (`Simulation.over`). A `Profile` is figures of your own.
    cluster : Cluster, mapping or path, optional
        Devices and links; also as plain data, or a JSON file of it. Default: the devices and links that the
        plan was made for.
    schedule : {"fig1", "lean", "1f1b", "gpipe", "bp"}, optional
        The order. This and all that follows of training: by default as the pipeline's trainer has it, where
        there is one, else "fig1" with whole batches, predictions to one moment, and Adam.
    micro_batches : int, optional
        Equal parts of each mini-batch, which travel one by one. A part is taken to cost its share.
    recompute : bool or sequence of bool, optional
        Whether stages recompute, one for all or each. Default: as planned ("bp" never does).
    predicts, horizon : bool, {"common", "stage"}, optional
        Whether passes of the decoupled orders run on predicted weights, and which moment they aim at.
    optimizer_bytes : float, optional
        The optimizer's state per byte of parameters: 2 for Adam, 1 for SGD with momentum.
    batches : int, optional
        Mini-batches over which is measured, behind those that fill the pipeline. Default: enough for a steady
        rate.
    seed : int
        Of jitter.
    timeline : path, optional
        Write what each device did when, in Chrome's trace format (opens in Perfetto).

    Returns
    -------
    Simulation

    Raises
    ------
    TypeError, ValueError
        Arguments that make no sense, a plan without costs, a cluster that names devices that there are not.

    Notes
    -----
    Ours. Figures are as good as the plan's costs; docs/simulator.md says how far measured runs are from them.
    Time grows with stages times batches: 1,024 stages take a few seconds.

    Examples
    --------
    >>> from dtrp.partitioner.profile import Message, Profile, StageProfile
    >>> chain = tuple(Message(k, k + 1, 1, 1) for k in range(3))
    >>> four = Profile((StageProfile(forward=1.0, backward=2.0, sweep=0.0),) * 4, chain)
    >>> result = simulate(four, schedule="1f1b", micro_batches=8, recompute=False)
    >>> round(result.stages[0].idle, 4), 3 / (8 + 3)
    (0.2727, 0.2727272727272727)
    """
    profile, planned, report = _costs(plan)
    here = cluster_of(cluster)
    given: dict[str, Any] = {
        "order": schedule,
        "micro_batches": micro_batches,
        "predicts": predicts,
        "horizon": horizon,
        "optimizer_bytes": optimizer_bytes,
    }
    training = replace(
        ASSUMED if report is None else report._training,
        **{name: value for name, value in given.items() if value is not None},
    )
    order = _order(training, len(profile.stages))
    if batches is not None:
        count_of("batches", batches)
    _check_speed(here, order.n_stages)
    again = _recomputes(order, planned if recompute is None else recompute)
    decoupled = training.predicts and not order.exact
    setting = _Setting(profile, here, order, again, replace(training, predicts=decoupled))
    work = setting.work()
    first, count = _window(order, jitter=bool(work.jitter or work.lines.jitter.any()))
    trace = run(work, first + (batches or count), seed=seed, record=timeline is not None)
    if timeline is not None:
        write_timeline(timeline, _events(trace, order))
    over: Callable[[int, str], Simulation] | None = None
    if report is not None:
        over = partial(
            _with_stages,
            report,
            here,
            recompute=recompute if isinstance(recompute, bool) else None,
            batches=batches,
            seed=seed,
            **{name: getattr(training, name) for name in given if name != "order"},
        )
    return setting.result(work, trace, first, over)


def _with_stages(
    report: PartitionReport, cluster: Cluster, n_stages: int, schedule: str, **how: Any
) -> Simulation:
    """The same, with the model planned for another number of stages."""
    devices = n_stages * cluster.replicas
    cluster = replace(cluster, speed={d: s for d, s in cluster.speed.items() if d < devices})
    if n_stages == report.n_stages:
        return simulate(report, cluster, schedule=schedule, **how)
    found = report._cut_for(n_stages)
    profile = make_profile(report._graph, found.stage_of, n_stages, node_of=found.node_of)
    if how["recompute"] is None:
        how["recompute"] = [option == RECOMPUTES for option in found.options]
    return simulate(profile, cluster, schedule=schedule, **how)


@dataclass(frozen=True)
class _Setting:
    """What is simulated, as the user said it."""

    profile: Profile
    cluster: Cluster
    schedule: Schedule
    recomputes: tuple[bool, ...]
    training: Training

    # ---- to the clock ------------------------------------------------------------------------------------

    def work(self) -> Work:
        """In the clock's terms."""
        k, replicas = self.schedule.n_stages, self.cluster.replicas
        speed = np.ones(k * replicas)
        for device, value in self.cluster.speed.items():
            speed[device] = value
        seconds = np.array([self._seconds(stage) for stage in range(k)]).T
        seconds = np.tile(seconds, replicas) / speed
        return Work(
            schedule=self.schedule,
            replicas=replicas,
            seconds=seconds,
            lines=self._lines(),
            reduction=np.array([self._reduction(stage) for stage in range(k)]),
            overlaps=self.profile.overlaps,
            jitter=self.cluster.jitter,
        )

    def passes(self, stage: int) -> int:
        """How many passes of a slot run on predicted weights."""
        return predictions(
            stage,
            self.schedule.n_stages,
            recompute=self.recomputes[stage],
            training=self.training,
        )

    def _seconds(self, stage: int) -> list[float]:
        """Of each kind of action."""
        cost, parts = self.profile.stages[stage], self.schedule.parts
        passes = self.passes(stage)
        state = self.training.optimizer_bytes
        prediction = (2 + state) * cost.sweep
        seconds = [0.0] * len(KINDS)
        seconds[FORWARD] = cost.forward / parts + min(passes, 1) * prediction
        seconds[FORWARD] += cost.loop + self.cluster.overhead
        if self.recomputes[stage]:
            seconds[RECOMPUTE] = cost.forward / parts + max(passes - 1, 0) * prediction
        seconds[BACKWARD] = cost.backward / parts
        seconds[STEP] = (3 + 2 * state) * cost.sweep
        if not self.profile.overlaps:  # gradients of tied weights come or leave, and their sum
            link = self._link(stage, stage)
            tied = [size for *ends, size in self.profile.ties if stage in ends]
            seconds[BACKWARD] += sum(size / link.bandwidth + link.latency for size in tied)
            seconds[STEP] += sum(size / link.bandwidth + link.latency for size in tied)
        return seconds

    def _link(self, a: int, b: int) -> Link:
        """What joins two devices."""
        node_of, k = self.profile.node_of, self.schedule.n_stages
        apart = bool(node_of) and node_of[a % k] != node_of[b % k]
        bandwidth = self.profile.net if apart and self.profile.net else self.profile.bandwidth
        return self.cluster.link(a, b) or Link(bandwidth, self.profile.latency)

    def _lines(self) -> Lines:
        k, parts = self.schedule.n_stages, self.schedule.parts
        rows: list[tuple[int, int, bool, int, float, float, float]] = []
        for first in range(0, k * self.cluster.replicas, k):
            for message in self.profile.messages:
                ends = (first + message.source, first + message.target)
                for (a, b), size in ((ends, message.bytes), (ends[::-1], message.gradient_bytes)):
                    if size:
                        link = self._link(a, b)
                        places = self.schedule.places(message.source, message.target)
                        seconds, latency = size / parts / link.bandwidth, link.latency
                        if not self.profile.overlaps and self.cluster.link(a, b) is None:
                            seconds, latency = seconds + latency, 0.0  # a CPU spends it on the message
                        rows.append((a, b, a > b, places, seconds, latency, link.jitter))
        columns = list(zip(*rows, strict=True)) or [()] * 7
        whole, real = np.int64, np.float64
        types = (whole, whole, np.bool_, whole, real, real, real)
        return Lines(*(np.array(c, dtype=t) for c, t in zip(columns, types, strict=True)))

    def _reduction(self, stage: int) -> float:
        """Seconds in which a ring of replicas averages a stage's gradients."""
        n, k = self.cluster.replicas, self.schedule.n_stages
        if n == 1:
            return 0.0
        links = [self._link(r * k + stage, (r + 1) % n * k + stage) for r in range(n)]
        size = self.profile.stages[stage].gradients
        slowest = min(link.bandwidth for link in links)
        return 2 * (n - 1) * (size / n / slowest + max(link.latency + link.jitter for link in links))

    # ---- and back ----------------------------------------------------------------------------------------

    def result(
        self, work: Work, trace: Trace, first: int, over: Callable[[int, str], Simulation] | None
    ) -> Simulation:
        """What the clock showed, in the user's terms."""
        k, replicas = self.schedule.n_stages, self.cluster.replicas
        count = len(trace.ended) - first

        def per_batch(series: Floats) -> Floats:
            """What a mini-batch adds in each stage, in the replica where that is most."""
            most: Floats = ((series[-1] - series[first - 1]) / count).reshape(replicas, k).max(axis=0)
            return most

        busy = per_batch(trace.busy)
        held = trace.in_flight.reshape(replicas, k).max(axis=0)
        batch_time = float(per_batch(trace.ended)[0])  # the first stage is the last to be done with a batch
        if self.profile.cores:  # stages take turns on them
            batch_time = max(batch_time, float(busy.sum()) * replicas / self.profile.cores)
        stages = tuple(
            SimulatedStage(
                index=s,
                busy=min(1.0, float(busy[s]) / batch_time),
                work_time=float(busy[s]),
                staleness=self.schedule.staleness(s),
                in_flight=int(held[s]),
                recompute=self.recomputes[s],
                peak_bytes=self._peak(s, int(held[s])),
            )
            for s in range(k)
        )
        share = work.lines.seconds * self.schedule.parts / batch_time
        ends = zip(work.lines.source % k, work.lines.target % k, share, strict=True)
        links: dict[tuple[int, int], float] = {}
        for a, b, used in ends:
            links[int(a), int(b)] = max(float(used), links.get((int(a), int(b)), 0.0))
        return Simulation(
            schedule=self.schedule.order,
            micro_batches=self.schedule.parts,
            n_stages=k,
            replicas=replicas,
            batch_time=batch_time,
            throughput=replicas / batch_time,
            speedup=replicas * self._alone() / batch_time,
            fill_time=float(trace.ended[0].max()),
            stages=stages,
            links=tuple(SimulatedLink(a, b, used) for (a, b), used in sorted(links.items())),
            memory=self.cluster.memory,
            _over=over,
        )

    def _alone(self) -> float:
        """Seconds per mini-batch on one device of the plan's kind."""
        update = 3 + 2 * self.training.optimizer_bytes
        return sum(s.forward + s.backward + update * s.sweep for s in self.profile.stages)

    def _peak(self, stage: int, held: int) -> int:
        """Bytes at the fullest moment: as in `partitioner.stage_cost`, with so many slots in flight."""
        cost, parts = self.profile.stages[stage], self.schedule.parts
        last, recomputes = stage == self.schedule.n_stages - 1, self.recomputes[stage]
        copies = int(self.passes(stage) > 0 and (recomputes or last))
        graphs = 1 if recomputes or last else held
        versions = 0 if recomputes or last or self.schedule.exact else held
        tensors = cost.inputs * held + cost.activations + cost.kept * (graphs - 1)
        trained = cost.gradients * (1 + self.training.optimizer_bytes + copies + versions)
        tied = self.training.tied_bytes(stage, self.profile.ties)
        return int(cost.weights + trained + tied + tensors / parts)


def _costs(plan: Any) -> tuple[Profile, tuple[bool, ...] | bool, PartitionReport | None]:
    """What the stages cost, which of them recompute, and what can plan for other numbers of them."""
    if isinstance(plan, Pipeline):
        plan = plan.report
    report = plan if isinstance(plan, PartitionReport) else None
    if report is not None:
        plan = report._plan
    if isinstance(plan, Profile):
        return plan, True, None
    if not isinstance(plan, Plan):
        raise TypeError(
            f"plan must be a dtrp.Plan, a Pipeline, its report or a Profile; got {type(plan).__name__}"
        )
    if plan.replicas:
        raise ValueError(
            f"the plan has stages of several devices, {plan.replicas}, which are not simulated: "
            f"report.layouts() prices them"
        )
    if plan.profile is None:
        why = "was edited by hand" if plan.edited else "was saved by an earlier version"
        raise ValueError(
            f"the plan {why} and does not say what its stages cost: compile the model with it "
            f"(dtrp.compile(model, plan=...)) and simulate the pipeline"
        )
    return plan.profile, plan.recomputes, report


def _check_speed(cluster: Cluster, n_stages: int) -> None:
    devices = cluster.replicas * n_stages
    beyond = [d for d in cluster.speed if d >= devices]
    if beyond:
        raise ValueError(
            f"the cluster's speed names device {beyond[0]}, but {cluster.replicas} replica(s) of {n_stages} "
            f"stages are on devices 0 to {devices - 1}"
        )


def _order(training: Training, n_stages: int) -> Schedule:
    one_of("schedule", training.order, ORDERS)
    one_of("horizon", training.horizon, ("common", "stage"))
    if not isinstance(training.predicts, bool):
        raise TypeError(f"predicts={training.predicts!r}: expected True or False")
    number_of("optimizer_bytes", training.optimizer_bytes, low=0.0)
    return Schedule(training.order, n_stages, count_of("micro_batches", training.micro_batches))


def _recomputes(order: Schedule, wanted: bool | Sequence[bool]) -> tuple[bool, ...]:
    k = order.n_stages
    each = [wanted] * k if isinstance(wanted, bool) else list(wanted)
    if len(each) != k:
        raise ValueError(f"recompute has {len(each)} entries for {k} stages")
    return tuple(bool(r) and order.order != "bp" and stage < k - 1 for stage, r in enumerate(each))


def _window(order: Schedule, *, jitter: bool) -> tuple[int, int]:
    """The first mini-batch that is measured, and how many are, so that the rate is steady."""
    if order.exact:
        return 1, 32 if jitter else 2  # they are all alike
    deep = -(-order.depth(0) // order.parts)
    count = max(64, min(4 * deep, 256), 256 * jitter)
    return -(-order.n_stages // order.parts) + count // 2, count


def _events(trace: Trace, order: Schedule) -> list[Event]:
    """As a trainer notes them; a replica's stages come behind those of the one before."""
    return [
        Event(device, 0, KINDS[kind], slot // order.parts, 0, start, end, 0, 0)
        for device, kind, slot, start, end in trace.events
        if kind != RECOMPUTE or end > start
    ]
