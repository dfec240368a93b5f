"""Predicted weights against the optimizers themselves: what they would do if the future were as assumed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dtrp.runtime.predictors import BY_NAME, Adam, asks_for, check_predictor, make_predictor, predict_all

ADAMS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"amsgrad": True},
    {"maximize": True, "weight_decay": 0.1},
]


def trained(optimizer: Any, **options: Any) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """A parameter after four updates with gradients of its own."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(7, dtype=torch.float64))
    made = optimizer([weight], **options)
    for _ in range(4):
        weight.grad = torch.randn(7, dtype=torch.float64)
        made.step()
    return weight, made


def predict(
    name: str, weight: nn.Parameter, made: torch.optim.Optimizer, s: float, **extra: Any
) -> torch.Tensor:
    state = {**made.state.get(weight, {}), **extra}
    return make_predictor(name, type(made)).predict(weight.detach(), made.param_groups[0], state, s)


@pytest.mark.parametrize("s", [1, 2, 5])
def test_geometric_is_momentum_sgd_with_no_more_gradient(s: int) -> None:
    weight, made = trained(torch.optim.SGD, lr=0.1, momentum=0.9)
    ahead = predict("geometric", weight, made, s)
    for _ in range(s):
        weight.grad = torch.zeros_like(weight)
        made.step()
    torch.testing.assert_close(ahead, weight.detach(), rtol=1e-12, atol=1e-12)


def test_geometric_with_momentum_one_is_its_limit() -> None:
    weight, made = trained(torch.optim.SGD, lr=0.1, momentum=0.5)
    near, limit = ({**made.param_groups[0], "momentum": m} for m in (1 - 1e-9, 1.0))
    state = made.state[weight]
    geometric = make_predictor("geometric", torch.optim.SGD)
    torch.testing.assert_close(
        geometric.predict(weight.detach(), near, state, 3.0),
        geometric.predict(weight.detach(), limit, state, 3.0),
    )


