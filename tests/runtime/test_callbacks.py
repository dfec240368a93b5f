"""What looks on while `fit` trains: callbacks, loggers, metrics over a whole loader."""

from __future__ import annotations

import copy
import csv
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from dtrp.callbacks import EMA, CSVLog, EarlyStopping, SaveBest

from .toys import batches, compiled, mlp, same, trainer

EXECUTORS = ["inline", pytest.param("workers", marks=pytest.mark.slow)]


class Notes:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    def on_step(self, trainer: Any, loss: float | None) -> None:
        self.heard.append(("step", loss))

    def on_epoch(self, trainer: Any, row: dict[str, Any]) -> None:
        self.heard.append(("epoch", dict(row)))

    def on_save(self, trainer: Any, path: Any) -> None:
        self.heard.append(("save", path))


def test_callbacks_hear_all_in_order(tmp_path: Path) -> None:
    """A step is told after each batch, an epoch with the row that `fit` returns, a save with its path, also
    where another callback asked for it; after `fit` nobody is told anything."""
    notes, path = Notes(), tmp_path / "best.ckpt"
    with trainer(compiled()) as t:
        rows = t.fit(batches(3), 2, batches(2), callbacks=[SaveBest(path, monitor="loss"), notes])
        t.save(tmp_path / "later.ckpt")
    kinds = [kind for kind, _ in notes.heard]
    better = rows[1]["loss"] < rows[0]["loss"]
    assert kinds == [*["step"] * 3, "save", "epoch", *["step"] * 3, *["save"] * better, "epoch"]
    assert [what for kind, what in notes.heard if kind == "epoch"] == rows
    losses = [what for kind, what in notes.heard if kind == "step" and what is not None]
    assert losses[-1] in t.losses


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_best_is_kept(executor: str, tmp_path: Path) -> None:
    """The file has the weights of the epoch with the best number, not the last one's."""
    path, model = tmp_path / "best.ckpt", mlp(dropout=0.0)
    scores, states = iter([0.3, 0.9, 0.5]), []

    class Scores:
        def on_epoch(self, trainer: Any, row: dict[str, Any]) -> None:
            row["score"] = next(scores)
            states.append(copy.deepcopy(model.state_dict()))

    with trainer(compiled(model), executor) as t:
        t.fit(batches(3), 3, callbacks=[Scores(), SaveBest(path, monitor="score", larger=True)])
    saved = torch.load(path, weights_only=True)["model"]
    assert same(saved, states[1])
    assert not same(saved, states[2])


def test_early_stopping_waits_for_its_patience() -> None:
    scores = iter([3.0, 2.0, 2.5, 1.995, 2.0, 1.0])

    class Scores:
        def on_epoch(self, trainer: Any, row: dict[str, Any]) -> None:
            row["score"] = next(scores)

    with trainer(compiled()) as t:
        stop = EarlyStopping(2, monitor="score", min_delta=0.01)
        rows = t.fit(batches(2), 6, callbacks=[Scores(), stop])
        assert [row["score"] for row in rows] == [3.0, 2.0, 2.5, 1.995]
        assert t.epochs == 4
        with pytest.raises(
            ValueError, match="monitor='f1': an epoch's numbers are train_loss, loss, accuracy"
        ):
            t.fit(batches(2), 1, batches(1), callbacks=[EarlyStopping(1, monitor="f1")])


@pytest.mark.parametrize("kind", [bool, numpy.bool_, torch.tensor])
def test_a_step_may_end_the_run(kind: Any) -> None:
    """What was fed is trained, the epoch closed, and no further one begun; what numpy and torch say of a
    comparison counts as Python's word."""

    class Enough:
        def on_step(self, trainer: Any, loss: float | None) -> Any:
            return kind(trainer.samples >= 8)

    with trainer(compiled()) as t:
        assert len(t.fit(batches(5, size=4), 3, callbacks=[Enough()])) == 1
        assert len(t.losses) == 2


