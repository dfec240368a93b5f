"""float16 with loss scaling: what `torch.amp.GradScaler` does in the plain loop, over all stages."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrp.runtime.scaling import INTERVAL, LossScale

from .toys import batches, compiled, mlp, same, trainer

SMALL_STEPS = partial(torch.optim.SGD, lr=1e-5, momentum=0.9)


def steep(output: Tensor, target: Tensor) -> Tensor:
    """A loss whose gradients overflow float16 with the first scales."""
    return F.cross_entropy(output, target) * 3e3


def plain(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> tuple[list[float], float]:
    scaler = torch.amp.GradScaler("cpu")
    optimizer = SMALL_STEPS(model.parameters())
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = steep(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    return losses, scaler.get_scale()


@pytest.mark.parametrize("n_stages", [1, 2, 3])
def test_exact_orders_do_what_grad_scaler_does(n_stages: int) -> None:
    """If a stage stepped where another overflows, or the scale were halved twice, weights would differ."""
    model = mlp(dropout=0.0, norm=False)
    expected = copy.deepcopy(model)
    data = batches(20)
    losses, scale = plain(expected, data)
    assert scale < 65536.0
    with trainer(
        compiled(model, n_stages),
        loss_fn=steep,
        optimizer=SMALL_STEPS,
        autocast=torch.float16,
        method="bp",
    ) as t:
        for x, y in data:
            t.step(x, y)
        t.flush()
        assert t._run.executor.stages[-1].scaling.scale == scale
    assert t.losses == losses
    assert same(model.state_dict(), expected.state_dict())
    assert t.skipped == 11


def test_decoupled_stages_hear_of_an_overflow_in_any_of_them() -> None:
    found = []
    for executor in ("inline", "workers"):
        model = mlp()
        with trainer(
            compiled(model, 3), executor, loss_fn=steep, optimizer=SMALL_STEPS, autocast=torch.float16
        ) as t:
            for x, y in batches(40):
                t.step(x, y)
        assert 0 < t.skipped < 20  # the scale came down
        assert all(p.isfinite().all() for p in model.parameters())
        found.append((t.losses, model.state_dict()))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


def test_the_scale_grows_again_and_is_halved_once_for_one_scale() -> None:
    scale = LossScale()
    scale.finished(overflowed=True)
    assert scale.scale == 32768.0
    scale.heard(65536.0)  # a stage that found it later
    scale.finished(overflowed=False)
    assert scale.scale == 32768.0
    for _ in range(INTERVAL - 1):
        scale.finished(overflowed=False)
    assert scale.scale == 65536.0
