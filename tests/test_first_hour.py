"""What a newcomer gets wrong in the first hour: each mistake says what happened and what to do, at once."""

from __future__ import annotations

import copy
import gc
import io
import threading
from collections import namedtuple
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dtrp

from .runtime.inside import refuse_workers
from .runtime.toys import SGD, batches, mlp, same

X, Y = torch.randn(16, 8), torch.arange(16) % 4


def net(out: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, out))


class Gives(nn.Module):
    """A model whose output is what a function makes of a tensor."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.body, self.form = net(), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.body(x))


@pytest.fixture(scope="module")
def pipe() -> dtrp.Pipeline:
    return dtrp.compile(net(), n_gpus=2, example_inputs=X)


@pytest.fixture
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_workers(monkeypatch)


@cache
def small(samples: int) -> dtrp.Pipeline:
    return dtrp.compile(net(), n_gpus=2, example_inputs=X[:samples])


def train(
    loss_fn: Any, target: Any = Y, *, model: nn.Module | None = None, example: Tensor = X, **knobs: Any
) -> list[float]:
    """The losses of three batches; with workers, which tests of mistakes forbid to start."""
    pipe = small(len(example)) if model is None else dtrp.compile(model, n_gpus=2, example_inputs=example)
    with pipe.trainer(loss_fn, SGD, **{"executor": "workers", **knobs}) as t:
        for _ in range(3):
            t.step(X, target)
        t.flush()
        return t.losses


# --- Losses -------------------------------------------------------------------------------------------


def loss_of(change: Any) -> Any:
    def loss(output: Tensor, target: Tensor) -> Any:
        return change(F.cross_entropy(output, target))

    return loss


def swapped(target: Tensor, output: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def goes_back(output: Tensor, target: Tensor) -> Tensor:
    loss = F.cross_entropy(output, target)
    loss.backward(retain_graph=True)
    return loss


def of_three(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(output, target, weight)


def misspelt(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, tarjet)  # type: ignore[name-defined] # noqa: F821


LOSSES = {
    "a class": (nn.CrossEntropyLoss, "is a class: make the loss first, CrossEntropyLoss"),
    "a partial class": (partial(nn.MSELoss, reduction="sum"), "is a class: make the loss first, MSELoss"),
    "swapped": (swapped, r"works as loss_fn\(target, output\): swap its arguments"),
    "a tuple": (loss_of(lambda loss: (loss, 1)), "gave tuple, .*; return the loss alone"),
    "a dict": (loss_of(lambda loss: {"loss": loss}), "gave dict, .*; return the loss alone"),
    "nothing": (loss_of(lambda loss: None), "gave NoneType, .*; is there a return in it"),
    ".item()": (loss_of(lambda loss: loss.item()), "gave float, .*without .item"),
    "float()": (loss_of(float), "gave float, .*without .item"),
    "detached": (loss_of(Tensor.detach), "without a gradient back to the model's output"),
    "numpy": (lambda o, y: torch.tensor((o.detach().numpy() ** 2).mean()), "without a gradient back"),
    "made anew": (loss_of(lambda loss: torch.tensor(loss.item())), "without a gradient back"),
    "of targets alone": (lambda o, y: y.float().mean(), "without a gradient back"),
    "of a parameter alone": (lambda o, y: (PARAMETER * 2).sum(), "without a gradient back"),
    "backward": (goes_back, r"calls backward\(\); only return the loss"),
    "three arguments": (of_three, r"takes .*weight.*missing a required argument: 'weight'; .*extra=\{...\}"),
    "one argument": (lambda output: output.sum(), "too many positional arguments; let it take these"),
    "a name": (misspelt, "fails on the first batch: NameError: name 'tarjet' is not defined"),
    "elementwise": (partial(F.cross_entropy, reduction="none"), r"shape \(\d+,\), .*reduce it"),
    "text": ("mse", "expected a callable .*such as F.cross_entropy"),
}
PARAMETER = nn.Parameter(torch.ones(2))


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
@pytest.mark.parametrize("samples", [16, 3])
@pytest.mark.parametrize("mistake", list(LOSSES))
def test_losses(no_workers: None, mistake: str, samples: int) -> None:
    """Also where the first batch is of another size than the example."""
    loss_fn, text = LOSSES[mistake]
    with pytest.raises(TypeError, match=text):
        train(loss_fn, example=X[:samples])


TARGETS = {
    "floats": (F.cross_entropy, Y.float(), r"wants class indices \(int64\) of shape \(16,\).*use y.long\(\)"),
    "int32": (F.cross_entropy, Y.int(), r"use y.long\(\)"),
    "a column": (nn.CrossEntropyLoss(), Y[:, None], r"int64 of shape \(16, 1\); use y.flatten\(\)"),
    "a column of floats": (F.cross_entropy, Y[:, None].float(), r"use y.flatten\(\).long\(\)"),
    "from one": (
        F.cross_entropy,
        Y.clamp(1) + (Y == 3),
        "first batch has 4; count classes from 0: use y - 1",
    ),
    "too high": (F.cross_entropy, Y * 3, "from 0 to 3, .*has 9; let the model give 10 scores"),
    "negative": (F.cross_entropy, Y - 1, "has -1; give what is to be left out as ignore_index"),
    "deep in a loss": (
        lambda o, y: F.cross_entropy(o.view(-1, 4), y.view(-1)),
        Y * 3,
        "has 9; let the model",
    ),
    "one-hot of five": (
        F.cross_entropy,
        F.one_hot(Y, 5).float(),
        "gives 4 scores, the targets have 5 classes",
    ),
    "one-hot integers": (F.cross_entropy, F.one_hot(Y, 4), r"as floats, y.float\(\), or as indices"),
    "a list": (F.cross_entropy, Y.tolist(), r"takes a tensor as target, got a list of 16; .*torch.as_tensor"),
    "numpy": (F.cross_entropy, Y.numpy(), r"got a ndarray; make it one"),
    "too few": (F.cross_entropy, Y[:7], "check how outputs and targets are batched"),
    "integers for bce": (F.binary_cross_entropy_with_logits, F.one_hot(Y, 4), r"use y.float\(\)"),
    "another shape for bce": (
        F.binary_cross_entropy_with_logits,
        Y.float(),
        r"wants targets like the output",
    ),
    "integers for huber": (F.huber_loss, F.one_hot(Y, 4), r"use y.float\(\)"),
    "floats for nll": (lambda o, y: F.nll_loss(o.log_softmax(1), y), Y.float(), r"F.nll_loss .*y.long\(\)"),
}


@pytest.mark.parametrize("samples", [16, 3])
@pytest.mark.parametrize("mistake", list(TARGETS))
def test_targets(no_workers: None, mistake: str, samples: int) -> None:
    loss_fn, target, text = TARGETS[mistake]
    with pytest.raises(ValueError, match=text):
        train(loss_fn, target, example=X[:samples])


def test_outputs_that_hold_the_tensor(no_workers: None) -> None:
    with pytest.raises(
        ValueError, match=r"gives a tuple of 2, .*lambda out, y: F.cross_entropy\(out\[0\], y\)"
    ):
        train(F.cross_entropy, model=Gives(lambda out: (out, out.sum())))
    with pytest.raises(ValueError, match=r"a dict with 'logits'.*F.cross_entropy\(out\['logits'\], y\)"):
        train(nn.CrossEntropyLoss(), model=Gives(lambda out: {"logits": out}))
    with pytest.raises(TypeError, match=r"unsupported operand .*meant for out\[0\]"):
        train(lambda out, y: ((out - y) ** 2).mean(), model=Gives(lambda out: (out, out.sum())))


def test_a_model_without_a_loss_of_its_own(no_workers: None, pipe: dtrp.Pipeline) -> None:
    with pipe.trainer(None, SGD) as t:
        with pytest.raises(TypeError, match="with loss_fn=None, step takes the model's arguments alone"):
            t.step(X, Y)
        with pytest.raises(TypeError, match=r"gave a tensor of shape \(16, 4\), .*; pass a loss_fn such as"):
            t.step(X)


def test_a_model_that_gives_several_losses() -> None:
    """As torchvision's detectors do; what the message says works."""
    model = Gives(lambda out: {"classes": out.square().mean(), "boxes": out.abs().mean()})
    pipe = dtrp.compile(model, devices=["cpu"] * 2, example_inputs=X)
    with (
        pipe.trainer(None, SGD) as t,
        pytest.raises(TypeError, match=r"gave dict, .*sum\(losses.values\(\)\)"),
    ):
        t.step(X)
    with pipe.trainer(lambda losses, _: sum(losses.values()), SGD, executor="inline") as t:
        t.step(X, None)
        t.flush()
        assert len(t.losses) == 1


