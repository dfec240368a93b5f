"""What a plain loop can do: edge cases of batches, schedules per epoch, metrics, several trainers at once."""

from __future__ import annotations

import contextlib
import copy
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import dtrp
from dtrp.runtime.arguments import split_batch
from dtrp.runtime.evaluation import class_hits

from .toys import ADAMW, SGD, batches, compiled, mlp, same, trainer


def plain(model: nn.Module, data: Any, optimizer: Any = SGD) -> list[float]:
    """The loop that everybody writes."""
    opt = optimizer(model.parameters())
    losses = []
    for x, y in data:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


def calm() -> nn.Module:
    return mlp(dropout=0.0)


# --- Batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dtrp", "fdg", "bp"])
def test_fewer_batches_than_stages(method: str) -> None:
    with trainer(compiled(n_stages=4), method=method) as t:
        for x, y in batches(2):
            t.step(x, y)
        t.flush()
        assert len(t.losses) == 2


def test_a_run_without_batches() -> None:
    with trainer(compiled()) as t:
        assert t.evaluate([]) == {}
        assert t.losses == []
        assert t.stats == []


def test_a_trainer_that_is_never_used() -> None:
    model = mlp()
    start = copy.deepcopy(model.state_dict())
    with trainer(compiled(model)) as t:
        t.flush()
    assert same(model.state_dict(), start)


def sizes() -> list[tuple[Tensor, Tensor]]:
    return [batches(1, size=s, seed=s)[0] for s in (4, 1, 7, 2, 9, 1, 3)]


def test_batch_sizes_that_change_every_step_down_to_one() -> None:
    model, twin = mlp(norm=False, dropout=0.0), mlp(norm=False, dropout=0.0)
    with trainer(compiled(model, 3), method="bp") as t:
        for x, y in sizes():
            t.step(x, y)
        assert t.losses == plain(twin, sizes())
    assert same(model.state_dict(), twin.state_dict())
    with trainer(compiled(mlp(norm=False), 3)) as t:
        for x, y in sizes():
            t.step(x, y)
        t.flush()
        assert len(t.losses) == len(sizes())


def test_many_stages() -> None:
    """As many as there can be on this model, twice over what the machine has cores."""
    model = mlp(8, norm=False)
    with trainer(compiled(model, 16)) as t:
        for x, y in batches(40):
            t.step(x, y)
        t.flush()
        assert len(t.losses) == 40
        assert [s.most_stashed for s in t.stats][:15] >= [2 * (15 - k) for k in range(15)]


@pytest.mark.slow
def test_sixteen_processes_on_two_cores() -> None:
    states = []
    for executor in ("inline", "workers"):
        model = mlp(8, norm=False)
        with trainer(compiled(model, 16), executor) as t:
            for x, y in batches(40):
                t.step(x, y)
        states.append(model.state_dict())
    assert same(*states)


# --- Evaluation -----------------------------------------------------------------------------------------


def test_evaluation_before_the_first_step_and_while_filling() -> None:
    model = mlp()
    data = batches(5)
    with torch.no_grad():
        model.eval()
        expected = sum(float(F.cross_entropy(model(x), y)) for x, y in data) / 5
        model.train()
    quiet = []
    for evaluates in (False, True):
        model = mlp()
        with trainer(compiled(model, 4)) as t:
            if evaluates:
                assert t.evaluate(data)["loss"] == pytest.approx(expected)
            t.step(*data[0])
            t.step(*data[1])
            if evaluates:
                t.evaluate(data)
            t.flush()
            for x, y in data:
                t.step(x, y)
        quiet.append(copy.deepcopy(model.state_dict()))
    assert same(*quiet)


def worst(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none").max()


def test_metrics() -> None:
    model = mlp()
    data = [batches(1, size=4)[0], batches(1, size=2, seed=7)[0]]
    with trainer(compiled(model)) as t:
        found = t.evaluate(data, metric={"worst": worst, "one": lambda output, target: 1.0})
        assert set(found) == {"loss", "worst", "one"}
        with torch.no_grad():
            model.eval()
            expected = (
                4 * worst(model(data[0][0]), data[0][1]) + 2 * worst(model(data[1][0]), data[1][1])
            ) / 6
        assert found["worst"] == pytest.approx(float(expected))
        assert found["one"] == 1.0
        assert set(t.evaluate(data, metric=worst)) == {"loss", "worst"}
        with pytest.raises(TypeError, match="metric=3: expected a callable"):
            t.evaluate(data, metric=3)


class Labels:
    """A target that only the loss can read."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


class OwnLoss(nn.Module):
    """Gives its loss, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.body(x), y)


