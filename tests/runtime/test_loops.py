"""Loaders and optimizers as plain loops have them: incomplete groups, generators, subsets of parameters."""

from __future__ import annotations

import copy
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dtrp
from tests.sweeps import each_once

from .toys import ADAMW, SGD, batches, compiled, mlp, same, trainer

either = pytest.mark.parametrize("executor", ["inline", pytest.param("workers", marks=pytest.mark.slow)])


def calm() -> nn.Module:
    return mlp(3, dropout=0.0, norm=False)


# --- The end of an epoch ----------------------------------------------------------------------------------


def grouped(model: nn.Module, data: Any, size: int, epochs: int, clip: float | None, optimizer: Any) -> int:
    """Groups of batches, the last one of an epoch as it is, as accelerate and Lightning step with it."""
    opt, updates = optimizer(model.parameters()), 0
    for _ in range(epochs):
        for start in range(0, len(data), size):
            group = data[start : start + size]
            for x, y in group:
                (F.cross_entropy(model(x), y) / len(group)).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            opt.zero_grad()
            updates += 1
    return updates


@either
@pytest.mark.parametrize(
    ("optimizer", "groups", "n_stages"),
    each_once([SGD, ADAMW], [(7, 3), (5, 4), (2, 4), (6, 3)], [1, 2, 3]),
)
def test_an_incomplete_group_is_stepped_with(
    n_stages: int, groups: tuple[int, int], optimizer: Any, executor: str
) -> None:
    model, twin = calm(), calm()
    n, size = groups
    knobs = {"method": "bp", "accumulate": size, "optimizer": optimizer}
    with trainer(compiled(model, n_stages), executor, **knobs) as t:
        t.fit(batches(n), 2)
        assert t.updates == grouped(twin, batches(n), size, 2, None, optimizer)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


@pytest.mark.parametrize("knobs", [{"method": "bp"}, {"method": "1f1b", "micro_batches": 2}])
@pytest.mark.parametrize("n_stages", [1, 3])
def test_also_under_clipping(n_stages: int, knobs: dict[str, Any]) -> None:
    model, twin = calm(), calm()
    with trainer(compiled(model, n_stages), accumulate=3, max_grad_norm=0.2, **knobs) as t:
        t.fit(batches(5), 3)
    grouped(twin, batches(5), 3, 3, 0.2, SGD)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


@pytest.mark.parametrize("knobs", [{}, {"method": "adl"}, {"schedule": "lean"}, {"max_grad_norm": 0.5}])
def test_decoupled_runs_drop_nothing_either(knobs: dict[str, Any]) -> None:
    model = calm()
    start = copy.deepcopy(model.state_dict())
    with trainer(compiled(model, 3), accumulate=8, **knobs) as t:
        t.fit(batches(3), 1)
        assert t.updates == 1
        t.fit(batches(9), 1)
        assert t.updates == 3
    assert all(not torch.equal(p, start[n]) for n, p in model.named_parameters())


def test_a_flush_is_no_end_of_an_epoch() -> None:
    model, twin = calm(), calm()
    with trainer(compiled(model, 2), method="bp", accumulate=4) as t:
        for x, y in batches(4):
            t.step(x, y)
            t.flush()
        assert t.updates == 1
    grouped(twin, batches(4), 4, 1, None, SGD)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


# --- Loaders ----------------------------------------------------------------------------------------------


def once(n: int) -> Any:
    yield from batches(n)


ONCE: dict[str, Any] = {
    "generator": once,
    "iterator": lambda n: iter(batches(n)),
    "zip": lambda n: zip(*zip(*batches(n), strict=True), strict=True),
    "map": lambda n: map(tuple, batches(n)),
}


