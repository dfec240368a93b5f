"""Batches whose arguments come and go: the plain loop's results, or a refusal that names the way out."""

from __future__ import annotations

import copy
import logging
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrp

from .toys import ADAMW

inline_or_slow = pytest.mark.parametrize(
    "executor", ["inline", pytest.param("workers", marks=pytest.mark.slow)]
)
G = torch.Generator().manual_seed(0)
Y = torch.randint(0, 4, (8,), generator=G)


class Optional(nn.Module):
    """What is left out leaves parameters out, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.style = nn.Linear(8, 16), nn.Linear(8, 16)
        self.deep = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 4)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, more: dict[str, Tensor] | None = None,
        negate: bool = False, scale: float = 1.0,
    ) -> Tensor:  # fmt: skip
        h = self.first(x)
        if mask is not None:
            h = h * mask
        for name in sorted(more or {}):
            h = h + self.style(more[name])  # type: ignore[index]
        out = self.head(self.deep(h)) * scale
        return -out if negate else out


def x() -> Tensor:
    return torch.randn(8, 8, generator=G)


CALLS: list[dict[str, Any]] = [
    {}, {"mask": torch.rand(8, 16, generator=G)}, {"more": {"a": x()}}, {"more": {"a": x(), "b": x()}},
    {}, {"mask": torch.rand(8, 16, generator=G)}, {"negate": True}, {"more": {"a": x()}}, {},
]  # fmt: skip
BATCHES = [{"x": x(), **call, "target": Y} for call in CALLS]


def plain(optimizer: Any, batches: list[dict[str, Any]]) -> tuple[dict[str, Tensor], list[float]]:
    model, losses = Optional(), []
    o = optimizer(model.parameters())
    for batch in batches:
        o.zero_grad()
        call = {k: v for k, v in batch.items() if k != "target"}
        loss = F.cross_entropy(model(**call), batch["target"])
        loss.backward()
        o.step()
        losses.append(loss.item())
    return model.state_dict(), losses


@inline_or_slow
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_plain_loop_does_the_same(micro_batches: int, executor: str) -> None:
    """Optimizer states of parameters that a batch does not use stay, and go on where the next one does."""
    state, losses = plain(ADAMW, BATCHES)
    model = Optional()
    method = {1: "bp", 2: "gpipe"}[micro_batches]
    with dtrp.compile(model, n_gpus=2).trainer(
        F.cross_entropy, ADAMW, method=method, micro_batches=micro_batches, executor=executor
    ) as t:
        for batch in BATCHES:
            t.step(**batch)
    assert t.losses == pytest.approx(losses, rel=1e-4)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-5, msg=name)


def test_decoupled_training_goes_on_and_says_once_what_it_costs(caplog: pytest.LogCaptureFixture) -> None:
    model = Optional()
    with (
        caplog.at_level(logging.WARNING, "dtrp"),
        dtrp.compile(model, n_gpus=3).trainer(F.cross_entropy, ADAMW, executor="inline", seed=0) as t,
    ):
        t.fit(BATCHES, 3)
    assert len(t.losses) == 3 * len(BATCHES)
    assert sum(t.losses[-len(BATCHES) :]) < sum(t.losses[: len(BATCHES)])
    assert sum("a batch has other arguments" in r.message for r in caplog.records) == 1


def test_calls_evaluation_and_prediction(tmp_path: Path) -> None:
    """In any order, and also between two batches of another form."""
    model = Optional()
    pipe = dtrp.compile(model, n_gpus=2, example_inputs=BATCHES[0]["x"])
    calls = [{k: v for k, v in batch.items() if k != "target"} for batch in BATCHES]
    for call in calls:
        torch.testing.assert_close(pipe(**call), model(**call))
    with pipe.trainer(F.cross_entropy, ADAMW, executor="inline", method="bp") as t:
        for batch, call in zip(BATCHES, calls, strict=True):
            t.step(**batch)
            pipe(**calls[2])
            torch.testing.assert_close(pipe(**call), model(**call))
        seen = t.evaluate(BATCHES)
        outputs = list(t.predict(calls))
    model.eval()
    with torch.no_grad():
        wanted = [model(**call) for call in calls]
    for one, other in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert seen["loss"] == pytest.approx(sum(F.cross_entropy(o, Y).item() for o in wanted) / len(wanted))
    state, _ = plain(ADAMW, BATCHES)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-5, msg=name)


def test_saved_where_a_batch_did_not_use_all(tmp_path: Path) -> None:
    whole, resumed = Optional(), Optional()
    made = {"loss_fn": F.cross_entropy, "optimizer": ADAMW, "executor": "inline", "method": "bp"}
    with dtrp.compile(whole, n_gpus=2).trainer(**made) as t:
        for i, batch in enumerate(BATCHES):
            t.step(**batch)
            if i == 4:
                t.save(tmp_path / "run.ckpt")
    with dtrp.compile(resumed, n_gpus=2).trainer(**made) as t:
        t.load(tmp_path / "run.ckpt")
        for batch in BATCHES[5:]:
            t.step(**batch)
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], msg=name)


def test_a_number_that_changes_is_refused() -> None:
    """Each would want a graph of its own."""
    with dtrp.compile(Optional(), n_gpus=2).trainer(F.cross_entropy, ADAMW, executor="inline") as t:
        t.step(BATCHES[0]["x"], Y)
        with pytest.raises(ValueError, match=r"'scale' was 1.0 .* 0.5 now.* give torch.tensor\(...\)"):
            t.step(x(), scale=0.5, target=Y)
        t.step(BATCHES[0]["x"], Y)


def test_a_gradient_that_could_not_wait_is_refused() -> None:
    with dtrp.compile(Optional(), n_gpus=2).trainer(
        F.cross_entropy, partial(torch.optim.SGD, lr=0.1), executor="inline", method="bp", accumulate=2
    ) as t:
        t.step(**BATCHES[2])
        with pytest.raises(ValueError, match=r"accumulate=2\) must have the same arguments: 'style.bias'"):
            t.step(**BATCHES[0])


class Named(nn.Module):
    """Takes batches as datasets give them: tensors, and beside them what they are called."""

    def __init__(self, looks: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.looks = nn.Linear(8, 16), nn.Linear(16, 4), looks

    def forward(self, batch: dict[str, Any]) -> Tensor:
        h = self.first(batch["x"]).tanh()
        if self.looks == "equal" and batch["name"][0] == "name 5":
            h = h * 2
        if self.looks == "kind" and isinstance(batch["name"][0], str) and batch["name"][0].endswith("5"):
            h = h * 2
        if self.looks == "word" and batch["task"] == "double":
            h = h * 2
        return self.last(h)  # type: ignore[no-any-return]


def named(count: int) -> list[dict[str, Any]]:
    """With names that never come again, and a word that says what is to be done."""
    g = torch.Generator().manual_seed(0)
    names = [[f"name {b + i}" for i in range(8)] for b in range(count)]
    tasks = [("single", "double")[b % 3 == 1] for b in range(count)]
    return [
        {"x": torch.randn(8, 8, generator=g), "name": name, "task": task}
        for name, task in zip(names, tasks, strict=True)
    ]


def test_names_beside_running_statistics() -> None:
    """Looking whether a name matters runs the model, while graphs of batches in flight wait."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.table = nn.BatchNorm1d(8), nn.Embedding(4, 8)
            self.last = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

        def forward(self, batch: dict[str, Any]) -> Tensor:
            h = [self.norm(batch["x"]), self.table(batch["kind"])]
            return self.last(torch.cat(h, 1))  # type: ignore[no-any-return]

    batches = [{"x": b["x"], "name": b["name"], "kind": torch.arange(8) % 4} for b in named(6)]
    pipe = dtrp.compile(Model(), 2, example_inputs=(batches[0],), recompute=False)
    with pipe.trainer(F.cross_entropy, ADAMW, executor="inline") as trainer:
        for batch in batches:
            trainer.step(batch, Y)
        trainer.flush()
        assert len(trainer.losses) == len(batches)


