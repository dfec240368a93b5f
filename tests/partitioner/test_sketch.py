"""Real runs without the price of their heavy products."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dtrp.partitioner.capture import capture, real, second_look
from dtrp.partitioner.capture.real import RealRuns
from dtrp.partitioner.sketch import Sketch


def counted(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def test_light_operators_are_computed():
    """Code that decides by values decides as it would."""
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    with Sketch() as sketch:
        y = layer(x)
    assert torch.equal(y, layer(x))
    assert sketch.flops == counted(layer, x)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Linear(512, 512), (64, 512)),
        (nn.Conv2d(16, 32, 3, padding=1), (2, 16, 64, 64)),
        (nn.ConvTranspose2d(16, 32, 2, stride=2), (2, 16, 64, 64)),
        (nn.Linear(512, 512).bfloat16(), (64, 512)),
        (nn.LSTM(256, 256, batch_first=True), (2, 64, 256)),
        (nn.MultiheadAttention(256, 4, batch_first=True), (2, 64, 256)),
    ],
)
def test_heavy_ones_give_random_numbers_of_the_same_kind(model, shape):
    """Otherwise code behind them would meet other shapes than in a true run."""
    x = torch.randn(shape, dtype=next(model.parameters()).dtype)
    given = (x, x, x) if isinstance(model, nn.MultiheadAttention) else (x,)
    model.eval()
    true = model(*given)
    with Sketch() as sketch:
        drawn = model(*given)
    true, drawn = (v[0] if isinstance(v, tuple) else v for v in (true, drawn))
    assert (drawn.shape, drawn.dtype, drawn.stride()) == (true.shape, true.dtype, true.stride())
    assert drawn.requires_grad
    assert drawn.isfinite().all()
    assert drawn.std() > 0
    if not isinstance(model, nn.LSTM):  # one operator of many small ones, of which torch has no count
        assert not torch.equal(drawn, true)
        assert sketch.flops > 1e7


class Picked(nn.Module):
    """Heavy, and of a size that depends on values."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(64, 4096)
        self.back = nn.Linear(4096, 64)

    def forward(self, x):
        y = self.back(torch.relu(self.wide(x)))
        return y[(y.sum(-1) > 0).nonzero()[:, 0]]


def test_modules_that_really_run_are_sketched():
    """Their products are what makes capturing detection heads slow."""
    runs, x = RealRuns(), torch.randn(256, 64)
    run = runs.of(Picked(), (x,), {}, {}).first
    assert run.flops == counted(Picked(), x) == 2 * 2 * 256 * 64 * 4096
    assert run.result.shape[1] == 64
    assert 0 < len(run.result) < 256


class Chooser(nn.Module):
    """Decides by values, and gives a loss."""

    def __init__(self):
        super().__init__()
        self.near, self.far = nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, found, labels):
        x = found["x"]
        return (self.near if x.sum() > 0 else self.far)(x).sub(labels).square().mean()


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.back, self.head = nn.Linear(8, 8), Chooser()

    def forward(self, x, labels):
        return self.head(OrderedDict(x=self.back(x)), labels)


def test_few_runs_of_what_really_runs(monkeypatch):
    """Each takes long in a detector: a loss has no size to be looked for, and the graph asks for no other."""
    tries, run_once = [], real._run_once

    def counting(*args):
        tries.append(args)
        return run_once(*args)

    monkeypatch.setattr(real, "_run_once", counting)
    capture(Detector(), (torch.randn(4, 8), torch.randint(0, 2, (4, 1))), run=False)
    assert len(tries) == 4, "two in each mode"


def test_their_flops_count_when_a_comparison_is_weighed(monkeypatch):
    """It is left out above a limit, and a list of tensors does not tell what it took to make them."""

    class Listed(Picked):
        def forward(self, x):
            return [super().forward(x)]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Listed()

        def forward(self, x):
            return self.inner(x)[0]

    flops = 2 * 2 * 4 * 64 * 4096
    looked: list[bool] = []
    monkeypatch.setattr(second_look, "_compare", lambda task, traced, training, n: looked.append(training))
    monkeypatch.setattr(second_look, "MAX_FLOPS", flops / 2 - 1)
    capture(Model(), (torch.randn(4, 64),))
    assert looked == []
    monkeypatch.setattr(second_look, "MAX_FLOPS", flops / 2)
    capture(Model(), (torch.randn(4, 64),))
    assert looked == [True, False]
