"""What must hold whatever the model: exactness, executors alike, losses in order, nothing left in flight."""

from __future__ import annotations

import copy
from collections import defaultdict
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrp
from tests.reference.models import CASES, FLAT_CNN, GPT, GPT_TIED, MLP, RESNET, RESNET20, UNET, Case, mlp

SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=1e-3)
ADAMW = partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.05)
OPTIMIZERS = {"sgd": SGD, "adamw": ADAMW}
SEED = 5
slow = pytest.mark.slow

CALM_GPT = Case("gpt_without_dropout", partial(GPT, dropout=0.0), GPT_TIED.batch, GPT_TIED.loss_fn)
CALM_MLP = Case("mlp_without_dropout", partial(mlp, dropout=0.0), MLP.batch, MLP.loss_fn)


def train(
    case: Case,
    n_stages: int,
    optimizer: Any,
    *,
    executor: str = "inline",
    n_batches: int = 200,
    recompute: bool | str = "auto",
    **knobs: Any,
) -> tuple[dict[str, Tensor], list[float]]:
    """Weights, buffers and losses after training ``case`` in a pipeline."""
    model = case.make()
    batches = case.batches(n_batches, last=max(1, case.batch_size - 1))
    pipe = dtrp.compile(model, n_gpus=n_stages, example_inputs=batches[0].args, recompute=recompute)
    assert len(pipe.stages) == n_stages
    torch.manual_seed(SEED)
    with pipe.trainer(case.loss_fn, optimizer, executor=executor, seed=SEED, **knobs) as trainer:
        for batch in batches:
            trainer.step(*batch.args, batch.target)
        trainer.flush()
        losses = list(trainer.losses)
    return {name: value.clone() for name, value in model.state_dict().items()}, losses


def train_plainly(case: Case, optimizer: Any, n_batches: int = 200) -> tuple[dict[str, Tensor], list[float]]:
    """The same by the loop that everybody writes."""
    model = case.make()
    batches = case.batches(n_batches, last=max(1, case.batch_size - 1))
    torch.manual_seed(SEED)
    opt = optimizer(model.parameters())
    losses = []
    for batch in batches:
        opt.zero_grad()
        loss = case.loss_fn(model(*batch.args), batch.target)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return model.state_dict(), losses


