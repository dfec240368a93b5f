"""The reference against what is known without it: the published table, the plain loop, plain gradients."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.reference.dtrp_serial import (
    METHODS,
    SerialPipeline,
    backward_horizon,
    forward_horizon,
    predict,
    simple_pass_seed,
    train,
)

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)

# Peng et al. 2023, Fig 1, K = 3: (tick, stage, part) -> (batch, weight version), all numbered from 1.
PUBLISHED = {
    (1, 1, "forward"): (1, 2),
    (2, 1, "forward"): (2, 3),
    (3, 1, "forward"): (3, 4),
    (4, 1, "forward"): (4, 5),
    (5, 1, "forward"): (5, 6),
    (6, 1, "forward"): (6, 7),
    (5, 1, "backward"): (1, 5),
    (6, 1, "backward"): (2, 6),
    (2, 2, "forward"): (1, 2),
    (3, 2, "forward"): (2, 3),
    (4, 2, "forward"): (3, 4),
    (5, 2, "forward"): (4, 5),
    (6, 2, "forward"): (5, 6),
    (4, 2, "backward"): (1, 3),
    (5, 2, "backward"): (2, 4),
    (6, 2, "backward"): (3, 5),
    (3, 3, "forward"): (1, 1),
    (4, 3, "forward"): (2, 2),
    (5, 3, "forward"): (3, 3),
    (6, 3, "forward"): (4, 4),
    (3, 3, "backward"): (1, 1),
    (4, 3, "backward"): (2, 2),
    (5, 3, "backward"): (3, 3),
    (6, 3, "backward"): (4, 4),
}


def stages(n: int, *, batch_norm: bool = False, dropout: bool = False) -> list[nn.Module]:
    torch.manual_seed(1)
    parts = []
    for i in range(n):
        layers: list[nn.Module] = [nn.Linear(6, 6)]
        if batch_norm:
            layers.append(nn.BatchNorm1d(6))
        layers.append(nn.Tanh())
        if dropout:
            layers.append(nn.Dropout(0.3))
        if i == n - 1:
            layers.append(nn.Linear(6, 3))
        parts.append(nn.Sequential(*layers).double())
    return parts


def batches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(5, 6, generator=g, dtype=torch.double),
            torch.randint(3, (5,), generator=g),
        )
        for _ in range(n)
    ]


def test_cells_match_the_published_table() -> None:
    pipeline = SerialPipeline(stages(3), SGD, F.cross_entropy, method="dtr")
    for x, y in batches(6):
        pipeline.step(x, y)
    seen = {
        (c.tick, c.stage, c.part): (c.batch + 1, c.version) for c in pipeline.record if c.part != "recompute"
    }
    assert seen == PUBLISHED


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_each_batch_passes_each_stage_at_its_tick_and_its_distance(n: int) -> None:
    pipeline = SerialPipeline(stages(n), SGD, F.cross_entropy, method="dtr")
    n_batches = 3 * n + 2
    train(pipeline, batches(n_batches))
    assert pipeline.tick == n_batches + 2 * n - 2
    assert pipeline.in_flight() == 0
    at = {(c.batch + 1, c.stage, c.part): c for c in pipeline.record}
    for b in range(1, n_batches + 1):
        for k in range(1, n + 1):
            forward, backward = at[b, k, "forward"], at[b, k, "backward"]
            assert forward.tick == b + k - 1
            assert backward.tick == b + 2 * n - k - 1
            lag = backward.version - forward.version
            assert lag == (2 * (n - k) - 1 if k < n else 0)
            if b > 2 * n:  # no empty turns in between: versions and updates advance together
                assert backward.updates - forward.updates == lag


@pytest.mark.parametrize("aim", ["stage", "common"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_horizons_end_at_the_moment_they_aim_at(n: int, aim: str) -> None:
    """Counted off the schedule: the stage's own updates between a pass and the moment it aims at."""
    for k in range(1, n + 1):
        # Batch 1. Stage k updates once in each tick; an update in the aimed-at tick itself is not used there.
        t_forward, t_backward = k, 2 * n - k
        t_aim = t_backward if aim == "stage" else 2 * n - 1
        to_come = t_aim - t_forward - (1 if k < n else 0)  # k < n: this tick's update is already done
        assert forward_horizon(k, n, aim) == to_come
        assert backward_horizon(k, n, aim) == t_aim - t_backward


