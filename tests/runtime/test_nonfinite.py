"""Batches whose loss is fine and whose gradients are not: skipped and counted, or told."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrp
from tests.sweeps import each_once

from .toys import ADAMW, SGD, batches, compiled, mlp, same, trainer

either = pytest.mark.parametrize("executor", ["inline", pytest.param("workers", marks=pytest.mark.slow)])


class Spoiled(torch.autograd.Function):
    """The identity, whose gradient is what a batch of three brings."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float) -> Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.full_like(grad, ctx.value), None


def root(output: Tensor, target: Tensor) -> Tensor:
    """A square root at zero: the loss is finite, its gradient 0 * inf."""
    loss = F.cross_entropy(output, target)
    return loss + (output - output.detach()).abs().sum().sqrt() if len(target) == 3 else loss


def infinite(output: Tensor, target: Tensor) -> Tensor:
    loss = F.cross_entropy(output, target)
    result: Tensor = Spoiled.apply(loss, math.inf) if len(target) == 3 else loss
    return result


class Spoils(nn.Module):
    """In the middle of a model: stages after it see nothing wrong. It asks for values, and is kept whole."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Spoiled.apply(x, math.nan) if len(x.tolist()) == 3 else x
        return result


def plain_model() -> nn.Module:
    return mlp(3, dropout=0.0, norm=False)


def with_a_bad_layer() -> nn.Module:
    model = plain_model()
    return nn.Sequential(*model[:6], Spoils(), *model[6:])


CASES: dict[str, tuple[Any, Any]] = {
    "root": (plain_model, root),
    "infinite": (plain_model, infinite),
    "layer": (with_a_bad_layer, F.cross_entropy),
}


def data() -> list[tuple[Tensor, Tensor]]:
    return [*batches(5), *batches(1, size=3), *batches(3, seed=2), *batches(2, size=3, seed=3), *batches(4)]


def plain(make: Any, loss_fn: Any, optimizer: Any, clip: float | None = None, accumulate: int = 1) -> Any:
    """The loop that leaves out batches whose gradients are not finite."""
    model = make()
    opt = optimizer(model.parameters())
    gathered: list[list[Tensor]] = []
    for x, y in data():
        loss = loss_fn(model(x), y) / accumulate
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        if not all(g.isfinite().all() for g in gradients):
            continue
        gathered.append(list(gradients))
        if len(gathered) < accumulate:
            continue
        for p, *parts in zip(model.parameters(), *gathered, strict=True):
            p.grad = sum(parts[1:], parts[0])
        gathered = []
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        opt.zero_grad()
    return model.state_dict()


@either
@pytest.mark.parametrize(("name", "n_stages", "optimizer"), each_once(list(CASES), [1, 2, 3], [SGD, ADAMW]))
def test_skipped_as_in_the_plain_loop(optimizer: Any, n_stages: int, name: str, executor: str) -> None:
    """In all stages or in none, though a single one sees it; and counted."""
    make, loss_fn = CASES[name]
    model = make()
    knobs = {"method": "bp", "on_nonfinite": "skip", "optimizer": optimizer}
    with trainer(compiled(model, n_stages), executor, loss_fn, **knobs) as t:
        for x, y in data():
            t.step(x, y)
        t.flush()
        assert t.skipped == 3
        assert len(t.losses) == 15
        assert all(math.isfinite(loss) for loss in t.losses)
    assert same(model.state_dict(), plain(make, loss_fn, optimizer))


@pytest.mark.parametrize("knobs", [{"max_grad_norm": 0.3}, {"accumulate": 2}])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("n_stages", [1, 3])
def test_skipped_under_clipping_and_in_groups(n_stages: int, name: str, knobs: dict[str, Any]) -> None:
    make, loss_fn = CASES[name]
    model = make()
    with trainer(
        compiled(model, n_stages), "inline", loss_fn, method="bp", on_nonfinite="skip", **knobs
    ) as t:
        for x, y in data():
            t.step(x, y)
        t.flush()
        assert t.skipped == 3
    expected = plain(make, loss_fn, SGD, knobs.get("max_grad_norm"), knobs.get("accumulate", 1))
    for n, value in expected.items():
        torch.testing.assert_close(model.state_dict()[n], value)


DECOUPLED: list[dict[str, Any]] = [
    {},
    {"schedule": "lean"},
    {"micro_batches": 2},
    {"method": "fdg"},
    {"method": "adl", "accumulate": 2},
    {"max_grad_norm": 1.0},
    {"max_grad_norm": 1.0, "max_grad_norm_lag": True},
    {"method": "1f1b", "micro_batches": 2},
    {"method": "gpipe", "micro_batches": 2},
]


@pytest.mark.parametrize(("knobs", "name"), each_once(DECOUPLED, list(CASES)))
def test_decoupled_runs_go_on(name: str, knobs: dict[str, Any]) -> None:
    """No weight, velocity or buffer ever becomes nan, and later batches are trained."""
    make, loss_fn = CASES[name]
    model = make()
    if "micro_batches" in knobs:
        rows = [(torch.cat([x, x])[:6], torch.cat([y, y])[:6]) if len(x) == 3 else (x, y) for x, y in data()]
    else:
        rows = data()
    with trainer(compiled(model, 3), "inline", loss_fn, on_nonfinite="skip", **knobs) as t:
        for x, y in rows:
            t.step(x, y)
        t.flush()
        before = {n: v.clone() for n, v in model.state_dict().items()}
        assert t.skipped == 3
        for x, y in batches(6, seed=8):
            t.step(x, y)
        t.flush()
        assert t.skipped == 3
    assert all(v.isfinite().all() for v in model.state_dict().values())
    assert all(not torch.equal(v, before[n]) for n, v in model.state_dict().items())


@either
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("knobs", [{}, {"method": "bp"}])
def test_told_where_nothing_is_skipped(knobs: dict[str, Any], name: str, executor: str) -> None:
    """Before anything is trained with it: the weights stay finite."""
    make, loss_fn = CASES[name]
    model = make()
    with (
        trainer(compiled(model, 2), executor, loss_fn, **knobs) as t,
        pytest.raises(
            dtrp.WorkerError,
            match=r"stage \d failed: FloatingPointError: the norm of the gradients of batch 5 in stage \d is "
            r"(nan|inf); look at the batch and the learning rate, or pass on_nonfinite='skip'",
        ),
    ):
        feed(t)
    assert all(v.isfinite().all() for v in model.state_dict().values())


def feed(t: Any) -> None:
    for x, y in data():
        t.step(x, y)
    t.flush()


def test_a_batch_in_worker_processes() -> None:
    states = []
    for executor in ("inline", "workers"):
        model = with_a_bad_layer()
        with trainer(compiled(model, 2), executor, on_nonfinite="skip") as t:
            feed(t)
            assert t.skipped == 3
        states.append(model.state_dict())
    assert same(*states)


def test_norms_beside_skipped_batches() -> None:
    """What is logged is the norm of what was stepped with."""
    with trainer(compiled(plain_model(), 2), "inline", root, on_nonfinite="skip", method="bp") as t:
        for x, y in data():
            t.step(x, y)
            assert math.isfinite(t.grad_norm)
    with trainer(compiled(plain_model(), 1), "inline", partial(F.cross_entropy, label_smoothing=0.1)) as t:
        assert math.isnan(t.grad_norm)