def of_each(output: Tensor, target: list[dict[str, Tensor]]) -> Tensor:
    return F.cross_entropy(output, torch.cat([t["labels"][:1] for t in target]))


def of_object(output: Tensor, target: Labels) -> Tensor:
    return F.cross_entropy(output, target.y)


@pytest.mark.parametrize("executor", ["inline", pytest.param("workers", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["a list of things per sample", "an object", "the model's own loss"])
def test_batches_weigh_what_they_hold_in_samples(kind: str, executor: str) -> None:
    """Where the target does not tell: a last, small batch counts for its samples, not for a whole one, nor
    for the boxes of its first image."""
    data = [batches(1, size=4)[0], batches(1, size=2, seed=7)[0]]
    model, own = mlp(), OwnLoss()
    x, y = data[0]
    if kind == "an object":
        pipe, loss, shown = compiled(model), of_object, [(x, Labels(y)) for x, y in data]
    elif kind == "the model's own loss":
        pipe, loss, shown = dtrp.compile(own, 2, example_inputs=(x, y)), None, data
        model = own.body  # type: ignore[assignment]
    else:
        pipe, loss = compiled(model), of_each
        shown = [
            (x, [{"labels": k.repeat(i * 5 + 1)} for i, k in enumerate(y.flip(0))][::-1]) for x, y in data
        ]
    with trainer(pipe, executor, loss) as t:
        found = t.evaluate(shown)["loss"]
        model.eval()
        with torch.no_grad():
            expected = sum(len(y) * float(F.cross_entropy(model(x), y)) for x, y in data) / 6
    assert found == pytest.approx(expected)


def test_the_models_own_mode_is_not_the_trainers() -> None:
    """`eval` and `train` on the model between steps change nothing that is trained."""
    states = []
    for switches in (False, True):
        model = mlp()
        pipe = compiled(model)
        with trainer(pipe) as t:
            for i, (x, y) in enumerate(batches(8)):
                t.step(x, y)
                if switches:
                    pipe.train(i % 2 == 0)
        states.append(copy.deepcopy(model.state_dict()))
    assert same(*states)


# --- Schedules ------------------------------------------------------------------------------------------


def test_plateau_per_epoch() -> None:
    """Halves the rate after each epoch whose loss is not far better than the best: as in the plain loop."""
    plateau = partial(lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.5)
    model, twin = calm(), calm()
    data, val = batches(6), batches(3, seed=5)
    with trainer(compiled(model, 3), method="bp", lr_scheduler=plateau, scheduler_step="epoch") as t:
        history = t.fit(data, 4, val)
    opt = SGD(twin.parameters())
    scheduler = plateau(opt)
    for row in history:
        for x, y in data:
            F.cross_entropy(twin(x), y).backward()
            opt.step()
            opt.zero_grad()
        scheduler.step(row["loss"])
    assert opt.param_groups[0]["lr"] < 0.05
    assert same(model.state_dict(), twin.state_dict())


def test_plateau_of_what_is_to_grow() -> None:
    """mode="max" steps on the metric, not on the loss, whose fall would look like a plateau of it."""
    plateau = partial(lr_scheduler.ReduceLROnPlateau, mode="max", factor=0.5, patience=0)
    values = iter([0.1, 0.2, 0.3, 0.2])
    rates: list[float] = []

    class Rates:
        def on_epoch(self, trainer: dtrp.Trainer, row: dict[str, Any]) -> None:
            rates.append(trainer.lr)

    def metric(output: Tensor, target: Tensor) -> float:
        return next(values)

    with trainer(compiled(calm(), 2), method="bp", lr_scheduler=plateau, scheduler_step="epoch") as t:
        t.fit(batches(2), 4, batches(1), metric=metric, callbacks=[Rates()])
    assert rates == [0.05, 0.05, 0.05, 0.025]


@pytest.mark.parametrize(
    ("mode", "told", "kind", "why"),
    [
        ("min", (), TypeError, "steps on a metric: end_epoch"),
        ("max", ({"train_loss": 1.0},), ValueError, "the epoch has none"),
        ("max", ({"loss": 1.0, "f1": 0.5, "auc": 0.5},), ValueError, "the epoch has f1, auc"),
    ],
)
def test_a_plateau_of_what_is_not_told(mode: Any, told: Any, kind: Any, why: str) -> None:
    """Refused, and training goes on: the epoch can be ended again with the value that is missing."""
    plateau = partial(lr_scheduler.ReduceLROnPlateau, mode=mode)
    with trainer(compiled(calm(), 2), lr_scheduler=plateau, scheduler_step="epoch") as t:
        x, y = batches(1)[0]
        t.step(x, y)
        with pytest.raises(kind, match=why):
            t.end_epoch(*told)
        assert t.epochs == 0
        t.end_epoch(0.5)
        t.step(x, y)
        assert t.epochs == 1


@pytest.mark.parametrize("scheduler_step", ["update", "epoch"])
def test_steps_of_a_schedule(scheduler_step: Any) -> None:
    model, twin = calm(), calm()
    schedule = partial(lr_scheduler.StepLR, step_size=2, gamma=0.1)
    with trainer(compiled(model, 2), method="bp", lr_scheduler=schedule, scheduler_step=scheduler_step) as t:
        t.fit(batches(3), 3)
    opt = SGD(twin.parameters())
    scheduler = schedule(opt)
    for _ in range(3):
        for x, y in batches(3):
            F.cross_entropy(twin(x), y).backward()
            opt.step()
            opt.zero_grad()
            if scheduler_step == "update":
                scheduler.step()
        if scheduler_step == "epoch":
            scheduler.step()
    assert same(model.state_dict(), twin.state_dict())


# --- Parameters -----------------------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.words, self.a, self.b = nn.Embedding(20, 8, sparse=sparse), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        out: Tensor = self.b(torch.relu(self.a(self.words(words).mean(1))))
        return out


def test_the_momentum_of_a_sparse_gradient_is_predicted_with() -> None:
    """SGD keeps it as a sparse tensor, and trains as with a dense one."""
    generator, states = torch.Generator().manual_seed(0), []
    data = [
        (torch.randint(0, 20, (4, 5), generator=generator), torch.randint(0, 3, (4,), generator=generator))
        for _ in range(12)
    ]
    for sparse in (False, True):
        torch.manual_seed(0)
        model = Words(sparse)
        pipe = dtrp.compile(model, devices=["cpu"] * 2, example_inputs=data[0][0])
        with trainer(pipe, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9)) as t:
            for words, target in data:
                t.step(words, target)
        states.append(model.state_dict())
    torch.testing.assert_close(*states)


class Idle(nn.Module):
    """Has a layer that the loss never sees, one that nothing uses, and one whose gradient is always zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.unseen, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.zero = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.a(x))
        side = self.unseen(x)
        return self.c(torch.tanh(self.b(x)) + 0.0 * self.zero), side


def first_of(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return F.cross_entropy(output[0], target)


@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)])
@pytest.mark.parametrize("n_stages", [2, 3])
def test_parameters_without_gradient(n_stages: int, optimizer: Any) -> None:
    torch.manual_seed(0)
    model = Idle()
    twin = copy.deepcopy(model)
    with trainer(compiled(model, n_stages), "inline", first_of, method="bp", optimizer=optimizer) as t:
        for x, y in batches(5):
            t.step(x, y)
    opt = optimizer(twin.parameters())
    for x, y in batches(5):
        first_of(twin(x), y).backward()
        opt.step()
        opt.zero_grad()
    assert same(model.state_dict(), twin.state_dict())
    with trainer(compiled(model, n_stages), "inline", first_of, optimizer=optimizer) as t:
        for x, y in batches(5):
            t.step(x, y)


@pytest.mark.parametrize("stage", [0, -1])
@pytest.mark.parametrize("method", ["dtrp", "fdg"])
def test_whole_stages_frozen(stage: int, method: str) -> None:
    """They are not backwarded where nothing below them learns, and their buffers are trained all the same."""
    model = mlp(4)
    pipe = compiled(model, 4)
    frozen = [name for name in pipe.stages[stage].submodules if [*model.get_submodule(name).parameters()]]
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with trainer(pipe, method=method, record=True) as t:
        for x, y in batches(12):
            t.step(x, y)
    after = model.state_dict()
    assert all(torch.equal(before[f"{name}.weight"], after[f"{name}.weight"]) for name in frozen)
    assert not torch.equal(before["1.running_mean"], after["1.running_mean"])
    if stage == 0:
        assert not any(e.stage == 0 and e.kind in ("backward", "recompute") for e in t.events)


# --- Loaders, devices, seeds ----------------------------------------------------------------------------


def test_a_data_loader_with_processes_of_its_own() -> None:
    xs, ys = zip(*batches(5), strict=True)
    dataset = TensorDataset(torch.cat(xs), torch.cat(ys))
    model, twin = calm(), calm()
    loader = DataLoader(dataset, batch_size=8, num_workers=1)
    with trainer(compiled(model), method="bp") as t:
        t.fit(loader, 1)
        assert t.losses == plain(twin, DataLoader(dataset, batch_size=8))
        assert t.samples == 20


class Stream(IterableDataset):
    """Batches of which nobody knows how many there are."""

    def __iter__(self) -> Any:
        return iter(batches(3))


def test_a_loader_without_length_under_a_progress_bar() -> None:
    loader = DataLoader(Stream(), batch_size=None)
    with pytest.raises(TypeError, match="has no len"):
        len(loader)
    with trainer(compiled(), progress=True) as t:
        t.fit(loader, 2)
        assert len(t.losses) == 6


@pytest.mark.parametrize("seed", [None, 3])
def test_a_seed_makes_a_run_reproducible(seed: int | None) -> None:
    states = []
    for _ in range(2):
        model = mlp(dropout=0.4)
        torch.manual_seed(11)  # without a seed, torch's own generator decides
        with trainer(compiled(model), seed=seed) as t:
            for x, y in batches(6):
                t.step(x, y)
        states.append(model.state_dict())
    assert same(*states)


def test_two_trainers_at_once_and_one_after_the_other() -> None:
    def alone(seed: int) -> dict[str, Tensor]:
        model = mlp(seed=seed)
        with trainer(compiled(model), seed=seed) as t:
            for x, y in batches(8):
                t.step(x, y)
        return model.state_dict()

    one, two = mlp(seed=1), mlp(seed=2)
    with trainer(compiled(one), seed=1) as a, trainer(compiled(two), seed=2) as b:
        for x, y in batches(8):
            a.step(x, y)
            b.step(x, y)
    assert same(one.state_dict(), alone(1))
    assert same(two.state_dict(), alone(2))


def test_a_second_trainer_goes_on_with_the_weights() -> None:
    model = calm()
    pipe = compiled(model)
    twin = calm()
    for _ in range(2):
        with trainer(pipe, method="bp") as t:
            for x, y in batches(4):
                t.step(x, y)
        plain(twin, batches(4))
    assert same(model.state_dict(), twin.state_dict())


@pytest.mark.slow
def test_two_trainers_in_worker_processes_at_once() -> None:
    models = [mlp(seed=s) for s in (1, 2, 1, 2)]
    with trainer(compiled(models[0]), "workers") as a, trainer(compiled(models[1]), "workers") as b:
        for x, y in batches(8):
            a.step(x, y)
            b.step(x, y)
    for model in models[2:]:
        with trainer(compiled(model)) as t:
            for x, y in batches(8):
                t.step(x, y)
    assert same(models[0].state_dict(), models[2].state_dict())
    assert same(models[1].state_dict(), models[3].state_dict())


# --- Batch compensation ---------------------------------------------------------------------------------


def test_joined_batches_are_one_batch() -> None:
    """m = 3 over 7 batches: two of three and one of one, with the rate scaled by 3, 3 and 1."""
    model, twin = calm(), calm()
    data = batches(7)
    with trainer(compiled(model), method="bp", batch_compensation=3, compensation_warmup=1) as t:
        seen = [t.step(x, y) for x, y in data]
        assert [loss is None for loss in seen] == [True, True, False, False, False, False, False]
        t.flush()
        losses = t.losses
    opt = SGD(twin.parameters())
    expected = []
    for group in (data[:3], data[3:6], data[6:]):
        opt.param_groups[0]["lr"] = 0.05 * len(group)
        loss = F.cross_entropy(twin(torch.cat([x for x, _ in group])), torch.cat([y for _, y in group]))
        loss.backward()
        opt.step()
        opt.zero_grad()
        expected += [loss.item()] * len(group)
    assert losses == expected
    assert same(model.state_dict(), twin.state_dict())


def test_the_scale_warms_up_and_the_schedule_counts_the_users_batches() -> None:
    model, twin = calm(), calm()
    data = batches(8)
    schedule = partial(lr_scheduler.ExponentialLR, gamma=0.9)
    knobs = {"method": "bp", "batch_compensation": 2, "compensation_warmup": 4, "lr_scheduler": schedule}
    with trainer(compiled(model), **knobs) as t:
        for x, y in data:
            t.step(x, y)
    opt = SGD(twin.parameters())
    for u in range(4):
        opt.param_groups[0]["lr"] = 0.05 * 0.9 ** (2 * u) * (1 + (u + 1) / 4)
        (x1, y1), (x2, y2) = data[2 * u : 2 * u + 2]
        F.cross_entropy(twin(torch.cat([x1, x2])), torch.cat([y1, y2])).backward()
        opt.step()
        opt.zero_grad()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_batches_of_other_forms_are_not_joined() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(torch.tanh(self.a(x)).mean(1))
            return y

    def batch(length: int) -> tuple[Tensor, Tensor]:
        return torch.randn(4, length, 8), torch.zeros(4, dtype=torch.long)

    pipe = dtrp.compile(Mean(), n_gpus=2, example_inputs=batch(5)[0])
    with trainer(pipe, batch_compensation=4) as t:
        for length in (5, 5, 6, 6, 6, 6, 5):
            t.step(*batch(length))
        t.flush()
        assert [len(set(t.losses[a:b])) for a, b in ((0, 2), (2, 6), (6, 7))] == [1, 1, 1]
        assert len(set(t.losses)) == 3


# --- Seeing it run --------------------------------------------------------------------------------------


def test_statistics() -> None:
    with trainer(compiled(n_stages=3, recompute=True)) as t:
        for x, y in batches(10):
            t.step(x, y)
        t.flush()
        stats = t.stats
    assert [s.stage for s in stats] == [0, 1, 2]
    assert [s.ticks for s in stats] == [14, 12, 10]  # each stage's own rounds: what was fed, and its depth
    assert all(s.tick_time > 0 and 0 < s.busy <= 1 and s.peak_memory > 2**20 for s in stats)
    assert [s.most_stashed for s in stats] == [4, 2, 0]
    assert [s.most_graphs for s in stats] == [1, 1, 1]
    assert t.stats == stats  # still there afterwards


def test_timeline(tmp_path: Any) -> None:
    import json

    path = tmp_path / "run.json"
    pipe = compiled(n_stages=3, recompute=True)
    with trainer(pipe, timeline=path) as t:
        for x, y in batches(5):
            t.step(x, y)
    events = json.loads(path.read_text())["traceEvents"]
    kinds = {(e["pid"], e["cat"]) for e in events if e["ph"] == "X"}
    assert kinds >= {(k, kind) for k in range(3) for kind in ("forward", "backward", "send", "wait")}
    with_weights = {s.index for s in pipe.stages if next(s.module.parameters(), None) is not None}
    assert {k for k, kind in kinds if kind == "step"} == with_weights
    assert {k for k, kind in kinds if kind == "recompute"} == {0, 1}
    assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in events if e["ph"] == "X")


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever tqdm draws of it, which depends on the time and on its settings."""
    from tqdm.auto import tqdm

    said: dict[str, Any] = {}
    true = tqdm.set_postfix
    monkeypatch.setattr("dtrp.runtime.fitting.PACE", 0.0)
    monkeypatch.setattr(tqdm, "set_postfix", lambda bar, row, **kw: (said.update(row), true(bar, row, **kw)))
    with trainer(compiled(), progress=True) as t:
        t.fit(batches(6), 1)
        assert said.keys() == {"train_loss", "samples/s", "balance"}  # "loss" is the val_loader's
        t.fit(batches(6), 1, val_loader=batches(2))
    assert {"loss", "accuracy"} <= said.keys()
    shown = capsys.readouterr().err
    assert "epoch 1/1: 6 batches, 00:0" in shown
    assert "the pipeline fills" in shown
    assert "train_loss=" in shown


class Talks(nn.Module):
    """Logs in its forward, as user code may."""

    def forward(self, x: Tensor) -> Tensor:
        import logging

        if not torch.compiler.is_compiling():
            logging.getLogger("mine").error("seen %d", x.dim())
        return x


def talkative(output: Tensor, target: Tensor) -> Tensor:
    import logging

    logging.getLogger("mine").error("seen %d", len(target))
    return F.cross_entropy(output, target)


def test_logs_of_workers_come_with_the_stages_name(caplog: pytest.LogCaptureFixture) -> None:
    """One run of worker processes also for what else needs them: statistics, timeline, glances."""
    with caplog.at_level("WARNING"), trainer(compiled(mlp(3)), "workers", talkative, record=True) as t:
        for x, y in batches(12):
            t.step(x, y)
        t.flush()
        stats = t.stats
        assert [s.ticks for s in stats] == [14, 12]
        assert all(s.peak_memory > 2**26 and s.tick_time > 0 for s in stats)
    assert ("mine", "[stage 1] seen 4") in [(r.name, r.getMessage()) for r in caplog.records]
    assert {"forward", "backward", "step", "send", "wait"} <= {e.kind for e in t.events}


# --- Options --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_stages() -> None:
    losses = []
    for compile_stages in (False, True):
        with trainer(compiled(mlp(3, dropout=0.0)), compile_stages=compile_stages) as t:
            for x, y in batches(6):
                t.step(x, y)
            t.flush()
            losses.append(t.losses)
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-4)