def test_horizons_of_four_stages_as_printed() -> None:
    assert [forward_horizon(k, 4, "common") for k in (1, 2, 3, 4)] == [5, 4, 3, 3]
    assert [backward_horizon(k, 4, "common") for k in (1, 2, 3)] == [0, 1, 2]
    assert forward_horizon(1, 4, "stage") == forward_horizon(1, 4, "common")


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.AdamW, lr=0.01)])
def test_one_stage_is_the_plain_loop(method: str, optimizer) -> None:
    model = stages(1, batch_norm=True, dropout=True)[0]
    twin = copy.deepcopy(model)
    torch.manual_seed(7)
    losses = train(SerialPipeline([model], optimizer, F.cross_entropy, method=method), batches(30))
    torch.manual_seed(7)
    plain = optimizer(twin.parameters())
    expected = []
    for x, y in batches(30):
        loss = F.cross_entropy(twin(x), y)
        loss.backward()
        plain.step()
        plain.zero_grad()
        expected.append(loss.item())
    assert losses == expected
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("method", ["dtr", "dtrp", "fdg"])
def test_without_learning_gradients_are_those_of_back_propagation(method: str, n: int) -> None:
    parts = stages(n, batch_norm=True, dropout=True)
    plain = copy.deepcopy(parts)
    seen: dict[int, list[list[torch.Tensor]]] = {}

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            grads = [p.grad.clone() for p in self.param_groups[0]["params"]]
            seen.setdefault(id(self), []).append(grads)
            return super().step(closure)

    pipeline = SerialPipeline(
        parts,
        partial(Recorder, lr=0.0, momentum=0.9),
        F.cross_entropy,
        method=method,
        pass_seed=simple_pass_seed,
    )
    data = batches(12)
    losses = train(pipeline, data)
    for b, (x, y) in enumerate(data):
        for k, part in enumerate(plain):
            torch.manual_seed(simple_pass_seed(0, b, k))
            x = part(x)
        loss = F.cross_entropy(x, y)
        assert loss.item() == losses[b]
        loss.backward()
        for k, part in enumerate(plain):
            recorded = seen[id(pipeline.stages[k].optimizer)][b]
            for p, grad in zip(part.parameters(), recorded, strict=True):
                assert torch.equal(p.grad, grad)
            part.zero_grad()
    for part, twin in zip(parts, plain, strict=True):
        for name, value in twin.state_dict().items():
            assert torch.equal(part.state_dict()[name], value), name


def test_predictions_by_hand() -> None:
    w = torch.tensor([2.0], dtype=torch.double)
    group = {"lr": 0.1, "momentum": 0.5}
    state = {"momentum_buffer": torch.tensor([3.0], dtype=torch.double)}
    assert predict("none", w, group, state, None, 2).item() == 2.0
    assert predict("linear", w, group, state, None, 2).item() == pytest.approx(2 - 2 * 0.1 * 3)
    assert predict("geometric", w, group, state, None, 2).item() == pytest.approx(2 - 0.1 * 3 * (0.5 + 0.25))
    assert predict("difference", w, group, state, w + 1, 2).item() == pytest.approx(0.0)
    for name in ("linear", "geometric", "difference", "adam"):
        assert predict(name, w, group, {}, None, 2).item() == 2.0


