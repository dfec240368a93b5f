"""What is saved by parameter name: optimizers, groups, schedulers, attributes, for whatever stages."""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.optim import lr_scheduler

import dtrp
from dtrp.runtime.checkpoint import read_checkpoint

from .toys import ADAMW, SGD, batches, compiled, cross_entropy, mlp, same, trainer

DATA = [(x.double(), y) for x, y in batches(12)]
HALF = 6
Outcome = tuple[dict[str, Tensor], list[float]]


def train(
    model: nn.Module,
    n_stages: int,
    path: Path | None = None,
    *,
    resume: bool = False,
    executor: str = "inline",
    **knobs: Any,
) -> Outcome:
    """From the beginning, saving after half; or from the save on. Exact, so that stages do not matter."""
    pipe = dtrp.compile(model, n_gpus=n_stages, example_inputs=DATA[0][0])
    with trainer(pipe, executor, **{"method": "bp", **knobs}) as t:
        if resume:
            t.load(path)
            assert len(t.losses) == HALF
        for i, (x, y) in enumerate(DATA[len(t.losses) :]):
            t.step(x, y)
            if path is not None and not resume and i == HALF - 1:
                t.save(path)
        t.flush()
    return copy.deepcopy(model.state_dict()), t.losses


def calm(norm: bool = True) -> nn.Module:
    return mlp(dropout=0.0, norm=norm).double()


def equal(a: Outcome, b: Outcome) -> bool:
    return same(a[0], b[0]) and a[1] == b[1]


# --- Names ------------------------------------------------------------------------------------------------