def looks_at_values(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target) if output.max() > 0 else output.square().mean()


def asserts(output: Tensor, target: Tensor) -> Tensor:
    assert bool((output.detach().exp().sum(1) - 1).abs().max() < 1e-3), "log-probabilities, please"
    return F.nll_loss(output, target)


def in_place(output: Tensor, target: Tensor) -> Tensor:
    output.sub_(output.detach().amax(1, keepdim=True))
    return F.cross_entropy(output, target)


def penalised(output: Tensor, target: Tensor) -> Tensor:
    loss = F.cross_entropy(output, target)
    (gradient,) = torch.autograd.grad(loss, output, create_graph=True)
    return loss + gradient.square().sum()


class Counting(nn.Module):
    """Keeps what it has seen; a fake tensor must not get into it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.norm = nn.BatchNorm1d(4)
        self.seen = 0

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.seen += 1
        self.mean = 0.9 * self.mean + 0.1 * output.detach().mean(0)
        return F.cross_entropy(self.norm(output - self.mean), target)


RIGHT: dict[str, tuple[Any, Any]] = {
    "bytes as classes": (F.cross_entropy, Y.byte()),
    "probabilities": (F.cross_entropy, F.one_hot(Y, 4).float()),
    "ignored": (nn.CrossEntropyLoss(ignore_index=-1), Y - 1),
    "values": (looks_at_values, Y),
    "in place": (in_place, Y),
    "no target": (lambda o, y: o.square().mean(), None),
    "anything as target": (lambda o, y: o.square().mean() * len(y), ["a", "b"]),
    "a list": (lambda o, y: F.cross_entropy(o, torch.tensor([int(label) for label in y])), ["0", "1"] * 8),
    "gradient penalty": (penalised, Y),
    "one by one": (
        lambda o, y: sum(F.mse_loss(o[i], t["box"]) for i, t in enumerate(y)),
        [{"box": X[0, :4]}] * 16,
    ),
    "sigmoid": (lambda o, y: F.binary_cross_entropy(o.sigmoid(), y), F.one_hot(Y, 4).float()),
    "none of its own": (lambda o, y: torch.zeros((), requires_grad=True) + 0 * o.sum(), Y),
}


@pytest.mark.parametrize("samples", [16, 3])
@pytest.mark.parametrize("what", list(RIGHT))
def test_right_losses_are_left_alone(what: str, samples: int) -> None:
    loss_fn, target = RIGHT[what]
    assert len(train(loss_fn, target, example=X[:samples], executor="inline")) == 3


def test_losses_that_assert_values_are_left_alone() -> None:
    assert len(train(asserts, model=Gives(lambda out: out.log_softmax(1)), executor="inline")) == 3
    halves = F.one_hot(Y, 4).float()
    assert len(train(nn.BCELoss(), halves, model=Gives(torch.sigmoid), executor="inline")) == 3


def test_trying_a_loss_leaves_nothing_in_it() -> None:
    loss = Counting()
    train(loss, executor="inline")
    assert loss.seen == loss.norm.num_batches_tracked == 3
    assert type(loss.mean) is Tensor


CALLS, SEEN = 0, []


def counts(output: Tensor, target: Tensor) -> Tensor:
    """A loss that changes what its script holds."""
    global CALLS
    CALLS += 1
    SEEN.append(output.detach())
    return CALLS * F.cross_entropy(output, target)


class Warming:
    """A loss that is an object, and remembers."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return self.calls * F.cross_entropy(output, target)