def test_geometric_is_what_sgd_does_when_gradients_vanish() -> None:
    w = nn.Parameter(torch.randn(4, dtype=torch.double))
    opt = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    for _ in range(3):
        w.grad = torch.randn_like(w)
        opt.step()
    ahead = predict("geometric", w, opt.param_groups[0], opt.state[w], None, 4)
    for _ in range(4):
        w.grad = torch.zeros_like(w)
        opt.step()
    torch.testing.assert_close(ahead, w.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_prediction_is_one_more_step_of_the_same_size(decay: float) -> None:
    """With betas that do not forget, the next step's mean and variance are the last's."""
    w = nn.Parameter(torch.randn(4, dtype=torch.double))
    opt = torch.optim.AdamW([w], lr=0.1, betas=(0.9, 0.99), weight_decay=decay)
    grad = torch.randn_like(w)
    for _ in range(5):
        w.grad = grad.clone()
        opt.step()
    ahead = predict("adam", w, opt.param_groups[0], opt.state[w], None, 1)
    w.grad = grad.clone()  # a constant gradient: bias-corrected moments are the gradient and its square
    opt.step()
    torch.testing.assert_close(ahead, w.detach(), rtol=1e-9, atol=1e-12)


def test_stages_shrink_learning_rates_and_gradients_towards_the_input() -> None:
    n = 3
    pipeline = SerialPipeline(
        stages(n), SGD, F.cross_entropy, method="fdg", lr_shrink=0.5, grad_shrink=0.5, horizon_scale=0
    )
    assert [s.optimizer.param_groups[0]["lr"] for s in pipeline.stages] == [0.0125, 0.025, 0.05]
    seen = []
    for stage in pipeline.stages:
        stage.optimizer.register_step_pre_hook(
            lambda opt, *_: seen.append(opt.param_groups[0]["params"][0].grad.clone())
        )
    plain = nn.Sequential(*copy.deepcopy([s.module for s in pipeline.stages]))
    x, y = batches(1)[0]
    train(pipeline, [(x, y)])
    F.cross_entropy(plain(x), y).backward()
    for k, grad in zip((3, 2, 1), seen, strict=True):
        torch.testing.assert_close(grad, plain[k - 1][0].weight.grad * 0.5 ** (n - k))


def test_accumulation_steps_once_per_window_on_the_mean_gradient() -> None:
    parts = stages(1)
    twin = copy.deepcopy(parts[0])
    data = batches(4)
    pipeline = SerialPipeline(parts, SGD, F.cross_entropy, accumulate=2)
    train(pipeline, data)
    opt = SGD(twin.parameters())
    for window in (data[:2], data[2:]):
        x = torch.cat([x for x, _ in window])
        y = torch.cat([y for _, y in window])
        F.cross_entropy(twin(x), y).backward()
        opt.step()
        opt.zero_grad()
    assert pipeline.stages[0].updates == 2
    for p, q in zip(parts[0].parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_training_goes_on_after_draining() -> None:
    """A drained pipeline fills again; nothing of the empty slots is left in the schedule."""
    pipeline = SerialPipeline(stages(3), SGD, F.cross_entropy, method="dtrp")
    train(pipeline, batches(4))
    train(pipeline, batches(3))
    assert len(pipeline.losses) == 7
    assert [s.updates for s in pipeline.stages] == [7, 7, 7]


class Keep(nn.Module):
    """Hands its input through beside its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x), x


class Both(nn.Module):
    """Works on the first value, hands the second through."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, values):
        return self.layer(values[0]), values[1]


class Join(nn.Module):
    """Takes both values."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, values):
        return self.layer(values[0] + values[1])


def test_values_for_a_later_stage_are_handed_through() -> None:
    torch.manual_seed(0)
    wraps = [nn.Sequential, Keep, Both, Both, Join]
    parts = [wrap(nn.Linear(6, 6).double()) for wrap in wraps]
    plain = nn.Sequential(*copy.deepcopy(parts))
    grads: list[torch.Tensor] = []
    pipeline = SerialPipeline(parts, partial(torch.optim.SGD, lr=0.0), F.cross_entropy, method="dtr")
    pipeline.stages[0].optimizer.register_step_pre_hook(
        lambda *_: grads.append(parts[0][0].weight.grad.clone())
    )
    data = batches(5)
    train(pipeline, data)
    for (x, y), grad in zip(data, grads, strict=True):
        plain.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        torch.testing.assert_close(grad, plain[0][0].weight.grad, rtol=1e-12, atol=1e-15)
