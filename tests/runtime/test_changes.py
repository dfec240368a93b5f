"""What the script changes on the model while a trainer runs: followed as the plain loop does, or refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import dtrp

from .toys import ADAMW, SGD, batches, compiled, mlp, same, trainer

Change = Callable[[nn.Sequential, int], None]
DATA = batches(10, 8)
inline_or_slow = pytest.mark.parametrize(
    "executor", ["inline", pytest.param("workers", marks=pytest.mark.slow)]
)


class Kept(nn.Module):
    """Is kept whole, as it counts; is called with what the script sets."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.scale = 0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.scale


class Annealed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tau = 1.0
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale / self.tau


def make() -> nn.Sequential:
    model = mlp(3, dropout=0.0)
    model[3], model[7] = Annealed(), Kept()
    return model


def unfreezing(model: nn.Sequential, i: int) -> None:
    if i == 0:
        model[:6].requires_grad_(False)
    if i in (3, 6):
        model[6 - i : 6].requires_grad_(True)
    if i == 7:
        model[8].requires_grad_(False)


def modes(model: nn.Sequential, i: int) -> None:
    if i == 4:
        model[5].eval()


def attribute(model: nn.Sequential, i: int) -> None:
    model[3].tau = 1.0 if i < 5 else 2.0


def of_a_kept_module(model: nn.Sequential, i: int) -> None:
    model[7].scale = 1.0 + i / 10


def buffer(model: nn.Sequential, i: int) -> None:
    model[3].scale.fill_(1.0 + i / 10)


def clamped(model: nn.Sequential, i: int) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.2, 0.2)


def clamped_data(model: nn.Sequential, i: int) -> None:
    for p in model.parameters():
        p.data.clamp_(-0.2, 0.2)


def shrunk_data(model: nn.Sequential, i: int) -> None:
    for p in model.parameters():
        p.data.mul_(0.9)


def hooked(model: nn.Sequential, i: int) -> None:
    if i == 4:
        model[4].register_forward_hook(lambda module, args, output: output * 2)


CHANGES = [modes, attribute, of_a_kept_module, buffer, clamped, clamped_data, hooked]


def plain(change: Change, optimizer: Any, scheduler: Any) -> tuple[dict[str, Tensor], list[float]]:
    model, losses = make(), []
    o = optimizer(model.parameters())
    s = scheduler(o) if scheduler else None
    for i, (x, y) in enumerate(DATA):
        change(model, i)
        o.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        o.step()
        if s:
            s.step()
        losses.append(loss.item())
    return model.state_dict(), losses


@inline_or_slow
@pytest.mark.parametrize("change", CHANGES)
def test_the_plain_loop_does_the_same(change: Change, executor: str) -> None:
    """A stage that went on with what it was made with would train something else, without a word."""
    state, losses = plain(change, SGD, None)
    model = make()
    with trainer(compiled(model), executor, method="bp") as t:
        for i, (x, y) in enumerate(DATA):
            t.flush()
            change(model, i)
            t.step(x, y)
    torch.testing.assert_close(torch.tensor(t.losses), torch.tensor(losses))
    torch.testing.assert_close(model.state_dict(), state)
    assert model[7].count == len(DATA)


@inline_or_slow
def test_optimizers_go_on(executor: str) -> None:
    """Moments, and a scheduler's count, survive new stages; also of what was frozen in between."""
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5)
    state, losses = plain(unfreezing, ADAMW, scheduler)
    model = make()
    with trainer(compiled(model), executor, method="bp", optimizer=ADAMW, lr_scheduler=scheduler) as t:
        for i, (x, y) in enumerate(DATA):
            unfreezing(model, i)
            t.step(x, y)
    torch.testing.assert_close(torch.tensor(t.losses), torch.tensor(losses))
    torch.testing.assert_close(model.state_dict(), state)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("scheduled", [False, True])
