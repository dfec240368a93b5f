"""Lean, 1f1b, gpipe and micro-batches in running trainers, and what a trainer says of itself."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

import dtrp
from dtrp.partitioner.training import Training
from dtrp.runtime.predictors import Adam
from dtrp.schedule import Action, Schedule
from tests.sweeps import each_once

from .inside import kept_versions, stages
from .toys import ADAMW, SGD, batches, compiled, mlp, same, trainer

either = pytest.mark.parametrize("executor", ["inline", pytest.param("workers", marks=pytest.mark.slow)])


def calm() -> nn.Module:
    return mlp(3, dropout=0.0, norm=False)


def plain(
    model: nn.Module, data: Any, optimizer: Any = SGD, parts: int = 1, clip: float | None = None
) -> list[float]:
    """The loop that everybody writes, each batch in parts."""
    opt = optimizer(model.parameters())
    losses = []
    for x, y in data:
        total = 0.0
        for part_x, part_y in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
            if len(part_x):
                share = len(part_x) / len(x)
                loss = F.cross_entropy(model(part_x), part_y) * share
                loss.backward()
                total += loss.item()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        opt.zero_grad()
        losses.append(total)
    return losses


def close(model: nn.Module, twin: nn.Module) -> None:
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


# --- Exact orders -----------------------------------------------------------------------------------------


@either
@pytest.mark.parametrize("method", ["1f1b", "gpipe"])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("n_stages", [1, 2, 4])
def test_exact_orders_are_back_propagation(n_stages: int, parts: int, method: str, executor: str) -> None:
    model, twin = calm(), calm()
    with trainer(compiled(model, n_stages), executor, method=method, micro_batches=parts) as t:
        for x, y in batches(10, size=8):
            t.step(x, y)
        t.flush()
        losses = t.losses
        assert t.updates == 10
    assert losses == pytest.approx(plain(twin, batches(10, size=8), parts=parts), rel=1e-5)
    close(model, twin)


@pytest.mark.slow
def test_gpipe_has_places_for_all_its_parts() -> None:
    """The last stage sends gradients of parts while the first still sends others: with three places in each
    direction, payloads that go through shared memory made both wait for ever."""
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    pipe = dtrp.compile(model, 2, example_inputs=torch.randn(192, 256))
    with trainer(pipe, "workers", method="gpipe", micro_batches=12, watchdog=10.0) as t:
        t.step(torch.randn(192, 256), torch.randint(0, 256, (192,)))
        t.flush()
        assert len(t.losses) == 1


@pytest.mark.parametrize("method", ["bp", "1f1b", "gpipe"])
def test_with_batch_norm_too(method: str) -> None:
    """Its statistics are those of the parts, in their order, once each."""
    model, twin = mlp(3, dropout=0.0), mlp(3, dropout=0.0)
    with trainer(compiled(model, 3, recompute=True), method=method, micro_batches=2) as t:
        for x, y in batches(6, size=8):
            t.step(x, y)
    plain(twin, batches(6, size=8), parts=2)
    close(model, twin)


@pytest.mark.parametrize("method", ["1f1b", "gpipe", "dtrp"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_batches_that_parts_do_not_divide(size: int, method: str) -> None:
    """The mean over the mini-batch, whatever its parts; no more parts than samples."""
    model, twin = calm(), calm()
    n_stages = 1 if method == "dtrp" else 3
    data = [*batches(3, size=8), *batches(2, size=size), *batches(2, size=8)]
    with trainer(compiled(model, n_stages), method=method, micro_batches=4) as t:
        for x, y in data:
            t.step(x, y)
        t.flush()
        losses = t.losses
    assert losses == pytest.approx(plain(twin, data), rel=1e-5)
    close(model, twin)


@pytest.mark.parametrize("method", ["1f1b", "gpipe"])
@pytest.mark.parametrize("n_stages", [1, 3])
def test_exact_orders_clip_by_the_norm_of_the_mini_batch(n_stages: int, method: str) -> None:
    model, twin = calm(), calm()
    with trainer(compiled(model, n_stages), method=method, micro_batches=2, max_grad_norm=0.3) as t:
        for x, y in batches(8, size=8):
            t.step(x, y)
    plain(twin, batches(8, size=8), parts=2, clip=0.3)
    close(model, twin)


# --- Decoupled orders -------------------------------------------------------------------------------------

ORDERS: dict[str, dict[str, Any]] = {
    "lean": {"schedule": "lean"},
    "lean, parts": {"schedule": "lean", "micro_batches": 2},
    "fig1, parts": {"micro_batches": 4},
    "lean, stage, AdamW": {"schedule": "lean", "horizon": "stage", "optimizer": ADAMW},
    "parts, AdamW": {"schedule": "lean", "micro_batches": 4, "optimizer": ADAMW},
    "parts, AdamW, clip": {"micro_batches": 3, "optimizer": ADAMW, "max_grad_norm": 0.05},
    "groups of parts, AdamW": {"micro_batches": 2, "accumulate": 3, "optimizer": ADAMW},
    "lean, fdg": {"schedule": "lean", "method": "fdg"},
    "lean, clip": {"schedule": "lean", "max_grad_norm": 0.5},
    "parts, clip": {"micro_batches": 2, "max_grad_norm": 0.5},
    "lag": {"max_grad_norm": 0.5, "max_grad_norm_lag": True},
    "lean, lag": {"schedule": "lean", "max_grad_norm": 0.5, "max_grad_norm_lag": True},
    "groups of parts": {"micro_batches": 2, "accumulate": 3},
    "exact start": {"exact_start": 5},
    "1f1b": {"method": "1f1b", "micro_batches": 3},
    "gpipe": {"method": "gpipe", "micro_batches": 3},
}


@pytest.mark.parametrize(("n_stages", "name"), each_once([1, 2, 4], list(ORDERS)))
def test_every_batch_is_trained_once(n_stages: int, name: str) -> None:
    model = mlp()
    with trainer(compiled(model, n_stages), **ORDERS[name]) as t:
        for x, y in [*batches(17, size=12), *batches(1, size=8)]:
            t.step(x, y)
        t.flush()
        assert len(t.losses) == 18
        assert all(math.isfinite(loss) for loss in t.losses)
        assert t.updates == (6 if "groups" in name else 18)
        parts = ORDERS[name].get("micro_batches", 1)
        assert int(model.state_dict()["1.num_batches_tracked"]) == 18 * parts


@pytest.mark.slow
@pytest.mark.parametrize("name", ORDERS)
def test_workers_as_inline(name: str) -> None:
    found = []
    for executor in ("inline", "workers"):
        model = mlp()
        with trainer(compiled(model, 3, recompute=True), executor, **ORDERS[name]) as t:
            for x, y in [*batches(15, size=12), *batches(1, size=8)]:
                t.step(x, y)
            t.flush()
            for x, y in batches(4, size=12, seed=4):
                t.step(x, y)
            t.flush()
            found.append((t.losses, t.grad_norm, t.lr, t.updates))
        found.append(model.state_dict())
    assert found[0] == found[2]
    assert same(found[1], found[3])


@pytest.mark.parametrize(("order", "held"), [("fig1", [6, 4, 2]), ("lean", [4, 3, 2])])
def test_what_is_held(order: str, held: list[int]) -> None:
    with trainer(compiled(n_stages=4, recompute=True), schedule=order) as t:
        for x, y in batches(20):
            t.step(x, y)
        t.flush()
        assert [s.most_stashed for s in t.stats][:3] == held


@pytest.mark.parametrize(
    ("parts", "order", "adaptive"), each_once([1, 2, 3, 4, 6], ["fig1", "lean"], [False, True])
)
def test_micro_batches_share_versions_of_the_weights(adaptive: bool, order: str, parts: int) -> None:
    """With one for each graph, memory would grow with the parts; with fewer than the planner counts on, a
    graph would be on weights that have changed."""
    model, x = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), torch.randn(12, 4)
    pipe = dtrp.compile(model, 4, example_inputs=x, recompute=False)
    optimizer = partial(torch.optim.Adam, lr=0.1) if adaptive else SGD
    with pipe.trainer(
        F.mse_loss, optimizer, executor="inline", schedule=order, micro_batches=parts, rebalance=False
    ) as trainer:
        for _ in range(20):
            trainer.step(x, x)
        found = [kept_versions(stage) for stage in stages(trainer)]
    training = Training(order=order, micro_batches=parts, adaptive=adaptive)
    assert found == [training.versions(k, 4, recompute=False) for k in range(4)]


class Recorded(Adam):
    """Notes what it is asked of the first layer."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, bool]] = []

    def write(self, targets: Any, weights: Any, group: Any, states: Any, s: float) -> None:
        self.asked += [
            (s, "gradient" in state)
            for weight, state in zip(weights, states, strict=True)
            if weight.shape == (5, 4)
        ]
        super().write(targets, weights, group, states, s)