def assert_same(seen: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(seen[name], value), (name, (seen[name] - value).abs().max())


class GradientRecorder(torch.optim.SGD):
    """Keeps every gradient it is given, by parameter, in the order of the steps."""

    def __init__(self, parameters: Any, seen: dict[int, list[Tensor]], lr: float = 0.0) -> None:
        super().__init__(parameters, lr=lr, momentum=0.9)
        self.seen = seen

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.seen[id(p)].append(p.grad.clone())
        super().step(closure)


def gradients(case: Case, n_stages: int, n_batches: int, **knobs: Any) -> dict[str, list[Tensor]]:
    """Each batch's gradients, by the model's names, with nothing learned in between."""
    model = case.make()
    batches = case.batches(n_batches)
    pipe = dtrp.compile(model, n_gpus=n_stages, example_inputs=batches[0].args)
    seen: dict[int, list[Tensor]] = defaultdict(list)
    optimizer = partial(GradientRecorder, seen=seen)
    with pipe.trainer(
        case.loss_fn, optimizer, executor="inline", seed=SEED, micro_batches=1, **knobs
    ) as trainer:
        for batch in batches:
            trainer.step(*batch.args, batch.target)
        trainer.flush()
        return {name: seen[id(p)] for name, p in model.named_parameters()}


# --- One stage is the plain loop ------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=slow)])
@pytest.mark.parametrize("name", list(CASES))
def test_one_stage_is_the_plain_loop(name: str, optimizer: str) -> None:
    case = CASES[name]
    weights, losses = train(case, 1, OPTIMIZERS[optimizer], n_batches=100)
    expected_weights, expected_losses = train_plainly(case, OPTIMIZERS[optimizer], n_batches=100)
    assert losses == expected_losses
    assert_same(weights, expected_weights)


def test_one_stage_in_a_worker_is_the_plain_loop() -> None:
    weights, losses = train(RESNET, 1, SGD, n_batches=50, executor="workers")
    expected_weights, expected_losses = train_plainly(RESNET, SGD, n_batches=50)
    assert losses == expected_losses
    assert_same(weights, expected_weights)


# --- Gradients without learning -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["dtrp", pytest.param("dtr", marks=slow), "fdg", pytest.param("bp", marks=slow)]
)
@pytest.mark.parametrize("n_stages", [pytest.param(2, marks=slow), 4])
@pytest.mark.parametrize("case", [CALM_MLP, FLAT_CNN, RESNET, UNET, CALM_GPT, CASES["two_heads"]], ids=str)
def test_without_learning_gradients_are_those_of_back_propagation(
    case: Case, n_stages: int, method: str
) -> None:
    """Against the whole model in one piece. Where a value is used by several stages its gradients may be
    added up in another order, hence a tolerance at rounding level."""
    n_batches = 12
    seen = gradients(case, n_stages, n_batches, method=method)
    model = case.make()
    for b, batch in enumerate(case.batches(n_batches)):
        model.zero_grad()
        case.loss_fn(model(*batch.args), batch.target).backward()
        for name, p in model.named_parameters():
            assert len(seen[name]) == n_batches
            torch.testing.assert_close(seen[name][b], p.grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("method", ["dtrp", pytest.param("dtr", marks=slow), "fdg"])
@pytest.mark.parametrize("n_stages", [pytest.param(2, marks=slow), 3, pytest.param(4, marks=slow)])
@pytest.mark.parametrize("case", [MLP, GPT_TIED], ids=str)
def test_without_learning_dropout_masks_are_those_of_back_propagation(
    case: Case, n_stages: int, method: str
) -> None:
    """Through the same stages, so that the masks are the same; bit for bit."""
    seen = gradients(case, n_stages, 12, method=method)
    expected = gradients(case, n_stages, 12, method="bp")
    for name, grads in expected.items():
        assert len(grads) == 12
        for a, b in zip(seen[name], grads, strict=True):
            assert torch.equal(a, b), name


def test_dropout_draws_anew_for_every_batch_and_stage() -> None:
    """One input over and over: masks that repeat would show as equal losses."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)) for _ in range(4)]).double()
    x, y = torch.randn(8, 64, dtype=torch.double), torch.randn(8, 64, dtype=torch.double)
    pipe = dtrp.compile(model, n_gpus=3, example_inputs=x)
    with pipe.trainer(F.mse_loss, partial(torch.optim.SGD, lr=0.0), executor="inline", seed=SEED) as trainer:
        for _ in range(20):
            trainer.step(x, y)
        trainer.flush()
        assert len(set(trainer.losses)) == 20


# --- The recompute pass repeats the first ---------------------------------------------------------------


@pytest.mark.parametrize("predictor", ["auto", pytest.param("difference", marks=slow)])
@pytest.mark.parametrize("n_stages", [pytest.param(2, marks=slow), 4])
@pytest.mark.parametrize("case", [MLP, RESNET, GPT_TIED], ids=str)
def test_frozen_weights_recompute_the_same_output(case: Case, n_stages: int, predictor: str) -> None:
    """Watched from inside the model: a layer's outputs come twice per batch, bit for bit alike."""
    model = case.make()
    batches = case.batches(10)
    pipe = dtrp.compile(model, n_gpus=n_stages, example_inputs=batches[0].args, recompute=True)
    *before_last, last = [set(stage.submodules) for stage in pipe.stages]
    leaves = {
        name: module
        for name, module in model.named_modules()
        if not list(module.children()) and not isinstance(module, (nn.ReLU, nn.Identity))
    }
    outputs: dict[str, list[Tensor]] = {name: [] for name in leaves}
    handles = [
        module.register_forward_hook(lambda _, __, y, at=outputs[name]: at.append(y.detach().clone()))
        for name, module in leaves.items()
    ]
    model(*batches[0].args)
    uses = {name: len(seen) for name, seen in outputs.items()}  # dropout may be called twice in a block
    for seen in outputs.values():
        seen.clear()
    optimizer = partial(torch.optim.SGD, lr=0.0, momentum=0.9)
    with pipe.trainer(
        case.loss_fn, optimizer, method="dtrp", predictor=predictor, executor="inline", seed=SEED
    ) as trainer:
        for batch in batches:
            trainer.step(*batch.args, batch.target)
        trainer.flush()
    for handle in handles:
        handle.remove()
    watched = 0
    for name, seen in outputs.items():
        if name in last:
            if not any(name in names for names in before_last):
                assert len(seen) == uses[name] * len(batches), name
            continue
        watched += 1
        assert len(seen) == 2 * uses[name] * len(batches), name
        for a in seen:
            copies = sum(torch.equal(a, b) for b in seen)
            assert copies == 2 or copies == len(seen), name  # all: a layer that sees nothing of the batch
    assert watched


# --- Executors ------------------------------------------------------------------------------------------


EXECUTOR_CASES = [MLP, RESNET20, UNET, GPT_TIED]


def compare_executors(case: Case, n_stages: int, optimizer: str, **knobs: Any) -> None:
    weights, losses = train(case, n_stages, OPTIMIZERS[optimizer], executor="inline", **knobs)
    in_workers, worker_losses = train(case, n_stages, OPTIMIZERS[optimizer], executor="workers", **knobs)
    assert worker_losses == losses
    assert_same(in_workers, weights)


@pytest.mark.parametrize(
    ("case", "n_stages", "optimizer", "knobs"),
    [
        (MLP, 2, "adamw", {}),
        pytest.param(RESNET20, 3, "sgd", {}, marks=slow),
        (UNET, 4, "adamw", {"horizon": "stage"}),
        (GPT_TIED, 4, "sgd", {}),
        pytest.param(GPT_TIED, 2, "adamw", {"method": "fdg"}, marks=slow),
    ],
    ids=lambda value: str(value) if not isinstance(value, dict) else "-".join(value) or "plain",
)
def test_workers_give_the_same_bits_as_this_process(
    case: Case, n_stages: int, optimizer: str, knobs: dict[str, Any]
) -> None:
    compare_executors(case, n_stages, optimizer, **knobs)


@slow
@pytest.mark.parametrize("method", ["dtrp", "dtr", "fdg", "adl", "bp"])
@pytest.mark.parametrize(("n_stages", "optimizer"), [(2, "adamw"), (4, "sgd")])
@pytest.mark.parametrize("case", EXECUTOR_CASES, ids=str)
def test_workers_give_the_same_bits_for_every_method(
    case: Case, n_stages: int, optimizer: str, method: str
) -> None:
    knobs = {"accumulate": 2} if method == "adl" else {}
    compare_executors(case, n_stages, optimizer, method=method, **knobs)


@pytest.mark.parametrize("method", ["dtrp", "fdg"])
@pytest.mark.parametrize("case", [MLP, pytest.param(UNET, marks=slow), GPT_TIED], ids=str)
def test_a_run_can_be_repeated(case: Case, method: str) -> None:
    first = train(case, 3, SGD, n_batches=40, method=method)
    torch.randn(3)  # the ambient generator is elsewhere now
    second = train(case, 3, SGD, n_batches=40, method=method)
    assert first[1] == second[1]
    assert_same(first[0], second[0])


# --- Losses and draining --------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["inline", "workers"])
@pytest.mark.parametrize("method", ["dtrp", "bp"])
def test_each_batch_gives_one_loss_in_order(method: str, executor: str) -> None:
    """Without learning, and without dropout, each loss tells which batch it is of."""
    case = CALM_MLP
    model = case.make()
    batches = case.batches(23, last=2)
    expected = [case.loss_fn(model(*b.args), b.target).item() for b in batches]
    pipe = dtrp.compile(model, n_gpus=4, example_inputs=batches[0].args)
    optimizer = partial(torch.optim.SGD, lr=0.0)
    given = []
    with pipe.trainer(case.loss_fn, optimizer, method=method, executor=executor, seed=SEED) as trainer:
        for b, batch in enumerate(batches[:11]):
            given.append(trainer.step(*batch.args, batch.target))
            assert len(trainer.losses) <= b + 1
        trainer.flush()
        assert list(trainer.losses) == pytest.approx(expected[:11], rel=1e-12)
        trainer.flush()  # draining twice changes nothing
        assert len(trainer.losses) == 11
        for batch in batches[11:]:  # a drained pipeline fills again; the last batch is a smaller one
            given.append(trainer.step(*batch.args, batch.target))
        trainer.flush()
        losses = list(trainer.losses)
    assert losses == pytest.approx(expected, rel=1e-12)
    numbers = [loss for loss in given if loss is not None]
    assert numbers
    newest = [min(range(23), key=lambda b, loss=loss: abs(expected[b] - loss)) for loss in numbers]
    assert newest == sorted(newest), "step gave a loss older than one it had given before"


@pytest.mark.parametrize("method", ["dtrp", "dtr", "fdg"])
def test_after_draining_every_stage_has_trained_every_batch(method: str) -> None:
    case = MLP
    model = case.make()
    batches = case.batches(9, last=1)
    pipe = dtrp.compile(model, n_gpus=4, example_inputs=batches[0].args)
    seen: dict[int, list[Tensor]] = defaultdict(list)
    optimizer = partial(GradientRecorder, seen=seen, lr=0.01)
    with pipe.trainer(case.loss_fn, optimizer, method=method, executor="inline", seed=SEED) as trainer:
        for batch in batches:
            trainer.step(*batch.args, batch.target)
        trainer.flush()
        assert len(trainer.losses) == 9
        assert {len(grads) for grads in seen.values()} == {9}
        trainer.step(*batches[0].args, batches[0].target)
    # Leaving the trainer drains too.
    assert {len(grads) for grads in seen.values()} == {10}


# --- Tied weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["inline", pytest.param("workers", marks=slow)])
@pytest.mark.parametrize("method", ["dtrp", pytest.param("dtr", marks=slow), "fdg", "bp"])
@pytest.mark.parametrize("n_stages", [pytest.param(2, marks=slow), 4])
def test_tied_weights_stay_one(n_stages: int, method: str, executor: str) -> None:
    case = GPT_TIED
    model = case.make()
    before = model.head.weight.clone()
    batches = case.batches(30)
    pipe = dtrp.compile(model, n_gpus=n_stages, example_inputs=batches[0].args)
    with pipe.trainer(case.loss_fn, SGD, method=method, executor=executor, seed=SEED) as trainer:
        for batch in batches:
            trainer.step(*batch.args, batch.target)
    assert model.head.weight is model.tokens.weight
    assert not torch.equal(model.head.weight, before)
    state = pipe.state_dict()
    assert torch.equal(state["head.weight"], state["tokens.weight"])
    plain = copy.deepcopy(model)
    plain.load_state_dict(state)


def test_a_tied_weight_gets_the_sum_of_both_uses() -> None:
    """One batch, one step of plain SGD: the weight moves by both uses' gradients together."""
    case = CALM_GPT
    model, plain = case.make(), case.make()
    batch = case.batches(1)[0]
    pipe = dtrp.compile(model, n_gpus=4, example_inputs=batch.args)
    optimizer = partial(torch.optim.SGD, lr=0.1)
    with pipe.trainer(case.loss_fn, optimizer, method="dtr", executor="inline", seed=SEED) as trainer:
        trainer.step(*batch.args, batch.target)
    opt = optimizer(plain.parameters())
    case.loss_fn(plain(*batch.args), batch.target).backward()
    opt.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-12, atol=1e-14, msg=name)


class Doubling(torch.optim.SGD):
    """Writes into the gradients that it is given."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(2.0)
        super().step(closure)


def test_what_an_optimizer_writes_into_gradients_is_its_own() -> None:
    """Rprop, LAMB and many scripts' own do: other holders of a tied weight must get what was there before."""
    case = CALM_GPT
    model, plain = case.make(), case.make()
    batches = case.batches(3)
    pipe = dtrp.compile(model, n_gpus=4, example_inputs=batches[0].args)
    optimizer = partial(Doubling, lr=0.05)
    with pipe.trainer(case.loss_fn, optimizer, method="bp", executor="inline", seed=SEED) as trainer:
        for batch in batches:
            trainer.step(*batch.args, batch.target)
    opt = optimizer(plain.parameters())
    for batch in batches:
        opt.zero_grad()
        case.loss_fn(plain(*batch.args), batch.target).backward()
        opt.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-10, atol=1e-12, msg=name)