@pytest.mark.parametrize("executor", EXECUTORS)
def test_ema_is_the_average_of_the_weights_seen(executor: str) -> None:
    """Against the definition, on exact training, whose weights after each batch are known."""
    model, decay = mlp(2, dropout=0.0, norm=False), 0.9
    seen: list[dict[str, Tensor]] = []

    class See:
        def on_step(self, trainer: Any, loss: float | None) -> None:
            trainer.sync()
            seen.append(copy.deepcopy(model.state_dict()))

    ema = EMA(model, decay, every=2)
    with trainer(compiled(model), executor, method="bp") as t:
        t.fit(batches(6), 1, callbacks=[See(), ema])
    expected = seen[1]
    for state in (seen[3], seen[5]):
        expected = {k: decay**2 * v + (1 - decay**2) * state[k] for k, v in expected.items()}
    found = ema.module.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_csv_log_goes_on_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    with trainer(compiled()) as t:
        first = t.fit(batches(2), 2, callbacks=[CSVLog(path)])
        second = t.fit(batches(2), 1, callbacks=[CSVLog(path)])
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [float(row["train_loss"]) for row in rows] == [row["train_loss"] for row in first + second]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["updates"] for row in rows] == ["2", "4", "6"]


def test_what_is_no_callback_is_refused() -> None:
    with trainer(compiled()) as t:
        with pytest.raises(TypeError, match=r"expected an object with a method on_step\(trainer, loss\)"):
            t.fit(batches(1), 1, callbacks=[EarlyStopping])
        with pytest.raises(TypeError, match="expected a list"):
            t.fit(batches(1), 1, callbacks=EarlyStopping(1))


# ---- metrics that see the whole loader ---------------------------------------------------------------------


class Spread:
    """Gathers as torchmetrics' metrics do: the largest output minus the smallest, over all batches."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.least, self.most = torch.tensor(torch.inf), torch.tensor(-torch.inf)

    def to(self, device: torch.device) -> Spread:
        return self

    def update(self, output: Tensor, target: Tensor) -> None:
        self.least, self.most = torch.min(self.least, output.min()), torch.max(self.most, output.max())

    def compute(self) -> Tensor:
        return self.most - self.least


@pytest.mark.parametrize("executor", ["inline", "workers"])
def test_a_gathering_metric_sees_the_whole_loader(executor: str) -> None:
    """A mean of the batches' spreads is another number. The user's object stays as it was, and a second
    evaluation begins anew."""
    model, data, metric = mlp(dropout=0.0), batches(3, seed=7), Spread()
    with trainer(compiled(model), executor) as t:
        t.fit(batches(2), 1)
        found = [t.evaluate(data, metric={"spread": metric, "one": lambda o, y: 1.0}) for _ in range(2)]
    with torch.no_grad():
        out = model.eval()(torch.cat([x for x, _ in data]))
    torch.testing.assert_close(torch.tensor(found[0]["spread"]), out.max() - out.min())
    assert found[0] == found[1]
    assert found[0].keys() == {"loss", "spread", "one"}
    assert metric.most == -torch.inf


def test_torchmetrics_are_computed_over_the_whole_loader() -> None:
    """Macro F1 of batches of unequal size, and a collection with a confusion matrix, against torchmetrics
    itself on all outputs at once."""
    classification = pytest.importorskip("torchmetrics.classification")
    collection_type = pytest.importorskip("torchmetrics").MetricCollection
    model, data = mlp(dropout=0.0), [*batches(3, size=5, seed=3), *batches(1, size=2, seed=4)]
    f1 = classification.MulticlassF1Score(3)
    several = collection_type({"f1": f1, "confusion": classification.MulticlassConfusionMatrix(3)})
    with trainer(compiled(model)) as t:
        t.fit(batches(2), 1)
        alone, both = t.evaluate(data, metric=f1), t.evaluate(data, metric=several)
        with pytest.raises(TypeError, match="a metric of torchmetrics \\(an object"):
            t.evaluate(data, metric=classification.MulticlassF1Score)
    with torch.no_grad():
        out = model.eval()(torch.cat([x for x, _ in data]))
    y = torch.cat([y for _, y in data])
    expected = several.clone()(out, y)
    assert alone["MulticlassF1Score"] == pytest.approx(float(expected["f1"]))
    assert both["f1"] == alone["MulticlassF1Score"]
    assert torch.equal(both["confusion"], expected["confusion"])


# ---- loggers -----------------------------------------------------------------------------------------------


class Run:
    """Has the method of a run of Weights & Biases, and its rule that steps never go back."""

    def __init__(self) -> None:
        self.step, self.told = 0, []

    def log(self, numbers: dict[str, float], step: int) -> None:
        assert step >= self.step
        self.step = step
        self.told.append((step, numbers))


def test_loggers_are_told_losses_and_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrp.runtime.loggers.PACE", 0.0)
    run, plain = Run(), []
    with trainer(compiled(), logger=[run, lambda numbers, step: plain.append((step, numbers))]) as t:
        (row,) = t.fit(batches(4), 1, batches(2))
    assert run.told == plain
    assert [(i, n["loss"]) for i, n in plain if "loss" in n] == list(enumerate(t.losses))
    (evaluated,) = [n for _, n in plain if "evaluation/loss" in n]
    assert evaluated == {"evaluation/loss": row["loss"], "evaluation/accuracy": row["accuracy"]}
    assert any("stage 1/tick_time" in n for _, n in plain)


def test_tensorboard_and_its_writer_by_hand_write_the_same(tmp_path: Path) -> None:
    """``tensorboard=`` is a writer more, made and closed here; ``logger=`` is the user's and stays open."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tmp_path / "hand")
    with trainer(compiled(), tensorboard=tmp_path / "made", logger=writer) as t:
        t.fit(batches(4), 1, batches(2))
    writer.add_scalar("mine", 1.0)
    writer.close()
    for name in ("made", "hand"):
        found = events.EventAccumulator(str(tmp_path / name)).Reload()
        assert [e.value for e in found.Scalars("loss")] == pytest.approx(t.losses)
        assert found.Scalars("evaluation/loss")
    assert found.Scalars("mine")