class Halfway:
    """A user's own predictor: half of what `difference` says."""

    needs_previous = True

    def predict(self, weight: Tensor, group: Any, state: Any, s: float) -> Tensor:
        previous = state.get("previous")
        return weight if previous is None else weight + 0.5 * s * (weight - previous)


def test_a_users_own_predictor_equals_scaling_the_horizon() -> None:
    states = []
    for knobs in ({"predictor": Halfway()}, {"predictor": "difference", "horizon_scale": 0.5}):
        model = mlp()
        with trainer(compiled(model, 3), optimizer=ADAMW, **knobs) as t:
            for x, y in batches(10):
                t.step(x, y)
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value)


def test_a_predictor_must_have_the_method() -> None:
    with pytest.raises(TypeError, match="expected a name or an object with"):
        trainer(compiled(), predictor=object())


# --- Executors ------------------------------------------------------------------------------------------

EVERYTHING: dict[str, dict[str, Any]] = {
    "dtrp": {},
    "dtrp, stage": {"horizon": "stage", "optimizer": ADAMW},
    "dtrp, difference": {"predictor": "difference", "horizon_scale": 1.5},
    "dtrp, own": {"predictor": Halfway()},
    "dtr": {"method": "dtr", "lr_shrink": 0.9},
    "fdg": {"method": "fdg", "grad_shrink": 0.8},
    "adl": {"method": "adl", "accumulate": 3},
    "bp": {"method": "bp"},
    "clip": {"max_grad_norm": 0.5},
    "bp, clip": {"method": "bp", "max_grad_norm": 0.5},
    "joined": {"batch_compensation": 3},
    "schedule": {"lr_scheduler": partial(lr_scheduler.CosineAnnealingLR, T_max=20)},
    "autocast": {"autocast": torch.bfloat16},
    "skip": {"on_nonfinite": "skip"},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("clip",) else pytest.mark.slow) for n in EVERYTHING]
)
def test_worker_processes_give_the_same_bits(name: str) -> None:
    found = []
    for executor in ("inline", "workers"):
        model = mlp()
        with trainer(compiled(model, 3, recompute=True), executor, **EVERYTHING[name]) as t:
            for x, y in [*batches(20), *batches(1, size=3)]:
                t.step(x, y)
            t.flush()
            evaluation = t.evaluate(batches(3))
        found.append((copy.deepcopy(model.state_dict()), t.losses, evaluation))
    assert same(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


class Mixes(nn.Module):
    """Mixes its samples by a number that torch does not draw."""

    def __init__(self, numpy: bool) -> None:
        super().__init__()
        self.numpy = numpy

    def forward(self, x: Tensor) -> Tensor:
        share = float(np.random.rand()) if self.numpy else random.random()
        return share * x + (1 - share) * x.flip(0)


@pytest.mark.parametrize("numpy", [False, True])
def test_numbers_of_python_and_numpy_are_seeded_too(numpy: bool) -> None:
    """Unseeded, stages in two processes draw other ones than in one, and a recompute pass other ones
    than the first forward."""
    states = []
    for ambient in (1, 2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), Mixes(numpy), nn.Linear(8, 8), nn.Linear(8, 3))
        pipe = compiled(model)
        random.seed(ambient)
        np.random.seed(ambient)
        with trainer(pipe, seed=0) as t:
            for x, y in batches(6):
                t.step(x, y)
        states.append(model.state_dict())
    assert same(*states)