@pytest.mark.parametrize("kind", ONCE)
def test_what_can_be_gone_through_once(kind: str) -> None:
    """For several epochs it is refused before anything is trained; for one it is fine."""
    model = mlp(3)
    start = copy.deepcopy(model.state_dict())
    with trainer(compiled(model)) as t:
        with pytest.raises(ValueError, match="can be gone through only once; give fit a list"):
            t.fit(ONCE[kind](4), 2)
        assert same(model.state_dict(), start)
        t.fit(ONCE[kind](4), 1)
        assert len(t.losses) == 4


class Fickle:
    """A loader that is empty from its second epoch on."""

    def __init__(self) -> None:
        self.epochs = 0

    def __iter__(self) -> Any:
        self.epochs += 1
        return iter(batches(3) if self.epochs == 1 else [])


@pytest.mark.parametrize(
    ("loader", "epoch"),
    [([], 1), (DataLoader(list(batches(1)), batch_size=4, drop_last=True), 1), (Fickle(), 2)],
)
def test_an_epoch_without_batches_is_told(loader: Any, epoch: int) -> None:
    with (
        trainer(compiled(mlp(3))) as t,
        pytest.raises(ValueError, match=f"the loader gave no batch in epoch {epoch}; .*drop_last"),
    ):
        t.fit(loader, 3)


def test_losses_are_those_that_are_finished() -> None:
    """Not those that the last step heard of: a script that looks later sees more, without another step."""
    data = batches(6)
    with trainer(compiled(n_stages=2), "workers") as t:
        for x, y in data:
            t.step(x, y)
        until = time.monotonic() + 20
        while len(t.losses) < len(data) - 2 and time.monotonic() < until:
            time.sleep(0.01)
        heard = list(t.losses)
        assert len(heard) >= len(data) - 2
        t.flush()
        assert t.losses[: len(heard)] == heard


def test_the_rate_is_that_of_the_newest_finished_batch() -> None:
    data, halving = batches(6), partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    with trainer(compiled(n_stages=2), "workers", lr_scheduler=halving) as t:
        for x, y in data:
            t.step(x, y)
        first, until = t.lr, time.monotonic() + 20
        expected = SGD(mlp().parameters()).param_groups[0]["lr"] * 0.5 ** (len(data) - 2)
        while t.lr > expected and time.monotonic() < until:
            time.sleep(0.01)
        assert t.lr <= expected <= first


# --- Optimizers -------------------------------------------------------------------------------------------


def biases(parameters: Any, optimizer: Any = SGD) -> torch.optim.Optimizer:
    """Over vectors alone, or over the last of them where there are none."""
    parameters = list(parameters)
    chosen = [p for p in parameters if p.dim() == 1]
    return optimizer(chosen or parameters[-1:])


@pytest.mark.parametrize("n_stages", [1, 3])
@pytest.mark.parametrize(
    ("predictor", "optimizer"),
    [("auto", SGD), ("linear", SGD), ("geometric", SGD), ("difference", SGD), ("none", SGD),
     ("auto", ADAMW), ("adam", ADAMW), ("difference", ADAMW)],
)  # fmt: skip
def test_a_subset_of_the_parameters(predictor: str, optimizer: Any, n_stages: int) -> None:
    """The others stay as they are, with every predictor."""
    model = mlp(3)
    start = copy.deepcopy(dict(model.named_parameters()))
    chosen = partial(biases, optimizer=optimizer)
    with trainer(compiled(model, n_stages), optimizer=chosen, predictor=predictor) as t:
        for x, y in batches(12):
            t.step(x, y)
        t.flush()
        assert len(t.losses) == 12
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {n for n, p in start.items() if p.dim() == 1}


@pytest.mark.parametrize("n_stages", [1, 2])
def test_a_subset_as_in_the_plain_loop(n_stages: int) -> None:
    model, twin = calm(), calm()
    with trainer(compiled(model, n_stages), optimizer=biases, method="bp") as t:
        for x, y in batches(6):
            t.step(x, y)
    opt = biases(twin.parameters())
    for x, y in batches(6):
        opt.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        opt.step()
    assert same(model.state_dict(), twin.state_dict())


