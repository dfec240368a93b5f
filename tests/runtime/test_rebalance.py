"""Moving the cuts during a run, against the run that was saved there and loaded under the other plan."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

import dtrp
from dtrp import planning
from dtrp.partitioner.feedback import StageTimes, corrected
from dtrp.partitioner.stage_cost import stage_costs
from dtrp.partitioner.training import Training
from dtrp.runtime import rebalance
from dtrp.runtime.rebalance import Move
from dtrp.runtime.workers import Workers

from .toys import SGD, batches, compiled, cross_entropy, mlp, same, trainer

AT = 7  # batches before the move
KNOBS: dict[str, Any] = {"lr_scheduler": partial(ExponentialLR, gamma=0.9)}


@cache
def two_plans(n_stages: int = 2) -> tuple[dtrp.Plan, dtrp.Plan]:
    """What the planner says, and the same with one block more in stage 0."""
    plan = compiled(n_stages=n_stages).plan
    first = next(node for node, stage in plan.stage_of.items() if stage == 1)
    other = plan.pin(plan.modules[first], 0)
    assert other.stage_of != plan.stage_of
    return plan, other


def moved(executor: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Tensor], list[float]]:
    """A run whose cuts are moved once; its report, weights and losses."""
    plan, other = two_plans()

    def decide(made: Any, request: Any, stats: Any) -> Move | None:
        if made.plan.stage_of == other.stage_of:
            return None
        return Move((2.0, 1.0), (1.5, 1.5), 200.0, 150.0, 3, (made.graph, other, request.training))

    monkeypatch.setattr(planning, "better_cut", decide)
    model = mlp()
    pipe = compiled(model, plan=plan)
    with trainer(pipe, executor, rebalance=AT, **KNOBS) as t:
        for i, (x, y) in enumerate(batches(16)):
            loss = t.step(x, y)
            assert (i + 1 != AT) or (
                loss == t.losses[-1] and len(t.losses) == AT
            )  # drained, nothing told twice
        t.flush()
        report = t.report
        losses = list(t.losses)
    assert pipe.plan.stage_of == other.stage_of
    return report, model.state_dict(), losses


def saved_and_loaded(path: Path) -> tuple[dict[str, Tensor], list[float]]:
    """The same by way of a file."""
    plan, other = two_plans()
    data = batches(16)
    with trainer(compiled(plan=plan), **KNOBS) as t:
        for x, y in data[:AT]:
            t.step(x, y)
        t.save(path)
    model = mlp()
    with trainer(compiled(model, plan=other), **KNOBS) as t:
        t.load(path)
        for x, y in data[AT:]:
            t.step(x, y)
        t.flush()
        return model.state_dict(), list(t.losses)


@pytest.mark.parametrize("executor", ["inline", "workers"])
def test_a_move_is_a_save_and_a_load(
    executor: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights, running statistics, momentum, the scheduler and dropout's masks go on as if from a file."""
    with caplog.at_level(logging.INFO, "dtrp"):
        report, weights, losses = moved(executor, monkeypatch)
    expected, their_losses = saved_and_loaded(tmp_path / "run.ckpt")
    assert same(weights, expected)
    assert losses == their_losses
    assert len(losses) == 16
    (move,) = report.moves
    assert move.batch == AT
    text = "after batch 7: 3 nodes to other stages, from 2e+05 ms per batch (2e+03 + 1e+03)"
    assert text in str(report)
    assert text in caplog.text
    assert report.to_dict()["moves"][0]["seconds_after"] == 150.0


@pytest.mark.slow
def test_a_move_to_new_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the new cut sends between stages that have no line."""
    monkeypatch.setattr(Workers, "renew", lambda *_: False)
    _, weights, losses = moved("workers", monkeypatch)
    assert (same(weights, saved_and_loaded(tmp_path / "r")[0]), len(losses)) == (True, 16)


@torch.library.custom_op("dtrp_tests::slow", mutates_args=())
def slow(x: Tensor) -> Tensor:
    time.sleep(0.004)
    return x.clone()


slow.register_fake(lambda x: torch.empty_like(x))
slow.register_autograd(lambda ctx, g: g)


class Slow(nn.Module):
    """Takes longer than its FLOPs and bytes tell."""

    def forward(self, x: Tensor) -> Tensor:
        return slow(x)


def test_what_takes_longer_than_was_planned_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The roofline knows nothing of waiting: four slow layers lie in one stage, until they are looked at."""
    monkeypatch.setattr(rebalance, "A_MOVE", 0.0)
    slow_ones = (nn.Sequential(nn.Linear(8, 8), Slow()) for _ in range(4))
    model = nn.Sequential(*slow_ones, *(nn.Linear(8, 8) for _ in range(6)), nn.Linear(8, 3))
    pipe = compiled(model, recompute=False)
    before = pipe.plan
    with trainer(pipe, rebalance=8) as t:
        for x, y in batches(20):
            t.step(x, y)
        report = t.report
    assert report.moves
    assert report.moves[0].seconds_after < 0.8 * report.moves[0].seconds_before
    assert pipe.plan.stage_of != before.stage_of
    assert report.balance > 0.7  # from 0.53
    assert len(t.losses) == 20