def interrupted(t: dtrp.Trainer) -> None:
    with t:
        for x, y in batches(6):
            t.step(x, y)
        raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_run_has_its_losses() -> None:
    """Those of the batches that were finished when the script was stopped, as with stages in this process."""
    found = []
    for executor in ("inline", "workers"):
        t = trainer(compiled(), executor)
        with pytest.raises(KeyboardInterrupt):
            interrupted(t)
        found.append(t.losses)
    assert found[0] == found[1] != []


@pytest.mark.parametrize("way", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("executor", ["inline", pytest.param("workers", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["dtrp", "fdg", "bp"])
def test_hooks_on_gradients(method: str, executor: str, way: str) -> None:
    """A parameter whose gradient a hook sets to zero stays, also where a copy of it has the gradient."""
    model = mlp(3)
    kept = [model[0].weight, model[-1].weight]
    for p in kept:
        getattr(p, way)((lambda g: g * 0) if way == "register_hook" else _drop)
    before = [p.detach().clone() for p in kept]
    others = model[4].weight.detach().clone()
    with trainer(compiled(model), executor, method=method) as t:
        for x, y in batches(6):
            t.step(x, y)
    assert all(torch.equal(p, was) for p, was in zip(kept, before, strict=True))
    assert not torch.equal(model[4].weight, others)


def _drop(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.zero_()


def test_the_rate_of_a_model_whose_last_stage_is_frozen() -> None:
    """Losses come from there, and its rate with them, of which it has none."""
    model = mlp()
    model[3:].requires_grad_(False)
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    with trainer(compiled(model), lr_scheduler=scheduler, optimizer=partial(torch.optim.SGD, lr=1.0)) as t:
        for x, y in batches(4):
            t.step(x, y)
        t.flush()
        assert t.lr == 0.5**4


@pytest.mark.parametrize("executor", ["inline", pytest.param("workers", marks=pytest.mark.slow)])
def test_options_by_the_parameter_itself(executor: str) -> None:
    """``id(p) in head``, as fine-tuning scripts have it."""
    model = mlp(norm=False, dropout=0.0)
    head, before = {id(p) for p in model[-1].parameters()}, copy.deepcopy(model.state_dict())
    options = lambda name, p: {"lr": 0.1} if id(p) in head else {}  # noqa: E731
    optimizer = partial(torch.optim.SGD, lr=0.0)
    with trainer(compiled(model), executor, optimizer=optimizer, param_groups=options) as t:
        for x, y in batches(4):
            t.step(x, y)
    moved = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert moved == {f"{len(model) - 1}.weight", f"{len(model) - 1}.bias"}


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("n_stages", [2, 3])
def test_accumulated_gradients_are_clipped_over_all_stages(n_stages: int, accumulate: int) -> None:
    """In the paper's order, where each tick's are: a stage that does not step says nothing of its own."""
    model, limit = mlp(norm=False, dropout=0.0), 1e-3
    optimizer = partial(torch.optim.SGD, lr=1.0)
    with trainer(
        compiled(model, n_stages), optimizer=optimizer, max_grad_norm=limit, accumulate=accumulate
    ) as t:
        for x, y in batches(1) * 4 * accumulate:
            t.step(x, y)
        t.flush()
        before = copy.deepcopy(model.state_dict())
        for x, y in batches(1) * 6 * accumulate:
            t.step(x, y)
        t.flush()
    moved = torch.cat([(p - before[name]).flatten() for name, p in model.state_dict().items()]).norm()
    assert float(moved) == pytest.approx(6 * limit, rel=0.05 if accumulate > 1 else 0.3)


def test_validation_that_cannot_be_is_refused_before_training() -> None:
    """An epoch of hours, and then a refusal, would be lost."""
    with trainer(compiled()) as t:
        for val_loader, metric, text in (
            (TensorDataset(*batches(1)[0]), None, "wrap it"),
            (batches(1), "f1", "expected a callable"),
            ((b for b in batches(1)), None, "as val_loader, which can be gone through only once"),
        ):
            with pytest.raises((TypeError, ValueError), match=text):
                t.fit(batches(4), 2, val_loader, metric=metric)
        assert t.samples == 0


def test_lists_with_something_for_each_sample_are_cut() -> None:
    """As collators for detection give them: else the second part meets the first one's targets."""
    x, _ = batches(1)[0]
    boxes = [torch.rand(i + 1, 3) for i in range(4)]
    parts = list(split_batch([x], boxes, 2))
    assert [len(wanted) for _, wanted, _ in parts] == [2, 2]
    assert parts[1][1][0] is boxes[2]
    several = [torch.zeros(4), torch.ones(4), torch.ones(4), torch.ones(4)]  # four targets of all samples
    assert [t.shape[0] for t in next(iter(split_batch([x], several, 2)))[1]] == [2] * 4


def test_a_run_resumed_within_a_group_closes_the_same_groups(tmp_path: Path) -> None:
    """Else the epoch's last batches are never stepped with, and updates are counted wrong."""

    class Break:
        def on_step(self, t: Any, loss: float | None) -> None:
            if t._history.fed == 6:
                t.save(tmp_path / "run")
                raise InterruptedError

    def run(path: Path, callbacks: list[Any]) -> tuple[int, dict[str, Tensor]]:
        model = mlp(dropout=0.0)
        with trainer(compiled(model, 2), method="bp", accumulate=4) as t:
            t.fit(batches(10), 1, callbacks=callbacks, resume=path)
        return t.updates, model.state_dict()

    updates, weights = run(tmp_path / "whole", [])
    with pytest.raises(InterruptedError):
        run(tmp_path / "run", [Break()])
    again, resumed = run(tmp_path / "run", [])
    assert again == updates == 3
    assert same(resumed, weights)


def test_the_rest_of_an_epoch_is_stepped_with_behind_a_batch_that_was_skipped() -> None:
    model, (x, y) = mlp(norm=False, dropout=0.0), batches(1)[0]
    bad = torch.full_like(x, math.nan)
    with trainer(compiled(model, 1), accumulate=2, on_nonfinite="skip", method="bp") as t:
        t.fit([(x, y), (bad, y), (x, y), (x, y)], 1)
        assert all(stage.weights.own.waiting == 0 for stage in t._run.executor.stages)


def test_an_optimizer_that_finds_its_own_rate() -> None:
    class Own(torch.optim.SGD):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=0.1)
            for group in self.param_groups:
                group["lr"] = None

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["lr"] = 0.1
            super().step()
            for group in self.param_groups:
                group["lr"] = None

    with trainer(compiled(), optimizer=Own, method="bp") as t:
        t.step(*batches(1)[0])
        t.flush()
        assert math.isnan(t.lr)


def test_accuracy_is_of_classes_that_count() -> None:
    """One score is no choice, and what the loss leaves out is not wrong."""
    scores, target = torch.eye(3).repeat(2, 1), torch.tensor([0, 1, 2, 0, 1, 255])
    assert class_hits(torch.randn(6, 1), target) is None
    assert class_hits(scores, target, 255).tolist() == [True] * 5
    assert class_hits(scores, target).tolist() == [True] * 5 + [False]
    pipe = compiled(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)))
    masked = [(x, torch.where(torch.arange(4) < 2, y, 255)) for x, y in batches(1)]
    with trainer(pipe, loss_fn=nn.CrossEntropyLoss(ignore_index=255)) as t:
        t.step(*masked[0])
        found = t.evaluate(masked)
        x, y = masked[0]
        expected = (pipe.model.eval()(x).argmax(1) == y)[:2].double().mean()
    assert found["accuracy"] == float(expected)


def test_batches_in_flight_survive_inference_mode() -> None:
    """``@torch.inference_mode()`` around a validation of one's own: it drains the pipeline first."""

    def run(around: Any) -> dict[str, Tensor]:
        model = mlp(dropout=0.0)
        with trainer(compiled(model, 3)) as t:
            for x, y in batches(6):
                t.step(x, y)
            with around():
                t.evaluate(batches(2))
                if around is torch.inference_mode:
                    with pytest.raises(RuntimeError, match="nothing can be trained inside"):
                        t.step(*batches(1)[0])
        return model.state_dict()

    assert same(run(contextlib.nullcontext), run(torch.inference_mode))


@pytest.mark.parametrize("eval_mode", [False, True])
def test_a_model_in_eval_mode_is_told_that_it_is_trained(
    eval_mode: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A plain loop would leave the running statistics of a frozen backbone alone."""
    with trainer(compiled(mlp().train(not eval_mode))) as t:
        t.step(*batches(1)[0])
    assert any("was in eval mode and is trained" in r.message for r in caplog.records) == eval_mode


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_lagging_norms_are_those_of_updates(accumulate: int) -> None:
    """A batch that only gathers has no norm: with 0 in its place the next update would not be clipped."""
    model, limit = mlp(norm=False, dropout=0.0), 1e-3
    with trainer(
        compiled(model), optimizer=partial(torch.optim.SGD, lr=1.0), max_grad_norm=limit,
        max_grad_norm_lag=True, accumulate=accumulate, schedule="lean",
    ) as t:  # fmt: skip
        before = copy.deepcopy(model.state_dict())
        for x, y in batches(1) * 10 * accumulate:
            t.step(x, y)
    moved = torch.cat([(p - before[name]).flatten() for name, p in model.state_dict().items()]).norm()
    assert float(moved) <= 10 * limit * 1.5  # the first by each stage's own norm


def test_a_metric_is_not_the_loss() -> None:
    def loss(output: Tensor, target: Tensor) -> float:
        return 7.0

    with trainer(compiled()) as t, pytest.raises(ValueError, match="a metric is called 'loss'"):
        t.fit(batches(2), 1, batches(1), metric=loss)
