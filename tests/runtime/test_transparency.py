"""The transparency table: back-propagation through 1, 2 and 4 stages against the loop that everybody writes.

Each row is a training feature. 50 batches, then weights, buffers and losses must agree: bit for bit where
the stages do the same sums in the same order, else to the rounding that a row states with its reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dtrp
from tests.reference.models import FLAT_CNN, GPT, GPT_TIED, MLP, RESNET, TWO_HEADS, UNET, Batch, Case, mlp
from tests.sweeps import each_once

N_BATCHES = 50
SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=1e-3)

# Dropout draws per stage and batch, so against one plain model only models without it can be compared.
CALM_MLP = Case("mlp", partial(mlp, dropout=0.0), MLP.batch, MLP.loss_fn)
CALM_GPT = Case("gpt", partial(GPT, dropout=0.0), GPT_TIED.batch, GPT_TIED.loss_fn)


@dataclass(frozen=True)
class Row:
    """One feature: how the pipeline is told, and how the plain loop does it."""

    case: Case = FLAT_CNN
    optimizer: Callable[[Any], torch.optim.Optimizer] = SGD
    prepare: Callable[[nn.Module], None] = lambda model: None  # before anything else, on both models
    knobs: dict[str, Any] = field(default_factory=dict)  # of Pipeline.trainer
    plain: dict[str, Any] = field(default_factory=dict)  # of plain_loop, where it needs to be told otherwise
    tolerance: float = 0.0  # relative; 0: bit for bit
    why: str = ""  # the tolerance


def plain_loop(
    model: nn.Module,
    batches: list[Batch],
    loss_fn: Any,
    optimizer: Any,
    *,
    lr_scheduler: Any = None,
    max_grad_norm: float | None = None,
    autocast: torch.dtype | None = None,
    accumulate: int = 1,
    param_groups: Any = None,
) -> list[float]:
    """Train by hand."""
    parameters: Any = list(model.parameters())
    if param_groups is not None:
        parameters = [{"params": [p], **param_groups(name, p)} for name, p in model.named_parameters()]
    opt = optimizer(parameters)
    scheduler = lr_scheduler(opt) if lr_scheduler is not None else None
    losses = []
    for b, batch in enumerate(batches):
        with torch.autocast("cpu", autocast) if autocast is not None else nullcontext():
            loss = loss_fn(model(*batch.args), batch.target)
        (loss / accumulate).backward()
        losses.append(loss.item())
        if (b + 1) % accumulate:
            continue
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        opt.step()
        opt.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return losses


def no_decay_on_norms_and_biases(name: str, p: nn.Parameter) -> dict[str, Any]:
    return {"weight_decay": 0.0} if p.dim() < 2 else {"weight_decay": 0.1}


def slow_biases(name: str, p: nn.Parameter) -> dict[str, Any]:
    return {"lr": 1e-3} if name.endswith("bias") else {}


def freeze(*prefixes: str) -> Callable[[nn.Module], None]:
    def prepare(model: nn.Module) -> None:
        for name, p in model.named_parameters():
            if name.startswith(prefixes):
                p.requires_grad_(False)

    return prepare


def single(case: Case) -> Case:
    """The same in float32."""

    def batch(g: torch.Generator, n: int) -> Batch:
        made = case.batch(g, n)
        return Batch(tuple(x.float() if x.is_floating_point() else x for x in made.args), made.target)

    return replace(case, batch=batch)


def to_single(model: nn.Module) -> None:
    model.float()


def pair_loss(output: dict[str, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    classes, value = target
    return TWO_HEADS.loss_fn(output, {"classes": classes, "value": value})


def tuple_target(g: torch.Generator, n: int) -> Batch:
    made = TWO_HEADS.batch(g, n)
    return Batch(made.args, (made.target["classes"], made.target["value"]))


class WithoutBias(nn.Sequential):
    """Matrices only, which is what Muon takes."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for _ in range(4):
            layers += [nn.Linear(8, 8, bias=False), nn.Tanh()]
        super().__init__(*layers, nn.Linear(8, 3, bias=False))


NORM = "the norm over all parameters is a sum over stages, added up in another order"
SUMS = "a value used by several stages has its gradients added up in another order"

