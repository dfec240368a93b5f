"""Nothing trained is lost, nothing stale is seen, and the caller's batch stays the caller's."""

from __future__ import annotations

import copy
import io
import os
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dtrp
from tests.sweeps import each_once

from .inside import processes
from .toys import SGD, batches, compiled, mlp, same, trainer

NAN = float("nan")
inline_or_slow = pytest.mark.parametrize(
    "executor", ["inline", pytest.param("workers", marks=pytest.mark.slow)]
)


def trained(data: Any, executor: str = "inline", n_stages: int = 2, **knobs: Any) -> dict[str, Tensor]:
    """What a run over ``data`` leaves in the model."""
    model = mlp(3)
    with trainer(compiled(model, n_stages), executor, **knobs) as t:
        for x, y in data:
            t.step(x, y)
    return model.state_dict()


# --- The caller's batch -----------------------------------------------------------------------------------


@inline_or_slow
@pytest.mark.parametrize(
    ("knobs", "n_stages"),
    each_once([{}, {"method": "fdg"}, {"batch_compensation": 3}, {"micro_batches": 2}], [2, 4]),
)
def test_the_same_tensors_may_be_filled_again(n_stages: int, knobs: dict[str, Any], executor: str) -> None:
    """A buffer for a batch, filled again and again, as data pipelines without allocations do."""
    data = batches(12)
    expected = trained(data, n_stages=n_stages, **knobs)
    model = mlp(3)
    x, y = (torch.empty_like(t) for t in data[0])
    with trainer(compiled(model, n_stages), executor, **knobs) as t:
        for new_x, new_y in data:
            x.copy_(new_x)
            y.copy_(new_y)
            t.step(x, y)
            x.fill_(NAN)
            y.zero_()
    assert same(model.state_dict(), expected)


def of_parts(output: Tensor, target: dict[str, Any]) -> Tensor:
    return F.cross_entropy(output, target["parts"][0])


def test_also_targets_that_are_structures() -> None:
    states = []
    for reuses in (True, False):
        model = mlp(3)
        y = torch.zeros(4, dtype=torch.long)
        with trainer(compiled(model), "inline", of_parts) as t:
            for x, new in batches(8):
                y = y.copy_(new) if reuses else new
                t.step(x, {"parts": (y, "a word")})
        states.append(model.state_dict())
    assert same(*states)


def test_evaluation_may_use_one_buffer_too() -> None:
    data = batches(6)
    x, y = (torch.empty_like(t) for t in data[0])

    def loader() -> Any:
        for new_x, new_y in data:
            yield x.copy_(new_x), y.copy_(new_y)

    with trainer(compiled(mlp(3), 3)) as t:
        assert t.evaluate(loader()) == t.evaluate(data)


# --- After an exception -----------------------------------------------------------------------------------


def fails_at_three(output: Tensor, target: Tensor) -> Tensor:
    if len(target) == 3:
        raise ArithmeticError("three is a bad number")
    return F.cross_entropy(output, target)


class Fails(torch.optim.SGD):
    """Refuses its 21st step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 21:
            raise ArithmeticError("no more")
        super().step()


class FailsAtThree(nn.Module):
    """It asks for values, and is kept whole."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x.tolist()) == 3:
            raise ArithmeticError("three is a bad number")
        return x


def in_the_middle() -> nn.Module:
    model = mlp(3)
    return nn.Sequential(*model[:4], FailsAtThree(), *model[4:])


FAILURES: dict[str, tuple[Any, dict[str, Any]]] = {
    "loss": (mlp, {"loss_fn": fails_at_three}),
    "optimizer": (mlp, {"optimizer": partial(Fails, lr=0.05)}),
    "stage": (in_the_middle, {}),
    "shape": (mlp, {}),
}