def test_foreign_parameters_are_refused() -> None:
    model, other = mlp(3), nn.Linear(2, 2)

    def of_the_model(parameters: Any) -> torch.optim.Optimizer:
        return SGD(list(copy.deepcopy(model).parameters()))

    def one_more(parameters: Any) -> torch.optim.Optimizer:
        return SGD([*parameters, other.weight])

    def none_of_them(parameters: Any) -> torch.optim.Optimizer:
        return SGD(other.parameters())

    for optimizer in (of_the_model, one_more, none_of_them):
        with pytest.raises(ValueError, match=r"holds \d+ parameter\(s\) that it was not given"):
            trainer(compiled(model), optimizer=optimizer)


# --- Stages without gradient ------------------------------------------------------------------------------


class Quantized(nn.Module):
    """Indices into a codebook: nothing to go backward through, though what they are made of has gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(5, 8))
        self.encode, self.decode = nn.Linear(8, 8), nn.Linear(8, 3)
        self.distances = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.encode(x))
        indices = torch.cdist(self.distances(z), self.codes).argmin(1)
        q = F.embedding(indices, self.codes)
        y: Tensor = self.decode(z + q)
        return y


class Teacher(nn.Module):
    """Looks at trainable features without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.student = nn.Linear(8, 8), nn.Linear(8, 3)
        self.teacher = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        with torch.no_grad():
            t = self.teacher(h)
        y: Tensor = self.student(h) + t
        return y


class Detached(nn.Module):
    """A side branch whose result is a number of no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        scale = torch.sigmoid(self.b(h)).detach().mean(1, keepdim=True)
        y: Tensor = self.c(h * scale)
        return y


class MeanTeacher(nn.Module):
    """Follows the student by an average of its weights, in a stage that no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.data.lerp_(theirs.data, 0.2)
            t = self.teacher(x)
        y: Tensor = self.head(torch.tanh(self.student(x)) - t)
        return y


PLACES: dict[Any, dict[str, int]] = {
    MeanTeacher: {"student": 1, "head": 2, "teacher": 0},
    Quantized: {"encode": 0, "distances": 1, "decode": 2},
    Teacher: {"stem": 0, "teacher": 1, "student": 2},
    Detached: {"a": 0, "b": 1, "c": 2},
}


