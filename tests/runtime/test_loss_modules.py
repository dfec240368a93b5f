"""Losses with parameters and buffers: trained as part of the last stage, saved, and handed back."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrp
from tests.sweeps import each_once

from .toys import ADAMW, SGD, batches, mlp, same, trainer


class Margin(nn.Module):
    """ArcFace-like: the last layer's weights are the loss's, and see the target."""

    def __init__(self, classes: int = 3, width: int = 3, margin: float = 0.2, scale: float = 8.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.weight = nn.Parameter(torch.randn(classes, width))
        self.margin, self.scale = margin, scale

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        cosine = F.linear(F.normalize(output), F.normalize(self.weight)).clamp(-0.99, 0.99)
        shifted = torch.cos(torch.acos(cosine) + self.margin)
        hit = F.one_hot(target, cosine.shape[1]).bool()
        return F.cross_entropy(self.scale * torch.where(hit, shifted, cosine), target)


class Uncertainty(nn.Module):
    """Two tasks, weighed by what is learned of their noise (Kendall et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(2))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        losses = torch.stack([F.cross_entropy(output, target), output.square().mean()])
        return (torch.exp(-self.log_variance) * losses + self.log_variance).sum()


class Centers(nn.Module):
    """Buffers and no parameters: a running mean of each class, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centers", torch.zeros(3, 3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                for c in range(3):
                    if (target == c).any():
                        self.centers[c].lerp_(output[target == c].mean(0), 0.1)
                self.seen += 1
        return F.cross_entropy(output, target) + 0.1 * (output - self.centers[target]).square().mean()


class Both(nn.Module):
    """A head with BatchNorm and dropout inside a loss, and a temperature of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.head = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
        self.temperature = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return F.cross_entropy(self.head(output) / self.temperature, target)


LOSSES: dict[str, Any] = {"margin": Margin, "uncertainty": Uncertainty, "centers": Centers, "both": Both}


def everything(model: nn.Module, loss: nn.Module) -> dict[str, Tensor]:
    states = {**model.state_dict(), **{f"loss.{n}": v for n, v in loss.state_dict().items()}}
    return copy.deepcopy(states)


