"""The runtime against the serial reference: 100 batches, weights, buffers and losses.

The compiler chooses the cuts; the reference gets plain modules cut at the same places.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import dtrp
from dtrp.runtime.random import pass_seed
from tests.reference.dtrp_serial import SerialPipeline, train
from tests.reference.models import FLAT_CNN, HANDED, MLP, Case, Handed
from tests.sweeps import each_once

N_BATCHES = {"fast": 40, "slow": 100}  # the deepest pipeline here is full after six
SEED = 3

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.02),
    "momentum": partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=1e-3),
    "dampened": partial(torch.optim.SGD, lr=0.02, momentum=0.8, dampening=0.3),
    "nesterov": partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=3e-3, weight_decay=1e-2),
    # eps: a bias before a BatchNorm has a gradient of mere rounding, which Adam would divide by its own size.
    "adamw": partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-3),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3, momentum=0.5),
}


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers in a row, and under which names the stages know them."""
    if isinstance(model, Handed):
        return [(f"steps.{i}.layer", step) for i, step in enumerate(model.steps)]
    assert isinstance(model, nn.Sequential)
    return list(model.named_children())


def stages_of(pipe: dtrp.Pipeline, model: nn.Module) -> list[nn.Sequential]:
    """Copies of the model's layers, cut as the pipeline is."""
    twin = copy.deepcopy(model)
    place = {name: stage.index for stage in pipe.stages for name in stage.submodules}
    cut: list[list[nn.Module]] = [[] for _ in pipe.stages]
    places = []
    for name, layer in layers_of(twin):
        at = place[name] if name in place else place[name.removesuffix(".layer")]
        cut[at].append(layer)
        places.append(at)
    assert places == sorted(places)
    return [nn.Sequential(*layers) for layers in cut]


def compare(
    case: Case,
    n_stages: int,
    optimizer: str,
    *,
    method: str,
    recompute: bool | str = True,
    n_batches: int | None = None,
    tolerance: float = 1e-9,
    lr_scheduler: Any = None,
    **knobs: Any,
) -> None:
    """Train both, compare everything that training leaves behind."""
    model = case.make()
    batches = case.batches(n_batches or usual["n"], last=2)
    pipe = dtrp.compile(model, n_gpus=n_stages, example_inputs=batches[0].args, recompute=recompute)
    assert len(pipe.stages) == n_stages
    parts = stages_of(pipe, model)
    handed = isinstance(model, Handed)  # its steps give a tuple, of which the first is the output

    reference = SerialPipeline(
        parts,
        OPTIMIZERS[optimizer],
        (lambda output, target: case.loss_fn(output[0], target)) if handed else case.loss_fn,
        method=method,
        recompute=pipe.plan.recompute if method in ("dtr", "dtrp") else None,
        lr_scheduler=lr_scheduler,
        seed=SEED,
        pass_seed=pass_seed,
        **knobs,
    )
    torch.manual_seed(SEED)  # from which a single stage draws, as the plain loop does
    expected = train(reference, [(b.args if handed else b.args[0], b.target) for b in batches])

    torch.manual_seed(11)
    trainer = pipe.trainer(
        case.loss_fn,
        OPTIMIZERS[optimizer],
        method=method,
        executor="inline",
        seed=SEED,
        lr_scheduler=lr_scheduler,
        **{"schedule": "fig1", "micro_batches": 1, **knobs},
    )
    with trainer:
        for batch in batches:
            trainer.step(*batch.args, batch.target)
        trainer.flush()
        losses = list(trainer.losses)

    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance * 1e-2)
    close(torch.tensor(losses, dtype=torch.double), torch.tensor(expected, dtype=torch.double))
    trained = dict(layers_of(model))
    seen = nn.Sequential(*trained.values()).state_dict()
    reached = nn.Sequential(*[layer for part in parts for layer in part]).state_dict()
    assert seen.keys() == reached.keys()
    for name, value in reached.items():
        close(seen[name], value, msg=lambda m, at=name: f"{at}: {m}")


usual = {"n": N_BATCHES["fast"]}