def enclosed() -> Any:
    calls = 0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return calls * F.cross_entropy(output, target)

    return loss


class Inherits(Warming):
    """What is called is its class's class's."""


class Task:
    """Whose method is the loss; it keeps a tensor."""

    def __init__(self) -> None:
        self.calls, self.mean = 0, torch.zeros(())

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * output.detach().mean()
        return self.calls * F.cross_entropy(output, target) + 0 * self.mean


class Centred(nn.Module):
    """Keeps a number and a tensor, and is called by another function."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.mean = 0, torch.zeros(())

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * output.detach().mean()
        return self.calls * F.cross_entropy(output, target) + 0 * self.mean


def around_a_module() -> Any:
    centred = Centred()
    return lambda output, target: centred(output, target)


FUNCTIONS = [lambda: counts, enclosed, lambda: partial(counts), lambda: Task().loss, around_a_module]


@pytest.mark.parametrize("make", [Warming, Inherits, *FUNCTIONS])
def test_trying_a_loss_is_no_call_of_it(make: Any) -> None:
    global CALLS
    CALLS = 0
    SEEN.clear()
    first = []
    for loss_fn in (make(), F.cross_entropy):
        torch.manual_seed(0)
        model = Gives(lambda out: out)
        first.append(train(loss_fn, model=model, method="bp", executor="inline", seed=0)[0])
    assert first[0] == first[1]
    assert len(SEEN) in (0, 3)


# --- Arguments of the loss that travel with the batch -------------------------------------------------


def annealed(output: Tensor, target: Tensor, beta: float = 1.0, kind: str = "ce") -> Tensor:
    loss = F.cross_entropy(output, target) if kind == "ce" else output.square().mean()
    return beta * loss


def weighted(output: Tensor, target: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    return (F.cross_entropy(output, target, classes, reduction="none") * weight).mean()


def plain(extras: list[dict[str, Any]]) -> list[float]:
    """The first losses of the plain loop, without updates."""
    model = mlp(dropout=0.0)
    return [annealed(model(x), y, **e).item() for (x, y), e in zip(batches(len(extras)), extras, strict=True)]


EXTRAS = [{"beta": 10.0**k, "kind": ("ce", "square")[k % 2]} for k in range(4)]


@pytest.mark.parametrize("executor", ["inline", "workers"])
def test_extra_arguments_of_the_loss(executor: str) -> None:
    pipe = dtrp.compile(mlp(dropout=0.0), n_gpus=2, example_inputs=torch.randn(4, 8))
    still = partial(torch.optim.SGD, lr=0.0)
    with pipe.trainer(annealed, still, executor=executor, method="bp") as t:
        for (x, y), extra in zip(batches(4), EXTRAS, strict=True):
            t.step(x, y, extra=extra)
        t.flush()
        assert t.losses == pytest.approx(plain(EXTRAS), rel=1e-5)
        (x, y), *_ = batches(1)
        row = {"input": x, "target": y}
        (once,) = t.fit([{**row, "extra": {"beta": 1.0}}], 1)
        (thrice,) = t.fit([{**row, "extra": {"beta": 3.0}}], 1)
        assert thrice["train_loss"] == pytest.approx(3 * once["train_loss"], rel=1e-5)
        seen = [t.evaluate([{**row, "extra": {"beta": beta}}]) for beta in (1.0, 3.0)]
        assert seen[1]["loss"] == pytest.approx(3 * seen[0]["loss"], rel=1e-5)
        assert seen[0]["accuracy"] == seen[1]["accuracy"]


def weights_after(extras: list[dict[str, Any]], **knobs: Any) -> dict[str, Tensor]:
    model = mlp(dropout=0.0, norm=False)
    pipe = dtrp.compile(model, n_gpus=2, example_inputs=torch.randn(4, 8))
    with pipe.trainer(weighted, SGD, executor="inline", seed=0, **knobs) as t:
        for (x, y), extra in zip(batches(len(extras)), extras, strict=True):
            t.step(x, y, extra=extra)
    return model.state_dict()


def test_extra_tensors_are_cut_and_joined_with_the_batch() -> None:
    g = torch.Generator().manual_seed(0)
    extras = [
        {"weight": torch.rand(4, generator=g), "classes": torch.tensor([1.0, 2.0, 3.0])} for _ in range(4)
    ]
    whole, parts = weights_after(extras, method="bp"), weights_after(extras, method="gpipe", micro_batches=2)
    assert all(torch.allclose(whole[name], parts[name], atol=1e-6) for name in whole)
    weights_after(extras, batch_compensation=2)  # weights are joined, classes are the same in both
    extras[1]["classes"] = torch.ones(3)
    with pytest.raises(ValueError, match="a tensor without that dimension differs between them"):
        weights_after(extras, batch_compensation=2)


def test_extra_that_makes_no_sense(no_workers: None, pipe: dtrp.Pipeline) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: Tensor, extra: Any = None) -> Any:
            return self.body(x)

    with pipe.trainer(annealed, SGD) as t:
        with pytest.raises(TypeError, match=r"extra=0.5: expected a dict of arguments of loss_fn by name"):
            t.step(X, Y, extra=0.5)
        with pytest.raises(TypeError, match=r"loss_fn\(output, target, gamma=...\), .*unexpected keyword"):
            t.step(X, Y, extra={"gamma": 1.0})
    with (
        dtrp.compile(Own(), n_gpus=2, example_inputs=X).trainer(annealed, SGD) as t,
        pytest.raises(TypeError, match="forward of Own has a parameter 'extra' too"),
    ):
        t.step(X, Y, extra={"beta": 1.0})
    with pipe.trainer(None, SGD) as t, pytest.raises(TypeError, match="no target and no extra"):
        t.step(X, extra={"beta": 1.0})


# --- Compiling ----------------------------------------------------------------------------------------


def wrapped(kind: type) -> nn.Module:
    """As DistributedDataParallel wraps, without a process group."""
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    model.module = net()
    return model


MODELS: dict[str, tuple[Any, str]] = {
    "a class": (nn.Linear, r"model is the class Linear: give compile an object, Linear\(...\)"),
    "a function": (len, "model must be a torch.nn.Module, got a builtin_function"),
    "compiled by torch": (
        torch.compile(net(), backend="eager"),
        "made by torch.compile: .*compile_stages=True",
    ),
    "DataParallel": (nn.DataParallel(net()), "wrapped in DataParallel: give compile model.module"),
    "DDP": (wrapped(nn.parallel.DistributedDataParallel), "give compile model.module"),
}


@pytest.mark.parametrize("mistake", list(MODELS))
def test_models(mistake: str) -> None:
    model, text = MODELS[mistake]
    with pytest.raises(TypeError, match=text):
        dtrp.compile(model, n_gpus=2)


def test_an_argument_misspelt() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'ngpus'; did you mean 'n_gpus'"):
        dtrp.compile(net(), ngpus=2)  # type: ignore[call-arg]


def test_a_model_compiled_twice(pipe: dtrp.Pipeline) -> None:
    with pytest.raises(TypeError, match="model is a Pipeline, and so compiled already"):
        dtrp.compile(pipe, n_gpus=2)  # type: ignore[arg-type]


def test_models_without_shapes() -> None:
    with pytest.raises(ValueError, match=r"'0.weight' has no shape yet: call the model once first"):
        dtrp.compile(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)), n_gpus=2)


def test_a_model_of_one_layer() -> None:
    text = r"stay together \(one layer's operations, .*; use at most 1 stage, since nothing here can be cut"
    with pytest.raises(ValueError, match=text):
        dtrp.compile(nn.Linear(8, 3), n_gpus=2, example_inputs=X)


def test_models_with_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="has no parameters: there is nothing to train"):
        dtrp.compile(nn.Sequential(nn.ReLU()), n_gpus=2)
    with pytest.raises(ValueError, match="no parameter of the model requires gradient"):
        dtrp.compile(net().requires_grad_(False), n_gpus=2).trainer(F.cross_entropy, SGD)
    with pytest.raises(ValueError, match=r"'0.weight' is on the meta device, .*to_empty"):
        dtrp.compile(net().to("meta"), n_gpus=2).trainer(F.cross_entropy, SGD)


EXAMPLES: dict[str, tuple[Any, str]] = {
    "a batch": ((X, Y), "example_inputs: .*too many positional arguments; .*without targets"),
    "numpy": (X.numpy(), "called with a ndarray: give tensors"),
    "a loader": (DataLoader([X]), "called with a DataLoader: give tensors"),  # type: ignore[arg-type]
    "a dict": ({"image": X}, r"a dict that is itself one argument goes into a tuple: .*\(batch,\)"),
    "a shape": ((16, 8), "too many positional arguments; give what the model is called with"),
}


@pytest.mark.parametrize("mistake", list(EXAMPLES))
def test_examples(mistake: str) -> None:
    example, text = EXAMPLES[mistake]
    with pytest.raises(TypeError, match=text):
        dtrp.compile(net(), n_gpus=2, example_inputs=example)


def test_a_list_as_example() -> None:
    """What a DataLoader gives, say; and a batch by name that is packed once too often."""
    for example, kind in (([X], "list"), (({"input": X},), "dict")):
        with pytest.raises(dtrp.CaptureError, match=f"the {kind} in example_inputs is one argument of the"):
            dtrp.compile(net(), n_gpus=2, example_inputs=example)


def test_examples_of_another_dtype() -> None:
    """What numpy gives."""
    with pytest.raises(dtrp.CaptureError, match=r"of different dtypes meet\n  to do: .*x.float\(\) \(numpy"):
        dtrp.compile(net(), n_gpus=2, example_inputs=X.double())


def test_a_loss_that_uses_the_models_parameters(pipe: dtrp.Pipeline, no_workers: None) -> None:
    """A worker would have a copy of them, which stays as it was."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + sum(p.square().sum() for p in pipe.parameters())

    with (
        pipe.trainer(loss, SGD) as t,
        pytest.raises(ValueError, match=r"own parameter '0.weight', .*weight_decay=.* beside its output"),
    ):
        t.step(X, Y)


