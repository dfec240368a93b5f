"""Lightning's Trainer over a pipeline, beside its own single-device run, and beside a loop by hand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dtrp

lightning = pytest.importorskip("lightning.pytorch")

from dtrp.integrations.lightning import PipelineStrategy  # noqa: E402

EXACT = {"method": "bp", "executor": "inline"}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The library's own warnings are its own; the stages' one about logs is looked for by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
    def __init__(self, *, schedule: str = "step", momentum: float = 0.9, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 8), nn.Tanh(),
            nn.Linear(8, 3),
        )  # fmt: skip
        self.schedule, self.momentum = schedule, momentum

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> Any:
        weights = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() == 1]
        groups = [{"params": weights, "weight_decay": 0.01}, {"params": others, "lr": 0.2}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=self.momentum)
        if self.schedule == "fifty":
            return optimizer
        if self.schedule == "step":
            made: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2], total_steps=20)
        else:
            made = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return [optimizer], [{"scheduler": made, "interval": self.schedule}]


class Losses(lightning.Callback):  # type: ignore[name-defined,misc]
    """Notes what the loop says of each batch."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.epochs: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.steps.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.epochs.append(float(trainer.callback_metrics["train_epoch"]))


def data(n: int = 27) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 8, generator=g), torch.randint(0, 3, (n,), generator=g)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def fit(folder: Path, module: Any, strategy: Any = "auto", *, resume: Any = None, **options: Any) -> Any:
    losses, loader = Losses(), options.pop("loader", None)
    usual = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        default_root_dir=folder, strategy=strategy, enable_model_summary=False,
        callbacks=[*([losses] * options.pop("epochs", True)), *options.pop("callbacks", [])],
        **{**usual, **options},
    )  # fmt: skip
    trainer.fit(module, data() if loader is None else loader, data(8), ckpt_path=resume)
    trainer.losses = losses
    return trainer


