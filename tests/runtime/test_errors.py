"""Bad input is refused before any worker starts, and what goes wrong later says where."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrp

from .inside import refuse_workers
from .toys import ADAMW, SGD, batches, compiled, mlp, same, trainer


@pytest.fixture
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a worker process is an error."""
    refuse_workers(monkeypatch)


# --- Arguments ------------------------------------------------------------------------------------------

WRONG = {
    "method": ("sgd", ValueError, r"method='sgd': expected one of 'dtrp', 'dtr'"),
    "predictor": ("oracle", ValueError, r"predictor='oracle': expected one of 'none'"),
    "horizon": ("far", ValueError, r"horizon='far': expected one of 'common', 'stage'"),
    "horizon_scale": (-1.0, ValueError, r"horizon_scale=-1.0: expected a finite number >= 0"),
    "lr_shrink": (0, ValueError, r"lr_shrink=0: expected a finite number > 0"),
    "grad_shrink": (math.nan, ValueError, r"grad_shrink=nan: expected a finite number > 0"),
    "accumulate": (0, ValueError, r"accumulate=0: expected an int >= 1"),
    "batch_compensation": (0, ValueError, r"batch_compensation=0: expected an int >= 1"),
    "compensation_warmup": (0, ValueError, r"compensation_warmup=0: expected an int >= 1"),
    "max_grad_norm_lag": ("yes", TypeError, r"max_grad_norm_lag='yes': expected True or False"),
    "compile_stages": (None, TypeError, r"compile_stages=None: expected True or False"),
    "record": ("all", TypeError, r"record='all': expected True or False"),
    "progress": ("bar", TypeError, r"progress='bar': expected True or False"),
    "max_grad_norm": (0.0, ValueError, r"max_grad_norm=0.0: expected a finite number > 0"),
    "autocast": ("bf16", TypeError, r"autocast='bf16': expected a dtype such as torch.bfloat16"),
    "seed": (1.5, TypeError, r"seed=1.5: expected an int or None"),
    "executor": ("threads", ValueError, r"executor='threads': expected one of 'auto', 'inline', 'workers'"),
    "threads": (0, ValueError, r"threads=0: expected an int >= 1"),
    "watchdog": (0, ValueError, r"watchdog=0: expected a number of seconds > 0"),
    "on_nonfinite": ("ignore", ValueError, r"on_nonfinite='ignore': expected one of 'raise', 'skip'"),
    "scheduler_step": ("batch", ValueError, r"scheduler_step='batch': expected one of 'update', 'epoch'"),
    "loss_fn": ("mse", TypeError, r"loss_fn='mse': expected a callable"),
    "optimizer": (None, TypeError, r"optimizer=None: expected a callable that takes parameters"),
    "lr_scheduler": (3, TypeError, r"lr_scheduler=3: expected a callable that takes an optimizer"),
    "param_groups": ([], TypeError, r"param_groups=\[\]: expected a callable \(name, parameter\)"),
}


@pytest.fixture(scope="module")
def pipe() -> dtrp.Pipeline:
    return compiled()


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_arguments(pipe: dtrp.Pipeline, no_workers: None, name: str) -> None:
    value, kind, text = WRONG[name]
    arguments = {"loss_fn": F.cross_entropy, "optimizer": SGD, "executor": "workers", name: value}
    with pytest.raises(kind, match=text):
        pipe.trainer(**arguments)


def test_an_optimizer_that_is_one_already(pipe: dtrp.Pipeline) -> None:
    made = SGD(list(pipe.parameters()))
    with pytest.raises(TypeError, match="expected a callable that takes parameters and returns"):
        pipe.trainer(F.cross_entropy, made)


def test_a_scheduler_that_is_none(pipe: dtrp.Pipeline) -> None:
    with pytest.raises(TypeError, match="the callable returned str, expected a scheduler"):
        trainer(pipe, lr_scheduler=str)


class ByEpoch(torch.optim.lr_scheduler.StepLR):
    """Is told where it is, as timm's."""

    def step(self, epoch: int) -> None:  # type: ignore[override]
        super().step()


class Closed(torch.optim.SGD):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        super().step(closure)


class Sharpness(torch.optim.Optimizer):
    """As SAM is written: the closure has a default, and is called."""

    def __init__(self, parameters: Any, kind: Any, **options: Any) -> None:
        super().__init__(parameters, options)
        self.base, self.tried = kind(self.param_groups, **options), [0]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.tried[0] += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=0.05)
        closure()
        self.base.step()