def plain(make_loss: Any, optimizer: Any = SGD, n: int = 8) -> tuple[dict[str, Tensor], list[float]]:
    """The loop that everybody writes: the optimizer holds both."""
    model, loss_fn = mlp(3, dropout=0.0), make_loss()
    opt = optimizer([*model.parameters(), *loss_fn.parameters()])
    losses = []
    for x, y in batches(n):
        loss = loss_fn(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return everything(model, loss_fn), losses


def compiled(model: nn.Module, n_stages: int) -> dtrp.Pipeline:
    return dtrp.compile(model, n_gpus=n_stages, example_inputs=batches(1)[0][0], devices=["cpu"] * n_stages)


@pytest.mark.parametrize("executor", ["inline", pytest.param("workers", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("n_stages", "name", "optimizer"), each_once([1, 2, 3], list(LOSSES), [SGD, ADAMW]))
def test_as_in_the_plain_loop(optimizer: Any, name: str, n_stages: int, executor: str) -> None:
    model, loss = mlp(3, dropout=0.0), LOSSES[name]()
    before = copy.deepcopy(loss.state_dict())
    with trainer(compiled(model, n_stages), executor, loss, method="bp", optimizer=optimizer) as t:
        for x, y in batches(8):
            t.step(x, y)
        t.flush()
        inside = everything(model, loss)
        losses = t.losses
    expected, expected_losses = plain(LOSSES[name], optimizer)
    assert losses == expected_losses
    assert same(everything(model, loss), expected)
    assert same(inside, expected), "after flush, also inside `with`"
    assert not same(loss.state_dict(), before)
    if name == "both":
        assert loss.calls == 8
    assert loss.training


def test_in_worker_processes() -> None:
    model, loss = mlp(3, dropout=0.0), Both()
    with trainer(compiled(model, 2), "workers", loss, method="bp") as t:
        for x, y in batches(8):
            t.step(x, y)
    assert same(everything(model, loss), plain(Both)[0])
    assert loss.calls == 8


DECOUPLED: list[dict[str, Any]] = [
    {},
    {"horizon": "stage"},
    {"schedule": "lean"},
    {"method": "fdg"},
    {"max_grad_norm": 0.5},
    {"accumulate": 2},
]


@pytest.mark.parametrize(("name", "knobs"), each_once(list(LOSSES), DECOUPLED))
def test_decoupled(knobs: dict[str, Any], name: str) -> None:
    """The loss learns with the model, whatever the method, and its state moves once per batch."""
    knobs = {"optimizer": partial(torch.optim.SGD, lr=0.01, momentum=0.5), **knobs}
    model, loss = mlp(3, dropout=0.0), LOSSES[name]()
    before = copy.deepcopy(loss.state_dict())
    with trainer(compiled(model, 3), "inline", loss, **knobs) as t:
        for _ in range(12):
            for x, y in batches(8):
                t.step(x, y)
        t.flush()
        assert sum(t.losses[-8:]) < sum(t.losses[:8])
    still = [n for n, v in loss.state_dict().items() if torch.equal(v, before[n])]
    assert still in ([], ["head.0.bias"]), "a bias before a BatchNorm has next to no gradient"
    if name == "centers":
        assert int(loss.seen) == 96, "once per batch, whatever is recomputed"
    if name == "both":
        assert loss.calls == 96


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_decoupled_in_workers_as_inline(name: str) -> None:
    states = []
    for executor in ("inline", "workers"):
        model, loss = mlp(3), LOSSES[name]()
        with trainer(compiled(model, 3), executor, loss) as t:
            for x, y in batches(20):
                t.step(x, y)
        states.append(everything(model, loss))
    assert same(*states)


def slower_loss(name: str, parameter: nn.Parameter) -> dict[str, Any]:
    return {"lr": 0.001} if name.startswith("loss.") else {}


def test_options_of_the_losss_parameters() -> None:
    model, loss = mlp(3, dropout=0.0), Margin()
    with trainer(compiled(model, 2), "inline", loss, method="bp", param_groups=slower_loss) as t:
        for x, y in batches(8):
            t.step(x, y)

    def grouped(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return SGD([{"params": parameters[:-1]}, {"params": parameters[-1:], "lr": 0.001}])

    assert same(everything(model, loss), plain(Margin, grouped)[0])


@pytest.mark.parametrize("name", LOSSES)
def test_saved_and_resumed(name: str, tmp_path: Any) -> None:
    """Also in other stages than before."""
    data = batches(10)
    one, loss = mlp(3), LOSSES[name]()
    with trainer(compiled(one, 2), "inline", loss) as t:
        for x, y in data[:5]:
            t.step(x, y)
        t.save(tmp_path / "run")
        for x, y in data[5:]:
            t.step(x, y)
    two, again = mlp(3, seed=5), LOSSES[name]()
    with trainer(compiled(two, 2), "inline", again) as t:
        t.load(tmp_path / "run")
        for x, y in data[5:]:
            t.step(x, y)
    assert same(everything(two, again), everything(one, loss))
    with trainer(compiled(mlp(3), 2), "inline") as t, pytest.raises(dtrp.CheckpointError, match="loss"):
        t.load(tmp_path / "run")


def test_evaluated_in_eval_mode() -> None:
    """Its buffers stay, its own mode comes back, and the mean is the plain one."""
    model, loss = mlp(3), Both()
    with trainer(compiled(model, 2), "inline", loss) as t:
        for x, y in batches(6):
            t.step(x, y)
        t.flush()
        before = everything(model, loss)
        found = t.evaluate(batches(4, seed=3))
        assert same(everything(model, loss), before)
        assert loss.calls == 6
    model.eval()
    loss.eval()
    with torch.no_grad():
        mean = sum(float(loss(model(x), y)) for x, y in batches(4, seed=3)) / 4
    assert found["loss"] == pytest.approx(mean, rel=1e-6)


def test_one_that_is_partly_frozen() -> None:
    model, loss = mlp(3), Both()
    loss.head.requires_grad_(False)
    before = copy.deepcopy(loss.head.state_dict())
    with trainer(compiled(model, 2), "inline", loss) as t:
        for x, y in batches(6):
            t.step(x, y)
    after = loss.head.state_dict()
    assert all(torch.equal(after[n], before[n]) for n in after if "weight" in n or "bias" in n)
    assert not torch.equal(after["1.running_mean"], before["1.running_mean"])
    assert loss.temperature.item() != 1.0


def test_a_frozen_model_under_a_loss_that_learns() -> None:
    model, loss = mlp(3, dropout=0.0), Margin()
    model.requires_grad_(False)
    before = copy.deepcopy(loss.state_dict())
    with trainer(compiled(model, 2), "inline", loss) as t:
        for x, y in batches(6):
            t.step(x, y)
    assert not same(loss.state_dict(), before)


@pytest.mark.parametrize("n_stages", [1, 2])
def test_a_loss_module_without_tensors_stays_what_it_is(n_stages: int) -> None:
    states = []
    for loss in (nn.CrossEntropyLoss(), F.cross_entropy, partial(F.cross_entropy, reduction="mean")):
        model = mlp(3)
        with trainer(compiled(model, n_stages), "inline", loss) as t:
            for x, y in batches(6):
                t.step(x, y)
        states.append(model.state_dict())
    assert same(states[0], states[1])
    assert same(states[0], states[2])


def test_class_weights_are_a_buffer_that_nobody_changes() -> None:
    weights = torch.tensor([1.0, 2.0, 0.5])
    model, loss = mlp(3, dropout=0.0), nn.CrossEntropyLoss(weight=weights.clone())
    with trainer(compiled(model, 2), "inline", loss, method="bp") as t:
        for x, y in batches(8):
            t.step(x, y)
    assert torch.equal(loss.weight, weights)
    assert same(everything(model, loss), plain(lambda: nn.CrossEntropyLoss(weight=weights.clone()))[0])