@pytest.mark.parametrize(
    ("what", "executor"),
    [(w, "inline") for w in FAILURES]
    + [("loss", "workers")]
    + [pytest.param(w, "workers", marks=pytest.mark.slow) for w in ("optimizer", "stage", "shape")],
)
def test_an_exception_loses_nothing_that_was_trained(what: str, executor: str) -> None:
    """All updates before the batch that fails are in the model; none of those that it spoils."""
    make, knobs = FAILURES[what]
    model = make(3) if make is mlp else make()
    start = copy.deepcopy(model.state_dict())
    after: list[dict[str, Tensor]] = []

    def train(n: int) -> dict[str, Tensor]:
        """Exact back-propagation of the first n batches."""
        twin = make(3) if make is mlp else make()
        options = {**knobs, "optimizer": partial(torch.optim.SGD, lr=0.05), "method": "bp"}
        with trainer(compiled(twin), "inline", **options) as t:
            for x, y in batches(n):
                t.step(x, y)
        return twin.state_dict()

    options = {"optimizer": partial(torch.optim.SGD, lr=0.05), **knobs, "method": "bp"}
    with trainer(compiled(model), executor, **options) as t:
        for x, y in batches(20):
            t.step(x, y)
        if what == "shape":
            bad = torch.randn(4, 9), torch.zeros(4, dtype=torch.long)
        else:
            bad = batches(1, size=3)[0]
        with pytest.raises(dtrp.WorkerError):
            fail(t, bad)
        after.append(copy.deepcopy(model.state_dict()))
    expected = train(20)
    for found in (*after, model.state_dict()):
        stepped = {n: v for n, v in found.items() if not same({"": v}, {"": start[n]})}
        assert stepped
        wrong = [n for n, p in model.named_parameters() if not torch.equal(found[n], expected[n])]
        # Where the optimizer of one stage fails in a batch, the other one may have stepped with it.
        assert wrong == [] or (what == "optimizer" and wrong != list(dict(model.named_parameters())))


def fail(t: Any, bad: Any) -> None:
    t.step(*bad)
    for x, y in batches(40):
        t.step(x, y)
    t.flush()


@pytest.mark.parametrize("n_stages", [2, 3])
def test_losses_of_finished_batches_are_told_after_a_failure(n_stages: int) -> None:
    """With workers at least those that inline tells, to the bit: the stages go as far as they can with what
    the failed one has sent; of the batch that fails there is none."""
    losses = []
    for executor in ("inline", "workers"):
        with trainer(compiled(in_the_middle(), n_stages), executor, seed=0) as t:
            for x, y in batches(20):
                t.step(x, y)
            with pytest.raises(dtrp.WorkerError, match="three is a bad number"):
                fail(t, batches(1, size=3)[0])
            losses.append(t.losses)
    inline, workers = losses
    assert len(inline) <= len(workers) <= 20
    assert workers[: len(inline)] == inline
    assert len(inline) > 20 - 2 * n_stages


def bad_metric(output: Tensor, target: Tensor) -> float:
    raise ArithmeticError("immeasurable")


@inline_or_slow
def test_a_metric_that_fails_loses_nothing(executor: str) -> None:
    model = mlp(3)
    with trainer(compiled(model), executor) as t:
        for x, y in batches(10):
            t.step(x, y)
        with pytest.raises(dtrp.WorkerError, match="immeasurable"):
            t.evaluate(batches(2), metric=bad_metric)
        assert same(model.state_dict(), trained(batches(10)))
        for x, y in batches(5):
            t.step(x, y)
    assert not same(model.state_dict(), trained(batches(10)))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_process_that_dies_takes_only_its_own_stage(stage: int) -> None:
    model = mlp(3)
    start = copy.deepcopy(model.state_dict())
    pipe = compiled(model, 3)
    with trainer(pipe, "workers") as t:
        for x, y in batches(20):
            t.step(x, y)
        os.kill(processes(t)[stage], signal.SIGKILL)
        with pytest.raises(dtrp.WorkerError, match=f"stage {stage}'s process died"):
            fail(t, batches(1)[0])
    for k, s in enumerate(pipe.stages):
        names = [n for n, _ in model.named_parameters() if n.split(".")[0] in s.submodules]
        moved = [n for n in names if not torch.equal(model.state_dict()[n], start[n])]
        assert bool(moved) == (k != stage and bool(names))


def test_an_autosave_bounds_what_can_be_lost(tmp_path: Any) -> None:
    path = tmp_path / "run.ckpt"
    data = batches(12)
    with trainer(compiled(mlp(3)), autosave=(path, 1e-6)) as t:
        for x, y in data[:7]:
            t.step(x, y)
    model = mlp(3)
    with trainer(compiled(model)) as t:
        t.load(path)
        assert len(t.losses) == 7
        for x, y in data[7:]:
            t.step(x, y)
    assert len(t.losses) == 12
    quiet = tmp_path / "none.ckpt"
    with trainer(compiled(mlp(3)), autosave=(quiet, 3600)) as t:
        for x, y in data:
            t.step(x, y)
    assert not quiet.exists()