def test_groups_that_come_with_what_is_unfrozen(swap: bool, scheduled: bool) -> None:
    """Options by name: what is trained only now has its own, not by position those of a group before; and the
    scheduler goes on with both."""

    def rate(name: str) -> float:
        return 1e-3 if name.startswith("0.") else 0.1

    def change(model: nn.Module, i: int) -> None:
        model[0].requires_grad_(i > 0)
        model[1:].requires_grad_(i == 0 or not swap)

    expected, model = make(), make()
    for i, (x, y) in enumerate(DATA[:5]):
        change(expected, i)
        F.cross_entropy(expected(x), y).backward()
        with torch.no_grad():
            for name, p in expected.named_parameters():
                if p.grad is not None and p.requires_grad:
                    p -= rate(name) * (0.5 ** (i // 2) if scheduled else 1.0) * p.grad
                p.grad = None
    change(model, 0)
    with trainer(
        compiled(model), method="bp", optimizer=partial(torch.optim.SGD, lr=0.1),
        lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5) if scheduled else None,
        param_groups=lambda name, p: {"lr": rate(name)},
    ) as t:  # fmt: skip
        for i, (x, y) in enumerate(DATA[:5]):
            change(model, i)
            t.step(x, y)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("change", [*CHANGES, unfreezing])
def test_workers_follow_as_stages_in_this_process_do(change: Change) -> None:
    """With batches in flight between the changes."""
    states = []
    for executor in ("inline", "workers"):
        model = make()
        with trainer(compiled(model), executor) as t:
            for i, (x, y) in enumerate(DATA):
                if i % 3 == 0:
                    t.flush()
                    change(model, i)
                t.step(x, y)
        states.append(model.state_dict())
    assert same(*states)


def test_weights_are_not_changed_under_batches_in_flight() -> None:
    """The model's are old ones then: what is made of them would undo what was trained since."""
    model = make()
    with trainer(compiled(model)) as t:
        t.step(*DATA[0])
        clamped(model, 1)
        with pytest.raises(RuntimeError, match=r"'0.weight' was changed .*: call trainer.flush\(\) before"):
            t.step(*DATA[1])
        t.flush()
        clamped(model, 2)
        t.step(*DATA[2])


@pytest.mark.parametrize("ask", ["step", "flush", "sync"])
def test_workers_lose_no_weights_without_a_word(ask: str) -> None:
    """A version tells nothing of what is written through ``.data``, as WGAN's clipping is in most scripts."""
    model = make()
    with trainer(compiled(model), "workers", method="bp") as t:
        for i, (x, y) in enumerate(DATA[:3]):
            t.step(x, y)
            t.flush()
            shrunk_data(model, i)
        t.step(*DATA[3])
        weight = model[0].weight  # nobody was asked for it
        (weight.detach() if ask == "sync" else weight.data).mul_(0.9)
        with pytest.raises(RuntimeError, match=r"'0.weight' was changed .*: call trainer.flush\(\) before"):
            t.step(*DATA[4]) if ask == "step" else getattr(t, ask)()


@pytest.mark.parametrize("change", [clamped, clamped_data, shrunk_data])
def test_weights_that_were_asked_for_may_be_written_after_any_step(change: Change) -> None:
    """`parameters()` gives the newest, so that a script that clips them needs no flush before (it was
    refused with worker processes)."""
    state, losses = plain(change, SGD, None)
    for executor in ("inline", "workers"):
        model = make()
        with trainer(compiled(model), executor, method="bp") as t:
            for i, (x, y) in enumerate(DATA):
                change(model, i)
                t.step(x, y)
        torch.testing.assert_close(torch.tensor(t.losses), torch.tensor(losses))
        torch.testing.assert_close(model.state_dict(), state)


class Judged(nn.Module):
    """A generator under a critic that another trainer trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.critic = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, noise: Tensor) -> Tensor:
        return self.critic(self.generator(noise))


def still(name: str, parameter: nn.Parameter) -> dict[str, float]:
    return {"lr": 0.0} if name.startswith("critic.") else {}


@inline_or_slow
@pytest.mark.parametrize("method", ["bp", "1f1b"])
def test_two_trainers_take_turns(executor: str, method: str) -> None:
    """A GAN, as docs/restrictions.md has it, and as the plain loop trains it."""
    torch.manual_seed(1)
    turns = [(torch.randn(8, 4), torch.randn(8, 3) + 2) for _ in range(5)]
    real, fake = torch.ones(8, 1), torch.zeros(8, 1)
    loss, adam = F.binary_cross_entropy_with_logits, partial(torch.optim.Adam, lr=0.01)

    plain = Judged()
    of_critic, of_generator = adam(plain.critic.parameters()), adam(plain.generator.parameters())
    for noise, x in turns:
        made = plain.generator(noise).detach()
        of_critic.zero_grad()
        loss(plain.critic(torch.cat([x, made])), torch.cat([real, fake])).backward()
        of_critic.step()
        of_generator.zero_grad()
        loss(plain(noise), real).backward()
        of_generator.step()

    model = Judged()
    knobs: dict[str, Any] = {"method": method, "executor": executor}
    with (
        dtrp.compile(model.critic, n_gpus=2).trainer(loss, adam, **knobs) as critic,
        dtrp.compile(model, n_gpus=2).trainer(loss, adam, param_groups=still, **knobs) as generator,
    ):
        for noise, x in turns:
            with torch.no_grad():
                made = model.generator(noise)
            critic.step(torch.cat([x, made]), torch.cat([real, fake]))
            critic.flush()
            generator.step(noise, real)
            generator.flush()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_buffer_is_filled_under_batches_in_flight(caplog: pytest.LogCaptureFixture) -> None:
    """With workers the pipeline is emptied first, so that no earlier batch sees the new value."""
    expected = make()
    with trainer(compiled(expected), "workers") as t:
        for i, (x, y) in enumerate(DATA):
            t.flush()
            buffer(expected, i)
            t.step(x, y)
    model = make()
    with trainer(compiled(model), "workers") as t, caplog.at_level(logging.WARNING):
        for i, (x, y) in enumerate(DATA):
            buffer(model, i)
            t.step(x, y)
    assert same(model.state_dict(), expected.state_dict())
    assert caplog.text.count("'3.scale' was changed by the script while batches were in flight") == 1


@pytest.mark.parametrize("way", ["pruned", "replaced"])
def test_other_parameters_need_another_trainer(way: str) -> None:
    model = make()
    with trainer(compiled(model)) as t:
        t.step(*DATA[0])
        t.flush()
        if way == "pruned":
            prune.l1_unstructured(model[4], "weight", 0.5)
        else:
            model[4] = nn.Linear(8, 8)
        with pytest.raises(RuntimeError, match=r"parameter '4.weight' was replaced, .* new one"):
            t.step(*DATA[1])


@inline_or_slow
def test_other_weights_for_an_evaluation(executor: str) -> None:
    """Averaged weights are swapped in, evaluated, and swapped out again."""
    model, averaged = mlp(3), mlp(3, seed=5)
    with trainer(compiled(model), executor) as t:
        for x, y in DATA[:4]:
            t.step(x, y)
        own = t.evaluate(DATA)
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(averaged.state_dict())
        found = t.evaluate(DATA)["loss"]
        model.load_state_dict(kept)
        assert t.evaluate(DATA) == own
    averaged.eval()
    assert found == pytest.approx(sum(F.cross_entropy(averaged(x), y).item() for x, y in DATA) / len(DATA))


@pytest.mark.parametrize("back", [True, False])
def test_looking_at_the_model_in_eval_mode_changes_nothing(back: bool) -> None:
    losses = []
    for looks in (False, True):
        model = mlp()
        with trainer(compiled(model, 2)) as t:
            for x, y in batches(6):
                t.step(x, y)
                if looks:
                    model.eval()
                    model(x)
                    model.train(back)
            t.flush()
            losses.append(t.losses)
    assert losses[0] == losses[1]


class Assigns(nn.Module):
    """Assigns to its buffer, in a part that is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if y.abs().mean().item() >= 0.0 and self.training:
            self.seen = self.seen + 1
        return y


@pytest.mark.parametrize("recompute", [False, True])
def test_buffers_that_several_versions_assign_to(recompute: bool) -> None:
    """A pass on one version of the weights begins with what one on another has left."""
    model = nn.Sequential(*(nn.Sequential(Assigns(), nn.Tanh()) for _ in range(4)), nn.Linear(8, 3))
    pipe = dtrp.compile(model, n_gpus=3, example_inputs=torch.randn(4, 8), recompute=recompute)
    with trainer(pipe) as t:
        for x, y in batches(9):
            t.step(x, y)
    assert [float(part[0].seen) for part in model[:4]] == [9.0] * 4