@pytest.mark.parametrize("s", [0.5, 1, 4])
def test_linear_is_s_steps_with_the_present_velocity(s: float) -> None:
    weight, made = trained(torch.optim.SGD, lr=0.1, momentum=0.9)
    expected = weight.detach() - s * 0.1 * made.state[weight]["momentum_buffer"]
    torch.testing.assert_close(predict("linear", weight, made, s), expected)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_takes_the_last_step_again(kind: Any, amsgrad: bool) -> None:
    """One update ahead, with moments that stay: a step of the optimizer whose betas keep them."""
    decay = 0.1 if kind is torch.optim.AdamW else 0.0
    weight, made = trained(kind, lr=0.01, weight_decay=decay, amsgrad=amsgrad)
    ahead = predict("adam", weight, made, 1.0)
    frozen = copy.deepcopy(made)
    (held,) = frozen.param_groups[0]["params"]
    before, group, state = held.detach().clone(), frozen.param_groups[0], frozen.state[held]
    beta1, beta2 = group["betas"]
    step = float(state["step"])
    mean = state["exp_avg"] / (1 - beta1**step)
    second = state["max_exp_avg_sq"] if amsgrad else state["exp_avg_sq"]
    expected = before * (1 - 0.01 * decay) - 0.01 * mean / (
        (second / (1 - beta2**step)).sqrt() + group["eps"]
    )
    torch.testing.assert_close(ahead, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", ADAMS)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_with_the_next_gradient_known_adam_is_exact(kind: Any, options: dict[str, Any]) -> None:
    """One update ahead, all parts of the batch passed back: the step that the optimizer makes then."""
    weight, made = trained(kind, lr=0.01, betas=(0.8, 0.9), **options)
    gradient = torch.randn(7, dtype=torch.float64)
    ahead = predict("adam", weight, made, 1.0, gradient=gradient)
    half = predict("adam", weight, made, 0.5, gradient=gradient)
    start = weight.detach().clone()
    weight.grad = gradient.clone()
    made.step()
    torch.testing.assert_close(ahead, weight.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(half, (start + weight.detach()) / 2, rtol=1e-12, atol=1e-12)


def test_weights_with_and_without_a_known_gradient_go_together() -> None:
    """An expert that no part of this batch has used yet is predicted by its moments."""
    weight, made = trained(torch.optim.AdamW, lr=0.01)
    group, state = made.param_groups[0], made.state[weight]
    states = [state, {**state, "gradient": torch.ones(7, dtype=torch.float64)}]
    targets = [torch.empty(7, dtype=torch.float64) for _ in states]
    predict_all(make_predictor("auto", torch.optim.AdamW), [weight.detach()] * 2, group, states, 1.0, targets)
    assert torch.equal(targets[0], predict("adam", weight, made, 1.0))
    assert torch.equal(targets[1], predict("adam", weight, made, 1.0, gradient=states[1]["gradient"]))


def test_difference_goes_on_as_it_went() -> None:
    weight, made = trained(torch.optim.RMSprop, lr=0.01)
    previous = weight.detach() - 0.5
    ahead = predict("difference", weight, made, 3.0, previous=previous)
    torch.testing.assert_close(ahead, weight.detach() + 1.5)


@pytest.mark.parametrize("name", BY_NAME)
def test_before_the_first_update_nothing_is_predicted(name: str) -> None:
    """No velocity, no moments, no earlier weights: the true weights themselves, not a copy."""
    weight = nn.Parameter(torch.randn(3))
    made = torch.optim.AdamW([weight], lr=0.1)
    detached = weight.detach()
    ahead = make_predictor(name, type(made)).predict(detached, made.param_groups[0], {}, 2.0)
    assert ahead is detached


@pytest.mark.parametrize(
    ("optimizer", "chosen"),
    [
        (torch.optim.SGD, "Geometric"),
        (torch.optim.Adam, "Adam"),
        (torch.optim.AdamW, "Adam"),
        (torch.optim.RMSprop, "Difference"),
        (torch.optim.Adagrad, "Difference"),
    ],
)
def test_auto_goes_by_the_optimizer(optimizer: Any, chosen: str) -> None:
    auto = make_predictor("auto", optimizer)
    assert type(auto).__name__ == chosen
    assert asks_for(auto, "needs_previous") == (chosen == "Difference")


def test_auto_predicts_nothing_for_plain_sgd() -> None:
    weight, made = trained(torch.optim.SGD, lr=0.1)
    detached = weight.detach()
    assert (
        make_predictor("auto", torch.optim.SGD).predict(detached, made.param_groups[0], {}, 3.0) is detached
    )


def test_unknown_predictors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"predictor='quadratic': expected one of 'none', 'linear'"):
        check_predictor("quadratic")
    with pytest.raises(TypeError, match=r"a name or an object with predict\(weight, group, state, s\)"):
        check_predictor(object())


class Backwards:
    """A user's own predictor: one tensor at a time."""

    def predict(self, weight: torch.Tensor, group: Any, state: Any, s: float) -> torch.Tensor:
        return weight - s * group["lr"]


@pytest.mark.parametrize("predictor", [*BY_NAME, Backwards()])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_many_tensors_at_once_are_what_each_is_alone(kind: Any, predictor: Any) -> None:
    """Among them some without gradient so far, and some that have been stepped less often than others."""
    torch.manual_seed(0)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {"weight_decay": 0.1}
    weights = [nn.Parameter(torch.randn(n, 3)) for n in (1, 4, 2, 5)]
    made = kind(weights, lr=0.1, **options)
    for step in range(4):
        for i, w in enumerate(weights):
            w.grad = torch.randn_like(w) if i < 3 and step >= i else None
        made.step()
    states = [{**made.state.get(w, {}), "previous": w.detach() - 0.1} for w in weights]
    group = made.param_groups[0]
    chosen = make_predictor(predictor, kind)
    targets = [torch.full_like(w, 9.0) for w in weights]
    before = [w.detach().clone() for w in weights]
    with torch.no_grad():
        predict_all(chosen, weights, group, states, 1.5, targets)
    for w, state, target, was in zip(weights, states, targets, before, strict=True):
        assert torch.equal(w, was)
        alone = chosen.predict(w.detach(), group, state, 1.5)
        assert torch.equal(target, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_pass_rounds_as_two_operations_do(dtype: torch.dtype) -> None:
    """Product and sum rounded together would train other bits than versions before, and than CUDA's path."""
    torch.manual_seed(0)
    weight, velocity = torch.randn(1003).to(dtype), torch.randn(1003).to(dtype)
    group = {"lr": 0.1, "momentum": 0.9}
    ahead = make_predictor("linear", torch.optim.SGD).predict(
        weight, group, {"momentum_buffer": velocity}, 3.0
    )
    assert torch.equal(ahead, velocity.mul(-3.0 * 0.1).add_(weight))


@pytest.mark.parametrize("amsgrad", [False, True])
def test_complex_weights_are_predicted_as_they_are_stepped(amsgrad: bool) -> None:
    """Adam steps real and imaginary parts each by itself. With the same gradient again, one update ahead is
    what the optimizer then makes, where its moments are near what that gives."""
    torch.manual_seed(0)
    z = nn.Parameter(torch.randn(6, dtype=torch.complex64))
    pairs = nn.Parameter(torch.view_as_real(z.detach()).clone())
    both = [torch.optim.Adam([p], lr=0.1, amsgrad=amsgrad) for p in (z, pairs)]
    for _ in range(3):
        gradient = torch.randn(6, dtype=torch.complex64)
        z.grad, pairs.grad = gradient, torch.view_as_real(gradient)
        for optimizer in both:
            optimizer.step()
    ahead = [
        Adam().predict(p.detach(), o.param_groups[0], o.state[p], 1.5)
        for p, o in zip((z, pairs), both, strict=True)
    ]
    torch.testing.assert_close(torch.view_as_real(ahead[0]), ahead[1])