# --- Inside ``with`` --------------------------------------------------------------------------------------


def after_fit(t: Any, data: Any) -> None:
    t.fit(data, 1)


def after_flush(t: Any, data: Any) -> None:
    for x, y in data:
        t.step(x, y)
    t.flush()


def after_evaluate(t: Any, data: Any) -> None:
    for x, y in data:
        t.step(x, y)
    t.evaluate(data[:1])


MOMENTS = {"fit": after_fit, "flush": after_flush, "evaluate": after_evaluate}


@pytest.mark.parametrize(
    ("moment", "executor"),
    [*((m, "inline") for m in MOMENTS), ("fit", "workers")]
    + [pytest.param(m, "workers", marks=pytest.mark.slow) for m in ("flush", "evaluate")],
)
def test_whoever_looks_inside_sees_the_newest_weights(moment: str, executor: str) -> None:
    """`state_dict`, a deep copy (as an average of the weights keeps), the model and the pipeline called."""
    data = batches(10)
    expected = mlp(3)
    expected.load_state_dict(trained(data))
    expected.eval()
    model = mlp(3)
    pipe = compiled(model, 2)
    x = data[0][0]
    with trainer(pipe, executor) as t:
        MOMENTS[moment](t, data)
        assert same(model.state_dict(), expected.state_dict())
        assert same(pipe.state_dict(), expected.state_dict())
        assert same(copy.deepcopy(model).state_dict(), expected.state_dict())
        was = model.training
        model.eval()
        pipe.eval()
        with torch.no_grad():
            assert torch.equal(model(x), expected(x))
            torch.testing.assert_close(pipe(x), expected(x))
        model.train(was)
        pipe.train(was)
        for more in batches(3, seed=9):  # and training goes on
            t.step(*more)
    assert not same(model.state_dict(), expected.state_dict())


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)
    return found