@pytest.fixture(autouse=True)
def longer_where_slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not run every time is run for longer."""
    if request.node.get_closest_marker("slow"):
        monkeypatch.setitem(usual, "n", N_BATCHES["slow"])


HORIZONS = ["stage", "common"]
slow = pytest.mark.slow


FORMULAS = [
    ("momentum", "none"),
    ("momentum", "linear"),
    ("momentum", "geometric"),
    ("momentum", "difference"),
    ("adamw", "adam"),
]


@pytest.mark.parametrize(("formula", "horizon", "n_stages"), each_once(FORMULAS, HORIZONS, [4, 2, 3]))
def test_dtrp(formula: tuple[str, str], n_stages: int, horizon: str) -> None:
    optimizer, predictor = formula
    compare(MLP, n_stages, optimizer, method="dtrp", predictor=predictor, horizon=horizon)


@pytest.mark.parametrize("horizon", [pytest.param("stage", marks=slow), "common"])
@pytest.mark.parametrize(
    ("optimizer", "predictor"),
    [
        ("momentum", "auto"),
        ("sgd", "auto"),
        pytest.param("sgd", "difference", marks=slow),
        ("dampened", "geometric"),
        pytest.param("nesterov", "linear", marks=slow),
        ("nesterov", "geometric"),
        ("adam", "adam"),
        pytest.param("adam", "difference", marks=slow),
        ("adam", "auto"),
        ("adamw", "auto"),
        ("rmsprop", "difference"),
        pytest.param("rmsprop", "auto", marks=slow),
    ],
)
@pytest.mark.parametrize("n_stages", [pytest.param(2, marks=slow), 3, pytest.param(4, marks=slow)])
def test_dtrp_with_every_optimizer(n_stages: int, optimizer: str, predictor: str, horizon: str) -> None:
    compare(MLP, n_stages, optimizer, method="dtrp", predictor=predictor, horizon=horizon)


@pytest.mark.parametrize("optimizer", ["momentum", pytest.param("adamw", marks=slow)])
@pytest.mark.parametrize(("method", "n_stages"), each_once(["dtr", "dtrp", "fdg", "adl", "bp"], [4, 2, 3, 1]))
@pytest.mark.parametrize("case", [pytest.param(MLP, marks=slow), FLAT_CNN], ids=str)
def test_methods(method: str, case: Case, n_stages: int, optimizer: str) -> None:
    knobs = {"accumulate": 2} if method == "adl" else {}
    compare(case, n_stages, optimizer, method=method, **knobs)


@pytest.mark.parametrize(("predictor", "horizon"), each_once(["linear", "geometric", "difference"], HORIZONS))
@pytest.mark.parametrize("n_stages", [pytest.param(2, marks=slow), 4])
@pytest.mark.parametrize("case", [MLP, pytest.param(FLAT_CNN, marks=slow)], ids=str)
def test_kept_graphs(case: Case, n_stages: int, predictor: str, horizon: str) -> None:
    """Without re-computation: the gradient is taken where the forward was, and applied to what is there."""
    compare(case, n_stages, "momentum", method="dtrp", recompute=False, predictor=predictor, horizon=horizon)


@pytest.mark.parametrize("n_stages", [2, 4])
def test_recompute_where_the_plan_says_so(n_stages: int) -> None:
    compare(FLAT_CNN, n_stages, "momentum", method="dtrp", recompute="auto")


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("predictor", ["geometric", pytest.param("difference", marks=slow)])
@pytest.mark.parametrize("n_stages", [pytest.param(2, marks=slow), 4])
def test_batch_norm_under_prediction(n_stages: int, predictor: str, horizon: str) -> None:
    compare(FLAT_CNN, n_stages, "nesterov", method="dtrp", predictor=predictor, horizon=horizon)


@pytest.mark.parametrize(
    ("scale", "predictor", "horizon"),
    each_once([0.0, 0.5, 1.5], ["difference", "geometric", "linear"], HORIZONS),
)
def test_horizon_scale(scale: float, predictor: str, horizon: str) -> None:
    compare(MLP, 3, "momentum", method="dtrp", predictor=predictor, horizon=horizon, horizon_scale=scale)


KNOBS: dict[str, dict[str, Any]] = {
    "rates": {"lr_shrink": 0.7},
    "gradients": {"grad_shrink": 0.8},
    "both": {"lr_shrink": 0.9, "grad_shrink": 0.6},
    "groups": {"accumulate": 2},
    "groups and gradients": {"accumulate": 3, "grad_shrink": 0.9},
}


@pytest.mark.parametrize(("knobs", "method"), each_once(list(KNOBS), ["dtrp", "dtr", "fdg"]))
@pytest.mark.parametrize("optimizer", ["momentum", pytest.param("adamw", marks=slow)])
def test_knobs(method: str, knobs: str, optimizer: str) -> None:
    compare(MLP, 3, optimizer, method=method, **KNOBS[knobs])


@pytest.mark.parametrize("method", ["dtr", "dtrp", "fdg", "bp"])
def test_scheduler_steps_once_per_update(method: str) -> None:
    """Predictions use the rate that holds at that moment, not the rate the optimizer was made with."""
    cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=40)
    knobs = {} if method == "bp" else {"lr_shrink": 0.9}
    compare(MLP, 3, "momentum", method=method, lr_scheduler=cosine, **knobs)


@pytest.mark.parametrize("optimizer", ["momentum", pytest.param("adamw", marks=slow)])
@pytest.mark.parametrize(("method", "n_stages"), each_once(["dtr", "dtrp", "fdg"], [2, 4]))
def test_skips_over_stages(method: str, n_stages: int, optimizer: str) -> None:
    """The reference hands values through; the runtime sends them straight to the stage that needs them."""
    compare(HANDED, n_stages, optimizer, method=method)


def test_shrunk_gradients_of_skips() -> None:
    """A gradient that skips stages is shrunk as often as one that passes through them."""
    compare(HANDED, 4, "momentum", method="fdg", grad_shrink=0.8)


@pytest.mark.parametrize("n_batches", [1, 2, 5])
def test_fewer_batches_than_the_pipeline_holds(n_batches: int) -> None:
    compare(MLP, 4, "momentum", method="dtrp", n_batches=n_batches)