class Slopes(nn.Module):
    """Far apart in the model: what is made from ``h`` runs in another stage than the last."""

    def __init__(self, inside: bool = False) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
        self.head, self.inside = nn.Linear(32, 4), inside
        self.middle = nn.Sequential(nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 16))

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        y = self.head(torch.cat([self.middle(h), h], 1))
        return (y, *torch.autograd.grad(y.sum(), h, create_graph=True)) if self.inside else (y, h)


def of_a_part(model: Any, output: Any, target: Any) -> Any:
    return torch.autograd.grad(output[0].sum(), output[1], create_graph=True)


def of_a_parameter(model: Any, output: Any, target: Any) -> Any:
    return torch.autograd.grad(output[0].sum(), model.first[0].weight, create_graph=True)


def of_the_input(model: Any, output: Any, target: Any) -> Any:
    return torch.autograd.grad(output[0].sum(), target[1], create_graph=True)


@pytest.mark.parametrize(
    ("loss_fn", "what"),
    [
        (F.mse_loss, "must match the size"),
        (lambda out, y: (out - y).square().mean(), "must match the size"),
        (lambda out, y: (out @ y).mean(), "cannot be multiplied"),
        (lambda out, y: F.smooth_l1_loss(out, y[:, 9]), "out of bounds"),
    ],
)
def test_a_target_of_another_size(no_workers: None, loss_fn: Any, what: str) -> None:
    """Whatever torch says of sizes alone is said before workers start, with both sizes."""
    with pytest.raises(TypeError, match=what) as caught:
        train(loss_fn, torch.randn(16, 3))
    assert "the output is float32 of shape (16, 4), the target float32 of shape (16, 3)" in str(caught.value)