@pytest.mark.parametrize("parts", [1, 4])
def test_costs_that_are_corrected_give_what_was_measured(parts: int) -> None:
    """The same stages under the corrected costs take, to the last part, what they were seen to take; what
    parts of a batch cost is in there, and does not count again."""
    pipe = compiled(n_stages=3, recompute=True)
    training = Training(1.0, micro_batches=parts, known=True)
    times = [
        StageTimes(3.0, 5.0, 0.5, 0.25, 1.0),
        StageTimes(1.0, 2.0, 0.25, 0.5, 1.0),
        StageTimes(2.0 + 0.5, 1.0 + 0.5, 0.25, 0.25, 1.0, loss=0.5),
    ]
    graph, priced = corrected(pipe.graph, pipe.plan, times, training)
    new = stage_costs(graph, pipe.plan.stage_of, pipe.plan.recompute, training=priced)
    for cost, seen in zip(new, times, strict=True):
        assert cost.forward == pytest.approx(seen.forward)
        assert cost.backward == pytest.approx(seen.backward)
        assert cost.update == pytest.approx(seen.update)
        assert cost.loop + sum(c.prediction for c in new) / 3 == pytest.approx(1.0)
    more, fewer = (
        stage_costs(
            graph, pipe.plan.stage_of, pipe.plan.recompute, training=replace(priced, micro_batches=n)
        )[0]
        for n in (2 * parts, 1)
    )
    assert more.loop == pytest.approx(new[0].loop + parts * new[0].slot)
    assert fewer.loop == new[0].loop  # at least
    assert (
        pipe.graph.nodes["_0"]["forward_time"] != graph.nodes["_0"]["forward_time"]
    )  # the old one is as it was


def test_no_move_where_none_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it would not pay back: in the last batches of a run."""
    asked = []

    def decide(made: Any, request: Any, stats: Any) -> Move | None:
        asked.append([s.ticks for s in stats])
        return Move((2.0, 1.0), (1.5, 1.5), 0.2, 0.15, 3, None)  # 50 ms a batch: 100 batches pay for a move

    monkeypatch.setattr(planning, "better_cut", decide)
    with trainer(compiled(), rebalance=4) as t:
        t.fit(batches(9), epochs=1)
        assert not t.report.moves
    assert len(asked) == 2
    assert all(n > 0 for ticks in asked for n in ticks)


def test_auto_looks_late_and_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short runs, inline ones and those under a given plan keep their cuts, and so their bits."""
    looks = []
    monkeypatch.setattr(planning, "better_cut", lambda *a: looks.append(a))
    for executor, plan in (("inline", None), ("workers", two_plans()[0])):
        with monkeypatch.context() as patch:
            for name in ("WARM_UP", "FIRST", "LATER"):
                patch.setattr(rebalance, name, (1, 0.0))
            with trainer(compiled(plan=plan), executor) as t:
                for x, y in batches(8):
                    t.step(x, y)
    with trainer(compiled(), "workers") as t:
        for x, y in batches(30):
            t.step(x, y)
        assert looks == []
        for name in ("WARM_UP", "FIRST", "LATER"):
            monkeypatch.setattr(rebalance, name, (1, 0.0))
        for x, y in batches(2):
            t.step(x, y)
    assert len(looks) == 1


@pytest.mark.parametrize("value", [True, 1, -3, "yes", 2.5, None])
def test_what_rebalance_may_be(value: Any) -> None:
    with pytest.raises(ValueError, match=r"rebalance=.*expected 'auto', False, or after how many batches"):
        compiled().trainer(cross_entropy, SGD, rebalance=value)


def test_a_plan_that_cannot_be_made_leaves_the_run_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise dtrp.InfeasiblePlanError("no")

    monkeypatch.setattr(planning, "better_cut", fails)
    with trainer(compiled(), rebalance=4) as t:
        for x, y in batches(10):
            t.step(x, y)
    assert len(t.losses) == 10
    assert caplog.text.count("no other cut is looked for any more: no") == 1
