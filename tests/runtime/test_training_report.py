"""`Trainer.report`: the plan's figures beside the run's own, against its counters and the schedule."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dtrp import loop_cost
from dtrp.loop_cost import loop_cost as measured_loop_cost
from dtrp.partitioner import calibration
from dtrp.partitioner.devices import LoopCost
from dtrp.partitioner.stage_cost import stage_costs
from dtrp.partitioner.training import Training
from dtrp.runtime.meter import Meter
from dtrp.runtime.optim import OptimizerKind

from .toys import ADAMW, SGD, batches, compiled, mlp, trainer


def test_report_says_what_was_predicted_and_what_was() -> None:
    """Fails if a kind of work is counted twice, or in the wrong stage: their sum is the rounds' time without
    waiting, as the stages' own counters have it."""
    pipe = compiled(n_stages=3, recompute=True)
    with trainer(pipe) as t:
        with pytest.raises(RuntimeError, match="needs some batches"):
            _ = t.report
        for x, y in batches(12):
            t.step(x, y)
        report, stats = t.report, t.stats  # in the middle
        for x, y in batches(3):
            t.step(x, y)
    after = t.report
    assert [s.staleness for s in after.stages] == [3, 1, 0]  # 2(K-k) - 1
    assert [s.predicted_tick for s in after.stages] == [s.tick_time for s in pipe.report.stages]
    assert all(set(s.predicted) == set(s.measured) for s in after.stages)
    assert [s.measured["recompute"] > 0 for s in after.stages] == [True, True, False]
    for stage, s in zip(report.stages, stats, strict=True):
        work = sum(v for kind, v in s.seconds.items() if kind not in ("wait", "loss")) / s.counts["forward"]
        assert stage.measured_tick == pytest.approx(work, rel=0.5)  # filling and draining are not batches
        assert 0 < stage.busy <= 1
        assert 0 <= stage.idle < 1
        assert stage.peak_bytes is None  # one process
    assert after.measured_time == pytest.approx(sum(s.measured_tick for s in after.stages))
    assert "take turns" in after.limit
    assert "executor='workers'" in str(after)
    assert json.loads(json.dumps(after.to_dict()))["stages"][2]["staleness"] == 0


@pytest.mark.parametrize("columns", [80, 100])
def test_report_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    with trainer(compiled(n_stages=2)) as t:
        for x, y in batches(4):
            t.step(x, y)
        report = t.report
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= columns
    heads = "stage device predicted measured busy waits caller predicted measured stale by"
    assert heads in " ".join(" ".join(lines).replace("tick:", "").replace("memory:", "").split())
    assert [len(line.split()) for line in lines if line.split()[1:2] == ["cpu"]] == [13, 13]  # with units


def test_a_wait_is_never_shorter_than_nothing() -> None:
    """Its two clocks differ in their steps: by hand, one of them has gone a second ahead."""
    meter = Meter(0, 2, torch.device("cpu"), record=False)
    meter.waited((time.perf_counter(), time.thread_time() - 1))
    assert meter.stats().wait_time >= 0


def test_report_of_workers() -> None:
    with trainer(compiled(n_stages=2), "workers", micro_batches=2, schedule="lean") as t:
        for x, y in batches(8):
            t.step(x, y)
        report = t.report
    assert report.executor == "workers"
    assert all(s.peak_bytes is not None and s.peak_bytes < 2**30 for s in report.stages)
    assert report.measured_time >= max(s.measured_tick for s in report.stages) * 0.5
    assert "Memory measured on the CPU is all that the process took" in str(report)


@pytest.mark.parametrize(
    ("optimizer", "held", "adaptive"),
    [
        (torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.0), 0.0, False),
        (SGD([nn.Parameter(torch.zeros(2))]), 1.0, False),
        (ADAMW([nn.Parameter(torch.zeros(2))]), 2.0, True),
        (torch.optim.AdamW([nn.Parameter(torch.zeros(2))], amsgrad=True), 3.0, True),
        (torch.optim.Muon([nn.Parameter(torch.zeros(2, 2))]), 1.0, False),
        (torch.optim.LBFGS([nn.Parameter(torch.zeros(2))]), 2.0, True),  # whose step wants a closure
    ],
)
def test_what_planning_knows_of_an_optimizer(
    optimizer: torch.optim.Optimizer, held: float, adaptive: bool
) -> None:
    """Memory is planned by the one, micro-batches by the other."""
    assert OptimizerKind.of(optimizer) == (held, adaptive, False)


def test_the_report_is_priced_again_for_the_optimizer_that_is_used() -> None:
    """SGD with momentum keeps half of what Adam does, which is assumed before."""
    pipe = compiled(n_stages=2)
    before = [s.memory["optimizer"] for s in pipe.report.stages]
    assert any("not known yet" in note for note in pipe.report.notes)
    with trainer(pipe):
        after = [s.memory["optimizer"] for s in pipe.report.stages]
    assert after == [b // 2 for b in before]
    assert not any("not known yet" in note for note in pipe.report.notes)


def test_more_stages_than_cores_are_priced_by_their_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without that, four stages on two cores are promised to be four times as fast as one."""
    fixed = calibration.calibrate
    monkeypatch.setattr(calibration, "calibrate", lambda *a: replace(fixed(*a), cores=2, threads=1))
    report = compiled(mlp(8), 4).report
    ticks = [s.tick_time for s in report.stages]
    assert report.tick_time == pytest.approx(sum(ticks) / 2)
    assert report.speedup <= 2
    assert report.lower_bound <= report.tick_time
    assert "runs 2 at a time" in report.reason
    assert "gap - (cores are shared)" in str(report)
    assert compiled(mlp(8), 2).report.tick_time == pytest.approx(
        max(s.tick_time for s in compiled(mlp(8), 2).report.stages)
    )


def test_exact_orders_are_priced_with_their_filling() -> None:
    """M parts through K stages take M + K - 1 times a part's time where stages are even."""
    assert Training(order="1f1b", micro_batches=4).batch_time([4.0, 4.0]) == 5.0
    assert Training(order="bp").batch_time([4.0, 4.0]) == 8.0
    assert Training(order="lean", micro_batches=4).batch_time([4.0, 3.0]) == 4.0


def test_what_the_runtime_costs_is_measured_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stage with nothing to compute takes some microseconds to some milliseconds per tick, a message's
    bytes are copied. The second look reads the file. Generators are left alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(0)
    with torch.no_grad():
        cost = measured_loop_cost.__wrapped__()
    assert 1e-5 < cost.tick < 0.05
    assert 1e-7 < cost.latency < 0.01
    assert 1e8 < cost.bandwidth < 1e12
    monkeypatch.setattr(loop_cost, "_measure", None)
    assert measured_loop_cost.__wrapped__() == cost
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(0)))


def test_the_loops_cost_is_in_the_tick() -> None:
    """Without it many tiny stages look as fast as few."""
    spec = compiled().graph.graph["specs"][0]
    slow = spec.with_loop(LoopCost(tick=0.5, latency=0.0, bandwidth=1e9))
    graph = compiled().graph.copy()
    graph.graph["specs"] = (slow,)
    costs = stage_costs(graph, dict.fromkeys(graph, 0), (False,), training=Training(micro_batches=2))
    assert costs[0].loop == pytest.approx(1.0, rel=0.01)
    assert costs[0].tick > 1.0