def test_a_loss_that_dislikes_values_is_left_alone() -> None:
    """It raises what it raises for sizes, but for none of those that stand in for the model's output."""

    def picky(out: Tensor, y: Tensor) -> Tensor:
        if bool((out.abs() > 1e4).any()) or out.shape != y.shape:
            raise RuntimeError("too large")
        return (out - y).square().mean()

    assert len(train(picky, torch.randn(16, 4), executor="inline")) == 3


@pytest.mark.parametrize("executor", ["inline", "workers"])
def test_a_metric_that_fails_leaves_the_trainer_usable(pipe: dtrp.Pipeline, executor: str) -> None:
    """And nothing that is found again, and complained of, when the trainer is long closed."""
    with pipe.trainer(F.cross_entropy, SGD, executor=executor) as t:
        t.step(X, Y)
        with pytest.raises(dtrp.WorkerError, match="metric 'acc' failed: ValueError"):
            t.evaluate([(X, Y)] * 9, metric={"acc": lambda out, y: out.argmax(1) == y})
        assert 0 <= t.evaluate([(X, Y)] * 3, metric={"acc": lambda out, y: 0.5})["acc"] <= 1
        answers = t.predict([X] * 9)
        next(answers)
    del answers
    gc.collect()


@pytest.mark.parametrize(
    ("slope", "what"),
    [
        (of_a_part, "a part of the output from which the model makes another"),
        (of_a_parameter, "the model's parameter 'first.0.weight'"),
        (of_the_input, "a tensor of its target"),
    ],
)
def test_a_loss_that_takes_gradients_through_the_model(no_workers: None, slope: Any, what: str) -> None:
    model, x = Slopes(), X.clone().requires_grad_()

    def loss_fn(output: Any, target: Any) -> Tensor:
        (slopes,) = slope(model, output, target)
        return F.cross_entropy(output[0], target[0]) + slopes.square().mean()

    loss_fn(model(x), (Y, x)).backward()  # the plain loop can
    pipe = dtrp.compile(model, n_gpus=3, example_inputs=X)
    with (
        pytest.raises(ValueError, match=rf"with respect to {what}: .* take them in the model's forward"),
        pipe.trainer(loss_fn, SGD) as trainer,
    ):
        trainer.step(x, (Y, x))


def test_gradients_that_a_loss_may_take() -> None:
    def loss_fn(output: Any, target: Any) -> Any:
        y, slopes = output
        (own,) = torch.autograd.grad(F.cross_entropy(y, target), y, create_graph=True)
        return F.cross_entropy(y, target) + own.square().sum() + slopes.square().mean()

    plain, model = Slopes(inside=True), Slopes(inside=True)
    model.load_state_dict(plain.state_dict())
    optimizer = SGD(plain.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        loss_fn(plain(X), Y).backward()
        optimizer.step()
    pipe = dtrp.compile(model, n_gpus=2, example_inputs=X)
    with pipe.trainer(loss_fn, SGD, method="bp", executor="inline") as trainer:
        for _ in range(3):
            trainer.step(X, Y)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=1e-6)


PLACES: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"n_gpus": 0}, r"n_gpus=0: expected an int >= 1, the number of stages"),
    "text": ({"n_gpus": "4"}, r"n_gpus='4': expected an int >= 1"),
    "an example": ({"n_gpus": X}, r"n_gpus=tensor.*: expected an int .*example_inputs=x is an example"),
    "too many": (
        {"n_gpus": 9, "example_inputs": X},
        "cannot make 9 non-empty stages of 3 nodes; use at most 3",
    ),
    "one device": ({"devices": "cpu"}, "expected a list with one device per stage"),
    "gpu": ({"devices": ["gpu:0", "gpu:1"]}, "expected devices such as 'cuda:0' or 'cpu'"),
    "memory": (
        {"n_gpus": 2, "memory_limit": "16 gigs", "example_inputs": X},
        "not a number of bytes: '16 gigs'; write for example 16GB",
    ),
}


@pytest.mark.parametrize("mistake", list(PLACES))
def test_places(mistake: str) -> None:
    arguments, text = PLACES[mistake]
    with pytest.raises((TypeError, ValueError), match=text):
        dtrp.compile(net(), **arguments)


def test_asking_before_planning() -> None:
    early = dtrp.compile(net(), n_gpus=2)
    with pytest.raises(dtrp.DtrpError, match="not been planned yet: pass example_inputs"):
        _ = early.report
    with pytest.raises(AttributeError, match=r"a Pipeline has no 'fit'; .*pipe.trainer\(...\)"):
        early.fit  # noqa: B018


# --- Settings -----------------------------------------------------------------------------------------


class NeedsRate(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)