def joined(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


LOOKS: dict[str, Callable[[dtrp.Pipeline], Tensor]] = {
    "pipeline called": lambda pipe: pipe(torch.ones(2, 8)),
    "pipeline's state": lambda pipe: joined(pipe.state_dict().values()),
    "pipeline's parameters": lambda pipe: joined(pipe.parameters()),
    "model called": lambda pipe: pipe.model(torch.ones(2, 8)),
    "model's state": lambda pipe: joined(pipe.model.state_dict().values()),
    "model's parameters": lambda pipe: joined(pipe.model.parameters()),
    "a part called": lambda pipe: pipe.model[-1](torch.ones(2, 8)),
    "a part's parameters": lambda pipe: joined(pipe.model[-1].parameters()),
    "a copy": lambda pipe: joined(copy.deepcopy(pipe.model).parameters()),
    "a file": lambda pipe: joined(saved(pipe.model).parameters()),
    "gathered by torch": lambda pipe: torch.nn.utils.parameters_to_vector(pipe.model.parameters()),
}


@pytest.mark.parametrize("method", ["bp", pytest.param("dtrp", marks=pytest.mark.slow)])
def test_in_the_middle_whoever_looks_sees_the_present_weights(method: str) -> None:
    """An agent that acts, or an average that is taken, between two steps: with workers as inline. After each
    step another way to look comes first."""
    seen: list[list[Tensor]] = []
    for executor in ("inline", "workers"):
        model = mlp(3, norm=False)
        pipe = compiled(model, 2)
        seen.append([])
        with trainer(pipe, executor, method=method) as t:
            for look, (x, y) in zip(LOOKS.values(), batches(len(LOOKS)), strict=True):
                t.step(x, y)
                model.eval()
                with torch.no_grad():
                    seen[-1] += [look(pipe).clone(), look(pipe).clone()]
                model.train()
        seen[-1].append(torch.tensor(t.losses))
    names = [name for look in LOOKS for name in (look, look)]
    for name, inline, apart in zip([*names, "losses"], *seen, strict=True):
        assert torch.equal(inline, apart), name


def test_after_a_load_too(tmp_path: Any) -> None:
    """Batches are counted anew then: as many as before must not look like no news."""
    seen = []
    for executor in ("inline", "workers"):
        pipe = compiled(mlp(3, dropout=0.0, norm=False))
        x = batches(1)[0][0]
        with trainer(pipe, executor) as t:
            t.save(tmp_path / "run.pt")
            for step, (a, b) in enumerate(batches(8)):
                if step == 4:
                    t.load(tmp_path / "run.pt")
                t.step(a, b)
            with torch.no_grad():
                seen.append(pipe(x))
    assert torch.equal(*seen)


def test_an_average_taken_after_every_step() -> None:
    """torch's own, with buffers; with workers it was one of the weights of the last flush, silently."""
    averages = []
    for executor in ("inline", "workers"):
        model = mlp(3)
        average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
        with trainer(compiled(model, 2), executor) as t:
            for x, y in batches(5):
                t.step(x, y)
                average.update_parameters(model)
        averages.append(average.state_dict())
    assert same(*averages)
    start = torch.optim.swa_utils.AveragedModel(mlp(3), use_buffers=True).state_dict()
    assert not same(averages[0], start)


class Chooses(nn.Module):
    """Stands in the graph as one node, and calls a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)) if bool(x.sum() < 1e6) else x


class AsksForSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(8, 8), Chooses()), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x))
        return y if x.shape[0] < 100 else y * 2


def test_what_dtrp_itself_calls_asks_for_no_weights(caplog: pytest.LogCaptureFixture) -> None:
    """A batch of another size has what is kept whole run here, to see whether its graph is right: weights
    that came while it ran were taken for the script's."""
    states = []
    for executor in ("inline", "workers"):
        torch.manual_seed(0)
        model = AsksForSizes()
        with trainer(compiled(model, 2), executor, method="bp") as t:
            for x, y in batches(4):
                t.step(x, y)
                t.step(x[:3], y[:3])
        states.append(model.state_dict())
    assert same(*states)
    assert "was changed by the script" not in caplog.text


def test_modules_are_torchs_own_again_once_no_workers_train() -> None:
    """Two trainers, left in another order than they began; what other threads ask, and other models, is not
    ours to answer."""
    before = dict(vars(nn.Module))
    first, second = (trainer(compiled(mlp(3), 2), "workers") for _ in range(2))
    for t in (first, second):
        t.step(*batches(1)[0])
    first.close()
    assert nn.Module.named_parameters is not before["named_parameters"]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(second._run.owner.model.state_dict).result()
    assert second._run.behind
    second.close()
    assert dict(vars(nn.Module)) == before
    assert not torch.nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize("syncs", [True, False])
def test_an_average_inside_the_model_is_made_of_present_weights_or_told(
    syncs: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A target network, as BYOL and MoCo have one."""
    model = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False))
    with trainer(compiled(model, 2), "workers", method="bp") as t:
        for x, y in batches(3):
            t.step(x, y)
            if syncs:
                t.sync()
            with torch.no_grad():
                model[2].weight.lerp_(model[1].weight, 0.1)
    assert caplog.text.count("'2.weight' was changed by the script while worker") == (not syncs)


@inline_or_slow
def test_the_best_epoch_can_be_kept(executor: str) -> None:
    """A loop of one's own: evaluate, keep the state if it is the best; its loss comes back when loaded."""
    model, data, val = mlp(3), batches(20), batches(5, seed=7)
    best, kept = float("inf"), None
    with trainer(compiled(model), executor) as t:
        for _ in range(3):
            for x, y in data:
                t.step(x, y)
            loss = t.evaluate(val)["loss"]
            if loss < best:
                best, kept = loss, copy.deepcopy(model.state_dict())
    assert kept is not None
    model.load_state_dict(kept)
    model.eval()
    with torch.no_grad():
        assert sum(float(F.cross_entropy(model(x), y)) for x, y in val) / 5 == pytest.approx(best)


@inline_or_slow
@pytest.mark.parametrize("knobs", [{}, {"max_grad_norm": 1.0, "schedule": "lean"}, {"method": "fdg"}])
def test_sync_in_the_middle_is_the_same_wherever_stages_run(knobs: dict[str, Any], executor: str) -> None:
    """Each stage has done the rounds that are due, and no more: what is in flight stays in flight."""
    seen = []
    for kind in ("inline", executor):
        model = mlp(3)
        with trainer(compiled(model, 3), kind, **knobs) as t:
            for n, (x, y) in enumerate(batches(9)):
                t.step(x, y)
                if n in (1, 4, 8):
                    t.sync()
                    seen.append(copy.deepcopy(model.state_dict()))
    assert all(same(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))
    assert not same(seen[1], seen[2])


@pytest.mark.parametrize(
    "knobs",
    [
        {"schedule": "fig1", "micro_batches": 2},
        pytest.param({"schedule": "fig1"}, marks=pytest.mark.slow),
        pytest.param({"schedule": "lean"}, marks=pytest.mark.slow),
        pytest.param({"schedule": "lean", "micro_batches": 3}, marks=pytest.mark.slow),
    ],
)
def test_a_question_in_the_middle_of_a_clipped_run(knobs: dict[str, Any]) -> None:
    """If a stage waited for norms that only later batches bring, and the caller for the stage: a hang."""
    with trainer(compiled(mlp(3), 3), "workers", max_grad_norm=1.0, watchdog=3.0, **knobs) as t:
        for x, y in batches(9):
            t.step(x, y)
            t.sync()
            assert len(t.stats) == 3
            assert t.grad_norm >= 0


# --- What modules keep outside tensors --------------------------------------------------------------------


class Counts(nn.Module):
    """Anneals a plain number of its own while it trains, and counts how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.heat, self.sizes = 0, 5.0, [0]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            self.heat = max(0.5, self.heat * 0.9)
            self.sizes = [*self.sizes[-2:], len(x)]
        return x / self.heat


class Remembers(nn.Module):
    """Keeps the last mean in a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return x - self.mean


def attributes(module: nn.Module) -> Any:
    if isinstance(module, Counts):
        return module.seen, module.heat, module.sizes
    return float(module.mean)  # type: ignore[arg-type]


@pytest.mark.parametrize("executor", [pytest.param("workers", marks=pytest.mark.slow), "inline"])
@pytest.mark.parametrize("n_stages", [1, 2, 3])
@pytest.mark.parametrize("kind", [Counts, Remembers])
def test_plain_attributes_come_back(kind: Any, n_stages: int, executor: str) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), kind(), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    model, twin = make(), make()
    opt = SGD(twin.parameters())
    with trainer(compiled(model, n_stages), executor, method="bp") as t:
        for n in (4, 3):
            data = batches(n, seed=n)
            t.fit(data, 1)
            losses = []
            for x, y in data:
                loss = F.cross_entropy(twin(x), y)
                loss.backward()
                opt.step()
                opt.zero_grad()
                losses.append(loss.item())
            assert t.losses[-n:] == losses
            assert attributes(model[1]) == attributes(twin[1])
    assert same(model.state_dict(), twin.state_dict())
    assert attributes(model[1]) == attributes(twin[1])


def test_plain_attributes_are_saved_and_restored(tmp_path: Any) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), Counts(), nn.Linear(8, 3))

    data = batches(6)
    one, two = make(), make()
    with trainer(compiled(one)) as t:
        for x, y in data[:4]:
            t.step(x, y)
        t.save(tmp_path / "run")
        for x, y in data[4:]:
            t.step(x, y)
        t.flush()
        losses = t.losses
    with trainer(compiled(two)) as t:
        t.load(tmp_path / "run")
        for x, y in data[4:]:
            t.step(x, y)
        t.flush()
        assert t.losses == losses
    assert attributes(two[1]) == attributes(one[1])


def test_a_loader_of_the_users_and_an_average_of_the_weights() -> None:
    """torch's own averaged model, updated after each epoch inside ``with``."""
    model = mlp(3, dropout=0.0)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    loader = DataLoader(list(zip(*(torch.cat(t) for t in zip(*batches(8), strict=True)), strict=True)), 4)
    states = []
    with trainer(compiled(model)) as t:
        for _ in range(3):
            t.fit(loader, 1)
            averaged.update_parameters(model)
            states.append(copy.deepcopy(model.state_dict()))
    for name, p in averaged.module.named_parameters():
        torch.testing.assert_close(p.detach(), torch.stack([s[name] for s in states]).mean(0))