def test_steps_that_ask_for_more(pipe: dtrp.Pipeline, no_workers: None) -> None:
    """Before anything is trained."""
    with pytest.raises(TypeError, match=r"ByEpoch.step\(\) asks for 'epoch'; expected step\(\) alone"):
        trainer(pipe, "workers", lr_scheduler=lambda optimizer: ByEpoch.__new__(ByEpoch))
    with pytest.raises(ValueError, match="Closed evaluates the loss several times per step"):
        trainer(pipe, "workers", optimizer=partial(Closed, lr=0.1))
    before, made = copy.deepcopy(pipe.state_dict()), []

    def sharpness(parameters: Any) -> Any:
        made.append(Sharpness(parameters, torch.optim.SGD, lr=0.1))
        return made[-1]

    with pytest.raises(ValueError, match="Sharpness evaluates the loss several times per step"):
        trainer(pipe, "workers", optimizer=sharpness)
    assert same(pipe.state_dict(), before)
    assert all(o.tried == [0] and not o.state for o in made)


def test_an_optimizer_that_gives_something_else(pipe: dtrp.Pipeline) -> None:
    with pytest.raises(TypeError, match=r"the callable returned list, expected a torch\.optim\.Optimizer"):
        pipe.trainer(F.cross_entropy, list)