OTHER = net()
STEP = torch.optim.lr_scheduler.StepLR
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "an optimizer": ({"optimizer": SGD(OTHER.parameters())}, r"such as partial\(torch.optim.SGD, lr=0.1\)"),
    "two optimizers": (
        {"optimizer": [SGD(OTHER.parameters()), SGD(OTHER.parameters())]},
        "expected a callable .*; several optimizers are a trainer each",
    ),
    "two at once": (
        {"optimizer": lambda p: (SGD(p), SGD(p))},
        "returned tuple, expected a torch.optim.Optimizer; .*several optimizers are a trainer each",
    ),
    "parameters": ({"optimizer": OTHER.parameters()}, "expected a callable that takes parameters"),
    "no rate": ({"optimizer": NeedsRate}, r"missing 1 required .*'lr'; expected .*partial\(torch.optim.SGD"),
    "misspelt": (
        {"optimizer": partial(torch.optim.SGD, learning_rate=0.1)},
        "unexpected keyword .*; expected",
    ),
    "not asked": (
        {"optimizer": lambda: SGD(OTHER.parameters())},
        "takes 0 positional .*; expected a callable",
    ),
    "foreign": ({"optimizer": lambda p: SGD(OTHER.parameters())}, "4 parameter.*that it was not given; use"),
    "a scheduler": (
        {"lr_scheduler": STEP(SGD(OTHER.parameters()), 3)},
        r"such as partial\(torch.optim.lr_sch",
    ),
    "no step size": ({"lr_scheduler": STEP}, "missing 1 required .*'step_size'; expected .*step_size=30"),
    "method": ({"method": "fgd"}, "method='fgd': expected one of 'dtrp', .*; did you mean 'fdg'"),
    "turned": ({"method": "dtpr"}, "; did you mean 'dtrp'"),
    "predictor": ({"predictor": "adamm"}, "predictor='adamm': .*; did you mean 'adam'"),
    "argument": ({"shedule": "lean"}, "unexpected keyword argument 'shedule'; did you mean 'schedule'"),
    "part": ({"scheduler": None}, "unexpected keyword argument 'scheduler'; did you mean 'lr_scheduler'"),
    "executor": ({"executor": "worker"}, "did you mean 'workers'"),
    "schedule": ({"schedule": "leen"}, "expected one of 'fig1', 'lean', 'auto'; did you mean 'lean'"),
    "timeline": ({"timeline": True}, "timeline=True: expected the path of a file"),
    "autosave": ({"autosave": "run.ckpt"}, r"expected \(path, seconds\), such as"),
}


@pytest.mark.parametrize("mistake", list(SETTINGS))
def test_settings(pipe: dtrp.Pipeline, no_workers: None, mistake: str) -> None:
    settings, text = SETTINGS[mistake]
    with pytest.raises((TypeError, ValueError), match=text):
        pipe.trainer(**{"loss_fn": F.cross_entropy, "optimizer": SGD, **settings})


# --- Batches and loaders ------------------------------------------------------------------------------

STEPS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "no target": (
        (X,),
        {},
        r"missing a required argument: 'input'; step takes .* then the target: step\(x, y\), or step\(x, No",
    ),
    "nothing": ((), {}, r"got no target: the last positional argument is the target"),
    "a pair": (((X, Y),), {}, r"step takes a batch's parts one by one: step\(\*batch\)"),
    "a list": (([X, Y],), {}, r"step\(\*batch\)"),
    "inputs in a list": (([X, X], Y), {}, r"one by one, then the target: step\(\*inputs, y\)"),
    "numbers": ((X.tolist(), Y), {}, r"another structure than the example.*\.\.\. 128 values"),
    "numpy": ((X.numpy(), Y), {}, "give tensors, as by torch.as_tensor"),
    "a dict": (({"input": X, "target": Y},), {}, r"a batch's parts by name: step\(\*\*batch\)"),
    "labels": ((), {"input": X, "labels": Y}, "no target among 'input', 'labels': name it 'target'"),
}


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("mistake", list(STEPS))
def test_steps(no_workers: None, mistake: str, planned: bool) -> None:
    args, kwargs, text = STEPS[mistake]
    if not planned and mistake in ("numbers", "inputs in a list"):
        pytest.skip("only the model can tell")
    pipe = dtrp.compile(net(), n_gpus=2, example_inputs=X if planned else None)
    with pipe.trainer(F.cross_entropy, SGD) as t, pytest.raises(TypeError, match=text) as error:
        t.step(*args, **kwargs)
    assert str(error.value).count("give tensors") <= 1


LOADERS: dict[str, tuple[tuple[Any, ...], str]] = {
    "nothing": ((None, 1), "got a NoneType as loader: expected an iterable of batches"),
    "a text": (("abc", 1), "got a str as loader: expected an iterable of batches"),
    "a batch": (((X, Y), 1), r"got one batch as loader: expected an iterable of batches \(x, y\)"),
    "x and y": ((X, Y), r"epochs=tensor.*: expected an int >= 0, as in fit\(loader, epochs=10\)"),
    "epochs": (([(X, Y)], 2.0), r"epochs=2.0: expected an int >= 0"),
    "empty": (([], 1), "the loader gave no batch in epoch 1; .*drop_last=True"),
    "labels": (([{"input": X, "label": Y}], 1), "name it 'target'"),
    "x alone": (([X], 1), r"step takes the model's arguments, then the target"),
    "a data set": ((TensorDataset(X, Y), 1), r"has samples, not batches: wrap it, DataLoader\(dataset"),
    "once only": ((iter([(X, Y)]), 2), "can be gone through only once"),
}


@pytest.mark.parametrize("mistake", list(LOADERS))
def test_loaders(pipe: dtrp.Pipeline, no_workers: None, mistake: str) -> None:
    arguments, text = LOADERS[mistake]
    with pipe.trainer(F.cross_entropy, SGD) as t, pytest.raises((TypeError, ValueError), match=text):
        t.fit(*arguments)


def test_a_generator_to_test_on(pipe: dtrp.Pipeline) -> None:
    """Its second epoch had no row for it, without a word; it is told before the first one is trained."""
    with pipe.trainer(F.cross_entropy, SGD, executor="inline") as t:
        with pytest.raises(ValueError, match=r"epochs=3 with a list_iterator as val_loader.*only once"):
            t.fit([(X, Y)], 3, val_loader=iter([(X, Y)]))
        assert t.updates == 0
        with pytest.raises(ValueError, match=r"the val_loader gave no batch in epoch 1; .*drop_last=True"):
            t.fit([(X, Y)], 1, val_loader=[])