def test_a_name_that_is_missing_is_another_form() -> None:
    """Any string may stand where strings are never looked at; None may be looked at."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, name: str | None = None) -> Tensor:
            h = self.first(x)
            return self.last(h if name is None else h * 2)  # type: ignore[no-any-return]

    model, given = Model(), x()
    pipe = dtrp.compile(model, 2, example_inputs=(given, "a"))
    for name in ("b", "c", None, "d", None):
        torch.testing.assert_close(pipe(given, name), model(given, name))


@pytest.mark.parametrize("looks", ["", "equal", "kind", "word"])
def test_names_that_come_with_batches(looks: str) -> None:
    """Twelve batches have twelve lists of names, which were once refused from the ninth on; where the code
    does look at them, each is another graph.
    """
    batches = named(12 if looks in ("", "word") else 7)
    model = Named(looks)
    optimizer = ADAMW(model.parameters())
    expected = []
    for batch in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch), Y)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    pipe = dtrp.compile(Named(looks), 2, example_inputs=(batches[0],))
    with pipe.trainer(F.cross_entropy, ADAMW, method="bp", executor="inline") as trainer:
        for batch in batches:
            trainer.step(batch, Y)
        trainer.flush()
        assert trainer.losses == pytest.approx(expected, abs=1e-6)


def test_the_plan_is_that_of_the_example_whatever_was_called_since(tmp_path: Path) -> None:
    """Else it could not be saved, copied or edited any more after a call with a mask, or in other modes."""
    example = x()
    pipe = dtrp.compile(Optional(), n_gpus=2, example_inputs=example)
    made = pipe.plan
    pipe(example, mask=torch.ones(8, 16))
    assert pipe.plan == made
    pipe.model.deep.eval()
    pipe(example)
    assert pipe.plan == made
    pipe.plan.save(tmp_path / "plan.json")
    again = dtrp.compile(Optional(), n_gpus=2, example_inputs=example, plan=tmp_path / "plan.json")
    assert again.plan.stage_of == made.stage_of
    for copied in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert copied.plan.stage_of == made.stage_of
    assert pipe.plan.pin("deep", 0).stage_of != pipe.plan.pin("deep", 1).stage_of


def test_ranks_follow_the_plan_of_the_example_when_the_first_batch_has_another_form() -> None:
    """As examples without labels have, of models that give their own loss."""
    example, masked = x(), {"x": x(), "mask": torch.ones(8, 16)}
    first, other = (dtrp.compile(Optional(), n_gpus=2, example_inputs=example) for _ in range(2))
    other.plan  # noqa: B018
    moved = first.plan.pin("deep", 0)
    follows = dtrp.compile(Optional(), n_gpus=2, example_inputs=example, plan=moved)
    follows._planning.prepare((), masked)
    other._planning.adopt(follows._planning.planned())
    other._planning.prepare((), masked)
    assert other.plan.stage_of == moved.stage_of
    assert other._planning.planned() == follows._planning.planned()
    assert other._planning.form != 0
    assert torch.equal(other(**masked), other.model(**masked))
