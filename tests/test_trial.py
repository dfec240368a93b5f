"""Costs from stages that run (``costs="measured"``): they come true, and trying leaves no trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrp
from dtrp import trial
from dtrp.partitioner.feedback import StageTimes
from dtrp.runtime.config import TrainConfig

from .runtime.toys import SGD, batches, mlp, same, trainer


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def measured(model: nn.Module, n_stages: int = 2) -> dtrp.Pipeline:
    devices = ["cpu"] * n_stages
    return dtrp.compile(model, example_inputs=torch.randn(4, 8), devices=devices, costs="measured")


def test_costs_of_running_stages_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first stage that takes ten times what its nodes took alone is made smaller; a second look agrees."""
    seen: list[Any] = []

    def run(made: Any, *_: Any) -> list[StageTimes]:
        seen.append(made.plan.stage_of)
        first = sum(made.graph.nodes[n]["forward_time"] for n, k in made.plan.stage_of.items() if k == 0)
        slow = 10.0 if len(seen) == 1 else 1.0
        return [StageTimes(slow * first, 2 * slow * first, 0, 0, 0), StageTimes(first, 2 * first, 0, 0, 0)]

    monkeypatch.setattr(trial, "_times", run)
    pipe = measured(mlp(8))
    assert len(seen) == 2
    assert sum(k == 0 for k in pipe.plan.stage_of.values()) < sum(k == 0 for k in seen[0].values())
    assert pipe.report.costs == "measured"


class Mixed(nn.Module):
    """Of the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize("whole", [False, True])
def test_tried_as_it_will_be_trained(monkeypatch: pytest.MonkeyPatch, *, whole: bool) -> None:
    """In the order and the parts that a trainer chooses: some of a model is cheaper in parts that fit the
    caches, so that whole batches would give another cut. The trainer's report then says the tick that was
    measured; and what the measured costs make it choose otherwise is tried too."""
    seen: list[TrainConfig] = []

    def run(made: Any, request: Any, model: Any, inputs: Any, config: TrainConfig) -> list[StageTimes]:
        seen.append(config)
        return [StageTimes(4.0, 5.997, 1e-3, 1e-3, 1e-3)] * 2

    monkeypatch.setattr(trial, "_times", run)
    layers = [nn.Linear(512, 512), nn.Linear(512, 512)]
    model = nn.Sequential(layers[0], Mixed() if whole else nn.Tanh(), layers[1])
    x = torch.randn(256, 512)
    pipe = dtrp.compile(model, example_inputs=x, devices=["cpu"] * 2, costs="measured")
    assert (seen[-1].parts == 1) == whole
    assert len(seen) == len({(one.order, one.parts) for one in seen})
    with pipe.trainer(F.mse_loss, SGD, threads=1) as t:
        t.step(x, torch.randn(256, 512))
        assert (t.config.order, t.config.parts) == (seen[-1].order, seen[-1].parts)
        assert [stage.predicted_tick for stage in t.report.stages] == pytest.approx([10.0, 10.0])


def test_a_single_stage_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed node by node, MobileNetV3 was predicted at twice its time."""
    monkeypatch.setattr(trial, "_times", lambda *_: [StageTimes(3.0, 5.0, 0, 0, 0)])
    assert measured(mlp(2), 1).report.tick_time > 8.0


def test_a_burst_of_something_else_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """One window of several, in which another process had the memory: it would be held against a stage."""
    monkeypatch.setattr(trial, "_run", lambda *_: [[5.0], [1.0], [1.2]])
    monkeypatch.setattr(trial, "stage_times", lambda seconds, *_, **__: StageTimes(seconds, 1.0, 0, 0, 0))
    assert 2.2 <= measured(mlp(2), 1).report.tick_time < 3.0


def test_stages_that_cannot_be_tried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Costs are then those of single nodes, and the log says why."""

    def run(*_: Any) -> None:
        raise TypeError("a lock cannot be sent")

    monkeypatch.setattr(trial, "_run", run)
    assert measured(mlp(2)).report.tick_time > 0
    assert "stages could not be tried out, costs are those of nodes run one by one: a lock" in caplog.text


@pytest.mark.slow
def test_trying_leaves_no_trace_and_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, running statistics, modes and generators are as before; the second compile reads the cache. A
    run under the plan takes, by the clock of its processes, what was predicted, within what noise allows."""
    model = mlp(4)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    torch.manual_seed(3)
    x = torch.randn(4, 8)
    state = torch.get_rng_state()
    pipe = dtrp.compile(model, 2, example_inputs=x, devices=["cpu"] * 2, costs="measured")
    assert same(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    with trainer(pipe, "workers", rebalance=False, micro_batches=1) as t:
        for x, y in batches(100):
            t.step(x, y)
        spent = [s.cpu_time / s.ticks for s in t.stats]
    for stage, seconds in zip(pipe.report.stages, spent, strict=True):
        assert 0.4 < seconds / stage.tick_time < 2.5
    monkeypatch.setattr(trial, "_run", None)
    again = dtrp.compile(mlp(4), 2, example_inputs=x, devices=["cpu"] * 2, costs="measured")
    assert again.plan.stage_of == pipe.plan.stage_of