def stages(**training: Any) -> PipelineStrategy:
    return PipelineStrategy(2, {"executor": "inline", **training})


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("step", {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
        pytest.param("epoch", {"max_epochs": 8}, marks=pytest.mark.slow),
        pytest.param("epoch", {"precision": "bf16-mixed"}, marks=pytest.mark.slow),
        pytest.param("step", {"precision": "16-mixed", "gradient_clip_val": 0.5}, marks=pytest.mark.slow),
        ("fifty", {"max_epochs": 8, "max_steps": 50}),
    ],
)
def test_exact_training_equals_the_library(schedule: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Losses, logs, validation and weights are those of Lightning's own single-device run, incomplete groups
    of accumulated batches, schedulers and groups of parameters included."""
    mine, theirs = Module(schedule=schedule), Module(schedule=schedule)
    a = fit(tmp_path, mine, stages(method="bp"), **options)
    b = fit(tmp_path, theirs, **options)
    tolerance = 1e-2 if "precision" in options else 1e-4
    assert a.losses.steps == pytest.approx(b.losses.steps, rel=tolerance)
    assert a.losses.epochs == pytest.approx(b.losses.epochs, rel=tolerance)
    assert float(a.callback_metrics["val"]) == pytest.approx(float(b.callback_metrics["val"]), rel=tolerance)
    assert a.global_step == b.global_step == options.get("max_steps", a.global_step)
    for x, y in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("executor", ["inline", pytest.param("workers", marks=pytest.mark.slow)])
def test_decoupled_training_equals_a_loop_by_hand(executor: str, tmp_path: Path) -> None:
    """The same bits as `Pipeline.trainer`, whose groups and schedule are written out."""
    mine, plain = Module(dropout=0.1), Module(dropout=0.1)
    fit(tmp_path, mine, stages(seed=3, executor=executor), limit_val_batches=0)
    pipe = dtrp.compile(plain.net, n_gpus=2)
    with pipe.trainer(
        F.cross_entropy,
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        param_groups=lambda name, p: {"weight_decay": 0.01} if p.dim() > 1 else {"lr": 0.2},
        lr_scheduler=partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=[0.1, 0.2], total_steps=20),
        seed=3,
        executor="inline",
    ) as t:
        t.fit(data(), 2)
    for name, value in plain.net.state_dict().items():
        assert torch.equal(value, mine.net.state_dict()[name]), name


@pytest.mark.parametrize("method", [pytest.param("bp", marks=pytest.mark.slow), "dtrp"])
def test_resumes_from_the_librarys_checkpoint(method: str, tmp_path: Path) -> None:
    """Optimizer, scheduler, counters: a run that goes on after an epoch equals one that goes through."""
    whole, resumed = Module(dropout=0.1), Module(dropout=0.1)
    fit(tmp_path, Module(dropout=0.1), stages(method=method, seed=3), max_epochs=1)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    fit(tmp_path / "whole", whole, stages(method=method, seed=3))
    fit(tmp_path / "resumed", resumed, stages(method=method, seed=3), resume=checkpoint)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.slow
def test_the_library_resumes_from_ours_and_we_from_its(tmp_path: Path) -> None:
    ways = {"ours": lambda: stages(method="bp"), "its": lambda: "auto"}
    for first, second in (("ours", "its"), ("its", "ours")):
        folder = tmp_path / first
        fit(folder, Module(), ways[first](), max_epochs=1)
        (checkpoint,) = folder.rglob("*.ckpt")
        whole, resumed = Module(), Module()
        fit(folder / "whole", whole, ways[first]())
        fit(folder / "resumed", resumed, ways[second](), resume=checkpoint)
        for x, y in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_what_else_is_logged_is_named(tmp_path: Path) -> None:
    class Talkative(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("twice", 2 * loss)
            return loss

    with pytest.warns(UserWarning, match="training_step logs 'twice', which is not the loss"):
        fit(tmp_path, Talkative(), stages(), max_epochs=1)


def test_how_a_loss_is_logged_is_followed(tmp_path: Path) -> None:
    """By position, detached, and with the size of the batch that the loss is of, which is no longer here."""

    class Logs(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log("train", loss.detach(), False, False, False, True)
            self.log("sized", loss, on_epoch=True, batch_size=len(batch[0]))
            self.log("inferred", loss, on_epoch=True)
            self.log("weightless", loss, on_step=False, on_epoch=True, batch_size=1)
            return loss

    class Notes(PipelineStrategy):
        def on_train_end(self) -> None:
            super().on_train_end()
            assert self._run is not None
            self.seen = list(self._run.losses)

    notes = Notes(3, {"executor": "inline"})
    found = fit(tmp_path, Logs(schedule="fifty"), notes, max_epochs=1, epochs=False).callback_metrics
    sizes = [4] * 6 + [3]
    weighted = sum(loss * n for loss, n in zip(notes.seen, sizes, strict=True)) / sum(sizes)
    for name in ("train", "sized_epoch", "inferred_epoch"):
        assert float(found[name]) == pytest.approx(weighted, rel=1e-6), name
    assert float(found["weightless"]) == pytest.approx(sum(notes.seen) / 7, rel=1e-6)


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(list(data().dataset))


def test_a_stream_that_ends_within_an_update(tmp_path: Path) -> None:
    """Nobody knows before that its last group is incomplete: losses were multiplied by NaN."""
    mine, theirs = Module(schedule="fifty"), Module(schedule="fifty")
    options: dict[str, Any] = {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5}
    options["loader"] = DataLoader(Stream(), batch_size=4)
    a = fit(tmp_path, mine, stages(method="bp"), **options)
    b = fit(tmp_path, theirs, **options)
    assert a.losses.steps == pytest.approx(b.losses.steps, rel=1e-4)
    assert a.global_step == b.global_step
    for x, y in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_saved_after_the_run(tmp_path: Path) -> None:
    """It has the optimizer's state, too: it was resumed from without momentum, without a word."""
    weights = []
    for strategy in (lambda: stages(method="bp"), lambda: "auto"):
        first = fit(tmp_path, Module(schedule="fifty"), strategy(), max_epochs=1)
        first.save_checkpoint(tmp_path / "after.ckpt")
        module = Module(schedule="fifty")
        fit(tmp_path, module, strategy(), resume=tmp_path / "after.ckpt")
        weights.append(module.state_dict().values())
    for x, y in zip(*weights, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_what_is_returned_beside_the_loss_is_named(tmp_path: Path) -> None:
    class More(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss, "twice": 2 * loss}

    with pytest.warns(UserWarning, match="training_step returns 'twice' beside the loss: the stages do not"):
        fit(tmp_path, More(), stages(), max_epochs=1)


def test_a_run_that_ends_within_an_epoch_logs_all_losses(tmp_path: Path) -> None:
    """Those of the batches in flight were left out of the epoch's mean."""

    class Counts(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log("sum", loss, on_step=False, on_epoch=True, reduce_fx="sum", batch_size=1)
            self.log("train", loss, on_step=True, on_epoch=True)
            return loss

    notes = PipelineStrategy(3, {"executor": "inline"})
    noted: list[float] = []
    notes.on_train_end = lambda: noted.extend(notes._run.losses) or PipelineStrategy.on_train_end(notes)  # type: ignore[method-assign,union-attr,func-returns-value]
    trainer = fit(tmp_path, Counts(schedule="fifty"), notes, max_epochs=1, max_steps=5)
    assert len(noted) == 5
    assert float(trainer.callback_metrics["sum"]) == pytest.approx(sum(noted), rel=1e-6)


class Freezes(Module):
    def on_train_epoch_start(self) -> None:
        self.net[4].requires_grad_(self.current_epoch != 1)


@pytest.mark.parametrize("schedule", ["fifty", "step"])
def test_what_is_frozen_in_the_middle(schedule: str, tmp_path: Path) -> None:
    """Groups stay those of the optimizer: all had the options of its defaults from then on, or a scheduler
    failed."""
    mine, theirs = Freezes(schedule=schedule, momentum=0.0), Freezes(schedule=schedule, momentum=0.0)
    options: dict[str, Any] = {"max_steps": 20, "max_epochs": 3, "limit_val_batches": 0}
    a = fit(tmp_path, mine, stages(method="bp"), **options)
    b = fit(tmp_path, theirs, **options)
    assert a.losses.steps == pytest.approx(b.losses.steps, rel=1e-4)
    for x, y in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


class Counting(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out, total = self(x), self.trainer.estimated_stepping_batches
        loss = F.cross_entropy(out, y) * 0.9**batch_idx * (1 - self.global_step / total)
        loss = loss + 0.1 * self.current_epoch * out.pow(2).mean()
        self.log("train", loss, on_step=True, on_epoch=True)
        return loss


def test_what_counts_batches_is_followed(tmp_path: Path) -> None:
    """An annealed loss is annealed in the stages, too: with each batch's own numbers, not the first one's."""
    mine, theirs = Counting(schedule="fifty"), Counting(schedule="fifty")
    a = fit(tmp_path, mine, stages(method="bp"))
    b = fit(tmp_path, theirs)
    assert a.losses.steps == pytest.approx(b.losses.steps, rel=1e-4)
    for x, y in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_a_layer_may_keep_what_it_pleases(tmp_path: Path) -> None:
    """What a layer changes on itself in its own forward is its own affair: it really runs in its stage."""

    class Counted(nn.Linear):
        calls, last = 0, torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = super().forward(x)
            return self.last * 0.9**self.calls

    class Two(Module):
        def __init__(self) -> None:
            super().__init__(schedule="fifty")
            self.first = Counted(8, 8)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((self.first(batch[0]), batch[1]), batch_idx)

    mine, theirs = Two(), Two()
    fit(tmp_path, mine, stages(method="bp"), max_epochs=1, limit_val_batches=0)
    fit(tmp_path, theirs, max_epochs=1, limit_val_batches=0)
    assert mine.first.calls == theirs.first.calls == 7
    for x, y in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


class Short(Module):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 4 else None


def test_an_epoch_that_a_hook_ends(tmp_path: Path) -> None:
    """The stages' schedulers count it, too; gradients of half an update the library drops, which stages would
    not."""
    mine, theirs = Short(schedule="epoch"), Short(schedule="epoch")
    a = fit(tmp_path, mine, stages(method="bp"), max_epochs=3, limit_val_batches=0)
    b = fit(tmp_path, theirs, max_epochs=3, limit_val_batches=0)
    assert a.losses.steps == pytest.approx(b.losses.steps, rel=1e-4)
    for x, y in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="ended epoch 0 after 4 batches, within an update over"):
        fit(tmp_path, Short(schedule="epoch"), stages(), accumulate_grad_batches=3)


def test_a_step_that_takes_gradients(tmp_path: Path) -> None:
    """A penalty on the input's gradient: the step is tried with gradients where it asks for them."""

    class Smooth(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0].detach().requires_grad_()
            loss = F.cross_entropy(self.net[2:](self.net[0](x)), batch[1])
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
            loss = loss + slope.pow(2).sum()
            self.log("train", loss, on_step=True, on_epoch=True)
            return loss

    mine, theirs = Smooth(schedule="fifty"), Smooth(schedule="fifty")
    fit(tmp_path, mine, stages(method="bp"), max_epochs=1, limit_val_batches=0)
    fit(tmp_path, theirs, max_epochs=1, limit_val_batches=0)
    for x, y in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


ASKED: list[tuple[Any, str]] = [
    (lambda m, loss, i: loss if i % 2 else 2 * loss, "training_step needs batch_idx, .* as a Python value"),
    (lambda m, loss, i: loss * min(1.0, m.global_step / 9), "global_step as a Python value"),
    (lambda m, loss, i: loss * math.cos(m.current_epoch), "or set an attribute of the module"),
    (lambda m, loss, i: loss * m.optimizers().param_groups[0]["lr"], "asks for trainer.strategy"),
    (lambda m, loss, i: loss * m.lr_schedulers().get_last_lr()[0], "asks for trainer.lr_scheduler_configs"),
    (lambda m, loss, i: loss + (m.logger is None), "asks for trainer.logger, which the stages have not: ask"),
    (lambda m, loss, i: m.seen.append(loss.detach()) or loss, "changes 'seen' .* stays with the stages"),
    (lambda m, loss, i: m.metric.update(loss) or loss, "changes 'metric._update_count' from 0 to 1"),
    (lambda m, loss, i: m.metric(loss) * 0 + loss, "changes 'metric._update_count' from 0 to 1"),
]


@pytest.mark.parametrize(("body", "message"), ASKED, ids=[text[:30] for _, text in ASKED])
def test_what_would_be_frozen_or_lost_is_refused(body: Any, message: str, tmp_path: Path) -> None:
    """Before any weight is changed: a graph would give the first batch's answer for all, and what the stages
    leave behind nobody would see."""
    from torchmetrics import MeanMetric

    class Asking(Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []
            self.metric = MeanMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return body(self, super().training_step(batch, batch_idx), batch_idx)

    module = Asking()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module, stages())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not module.seen


class Nothing(Module):
    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        pass


def test_a_step_without_a_loss(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="training_step gave a NoneType: stages train on every batch"):
        fit(tmp_path, Nothing(), stages())


class Iterating(Module):
    def training_step(self, dataloader_iter: Any) -> Any: ...  # type: ignore[override]


class Rates(lightning.Callback):  # type: ignore[name-defined,misc]
    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx:
            trainer.optimizers[0].param_groups[1]["lr"] = 0.5


class Norms(lightning.Callback):  # type: ignore[name-defined,misc]
    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None: ...


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Idle(Module):
    def configure_optimizers(self) -> None:
        pass


class Hooked(Module):
    def on_before_optimizer_step(self, optimizer: Any) -> None: ...


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (Manual, {}, "automatic_optimization=False: the stages step"),
    (Idle, {}, "Idle.configure_optimizers gives no optimizer"),
    (Hooked, {}, "Hooked overrides on_before_optimizer_step"),
    (Module, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "clip by the norm"),
    (Iterating, {}, "takes dataloader_iter: stages need the batch"),
    (Module, {"callbacks": [lightning.callbacks.GradientAccumulationScheduler({1: 2})]}, "do not follow"),
    (Module, {"callbacks": [Rates()]}, r"has set lr=0.5 in group 1 .* where 0\.0\d+ is"),
    (
        partial(Module, schedule="fifty"),
        {"callbacks": [Rates()]},
        "set lr=0.5 in group 1 .* where 0.2 is",
    ),
    (Module, {"callbacks": [Norms()]}, "Norms overrides on_before_optimizer_step, for gradients"),
    (Module, {"precision": "64-true"}, "precision='64-true': expected '32-true'"),
]


def test_averages_of_weights_need_the_weights_here(tmp_path: Path) -> None:
    options = {"callbacks": [lightning.callbacks.EMAWeightAveraging()]}
    with pytest.raises(ValueError, match=r"EMAWeightAveraging reads the weights after .*'inline'"):
        fit(tmp_path, Module(), PipelineStrategy(2), **options)


@pytest.mark.parametrize(("kind", "options", "message"), REFUSED, ids=lambda v: str(v)[:30])
def test_what_stages_cannot_do_is_refused(
    kind: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, kind(), stages(), **options)


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"pipeline": "2"}, "pipeline='2': expected options by name, such as pipeline="),
    ({"pipeline": {"ngpus": 2}}, "is no option of compile; did you mean 'n_gpus'"),
    ({"training": "bp"}, "training='bp': expected options by name, such as training={'method'"),
    ({"training": {"zero": 3}}, "no option of Pipeline.trainer: expected one of"),
    ({"training": {"max_grad_norm": 1.0}}, "comes from gradient_clip_val; set it in Lightning"),
]


@pytest.mark.parametrize(("given", "message"), OPTIONS)
def test_options_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    """Told where they are given, not when training begins."""
    with pytest.raises(TypeError, match=message):
        PipelineStrategy(**given)