def test_loaders_that_are_right(pipe: dtrp.Pipeline) -> None:
    pair = namedtuple("pair", "image label")
    rows = list(zip(X, Y, strict=True))
    with pipe.trainer(F.cross_entropy, SGD, executor="inline") as t:
        assert set(t.evaluate(DataLoader(rows, batch_size=4))) == {"loss", "accuracy"}  # before training
        t.fit(DataLoader(rows, batch_size=4), 1)
        t.fit(DataLoader([pair(x, y) for x, y in rows], batch_size=4), 1)
        t.fit(DataLoader([{"input": x, "target": y} for x, y in rows], batch_size=4), 1)
        assert len(t.losses) == 12


def test_evaluation(pipe: dtrp.Pipeline, no_workers: None) -> None:
    with pipe.trainer(F.cross_entropy, SGD) as t:
        with pytest.raises(TypeError, match="got one batch as loader"):
            t.evaluate((X, Y))
        with pytest.raises(TypeError, match=r"expected a callable .*or None"):
            t.evaluate([(X, Y)], metric="accuracy")
        with pytest.raises(TypeError, match=r"metric=tensor\(.{40,60}\.\.\.: expected a callable"):
            t.evaluate(X, torch.cat([Y, Y]))


def test_names_of_metrics(pipe: dtrp.Pipeline) -> None:
    """By which rows and files have them: what `SaveBest(monitor=...)` is given."""
    right = {"share": lambda o, y: (o.argmax(1) == y).float().mean()}
    with pipe.trainer(F.cross_entropy, SGD, executor="inline") as t:
        assert set(t.evaluate([(X, Y)], metric=right["share"])) == {"loss", "metric"}
        assert set(t.evaluate([(X, Y)], metric=right)) == {"loss", "share"}
        assert set(t.evaluate([(X, Y)], metric=partial(F.cross_entropy, reduction="sum"))) == {
            "loss",
            "cross_entropy",
        }


# --- The run ------------------------------------------------------------------------------------------


def test_using_a_trainer_that_is_closed(pipe: dtrp.Pipeline) -> None:
    with pipe.trainer(F.cross_entropy, SGD, executor="inline") as t:
        t.step(X, Y)
    for use in (lambda: t.step(X, Y), lambda: t.fit([(X, Y)], 1), lambda: t.evaluate([(X, Y)])):
        with pytest.raises(RuntimeError, match=r"this trainer is closed; make a new one"):
            use()


@pytest.mark.parametrize("filled", [False, True], ids=["None", "float"])
def test_a_loop_that_goes_backward_itself(pipe: dtrp.Pipeline, filled: bool) -> None:
    """`step` gives no tensor: Python's own words say nothing of dtrp, so a note does."""

    def loop() -> None:
        with pipe.trainer(F.cross_entropy, SGD, executor="inline") as t:
            while (loss := t.step(X, Y)) is None and filled:
                pass
            loss.backward()  # type: ignore[union-attr]

    with pytest.raises(AttributeError, match="step gave: that is the newest finished batch's loss, a number"):
        loop()


@pytest.mark.parametrize(
    "use", [lambda loss: 0.0 + loss, lambda loss: f"{loss:.3f}", lambda loss: round(loss, 3)]
)
def test_a_loop_that_uses_losses_at_once(pipe: dtrp.Pipeline, use: Any) -> None:
    def loop() -> None:
        with pipe.trainer(F.cross_entropy, SGD, executor="inline") as t:
            use(t.step(X, Y))

    with pytest.raises(TypeError, match="None while the pipeline fills"):
        loop()


