"""Each module's own ``training`` flag counts, and gradients switched off around the model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dtrp
from tests.sweeps import sweep


class Noisy(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


class Branch(nn.Module):
    def forward(self, x):
        return x + 100 if self.training else x * 2


class Net(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), middle, nn.Linear(6, 6))
        self.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))

    def forward(self, x):
        y = self.backbone(x)
        return self.head(y if self.backbone.training else -y)


MIDDLES = {"layer": lambda: nn.Dropout(0.5), "function": Noisy, "branch": Branch}


def behaviour(model, call, x):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    y = call(x)
    y.square().sum().backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters()}
    return y, gradients, {k: b.clone() for k, b in model.named_buffers()}


def assert_same(model, pipe, x):
    plain = copy.deepcopy(model)
    a, b = behaviour(plain, plain, x), behaviour(model, pipe, x)
    assert torch.equal(a[0], b[0])
    for mine, theirs in zip(a[1:], b[1:], strict=True):
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(8, 4)


@pytest.mark.parametrize("middle", MIDDLES)
def test_frozen_parts_stay_frozen(middle, x):
    model = Net(MIDDLES[middle]())
    model.backbone.eval()
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    assert_same(model, pipe, x)
    flags = [m.training for m in model.modules()]
    model.train()
    assert_same(model, pipe, x)
    model.head[0].eval()
    assert_same(model, pipe, x)
    model.eval()
    assert_same(model, pipe, x)
    model.head.train()  # the backbone and the model itself stay in eval mode
    assert_same(model, pipe, x)
    model.train()
    model.backbone.eval()
    assert [m.training for m in model.modules()] == flags
    assert_same(model, pipe, x)


def test_graphs_are_made_once_for_each_mode(x, monkeypatch):
    model = Net(Noisy())
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    model.backbone.eval()
    pipe(x)
    monkeypatch.setattr("dtrp.planning.capture", None)
    for module in (model, model.backbone, model.train(), model.backbone.eval()):
        module.train(module is model)
        pipe(x)


@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("executor", sweep(["inline", "workers"]))
def test_fine_tuning_with_a_frozen_backbone(middle, executor, x):
    torch.manual_seed(1)
    model = Net(MIDDLES[middle]()).eval()
    model.head.train()
    y = torch.randint(0, 3, (8,))
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    with pipe.trainer(
        F.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.1), method="bp", executor=executor
    ) as trainer:
        for _ in range(3):
            trainer.step(x, y)
        trainer.evaluate([(x, y)])
    for k, v in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[k], v)


def asks(x):
    return x * 2 if torch.is_grad_enabled() else x - 1


class Asks(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.function = function

    def forward(self, x):
        return self.b(self.function(self.a(x)))


@pytest.mark.parametrize(
    "function", [asks, lambda x: x + 1 if not torch.is_grad_enabled() else x, nn.Sequential(Asks(asks))]
)
def test_code_that_asks_for_gradients(function, x):
    model = Asks(function if not isinstance(function, nn.Module) else asks).eval()
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    for _ in range(2):
        assert torch.equal(pipe(x), model(x))
        with torch.no_grad():
            assert torch.equal(pipe(x), model(x))
    y = torch.zeros(8, dtype=torch.long)
    with pipe.trainer(F.cross_entropy, torch.optim.SGD, executor="inline") as trainer:
        trainer.step(x, y)
        found = trainer.evaluate([(x, y)])["loss"]
    with torch.no_grad():
        assert found == pytest.approx(F.cross_entropy(model.eval()(x), y).item(), rel=1e-2)