TABLE = {
    # Models
    "mlp": Row(CALM_MLP),
    "batch norm": Row(FLAT_CNN),
    "shortcuts": Row(RESNET, tolerance=1e-8, why=SUMS),
    "long skips": Row(UNET, tolerance=1e-8, why=SUMS),
    "tied embedding": Row(CALM_GPT, tolerance=1e-8, why=SUMS),
    "several inputs, outputs and targets": Row(TWO_HEADS, tolerance=1e-8, why=SUMS),
    "tuple target": Row(replace(TWO_HEADS, batch=tuple_target, loss_fn=pair_loss), tolerance=1e-8, why=SUMS),
    # Optimizers
    "sgd": Row(optimizer=partial(torch.optim.SGD, lr=0.02)),
    "nesterov": Row(optimizer=partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True)),
    "adam": Row(optimizer=partial(torch.optim.Adam, lr=2e-3)),
    "amsgrad": Row(optimizer=partial(torch.optim.Adam, lr=2e-3, amsgrad=True)),
    "adamw": Row(optimizer=partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.1)),
    "rmsprop": Row(optimizer=partial(torch.optim.RMSprop, lr=1e-3, momentum=0.5)),
    "adagrad": Row(optimizer=partial(torch.optim.Adagrad, lr=1e-2)),
    "nadam": Row(optimizer=partial(torch.optim.NAdam, lr=1e-3)),
    "muon": Row(
        Case("mlp_without_bias", WithoutBias, MLP.batch, MLP.loss_fn),
        optimizer=partial(torch.optim.Muon, lr=1e-2),
    ),
    "adafactor": Row(optimizer=partial(torch.optim.Adafactor, lr=1e-2)),
    "an update of many tensors at once": Row(optimizer=partial(SGD, foreach=True)),
    "an update in one kernel": Row(optimizer=partial(torch.optim.AdamW, lr=2e-3, fused=True)),
    "a learning rate that is a tensor": Row(
        optimizer=partial(torch.optim.AdamW, lr=torch.tensor(2e-3), foreach=False)
    ),
    # What an update is
    "parameter groups, weight decay by name": Row(
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        knobs={"param_groups": no_decay_on_norms_and_biases},
    ),
    "parameter groups, learning rate by name": Row(knobs={"param_groups": slow_biases}),
    "accumulate": Row(knobs={"accumulate": 2}),
    "scheduler: cosine": Row(
        knobs={"lr_scheduler": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=30)}
    ),
    "scheduler: one cycle": Row(
        knobs={
            "lr_scheduler": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.05, total_steps=N_BATCHES)
        }
    ),
    "max_grad_norm": Row(knobs={"max_grad_norm": 0.1}, tolerance=1e-8, why=NORM),
    "max_grad_norm, tied": Row(CALM_GPT, knobs={"max_grad_norm": 0.1}, tolerance=1e-8, why=NORM),
    "max_grad_norm never reached": Row(knobs={"max_grad_norm": 1e9}, tolerance=1e-8, why=NORM),
    "accumulate and max_grad_norm": Row(
        knobs={"accumulate": 2, "max_grad_norm": 0.1}, tolerance=1e-8, why=NORM
    ),
    # What is trained
    "frozen first layers": Row(CALM_MLP, prepare=freeze("0.", "3.", "6.")),
    "frozen last layers": Row(CALM_MLP, prepare=freeze("9.", "12.")),
    "frozen middle": Row(RESNET, prepare=freeze("groups.1"), tolerance=1e-8, why=SUMS),
    "frozen tied weight": Row(CALM_GPT, prepare=freeze("tokens"), tolerance=1e-8, why=SUMS),
    # Numbers
    "float32": Row(single(FLAT_CNN), prepare=to_single),
    "autocast": Row(single(FLAT_CNN), prepare=to_single, knobs={"autocast": torch.bfloat16}),
    "autocast, shortcuts": Row(single(RESNET), prepare=to_single, knobs={"autocast": torch.bfloat16}),
    "autocast, tied": Row(single(CALM_GPT), prepare=to_single, knobs={"autocast": torch.bfloat16}),
}


def build(row: Row, n_stages: int, executor: str, **knobs: Any) -> tuple[dict[str, Tensor], list[float]]:
    model = row.case.make()
    row.prepare(model)
    batches = row.case.batches(N_BATCHES)
    pipe = dtrp.compile(model, n_gpus=n_stages, example_inputs=batches[0].args)
    assert len(pipe.stages) == n_stages
    with pipe.trainer(
        row.case.loss_fn, row.optimizer, executor=executor, seed=1, **{"method": "bp", **row.knobs, **knobs}
    ) as trainer:
        for batch in batches:
            trainer.step(*batch.args, batch.target)
        trainer.flush()
        losses = list(trainer.losses)
    return copy.deepcopy(model.state_dict()), losses


def check(row: Row, n_stages: int, executor: str) -> None:
    weights, losses = build(row, n_stages, executor)
    model = row.case.make()
    row.prepare(model)
    expected = plain_loop(
        model, row.case.batches(N_BATCHES), row.case.loss_fn, row.optimizer, **{**row.knobs, **row.plain}
    )
    assert row.tolerance == 0 or row.why
    # One stage does every sum in the plain order, whatever the row.
    tolerance = row.tolerance if n_stages > 1 else 0.0
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance * 1e-2)
    close(torch.tensor(losses, dtype=torch.double), torch.tensor(expected, dtype=torch.double))
    for name, value in model.state_dict().items():
        close(weights[name], value, msg=lambda m, at=name: f"{at}: {m}")


@pytest.mark.parametrize(("feature", "n_stages"), each_once(list(TABLE), [1, 2, 4]))
def test_back_propagation_is_the_plain_loop(feature: str, n_stages: int) -> None:
    check(TABLE[feature], n_stages, "inline")