def test_a_model_without_a_target() -> None:
    """A loss of the outputs alone (triplets): its target is None."""
    model = net()
    expected = copy.deepcopy(model)
    optimizer = SGD(expected.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        expected(X).square().mean().backward()
        optimizer.step()
    pipe = dtrp.compile(model, n_gpus=2)
    with pipe.trainer(lambda output, _: output.square().mean(), SGD, method="bp", executor="inline") as t:
        for _ in range(2):
            t.step(X, None)
    assert same(model.state_dict(), expected.state_dict())


def test_predicting_with_targets(pipe: dtrp.Pipeline) -> None:
    with pipe.trainer(F.cross_entropy, SGD, executor="inline") as t:
        t.step(X, Y)
        with pytest.raises(TypeError, match=r"; predict takes .* alone: predict\(x for x, y in loader\)"):
            next(t.predict([(X, Y)]))


def test_arrays_for_a_planned_pipeline(pipe: dtrp.Pipeline) -> None:
    with pytest.raises(
        TypeError, match=r"(?s)'input' was a tensor .* and is array.*Give a tensor, or compile"
    ):
        pipe(X.numpy())


def test_a_finished_run_says_so(
    pipe: dtrp.Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Run again, a script with `resume` gave the old history at once."""
    path = tmp_path / "run.ckpt"
    for again in (False, True):
        with pipe.trainer(F.cross_entropy, SGD, executor="inline") as t:
            rows = t.fit([(X, Y)], 2, resume=path)
        assert len(rows) == 2
        assert (f"{path} has 2 epochs already, of 2: none is trained now" in caplog.text) == again


def test_a_file_of_another_model(pipe: dtrp.Pipeline, tmp_path: Path) -> None:
    """What it lacks, and what it has; the half that is empty is not said."""
    small = nn.Sequential(nn.Linear(8, 4))
    for model, other, text in (
        (small, net(), r"it lacks \['2.bias', '2.weight'\]$"),
        (net(), small, r"it has \['2.bias', '2.weight'\] that Sequential has not"),
    ):
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        with pytest.raises(dtrp.CheckpointError, match=text):
            dtrp.load_weights(other, tmp_path / "weights.pt")


def test_doubles_of_numpy(no_workers: None, pipe: dtrp.Pipeline) -> None:
    """Refused with the argument and what to do, not by a stage, somewhere in torch."""
    images = dtrp.compile(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()),
        n_gpus=2,
        example_inputs=X[:, None, None].expand(-1, 1, 8, 8),
    )
    for made, batch in ((pipe, X.double()), (images, torch.ones(4, 1, 8, 8, dtype=torch.uint8))):
        with (
            made.trainer(F.cross_entropy, SGD) as t,
            pytest.raises(
                ValueError,
                match=r"argument 'input' is .* now and was float32 .*[Gg]ive it as torch.float32",
            ),
        ):
            t.step(batch, Y)
    with pipe.trainer(F.cross_entropy, SGD, executor="inline", autocast=torch.bfloat16) as t:
        t.step(X.bfloat16(), Y)
        t.step(X, Y)


def test_two_trainers_of_a_model(pipe: dtrp.Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with pipe.trainer(F.cross_entropy, SGD, executor="inline") as t:
        t.step(X, Y)
        assert "another trainer" not in caplog.text
        with pipe.trainer(F.cross_entropy, SGD, executor="inline") as u:
            u.step(X, Y)
        assert "another trainer of this Sequential has not been left yet" in caplog.text


def test_at_a_prompt(pipe: dtrp.Pipeline) -> None:
    """What is shown where `print` was forgotten."""
    assert repr(pipe) == "<dtrp.Pipeline of Sequential for 2 stages: print its report>"
    assert repr(pipe.report) == str(pipe.report)


def test_what_a_trainer_is_not(pipe: dtrp.Pipeline) -> None:
    with pipe.trainer(F.cross_entropy, SGD, executor="inline") as t:
        with pytest.raises(AttributeError, match=r"a Trainer has no 'zero_grad'; step\(x, y\) does forward"):
            t.zero_grad()
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inside torch.inference_mode\(\)"):
            t.step(X, Y)


def test_files_in_folders_that_are_not_there(pipe: dtrp.Pipeline, tmp_path: Path) -> None:
    """They are made, not missed at the end of a run."""
    pipe.plan.save(tmp_path / "a" / "plan.json")
    pipe.report.to_html(tmp_path / "b" / "plan.html")
    timeline = tmp_path / "c" / "d" / "timeline.json"
    with pipe.trainer(F.cross_entropy, SGD, executor="inline", timeline=timeline) as t:
        t.fit([(X, Y)], 1, callbacks=[dtrp.callbacks.CSVLog(tmp_path / "e" / "log.csv")])
        t.save(tmp_path / "f" / "run.ckpt")
    assert sorted(p.parent.name for p in tmp_path.rglob("*.*")) == ["a", "b", "d", "e", "f"]


def test_a_forgotten_with(pipe: dtrp.Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    t = pipe.trainer(F.cross_entropy, SGD, executor="inline")
    t.step(X, Y)
    del t
    gc.collect()
    assert "use `with pipe.trainer(...) as trainer:`" in caplog.text


def test_files(pipe: dtrp.Pipeline, tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "weights.pt")
    (tmp_path / "notes.txt").write_text("hello")
    with pipe.trainer(F.cross_entropy, SGD, executor="inline") as t:
        with pytest.raises(dtrp.CheckpointError, match=r"dtrp.load_weights reads a state_dict"):
            t.load(tmp_path / "weights.pt")
        with pytest.raises(dtrp.CheckpointError, match="cannot be read as a checkpoint"):
            t.load(tmp_path / "notes.txt")
        with pytest.raises(dtrp.CheckpointError, match="there is no file"):
            t.load(tmp_path / "run.ckpt")
        with pytest.raises(dtrp.CheckpointError, match="is a folder"):
            t.save(tmp_path)


def test_a_loss_that_is_not_finite(pipe: dtrp.Pipeline) -> None:
    text = r"loss of batch 0 is nan; look at the batch .*'skip'"
    with (
        pytest.raises(dtrp.WorkerError, match=text),
        pipe.trainer(F.cross_entropy, SGD, executor="inline") as t,
    ):
        t.step(X * np.nan, Y)


def test_a_shape_that_the_model_cannot_take(pipe: dtrp.Pipeline) -> None:
    with (
        pipe.trainer(F.cross_entropy, SGD, executor="inline") as t,
        pytest.raises(dtrp.WorkerError, match=r"stage 0 failed: .*\(16x9 and 8x16\)"),
    ):
        t.step(torch.randn(16, 9), Y)


def holding(thing: Any) -> Any:
    return lambda output, target: F.cross_entropy(output, target) if thing else output.sum()


def test_what_cannot_be_sent(pipe: dtrp.Pipeline, tmp_path: Path) -> None:
    text = r"loss_fn \(.*\) cannot be sent to a worker process: .*Avoid"
    with open(tmp_path / "log", "w", encoding="utf-8") as file:
        for thing in (threading.Lock(), (i for i in "ab"), file):
            with (
                pipe.trainer(holding(thing), SGD, executor="workers") as t,
                pytest.raises(TypeError, match=text),
            ):
                t.step(X, Y)


def test_weights_after_a_mistake_are_as_before(no_workers: None) -> None:
    model = net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(TypeError, match="calls backward"):
        train(goes_back, model=model)
    assert same(before, model.state_dict())
    assert all(p.grad is None for p in model.parameters())


def torch_saved(pipe: dtrp.Pipeline) -> dtrp.Pipeline:
    file = io.BytesIO()
    torch.save(pipe, file)
    file.seek(0)
    copied: dtrp.Pipeline = torch.load(file, weights_only=False)
    return copied


@pytest.mark.parametrize("way", [copy.deepcopy, torch_saved], ids=["deepcopy", "saved"])
def test_a_copy_of_a_pipeline(pipe: dtrp.Pipeline, way: Any) -> None:
    """With a model of its own, in the same stages; what it trains is not the original's."""
    copied = way(pipe)
    assert copied.plan == pipe.plan
    pipe.eval()
    copied.eval()
    assert torch.equal(copied(X), pipe(X))
    pipe.train()
    before = {name: value.clone() for name, value in pipe.state_dict().items()}
    with copied.trainer(F.cross_entropy, SGD, executor="inline") as t:
        t.step(X, Y)
    assert all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())
    assert not torch.equal(copied.model[0].weight, pipe.model[0].weight)
