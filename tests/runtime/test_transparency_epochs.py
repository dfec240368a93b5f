"""The transparency table, second part: what a loop over epochs does around its batches.

Back-propagation through 1, 2 and 4 stages by `Trainer.fit` against the epochs that everybody writes: loaders,
schedules per epoch, evaluation with metrics, joined batches, compiled stages. Weights and buffers must agree
bit for bit, where a row does not say otherwise and why; what is measured, to the rounding of a mean.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

import dtrp
from tests.reference.models import FLAT_CNN, MLP, RESNET, TWO_HEADS, UNET, Batch, Case, mlp
from tests.sweeps import each_once

EPOCHS = 5
PER_EPOCH = 10
SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=1e-3)

CALM_MLP = Case("mlp", partial(mlp, dropout=0.0), MLP.batch, MLP.loss_fn)

Loader = Iterable[tuple[Any, ...]]


def in_order(case: Case, seed: int) -> Loader:
    """The same batches each time; the last one is smaller."""
    return [(*b.args, b.target) for b in case.batches(PER_EPOCH, last=3, seed=seed)]


def dataset(case: Case, seed: int) -> TensorDataset:
    batches = case.batches(PER_EPOCH, last=3, seed=seed)
    return TensorDataset(torch.cat([b.args[0] for b in batches]), torch.cat([b.target for b in batches]))


def shuffled(case: Case, seed: int, workers: int = 0) -> Loader:
    """A DataLoader that shuffles by a generator of its own; with worker processes, if they are asked for."""
    g = torch.Generator().manual_seed(seed)
    return DataLoader(
        dataset(case, seed), batch_size=case.batch_size, shuffle=True, num_workers=workers, generator=g
    )


def top2(output: Tensor, target: Tensor) -> Tensor:
    return (output.topk(2).indices == target[:, None]).any(1).double().mean()


def worst(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none").max()


def gap(output: dict[str, Tensor], target: dict[str, Tensor]) -> float:
    value = next(v for v in output.values() if v.shape == target["value"].shape)
    return float((value - target["value"]).abs().mean())


@dataclass(frozen=True)
class Row:
    """One feature: how the pipeline is told, and how the plain loop does it."""

    case: Case = FLAT_CNN
    loader: Callable[[Case, int], Loader] = in_order
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None  # steps per epoch
    on_loss: bool = False  # the schedule steps on the validation loss
    metrics: dict[str, Any] | None = None
    joined: int = 1  # batches that travel as one
    knobs: dict[str, Any] = field(default_factory=dict)  # of Pipeline.trainer
    tolerance: float = 0.0  # relative, of weights; 0: bit for bit
    why: str = ""  # the tolerance


SUMS = "a value used by several stages has its gradients added up in another order"
FUSED = "a compiled stage adds up and rounds as its kernels do, the plain model as eager kernels do"

TABLE = {
    "a loader in order": Row(),
    "a loader that shuffles": Row(loader=shuffled, knobs={"progress": True}),
    "a loader with worker processes": Row(loader=partial(shuffled, workers=1)),
    "scheduler per epoch: steps": Row(schedule=partial(lr_scheduler.StepLR, step_size=2, gamma=0.3)),
    "scheduler per epoch: cosine": Row(schedule=partial(lr_scheduler.CosineAnnealingLR, T_max=EPOCHS)),
    "scheduler per epoch: warm-up": Row(
        schedule=partial(lr_scheduler.LinearLR, start_factor=0.1, total_iters=3)
    ),
    "scheduler on the validation loss": Row(
        schedule=partial(lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.5), on_loss=True
    ),
    "accuracy": Row(RESNET, tolerance=1e-8, why=SUMS),
    "metrics by name": Row(metrics={"top2": top2, "worst": worst}),
    "accuracy per pixel": Row(UNET, tolerance=1e-8, why=SUMS),
    "metrics on dicts": Row(TWO_HEADS, metrics={"gap": gap}, tolerance=1e-8, why=SUMS),
    "joined batches": Row(joined=3),
    "joined batches of dicts": Row(TWO_HEADS, metrics={"gap": gap}, joined=2, tolerance=1e-8, why=SUMS),
    "compiled stages": Row(CALM_MLP, knobs={"compile_stages": True}, tolerance=1e-6, why=FUSED),
}
HEAVY = {
    "compiled stages": [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)],
    "a loader with worker processes": [pytest.mark.slow],
}


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Which classes lie along dimension 1, as cross_entropy has it."""
    return (output.argmax(1) == target).double().mean()


def plain_evaluation(model: nn.Module, loader: Loader, row: Row) -> dict[str, float]:
    model.eval()
    metrics = {"accuracy": accuracy} if row.metrics is None else row.metrics
    total = dict.fromkeys(["loss", *metrics], 0.0)
    n = 0
    with torch.no_grad():
        for *x, y in loader:
            output, size = model(*x), len(x[0])
            n += size
            total["loss"] += size * float(row.case.loss_fn(output, y))
            for name, metric in metrics.items():
                total[name] += size * float(metric(output, y))
    model.train()
    return {name: value / n for name, value in total.items()}