@pytest.mark.parametrize("order", ["fig1", "lean"])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_each_part_aims_at_the_updates_before_its_own_second_pass(parts: int, order: str) -> None:
    """Counted on the list itself: with the mean over a batch's parts, all would be wrong by a fraction, and
    AdamW needs a quarter more epochs."""
    layers = nn.Linear(4, 5, bias=False), nn.Linear(5, 6), nn.Linear(6, 4)
    model, x = nn.Sequential(*layers), torch.randn(30, 4)
    pipe = dtrp.compile(model, 3, example_inputs=x, recompute=True)
    recorded = Recorded()
    with pipe.trainer(
        F.mse_loss, ADAMW, executor="inline", schedule=order, micro_batches=parts, rebalance=False,
        predictor=recorded, horizon="stage",
    ) as trainer:  # fmt: skip
        for _ in range(6):
            trainer.step(x, x)
        asked = list(recorded.asked)
        assert [len(stage.program.module.state_dict()) for stage in stages(trainer)] == [1, 2, 2]
    schedule, steps, expected = Schedule(order, 3, parts), 0, []
    actions = schedule.actions(0, 6 * parts)
    last: object = None
    for i, (kind, slot) in enumerate(actions):
        steps += kind == "step" and slot % parts == parts - 1
        if kind != "forward":
            continue
        until = actions.index(Action("backward", slot))
        s = sum(a.kind == "step" and a.slot % parts == parts - 1 for a in actions[i:until])
        known = sum(a.kind == "step" for a in actions[:i]) % parts > 0
        if s and steps and (s, steps) != last:  # before the first update there is nothing to predict from
            expected.append((float(s), known))
        last = (s, steps)
    assert asked[: len(expected)] == expected


