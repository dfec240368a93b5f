"""What a run was predicted to do, beside what it did: `Trainer.report`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .partitioner.report import PartitionReport
from .partitioner.units import duration, size
from .runtime.config import TrainConfig
from .runtime.rebalance import Move
from .runtime.stats import WORK, StageStats

_PARTS = ("forward", "recompute", "backward", "step", "transfer", "loop")
_PROCESS = (
    "Memory measured on the CPU is all that the process took, what libraries keep for themselves included."
)
_SHORT = 0.25  # of a tick that the loop takes: from there on ticks are short
_IDLE = 0.15  # of the time of the busiest stage: from there on something else than stages limits
_OFF = 0.15  # by which a stage may miss its prediction before that is worth a word


@dataclass(frozen=True)
class StageOutcome:
    """One stage, predicted beside measured; times in seconds, sizes in bytes.

    Attributes
    ----------
    predicted_tick, measured_tick : float
        Seconds of work per batch, the loop's own included.
    predicted, measured : mapping of str to float
        What they are made of: ``forward``, ``recompute``, ``backward``, ``step``, ``transfer`` (copying in
        and out; on CUDA it goes on beside), ``loop`` (the runtime's own, and predicting weights).
    busy, idle : float
        Shares of the time since the first batch in which the stage worked, and did nothing.
    waiting : float
        The part of ``idle`` in which it waited for other stages; the rest is for the caller's next batch.
    predicted_bytes : int
    peak_bytes : int or None
        What the stage added to its process at most (on the CPU with what libraries load and keep for
        themselves, 150 MB or so); ``None`` where stages share one process.
    staleness : int
        Updates between the two passes of a batch.
    """

    index: int
    device: str
    predicted_tick: float
    measured_tick: float
    predicted: Mapping[str, float]
    measured: Mapping[str, float]
    busy: float
    idle: float
    waiting: float
    predicted_bytes: int
    peak_bytes: int | None
    staleness: int


@dataclass(frozen=True)
class TrainingReport:
    """Predicted beside measured, for a run so far.

    Attributes
    ----------
    stages : tuple of StageOutcome
    predicted_time, measured_time : float
        Seconds per batch of the whole pipeline. Measured: while no batch of the caller's was waited for.
    balance : float
        Mean over maximum of the stages' measured ticks; 1 is perfect.
    limit : str
        What keeps it from being faster.
    advice : tuple of str
        What to try.
    moves : tuple of Move
        When the cuts were moved, and what for. What is measured begins with the last one.
    """

    model: str
    executor: str
    stages: tuple[StageOutcome, ...]
    predicted_time: float
    measured_time: float
    balance: float
    limit: str
    advice: tuple[str, ...]
    moves: tuple[Move, ...] = ()

    @classmethod
    def of(
        cls,
        report: PartitionReport,
        stats: Sequence[StageStats],
        config: TrainConfig,
        parts: int,
        executor: str,
        cores: float,
        moves: Sequence[Move] = (),
    ) -> TrainingReport:
        """From the plan's report, priced for this training, and what the stages measured.

        ``parts``: micro-batches of a batch. ``cores``: how many stages compute at a time where they share
        cores; 0: all.
        """
        stages = tuple(_outcome(report, k, one, config, parts, executor) for k, one in enumerate(stats))
        ticks = [s.measured_tick for s in stages]
        alone = executor == "inline"
        rounds = [_round(one) * parts for one in stats]
        measured = sum(ticks) if alone else max(rounds)
        limit, advice = _judgement(stages, ticks, report, alone=alone, cores=cores)
        return cls(
            model=report.model,
            executor=executor,
            stages=stages,
            predicted_time=sum(s.predicted_tick for s in stages) if alone else report.tick_time,
            measured_time=measured,
            balance=sum(ticks) / len(ticks) / max(ticks) if max(ticks) > 0 else 1.0,
            limit=limit,
            advice=advice,
            moves=tuple(moves),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        plain = dataclasses.asdict(dataclasses.replace(self, moves=()))
        return {**plain, "moves": [{k: v for k, v in vars(m).items() if k != "cut"} for m in self.moves]}

    def __str__(self) -> str:
        from .partitioner.report_text import open_table, printed

        table = open_table()
        times = ("tick: predicted", "measured", "busy", "waits", "caller")
        for name in ("stage", "device", *times, "memory: predicted", "measured", "stale by"):
            long = ":" in name
            table.add_column(
                name,
                justify="left" if name == "device" else "right",
                no_wrap=not long,
                min_width=9 if long else None,
            )
        for s in self.stages:
            table.add_row(
                str(s.index),
                s.device,
                duration(s.predicted_tick),
                duration(s.measured_tick),
                f"{s.busy:.0%}",
                f"{s.waiting:.0%}",
                f"{max(0.0, s.idle - s.waiting):.0%}",
                size(s.predicted_bytes),
                "shared" if s.peak_bytes is None else size(s.peak_bytes),
                str(s.staleness),
            )
        return printed(
            f"{self.model}, {len(self.stages)} stages, {self.executor}: one batch per "
            f"{duration(self.measured_time)}, predicted {duration(self.predicted_time)}",
            table,
            f"balance {self.balance:.3f}   {self.limit}",
            *([_PROCESS] if any(s.device == "cpu" and s.peak_bytes for s in self.stages) else []),
            *(f"Try: {line}" for line in self.advice),
            *(f"Moved {move}" for move in self.moves),
        )

    __repr__ = __str__  # at a prompt, too


def work_per_batch(stats: StageStats, parts: float) -> dict[str, float]:
    """Seconds of each kind of work per batch, from how long one piece takes: rounds that only filled or
    drained the pipeline do not count as batches."""
    seconds = {kind: stats.mean(kind) * parts for kind in _PARTS}
    batches = max(1, stats.counts.get("forward", 0)) / parts
    seconds["transfer"] = (stats.seconds.get("send", 0.0) + stats.seconds.get("receive", 0.0)) / batches
    seconds["step"] = stats.seconds.get("step", 0.0) / max(1, stats.counts.get("backward", 0)) * parts
    return seconds


def _outcome(
    report: PartitionReport, k: int, stats: StageStats, config: TrainConfig, parts: int, executor: str
) -> StageOutcome:
    planned, schedule = report.stages[k], config.schedule(report.n_stages)
    devices = config.replicas[k] if config.replicas else 1
    measured = work_per_batch(stats, parts / devices)
    time = planned.time
    predicted = {
        "forward": time["forward"],
        "recompute": time["recompute"],
        "backward": time["backward"],
        "step": time["update"],
        "transfer": 0.0 if report.overlaps else time["transfer"],
        "loop": time["loop"] + time["prediction"],
    }
    tick = sum(measured.values())
    work = sum(stats.seconds.get(kind, 0.0) for kind in WORK)
    wall = work / stats.busy if stats.busy else 0.0
    share = {kind: stats.seconds.get(kind, 0.0) / wall if wall else 0.0 for kind in ("loop", "wait")}
    in_one = executor == "inline" and report.n_stages > 1
    return StageOutcome(
        index=k,
        device=stats.device,
        predicted_tick=planned.tick_time,
        measured_tick=tick,
        predicted=predicted,
        measured=measured,
        busy=stats.busy,
        idle=max(0.0, 1.0 - stats.busy - share["loop"]),
        waiting=min(1.0, share["wait"]),
        predicted_bytes=planned.peak_bytes,
        peak_bytes=None if in_one else max(0, stats.peak_memory - stats.memory_before),
        staleness=-(-schedule.staleness(k) // config.accumulate),
    )


def _round(stats: StageStats) -> float:
    """Seconds from tick to tick, waiting for other stages included, for the caller not."""
    return sum(stats.seconds.get(kind, 0.0) for kind in (*WORK, "wait", "loop")) / max(1, stats.ticks)


def _judgement(
    stages: Sequence[StageOutcome],
    ticks: Sequence[float],
    report: PartitionReport,
    *,
    alone: bool,
    cores: float,
) -> tuple[str, tuple[str, ...]]:
    """What limits, and what to try."""
    slowest = max(range(len(ticks)), key=ticks.__getitem__)
    stage, advice = stages[slowest], []
    if stage.measured["loop"] > _SHORT * stage.measured_tick:
        advice.append(
            f"larger batches, or fewer stages: the loop's own {duration(stage.measured['loop'])} are "
            f"{stage.measured['loop'] / stage.measured_tick:.0%} of stage {slowest}'s tick"
        )
    off = stage.measured_tick / stage.predicted_tick - 1 if stage.predicted_tick > 0 else 0.0
    if abs(off) > _OFF and report.costs == "analytic":
        advice.append(
            f"dtrp.compile(costs='measured'): stage {slowest} was predicted {duration(stage.predicted_tick)}"
        )
    if len(stages) == 1:
        return "One stage does all the work.", tuple(advice)
    if alone:
        return "Stages take turns in this process: the sum of their ticks counts.", (
            *advice,
            "executor='workers'",
        )
    if cores and sum(ticks) / cores > max(ticks):
        advice.append(f"n_gpus={max(1, int(cores))}: more stages than cores only add work")
        return f"{len(stages)} stages share {cores:g} cores: the sum of their ticks counts.", tuple(advice)
    caller = min(s.idle - s.waiting for s in stages)
    if caller > _IDLE:
        return "Stages wait for the caller's batches.", (
            "a DataLoader with num_workers, or less work between two steps",
            *advice,
        )
    transfer = stage.measured["transfer"]
    if transfer > _SHORT * stage.measured_tick:
        return f"Stage {slowest} sends and receives for {transfer / stage.measured_tick:.0%} of its tick.", (
            "bandwidth=... as it is between these devices, so that cuts fall where less is sent",
            *advice,
        )
    return (
        f"Stage {slowest} is the slowest: {duration(stage.measured_tick)} per batch, of which "
        f"{_most(stage.measured)}.",
        tuple(advice),
    )


def _most(parts: Mapping[str, float]) -> str:
    kind = max(parts, key=lambda k: parts[k])
    return f"{duration(parts[kind])} {kind}"