def test_the_names_are_those_of_torch(tmp_path: Path) -> None:
    model = calm()
    pipe = dtrp.compile(model, n_gpus=3, example_inputs=DATA[0][0])
    with trainer(pipe, optimizer=ADAMW, method="bp") as t:
        for x, y in DATA[:3]:
            t.step(x, y)
        t.save(tmp_path / "run.ckpt")
    found = read_checkpoint(tmp_path / "run.ckpt")["optimizer"]
    plain = calm()
    optimizer = ADAMW(plain.parameters())
    for x, y in DATA[:3]:
        optimizer.zero_grad()
        cross_entropy(plain(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    expected = get_optimizer_state_dict(plain, optimizer, options=options)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value


def test_saving_before_the_first_step_makes_none(tmp_path: Path) -> None:
    """torch's own function makes a step to have something to save."""
    with trainer(compiled(), optimizer=ADAMW) as t:
        t.save(tmp_path / "run.ckpt")
    assert not [k for k in read_checkpoint(tmp_path / "run.ckpt")["optimizer"] if k.startswith("state.")]


# --- Optimizers -------------------------------------------------------------------------------------------


class Odd(torch.optim.Optimizer):
    """State of all kinds, some of it of the optimizer as a whole; decays whatever the learning rate is."""

    def __init__(self, parameters: Any, lr: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr, "rule": "odd", "pair": (1, 0.5)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        whole: Any = self.state
        whole["count"] = whole.get("count", 0) + 1
        for group in self.param_groups:
            assert group["params"], "an optimizer never sees an empty group"
            for p in group["params"]:
                if p.grad is None:
                    continue
                s = self.state[p]
                s["seen"] = s.get("seen") is None
                s["history"] = [*s.get("history", []), float(p.grad.sum())][-3:]
                s["blocks"] = {0: p.grad.clone(), "inner": {"x": [torch.ones(2)]}}
                s["a.b"] = s.get("a.b", 0.0) + 1.0
                p.mul_(0.999).sub_(
                    p.grad, alpha=group["lr"] * (1 + 0.1 * sum(s["history"]) + 0.01 * whole["count"])
                )


class Counting(torch.optim.SGD):
    """Counts its steps in an attribute, as handwritten ones do."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, **options)
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.div_(self.steps)
        super().step()


class Around(torch.optim.Optimizer):
    """Has its state in another one, as timm's Lookahead."""

    def __init__(self, parameters: Any, lr: float) -> None:
        self.inner = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self.param_groups = self.inner.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state)
        self.param_groups = self.inner.param_groups


class Outside(torch.optim.SGD):
    """Keeps tensors where nobody else finds them."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.first = {p: p.grad.clone() for group in self.param_groups for p in group["params"]}
        super().step()


def last_only(name: str, p: nn.Parameter) -> dict[str, Any]:
    """A group that only the last stage has members of, and one with few."""
    if name.startswith("20."):
        return {"lr": 0.02}
    return {"weight_decay": 0.1} if p.dim() > 1 else {}


def by_position(parameters: Any) -> torch.optim.Optimizer:
    """Groups that the callable itself makes, by the place in the list."""
    return torch.optim.SGD(
        [{"params": [p], "lr": 0.05 * 0.95**i} for i, p in enumerate(parameters)], momentum=0.9
    )


def by_shape(parameters: Any) -> torch.optim.Optimizer:
    held = list(parameters)
    vectors, matrices = [p for p in held if p.dim() < 2], [p for p in held if p.dim() > 1]
    return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=0.01)


def tensor_lr(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=torch.tensor(0.05, dtype=torch.float64))


def late_only(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in parameters if p.shape[0] == 3], lr=0.05, momentum=0.9)


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD": SGD,
    "Adam": partial(torch.optim.Adam, lr=0.01, amsgrad=True),
    "AdamW": ADAMW,
    "RMSprop": partial(torch.optim.RMSprop, lr=0.001, centered=True, momentum=0.5),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.01),
    "odd": Odd,
    "counting": partial(Counting, lr=0.05),
    "around": partial(Around, lr=0.05),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_optimizers_in_other_stages_and_with_groups_that_few_have(name: str, tmp_path: Path) -> None:
    knobs: dict[str, Any] = {"optimizer": OPTIMIZERS[name], "param_groups": last_only, "accumulate": 2}
    if name == "odd":
        knobs["param_groups"] = lambda n, p: {"lr": 0.02} if n.startswith("20.") else {}
    knobs["lr_scheduler"] = partial(lr_scheduler.LinearLR, total_iters=9)
    expected = train(calm(), 1, **knobs)
    assert equal(train(calm(), 3, tmp_path / "3", **knobs), expected)
    assert equal(train(calm(), 2, tmp_path / "3", resume=True, **knobs), expected)


def matrices(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Linear(8, 8, bias=False) for _ in range(4)), nn.Linear(8, 3, bias=False)
    ).double()


def test_what_an_optimizer_keeps_outside_of_its_state_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for optimizer in (partial(Outside, lr=0.05), partial(Counting, lr=0.05, momentum=0.9)):
        with trainer(compiled(), optimizer=optimizer) as t:
            t.step(*batches(1)[0])
            t.save(tmp_path / "run")
            t.save(tmp_path / "run")
    told = [r.getMessage() for r in caplog.records if "self.state[parameter]" in r.getMessage()]
    assert len(told) == 2, told  # by either stage, once
    assert all(text.startswith("Outside keeps tensors in 'first'") for text in told)


def test_muon(tmp_path: Path) -> None:
    knobs: dict[str, Any] = {
        "optimizer": partial(torch.optim.Muon, lr=0.01),
        "param_groups": lambda name, p: {"lr": 0.02} if name.startswith("4") else {},
        "lr_scheduler": partial(lr_scheduler.StepLR, step_size=4),
    }
    expected = train(matrices(), 1, **knobs)
    assert equal(train(matrices(), 3, tmp_path / "3", **knobs), expected)
    assert equal(train(matrices(), 2, tmp_path / "3", resume=True, **knobs), expected)


@pytest.mark.parametrize("make", [by_position, by_shape, tensor_lr, late_only])
def test_groups_that_the_callable_makes_are_those_of_the_whole_model(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    knobs: dict[str, Any] = {
        "optimizer": make,
        "lr_scheduler": partial(lr_scheduler.ExponentialLR, gamma=0.9),
    }
    plain = calm()
    optimizer = make(list(plain.parameters()))
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    for x, y in DATA:
        plain.zero_grad()
        cross_entropy(plain(x), y).backward()
        optimizer.step()
        scheduler.step()
    outcome = train(calm(), 3, tmp_path / "3", **knobs)
    assert same(outcome[0], plain.state_dict())
    assert equal(train(calm(), 1, tmp_path / "3", resume=True, **knobs), outcome)


class Unused(nn.Module):
    """A parameter whose gradient comes only from time to time."""

    def __init__(self) -> None:
        super().__init__()
        self.body = calm()
        self.spare = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.spare.detach()


def test_parameters_that_never_had_a_gradient(tmp_path: Path) -> None:
    knobs: dict[str, Any] = {"optimizer": ADAMW}
    expected = train(Unused(), 2, tmp_path / "2", **knobs)
    assert equal(train(Unused(), 3, tmp_path / "2", resume=True, **knobs), expected)


def test_another_number_of_groups_under_a_scheduler(tmp_path: Path) -> None:
    knobs: dict[str, Any] = {"lr_scheduler": partial(lr_scheduler.StepLR, step_size=4)}
    train(calm(), 2, tmp_path / "run", **knobs, optimizer=by_shape)
    with pytest.raises(dtrp.CheckpointError, match="has 2 groups of parameters, this trainer's has 1"):
        train(calm(), 2, tmp_path / "run", resume=True, **knobs, optimizer=ADAMW)


def test_parameters_that_were_in_groups_of_different_options(tmp_path: Path) -> None:
    train(calm(), 2, tmp_path / "run", optimizer=by_shape)
    with pytest.raises(dtrp.CheckpointError, match="were in groups of different options"):
        train(calm(), 2, tmp_path / "run", resume=True, optimizer=ADAMW)


def test_the_scale_of_the_loss(tmp_path: Path) -> None:
    def run(n_stages: int, resume: bool) -> list[float]:
        with trainer(compiled(mlp(), n_stages), autocast=torch.float16) as t:
            if resume:
                t.load(tmp_path / "run")
            for x, y in batches(6)[len(t.losses) :]:
                t.step(x * (1e30 if len(t.losses) == 1 and not resume else 1.0), y)
                if not resume and t.samples == 16:
                    t.save(tmp_path / "run")
            t.save(tmp_path / "end")
        return t.losses

    losses = run(2, resume=False)
    scale = read_checkpoint(tmp_path / "end")["training"]["scale"]
    assert read_checkpoint(tmp_path / "run")["training"]["scale"]["scale"] <= 65536.0
    assert run(2, resume=True)[-1] == losses[-1]
    assert read_checkpoint(tmp_path / "end")["training"]["scale"] == scale


# --- Attributes, and losses with tensors ------------------------------------------------------------------


class Mode(enum.IntEnum):
    FAST = 1


class Remembers(nn.Module):
    """Keeps things outside tensors, as users' modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.means, self.kinds, self.mode = 0, [], set(), Mode.FAST
        self.scale = torch.ones((), dtype=torch.float64)  # a tensor, and no buffer

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.means = [*self.means, float(self.calls)][-3:]
            self.kinds.add(self.calls % 4)
            self.scale = self.scale * 0.99
        return x * (1 + 0.01 * self.calls + 0.001 * sum(self.means) + 0.01 * len(self.kinds)) * self.scale


class Arc(nn.Module):
    """A loss with a parameter, a buffer and an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ParameterDict({"w": nn.Parameter(torch.eye(3, dtype=torch.float64))})
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("hidden", torch.zeros((), dtype=torch.float64), persistent=False)
        self.seen = 0

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(output @ self.heads["w"], target)
        self.seen += 1
        self.mean.mul_(0.9).add_(loss.detach(), alpha=0.1)
        self.hidden.add_(1)
        return loss * (1 + 0.01 * self.seen) + 0.1 * self.mean + 0.01 * self.hidden


def remembering() -> nn.Module:
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(8, 8), nn.Tanh(), Remembers()]
    return nn.Sequential(*layers, nn.Linear(8, 3)).double()


def remembered(model: nn.Module, loss: Arc) -> Any:
    modules = [m for m in model.modules() if isinstance(m, Remembers)]
    kept = [(m.calls, m.means, m.kinds, m.mode, float(m.scale)) for m in modules]
    return kept, loss.seen, float(loss.mean), float(loss.hidden), loss.heads["w"].tolist()


def with_loss(n_stages: int, path: Path, **knobs: Any) -> Any:
    model, loss = remembering(), Arc()
    return *train(model, n_stages, path, loss_fn=loss, optimizer=ADAMW, **knobs), remembered(model, loss)


def agree(a: Any, b: Any) -> bool:
    return same(a[0], b[0]) and a[1:] == b[1:]


@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 1), (3, 2)])
def test_attributes_and_the_losss_own_tensors(before: int, after: int, tmp_path: Path) -> None:
    expected = with_loss(before, tmp_path / "run")
    kept, seen, *_ = expected[-1]
    assert [row[:2] for row in kept] == [(12, [10.0, 11.0, 12.0])] * 3
    assert seen == 12
    assert agree(with_loss(after, tmp_path / "run", resume=True), expected)


@pytest.mark.parametrize(("before", "after"), [(1, 2), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_attributes_and_the_losss_own_tensors_in_workers(before: int, after: int, tmp_path: Path) -> None:
    expected = with_loss(before, tmp_path / "inline")
    knobs = {"executor": "workers", "threads": 1}
    assert agree(with_loss(before, tmp_path / "run", **knobs), expected)
    assert agree(with_loss(after, tmp_path / "run", resume=True, **knobs), expected)


class Later(nn.Linear):
    """Of a version of the class that keeps something more."""

    scale: float

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * getattr(self, "scale", 1.0)


def test_attributes_that_came_after_a_run_was_saved(tmp_path: Path) -> None:
    """As an upgraded library's layers have: a load that took them away would break the user's model."""

    def run(scale: float | None) -> nn.Module:
        model = nn.Sequential(Later(8, 8), nn.Tanh(), Later(8, 3))
        with trainer(compiled(model)) as t:
            if scale is not None:
                model[0].scale = scale
                t.load(tmp_path / "run")
            t.step(*batches(1)[0])
            t.flush()
            t.save(tmp_path / "run")
        return model

    run(None)
    model = run(0.5)
    assert model[0].scale == 0.5
    assert not hasattr(model[2], "scale")


class Table(torch.optim.lr_scheduler.LRScheduler):
    """Rates from an array, as in many scripts of vision transformers."""

    def __init__(self, optimizer: Any, table: Any) -> None:
        self.table = np.asarray(table)
        super().__init__(optimizer)

    def get_lr(self) -> Any:
        return [lr * self.table[min(self.last_epoch, len(self.table) - 1)] for lr in self.base_lrs]


def test_arrays_stay_with_the_scheduler(tmp_path: Path) -> None:
    def run(n: int, resume: bool) -> Any:
        table = partial(Table, table=np.linspace(1.0, 0.1, 12))
        with trainer(compiled(mlp(), 2), method="bp", lr_scheduler=table) as t:
            if resume:
                t.load(tmp_path / "run")
            for x, y in batches(n)[len(t.losses) :]:
                t.step(x, y)
            t.save(tmp_path / "run")
            return t.lr, list(t.losses)

    whole = run(8, resume=False)
    run(4, resume=False)
    assert run(8, resume=True) == whole