def test_a_lagging_norm_leaves_one_stage_alone_exact() -> None:
    model, twin = calm(), calm()
    with trainer(compiled(model, 1), max_grad_norm=0.3, max_grad_norm_lag=True, method="bp") as t:
        for x, y in batches(8):
            t.step(x, y)
    plain(twin, batches(8), clip=0.3)
    close(model, twin)


def test_a_lag_without_a_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="max_grad_norm_lag=True without max_grad_norm"):
        trainer(compiled(), max_grad_norm_lag=True)


# --- What a trainer says of itself ------------------------------------------------------------------------


def test_learning_rate_updates_and_norm() -> None:
    """As users log them: the rate of the newest finished batch, updates fed, the norm before clipping."""
    schedule = partial(lr_scheduler.StepLR, step_size=2, gamma=0.5)
    model, twin = calm(), calm()
    opt = SGD(twin.parameters())
    knobs = {"method": "bp", "lr_scheduler": schedule, "max_grad_norm": 0.1}
    with trainer(compiled(model, 3), **knobs) as t:
        assert (t.lr, t.updates) == (0.05, 0)
        assert math.isnan(t.grad_norm)
        for n, (x, y) in enumerate(batches(6)):
            t.step(x, y)
            F.cross_entropy(twin(x), y).backward()
            norm = float(torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1))
            opt.step()
            opt.zero_grad()
            opt.param_groups[0]["lr"] = 0.05 * 0.5 ** ((n + 1) // 2)
            assert t.lr == pytest.approx(0.05 * 0.5 ** ((n + 1) // 2))
            assert t.updates == n + 1
            assert t.grad_norm == pytest.approx(norm, rel=1e-4)


@either
def test_they_are_there_while_batches_are_in_flight(executor: str) -> None:
    schedule = partial(lr_scheduler.ExponentialLR, gamma=0.5)
    with trainer(compiled(mlp(3), 2), executor, lr_scheduler=schedule, accumulate=2) as t:
        for x, y in batches(9):
            t.step(x, y)
        assert t.updates == 4
        assert t.grad_norm > 0
        t.flush()
        assert t.lr == pytest.approx(0.05 * 0.5**4)
        assert t.updates == 4


def output_sum(output: Tensor, target: Tensor) -> Tensor:
    return output.sum() * 0.0 + F.cross_entropy(output, target)


def test_a_resumed_run_counts_on(tmp_path: Any) -> None:
    with trainer(compiled(mlp(3), 2), "inline", output_sum) as t:
        for x, y in batches(5):
            t.step(x, y)
        t.save(tmp_path / "run")
    with trainer(compiled(mlp(3), 2), "inline", output_sum) as t:
        t.load(tmp_path / "run")
        assert t.updates == 5
        t.step(*batches(1)[0])
        assert t.updates == 6