def test_what_is_no_logger_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="logger=3: expected a SummaryWriter"):
        trainer(compiled(), logger=3)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="needs the package tensorboard: pip install"):
        trainer(compiled(), tensorboard=tmp_path)


def test_a_model_with_logits_is_measured_by_them() -> None:
    """Outputs of Hugging Face's kind: the metric gets the scores."""

    class Out(dict):  # type: ignore[type-arg]
        @property
        def logits(self) -> Tensor:
            return self["logits"]

    from dtrp.runtime.evaluation import Measure

    measure = Measure.of(None, {"spread": Spread()}).begin(torch.device("cpu"))
    measure(Out(loss=torch.tensor(1.0), logits=torch.tensor([[1.0, 4.0]])), None, 1.0)
    assert measure.totals() == {"spread": (3.0, 0.0)}


@pytest.mark.parametrize("executor", EXECUTORS)
def test_predict_gives_the_models_outputs(executor: str) -> None:
    """In eval mode, with the newest weights, in order; training goes on as if nothing had been."""
    model, other, data = mlp(), mlp(), batches(3, seed=7)
    with trainer(compiled(model), executor) as t, trainer(compiled(other)) as plain:
        with pytest.raises(RuntimeError, match=r"use pipe\(x\)"):
            next(t.predict([data[0][0]]))
        for run in (t, plain):
            run.fit(batches(3), 1)
        outputs = list(t.predict(x for x, _ in data))
        expected = [copy.deepcopy(model).eval()(x) for x, _ in data]
        for run in (t, plain):
            run.fit(batches(3), 1)
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("ask", ["step", "evaluate", "fit"])
def test_nothing_is_trained_while_a_prediction_goes_on(ask: str) -> None:
    """The stages are in eval mode until then: batch norms would stand still, and dropout be off."""
    model = mlp()
    with trainer(compiled(model)) as t:
        t.step(*batches(1)[0])
        outputs = t.predict([x for x, _ in batches(4)])
        next(outputs)
        with pytest.raises(RuntimeError, match=r"list\(trainer.predict\(loader\)\)"):
            {"step": lambda: t.step(*batches(1)[0]), "evaluate": lambda: t.evaluate(batches(1)),
             "fit": lambda: t.fit(batches(2), 1)}[ask]()  # fmt: skip
        outputs.close()
        for x, y in batches(3):
            t.step(x, y)
        assert len(list(t.predict([x for x, _ in batches(4)]))) == 4
    assert int(model[1].num_batches_tracked) == 4


def test_best_and_patience_are_those_of_the_whole_run(tmp_path: Path) -> None:
    """A run that goes on must not write its first epoch over a better one."""
    best = tmp_path / "best.ckpt"
    scores = [0.5, 0.9, 0.6, 0.7, 0.8, 0.85]

    class Scores:
        def on_epoch(self, trainer: Any, row: dict[str, Any]) -> None:
            row["score"] = scores[trainer.epochs - 1]

    def rows(epochs: int) -> int:
        stops = EarlyStopping(3, monitor="score", larger=True)
        callbacks = [Scores(), SaveBest(best, monitor="score", larger=True), stops]
        with trainer(compiled(mlp())) as t:
            return len(t.fit(batches(2), epochs, callbacks=callbacks, resume=tmp_path / "run"))

    assert rows(3) == 3
    saved = best.read_bytes()
    assert rows(6) == 5  # three epochs behind the second one, of which the first run had one
    assert best.read_bytes() == saved