@pytest.mark.parametrize("executor", ["inline", pytest.param("workers", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("knobs", [{"method": "bp"}, {}, {"method": "fdg"}, {"max_grad_norm": 1.0}])
def test_a_stage_that_gets_no_gradient(knobs: dict[str, Any], kind: Any, executor: str) -> None:
    torch.manual_seed(0)
    model = kind()
    twin = copy.deepcopy(model)
    x = batches(1)[0][0]
    plan = dtrp.compile(model, n_gpus=3, example_inputs=x).plan
    for name, stage in PLACES[kind].items():
        plan = plan.pin(name, stage)
    pipe = dtrp.compile(model, n_gpus=3, example_inputs=x, plan=plan)
    with trainer(pipe, executor, watchdog=20.0, **knobs) as t:
        for x, y in batches(8):
            t.step(x, y)
    assert len(t.losses) == 8
    if knobs.get("method") == "bp":
        opt = SGD(twin.parameters())
        for x, y in batches(8):
            F.cross_entropy(twin(x), y).backward()
            opt.step()
            opt.zero_grad()
        assert same(model.state_dict(), twin.state_dict())


@either
@pytest.mark.parametrize("frozen", [4, 8, 12])
@pytest.mark.parametrize("n_stages", [2, 4])
def test_a_frozen_backbone_in_front(n_stages: int, frozen: int, executor: str) -> None:
    """Its stages run forward alone, their BatchNorm as in the plain loop; the head is trained."""
    model, twin = mlp(3, dropout=0.0), mlp(3, dropout=0.0)
    for m in (model, twin):
        m[:frozen].requires_grad_(False)
    pipe = compiled(model, n_stages)
    with trainer(pipe, executor, method="bp", record=True) as t:
        for x, y in batches(8):
            t.step(x, y)
        t.flush()
        backward = {e.stage for e in t.events if e.kind == "backward"}
    trained = {s.index for s in pipe.stages if any(p.requires_grad for p in s.module.parameters())}
    assert min(backward) >= min(trained)
    opt = SGD([p for p in twin.parameters() if p.requires_grad])
    for x, y in batches(8):
        F.cross_entropy(twin(x), y).backward()
        opt.step()
        opt.zero_grad()
    assert same(model.state_dict(), twin.state_dict())


# --- Gradients that are not the run's ----------------------------------------------------------------------


@either
@pytest.mark.parametrize("knobs", [{}, {"accumulate": 2}, {"on_nonfinite": "skip"}, {"micro_batches": 2}])
@pytest.mark.parametrize("n_stages", [1, 3])
def test_gradients_that_the_script_leaves_on_the_model(
    n_stages: int, knobs: dict[str, Any], executor: str
) -> None:
    """A trial before training, saliency maps, another model's loss: a loop that begins with ``zero_grad``
    never steps with them."""
    models = [calm(), calm()]
    method = "1f1b" if "micro_batches" in knobs else "bp"
    for model, leaves in zip(models, (False, True), strict=True):
        with trainer(compiled(model, n_stages), executor, method=method, **knobs) as t:
            for i, (x, y) in enumerate(batches(6)):
                if leaves and i % 2 == 0:
                    t.sync()
                    model(x).square().sum().backward()
                t.step(x, y)
    assert same(*(model.state_dict() for model in models))


def test_small_class_targets_that_do_not_count() -> None:
    """Segmentation masks: bytes, where 255 is left out of the mean, also of a micro-batch's."""
    model, twin = calm(), calm()
    ignoring = partial(F.cross_entropy, ignore_index=255)
    masks = [(x, torch.where(x[:, 0] > 0.5, 255, y).to(torch.uint8)) for x, y in batches(4, 8)]
    with trainer(compiled(model, 2), "inline", ignoring, method="1f1b", micro_batches=4, optimizer=SGD) as t:
        t.fit(masks, 1)
    opt = SGD(twin.parameters())
    for x, y in masks:
        opt.zero_grad()
        ignoring(twin(x), y).backward()
        opt.step()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


class Normed(torch.optim.SGD):
    """Divides by the norm of all gradients."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(held, 0.1)
        super().step()


@pytest.mark.parametrize(("kind", "told"), [(Normed, 1), (torch.optim.SGD, 0), (torch.optim.AdamW, 0)])
def test_an_optimizer_that_looks_at_all_parameters_is_told(
    kind: Any, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    for n_stages in (1, 2):
        trainer(compiled(calm(), n_stages), optimizer=partial(kind, lr=0.1)).close()
    assert sum("depends on the gradients of the others" in r.message for r in caplog.records) == told


@pytest.mark.parametrize(
    ("options", "told"),
    [({"weight_decya": 1, "name": "a"}, ["'weight_decya'; did you mean 'weight_decay'?"]), ({"lr": 1.0}, [])],
)
def test_an_option_that_the_optimizer_does_not_read_is_told(
    options: dict[str, Any], told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    adam = partial(torch.optim.AdamW, lr=0.1)
    trainer(compiled(calm(), 2), optimizer=adam, param_groups=lambda name, p: options).close()
    text = "a group of parameters has what is no option of AdamW, which does not read it: "
    assert [r.message for r in caplog.records if "option" in r.message] == [text + t for t in told]


def test_what_schedulers_write_into_groups_is_no_misspelt_option(caplog: pytest.LogCaptureFixture) -> None:
    """Every run under OneCycleLR was told of ``max_lr``."""
    cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=9)
    average = partial(torch.optim.swa_utils.SWALR, swa_lr=0.1)
    for scheduler in (cycle, average):
        trainer(compiled(calm(), 2), lr_scheduler=scheduler).close()
    assert not [r.message for r in caplog.records if "option" in r.message]