def plain_groups(loader: Loader, m: int) -> Iterable[list[tuple[Any, ...]]]:
    group: list[tuple[Any, ...]] = []
    for batch in loader:
        group.append(batch)
        if len(group) == m:
            yield group
            group = []
    if group:
        yield group


def plain_epochs(model: nn.Module, row: Row) -> tuple[list[float], list[dict[str, float]]]:
    """Train and evaluate by hand; the losses and what each epoch measured."""
    opt = SGD(model.parameters())
    scheduler = row.schedule(opt) if row.schedule is not None else None
    loader, val = row.loader(row.case, 1), row.loader(row.case, 2)
    losses, history = [], []
    for _ in range(EPOCHS):
        for group in plain_groups(loader, row.joined):
            *x, y = pytree.tree_map(lambda *values: torch.cat(values), *group)
            loss = row.case.loss_fn(model(*x), y)
            loss.backward()
            rate = opt.param_groups[0]["lr"]
            opt.param_groups[0]["lr"] = rate * len(group)
            opt.step()
            opt.param_groups[0]["lr"] = rate
            opt.zero_grad()
            losses += [loss.item()] * len(group)
        history.append(plain_evaluation(model, val, row))
        if scheduler is not None:
            scheduler.step(*([history[-1]["loss"]] if row.on_loss else []))
    return losses, history


def by_fit(
    row: Row, n_stages: int, executor: str, method: str = "bp"
) -> tuple[dict[str, Tensor], list[float], list[dict[str, float]]]:
    model = row.case.make()
    first: Batch = row.case.batches(1)[0]
    pipe = dtrp.compile(model, n_gpus=n_stages, example_inputs=first.args)
    assert len(pipe.stages) == n_stages
    with pipe.trainer(
        row.case.loss_fn,
        SGD,
        method=method,
        executor=executor,
        seed=1,
        lr_scheduler=row.schedule,
        scheduler_step="epoch",
        batch_compensation=row.joined,
        compensation_warmup=1,
        **row.knobs,
    ) as trainer:
        history = trainer.fit(row.loader(row.case, 1), EPOCHS, row.loader(row.case, 2), metric=row.metrics)
        losses = list(trainer.losses)
    return copy.deepcopy(model.state_dict()), losses, history


def check(row: Row, n_stages: int, executor: str) -> None:
    weights, losses, history = by_fit(row, n_stages, executor)
    model = row.case.make()
    expected, measured = plain_epochs(model, row)
    assert row.tolerance == 0 or row.why
    # One stage does every sum in the plain order, unless it is compiled.
    tolerance = row.tolerance if n_stages > 1 or row.why == FUSED else 0.0
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance * 1e-2)
    close(torch.tensor(losses, dtype=torch.double), torch.tensor(expected, dtype=torch.double))
    for name, value in model.state_dict().items():
        close(weights[name], value, msg=lambda m, at=name: f"{at}: {m}")
    for seen, wanted in zip(history, measured, strict=True):
        assert seen.keys() == {"train_loss", *wanted}
        assert {k: seen[k] for k in wanted} == pytest.approx(wanted, rel=max(1e-12, tolerance))
    per_epoch = torch.tensor(losses, dtype=torch.double).view(EPOCHS, -1).mean(1)
    assert [h["train_loss"] for h in history] == pytest.approx(per_epoch.tolist(), rel=1e-12)
    if row.schedule is not None:
        assert_the_schedule_mattered(row, weights)


def assert_the_schedule_mattered(row: Row, weights: dict[str, Tensor]) -> None:
    """A row whose schedule changes nothing would test nothing."""
    model = row.case.make()
    plain_epochs(model, Row(row.case, row.loader))
    assert any(not torch.equal(weights[name], value) for name, value in model.state_dict().items())


QUICK = [name for name in TABLE if name not in HEAVY]


@pytest.mark.parametrize(
    ("feature", "n_stages"),
    [
        *each_once(QUICK, [1, 2, 4]),
        *(pytest.param(name, n, marks=HEAVY[name]) for name in HEAVY for n in (1, 2, 4)),
    ],
)
def test_epochs_are_those_of_the_plain_loop(feature: str, n_stages: int) -> None:
    check(TABLE[feature], n_stages, "inline")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # torch's own, of compiling
@pytest.mark.parametrize("method", ["bp", "dtrp"])
@pytest.mark.parametrize("feature", list(TABLE))
def test_workers_give_the_same_epochs(feature: str, method: str) -> None:
    """To the bit, with what they measure."""
    row = TABLE[feature]
    inline, in_workers = (by_fit(row, 3, executor, method) for executor in ("inline", "workers"))
    assert inline[1:] == in_workers[1:]
    for name, value in inline[0].items():
        assert torch.equal(in_workers[0][name], value), name