@pytest.mark.slow
@pytest.mark.parametrize("feature", list(TABLE))
def test_back_propagation_in_workers_is_the_plain_loop(feature: str) -> None:
    check(TABLE[feature], 2, "workers")


@pytest.mark.slow
@pytest.mark.parametrize("feature", list(TABLE))
def test_workers_give_the_same_bits_with_every_feature(feature: str) -> None:
    row = TABLE[feature]
    method = {"method": "dtrp"}
    weights, losses = build(row, 3, "inline", **method)
    in_workers, worker_losses = build(row, 3, "workers", **method)
    assert losses == worker_losses
    for name, value in weights.items():
        assert torch.equal(in_workers[name], value), name


# --- Losses that the model gives itself -----------------------------------------------------------------


class OwnLoss(nn.Module):
    """A model in the Hugging Face manner: with ``labels`` it gives its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(dropout=0.0)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class ScalarLoss(OwnLoss):
    """A model whose output is its loss."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return super().forward(x, labels)["loss"]


class FirstOfSeveral(OwnLoss):
    """A model that gives its loss before its scores."""

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        output = super().forward(x, labels)
        return output["loss"], output["logits"]


@pytest.mark.parametrize("kind", [OwnLoss, ScalarLoss, FirstOfSeveral])
@pytest.mark.parametrize("n_stages", [1, 2, 4])
def test_the_model_gives_its_own_loss(n_stages: int, kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().double()
    twin = copy.deepcopy(model)
    batches = CALM_MLP.batches(N_BATCHES)
    example = {"x": batches[0].args[0], "labels": batches[0].target}
    pipe = dtrp.compile(model, n_gpus=n_stages, example_inputs=example)
    with pipe.trainer(None, SGD, method="bp", executor="inline", seed=1) as trainer:
        for batch in batches:
            trainer.step(x=batch.args[0], labels=batch.target)
        trainer.flush()
        losses = list(trainer.losses)
    opt = SGD(twin.parameters())
    for batch, seen in zip(batches, losses, strict=True):
        output = twin(batch.args[0], labels=batch.target)
        loss = (
            output["loss"] if isinstance(output, dict) else output[0] if isinstance(output, tuple) else output
        )
        loss.backward()
        opt.step()
        opt.zero_grad()
        assert seen == loss.item()
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


# --- A frozen stage does no work in vain ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["bp", "dtrp", "fdg"])
def test_nothing_is_backwarded_below_the_lowest_trained_parameter(method: str) -> None:
    """A tensor hook on the output of a frozen first layer never fires: no gradient is taken there."""
    row = TABLE["frozen first layers"]
    model = row.case.make()
    row.prepare(model)
    batches = row.case.batches(10)
    pipe = dtrp.compile(model, n_gpus=4, example_inputs=batches[0].args)
    fired: list[int] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: fired.append(1))

    model[0].register_forward_hook(watch)
    model[3].register_forward_hook(watch)
    with pipe.trainer(row.case.loss_fn, SGD, method=method, executor="inline", seed=1) as trainer:
        for batch in batches:
            trainer.step(*batch.args, batch.target)
    assert not fired


class Written(nn.Module):
    """A new tensor, filled in place with what a layer gives, leaves the stage."""

    def __init__(self, fill: Callable[[Tensor, Tensor], Tensor], frozen: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.fill = [fill]
        self.a.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.fill[0](self.a(x), x)).relu())


def by_columns(h: Tensor, x: Tensor) -> Tensor:
    out = h.new_empty(h.shape)
    out[:, ::2] = h[:, ::2].tanh()
    out[:, 1::2] = h[:, 1::2].relu()
    return out


def by_a_loop(h: Tensor, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i in range(4):
        out[:, i] = h[:, i] * i
    return out


def by_index_copy(h: Tensor, x: Tensor) -> Tensor:
    return torch.zeros(x.shape).index_copy_(1, torch.arange(8).flip(0), h)


def by_a_view(h: Tensor, x: Tensor) -> Tensor:
    out = torch.ones(x.shape[0], 2, 4)
    left = out[:, 0]
    left.mul_(h[:, :4])
    return out.flatten(1)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("fill", [by_columns, by_a_loop, by_index_copy, by_a_view])
@pytest.mark.parametrize("n_stages", [2, 3])
def test_what_was_written_in_place_carries_gradient(n_stages: int, fill: Any, frozen: bool) -> None:
    """It had no gradient when it was made: else all layers before the cut stand still, silently."""
    model = Written(fill, frozen)
    twin, data = copy.deepcopy(model), [Batch((torch.randn(6, 8),), torch.randint(4, (6,))) for _ in range(8)]
    pipe = dtrp.compile(model, n_stages, example_inputs=data[0].args)
    with pipe.trainer(nn.functional.cross_entropy, SGD, method="bp", executor="inline") as trainer:
        for batch in data:
            trainer.step(*batch.args, batch.target)
        trainer.flush()
        losses = trainer.losses
    assert losses == pytest.approx(plain_loop(twin, data, nn.functional.cross_entropy, SGD), rel=1e-6)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