@pytest.mark.parametrize(
    ("knobs", "why"),
    [
        ({"method": "dtr", "predictor": "linear"}, "dtr is the scheme without weight prediction"),
        ({"method": "bp", "predictor": "linear"}, "back-propagation has no delay to predict over"),
        ({"method": "fdg", "predictor": "linear"}, "fdg keeps each batch's graph"),
        ({"method": "adl", "predictor": "linear"}, "adl keeps each batch's graph"),
        ({"method": "bp", "lr_shrink": 0.5}, "compensate a delay that it does not have"),
        ({"method": "bp", "grad_shrink": 0.5}, "compensate a delay that it does not have"),
        ({"method": "dtr", "horizon_scale": 0.5}, "nothing is predicted"),
        ({"method": "fdg", "horizon": "stage"}, "nothing is predicted"),
        ({"predictor": "adam"}, "Adam's moments, which SGD does not keep"),
        ({"predictor": "linear", "optimizer": ADAMW}, "a velocity, which AdamW does not keep"),
        ({"predictor": "geometric", "optimizer": partial(torch.optim.SGD, lr=0.1)}, "momentum is 0"),
        ({"lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, "steps on a metric"),
        ({"optimizer": torch.optim.LBFGS}, "evaluates the loss several times per step"),
        ({"autocast": torch.int8}, "torch.bfloat16"),
    ],
)
def test_combinations_that_make_no_sense(
    pipe: dtrp.Pipeline, no_workers: None, knobs: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        trainer(pipe, "workers", **knobs)


def test_the_rate_is_not_set_by_hand(pipe: dtrp.Pipeline) -> None:
    with pytest.raises(AttributeError, match="follows lr_scheduler="):
        trainer(pipe).lr = 0.1


def test_mixed_precision_around_a_step(pipe: dtrp.Pipeline) -> None:
    """Batches in flight would go on without it, workers never hear of it."""
    x, y = batches(1)[0]
    with trainer(pipe) as t:
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(RuntimeError, match=r"autocast=torch.bfloat16"),
        ):
            t.step(x, y)
        with torch.autocast("cpu", enabled=False):
            t.step(x, y)
    with trainer(pipe, autocast=torch.bfloat16) as t, torch.autocast("cpu", torch.bfloat16):
        t.step(x, y)


# --- Batches --------------------------------------------------------------------------------------------


def elementwise(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


def a_number(output: Tensor, target: Tensor) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("loss_fn", "got"), [(elementwise, r"a tensor of shape \(4,\)"), (a_number, "float")]
)
def test_a_loss_that_is_no_scalar(pipe: dtrp.Pipeline, no_workers: None, loss_fn: Any, got: str) -> None:
    x, y = batches(1)[0]
    with (
        trainer(pipe, "workers", loss_fn) as t,
        pytest.raises(TypeError, match=rf"loss_fn '{loss_fn.__name__}' gave {got}, expected a scalar tensor"),
    ):
        t.step(x, y)


def test_no_target(pipe: dtrp.Pipeline, no_workers: None) -> None:
    with (
        trainer(pipe, "workers") as t,
        pytest.raises(TypeError, match="the last positional argument is the target"),
    ):
        t.step()


def test_inputs_of_the_wrong_number(pipe: dtrp.Pipeline, no_workers: None) -> None:
    x, y = batches(1)[0]
    with trainer(pipe, "workers") as t, pytest.raises(TypeError, match="do not fit"):
        t.step(x, x, x, y)


def test_closed(pipe: dtrp.Pipeline) -> None:
    t = trainer(pipe)
    t.close()
    for use in (lambda: t.step(*batches(1)[0]), lambda: t.save("x"), lambda: t.load("x")):
        with pytest.raises(RuntimeError, match="this trainer is closed"):
            use()


# --- Failures inside a stage ----------------------------------------------------------------------------


def shaped(output: Tensor, target: Tensor) -> Tensor:
    if len(target) == 3:
        raise ArithmeticError("three is a bad number")
    return F.cross_entropy(output, target)


class Fussy(torch.optim.SGD):
    """Refuses its third step."""

    def step(self, closure: Any = None) -> None:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 3:
            raise ArithmeticError("no third step")
        super().step()


class BadSchedule(torch.optim.lr_scheduler.LRScheduler):
    """Fails at its third step."""

    def get_lr(self) -> list[float]:
        if self.last_epoch == 3:
            raise ArithmeticError("no rate for update 3")
        return [0.1 for _ in self.base_lrs]


class BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ArithmeticError("no way back")


def no_way_back(output: Tensor, target: Tensor) -> Tensor:
    result: Tensor = BadBackward.apply(F.cross_entropy(output, target))
    return result


FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "loss": ({"loss_fn": shaped}, "three is a bad number"),
    "backward": ({"loss_fn": no_way_back}, "no way back"),
    "optimizer": ({"optimizer": partial(Fussy, lr=0.1)}, "no third step"),
    "scheduler": ({"lr_scheduler": BadSchedule}, "no rate for update 3"),
}


def feed(t: dtrp.Trainer, data: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in data:
        t.step(x, y)


def failing_batches() -> list[tuple[Tensor, Tensor]]:
    return [*batches(6), *batches(1, size=3), *batches(6)]


@pytest.mark.parametrize("what", list(FAILURES))
def test_an_exception_in_a_stage(pipe: dtrp.Pipeline, what: str) -> None:
    knobs, text = FAILURES[what]
    with trainer(pipe, **knobs) as t:
        with pytest.raises(dtrp.WorkerError, match=rf"stage \d failed: ArithmeticError: {text}") as caught:
            feed(t, failing_batches())
        assert caught.value.stage in (0, 1)
        assert "Traceback" in caught.value.remote_traceback
        assert isinstance(caught.value.__cause__, ArithmeticError)
        with pytest.raises(dtrp.WorkerError, match="has failed before and cannot go on"):
            t.step(*batches(1)[0])


def test_a_shape_that_the_model_cannot_take(pipe: dtrp.Pipeline) -> None:
    with trainer(pipe) as t:
        t.step(*batches(1)[0])
        with pytest.raises(dtrp.WorkerError, match=r"stage 0 failed: RuntimeError: .*mat1 and mat2 shapes"):
            t.step(torch.randn(4, 9), torch.zeros(4, dtype=torch.long))


def test_the_users_loader_fails(pipe: dtrp.Pipeline) -> None:
    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches(3)
        raise FileNotFoundError("picture 4")

    with trainer(pipe) as t:
        with pytest.raises(FileNotFoundError, match="picture 4"):
            t.fit(loader(), 1)
        with pytest.raises(FileNotFoundError, match="picture 4"):
            t.evaluate(loader())
        t.step(*batches(1)[0])  # nothing is broken
        t.flush()
        assert len(t.losses) == 4


def test_a_metric_that_fails_does_not_end_the_run(pipe: dtrp.Pipeline) -> None:
    def metric(output: Tensor, target: Tensor) -> float:
        raise ArithmeticError("immeasurable")

    with trainer(pipe) as t:
        t.step(*batches(1)[0])
        with pytest.raises(dtrp.WorkerError, match="metric 'metric' failed: ArithmeticError: immeasurable"):
            t.evaluate(batches(2), metric=metric)
        t.step(*batches(1)[0])
        assert set(t.evaluate(batches(2))) == {"loss", "accuracy"}


# --- Losses that are no numbers -------------------------------------------------------------------------


def nan_for_three(output: Tensor, target: Tensor) -> Tensor:
    loss = F.cross_entropy(output, target)
    return loss * math.nan if len(target) == 3 else loss


def test_nan_raises(pipe: dtrp.Pipeline) -> None:
    with (
        trainer(pipe, "inline", nan_for_three) as t,
        pytest.raises(
            dtrp.WorkerError, match="stage 1 failed: FloatingPointError: the loss of batch 6 is nan; look at"
        ),
    ):
        feed(t, failing_batches())


@pytest.mark.parametrize("method", ["dtrp", "bp"])
@pytest.mark.parametrize("n_stages", [1, 2, 3])
def test_skipping_is_as_if_the_batch_had_not_been(n_stages: int, method: str) -> None:
    """Weights, buffers, optimizer: as without that batch, one batch at a time; its loss is counted.

    Without dropout, whose masks belong to a batch's number.
    """
    states = []
    for data in (failing_batches(), [b for b in failing_batches() if len(b[1]) != 3]):
        model = mlp(dropout=0.0)
        pipe = compiled(model, n_stages, recompute=True)
        with trainer(pipe, "inline", nan_for_three, on_nonfinite="skip", method=method) as t:
            for x, y in data:
                t.step(x, y)
                t.flush()
            states.append(copy.deepcopy(model.state_dict()))
            if len(data) == 13:
                assert t.skipped == 1
                assert [math.isnan(loss) for loss in t.losses] == [i == 6 for i in range(13)]
    with_it, without = states
    if method == "bp" and n_stages > 1:
        # Stages that keep a graph have seen the batch when its loss is found out: their running statistics.
        trained = {n for n, _ in mlp().named_parameters()}
        with_it, without = ({k: v for k, v in s.items() if k in trained} for s in (with_it, without))
    assert same(with_it, without)


def test_fit_leaves_skipped_batches_out_of_its_mean(pipe: dtrp.Pipeline) -> None:
    with trainer(pipe, "inline", nan_for_three, on_nonfinite="skip") as t:
        (row,) = t.fit(failing_batches(), 1)
        finite = [loss for loss in t.losses if math.isfinite(loss)]
        assert row["train_loss"] == pytest.approx(sum(finite) / len(finite))
        assert t.skipped == 1


def test_nothing_to_train() -> None:
    model = mlp()
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires gradient"):
        compiled(model).trainer(F.cross_entropy, SGD)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_torchscript_is_not_trained(no_workers: None) -> None:
    """Its parameters are copies at each look: an optimizer would move what nobody computes with."""
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model = nn.Sequential(nn.Linear(4, 4), scripted, nn.Linear(4, 2))
    x = torch.randn(3, 4)
    pipe = dtrp.compile(model, n_gpus=2, example_inputs=x)
    assert torch.equal(pipe(x), model(x))
    with pytest.raises(TypeError, match="the module '1' is TorchScript"):
        pipe.trainer(F.cross_entropy, partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(TypeError, match="a script cannot be cut"):
        dtrp.compile(scripted, n_gpus=2, example_inputs=x)


def test_what_cannot_be_sent_to_a_worker(pipe: dtrp.Pipeline) -> None:
    """Found out while the processes load torch; none of them is left."""
    import threading

    before = psutil.Process().children(recursive=True)

    lock = threading.Lock()

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        with lock:
            return F.cross_entropy(output, target)

    with (
        trainer(pipe, "workers", loss_fn) as t,
        pytest.raises(TypeError, match="cannot be sent to a worker process"),
    ):
        t.step(*batches(1)[0])
    assert psutil.Process().children(recursive=True) == before


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError("tensors only")
        y: Tensor = self.b(self.a(x))
        return y


def test_more_stages_than_nodes() -> None:
    with pytest.raises((ValueError, dtrp.DtrpError), match="stage"):
        dtrp.compile(Scaled(), n_gpus=9, example_inputs=torch.randn(4, 8))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)  # where the words end
        return self.head(torch.relu(h.mean(1)))


@pytest.mark.parametrize("executor", ["inline", "workers"])
def test_a_stage_that_fails_shows_the_line(executor: str) -> None:
    """The generated one, by its name in the model, and the user's: torch says "out of range in self"."""
    x, y = torch.arange(30).view(6, 5) % 10, torch.arange(6) % 3
    pipe = dtrp.compile(Words(), n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    with (
        pytest.raises(dtrp.WorkerError) as caught,
        pipe.trainer(F.cross_entropy, SGD, executor=executor) as t,
    ):
        t.fit([(x + 5, y)], 1)
    line = inspect.getsourcelines(Words.forward)[1] + 1
    assert re.search(rf"self\.embed\(input_0\);.*# .*test_errors\.py:{line}\n", str(caught.value))
