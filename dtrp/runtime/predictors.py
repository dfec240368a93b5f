"""Weight prediction: where the weights will be when a batch's gradient is applied.

A predictor is an object with one method (`Predictor`); a user can write their own. The formulas are not the
DTRP paper's, which are not public; each class names its source. ``s`` is the horizon in updates, already
multiplied by ``horizon_scale`` (our delay regulator), and may be fractional.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import accelerators
from ..names import one_of

Tensors = Sequence[Tensor]
CACHED = 2**16  # elements
AT_ONCE = 2**24  # on an accelerator, which wants few calls; what is between takes a few times their memory


@runtime_checkable
class Predictor(Protocol):
    """What a user's own predictor looks like.

    Two optional attributes, False by default, ask for more. ``needs_previous``: ``state["previous"]``, the
    parameter's value before the last update, kept by the stage (one more copy of the weights).
    ``takes_gradient``: ``state["gradient"]``, what the next update's gradient is by the parts of its batch
    that have been passed back so far (their mean); absent before the first of them, with replicas, and where
    batches may be given up. Whole updates are then aimed at, not the mean over the parts of a batch.
    """

    def predict(self, weight: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], s: float) -> Tensor:
        """The weights ``s`` updates ahead of ``weight``.

        Parameters
        ----------
        weight : Tensor
            The true weight; must not be changed.
        group : mapping
            The optimizer's parameter group (``lr``, ``momentum``, ``betas``, ...).
        state : mapping
            The optimizer's state of this parameter; empty before its first update.
        s : float
            The horizon in updates, > 0.

        Returns
        -------
        Tensor
            Same shape, dtype and device; ``weight`` itself where there is nothing to predict from.
        """
        ...


class Formula:
    """A predictor of ours: one formula, for many tensors at once.

    The passes of a small stage are a few hundred microseconds, so that predicting tensor by tensor would cost
    as much as they do; a few ``torch._foreach_*`` calls don't.
    """

    several_passes = True  # over the tensors, so that they had better be in a cache

    def knows(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
        """Whether there is something to predict from."""
        return False

    def write(
        self,
        targets: Tensors,
        weights: Tensors,
        group: Mapping[str, Any],
        states: Sequence[Mapping[str, Any]],
        s: float,
    ) -> None:
        """Write the weights ``s`` updates ahead of ``weights`` into ``targets``; all are known."""
        raise AssertionError  # of a formula that knows nothing, nothing is asked

    def predict(self, weight: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], s: float) -> Tensor:
        """One tensor's, as `Predictor` has it."""
        if not self.knows(group, state):
            return weight
        ahead = torch.empty_like(weight)
        self.write([ahead], [weight.detach()], group, [state], s)
        return ahead


class NoPrediction(Formula):
    """The true weights: DTR, the paper's scheme without prediction."""


class Linear(Formula):
    """``W - s lr v`` (SpecTrain, Chen et al. 2018; LWPv, Kosson et al. 2021)."""

    several_passes = False

    def knows(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
        return state.get("momentum_buffer") is not None

    def write(self, targets: Any, weights: Any, group: Any, states: Any, s: float) -> None:
        _step_along(targets, weights, [state["momentum_buffer"] for state in states], s * _lr(group))


class Geometric(Formula):
    """``W - lr v (m - m^(s+1)) / (1 - m)``: the velocity decays, future gradients are zero (FTPipe, 2021)."""

    several_passes = False

    def knows(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
        return state.get("momentum_buffer") is not None and float(group.get("momentum", 0.0)) != 0.0

    def write(self, targets: Any, weights: Any, group: Any, states: Any, s: float) -> None:
        m = float(group["momentum"])
        reach = s if m == 1.0 else (m - m ** (s + 1)) / (1 - m)
        _step_along(targets, weights, [state["momentum_buffer"] for state in states], _lr(group) * reach)


class Difference(Formula):
    """``W + s (W_tau - W_(tau-1))``: works with every optimizer (LWPw, Kosson et al. 2021)."""

    needs_previous = True

    def knows(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
        return state.get("previous") is not None

    def write(self, targets: Any, weights: Any, group: Any, states: Any, s: float) -> None:
        torch._foreach_copy_(targets, weights)
        torch._foreach_sub_(targets, [state["previous"] for state in states])
        torch._foreach_mul_(targets, s)
        torch._foreach_add_(targets, weights)


class Adam(Formula):
    """``W - s lr m^ / (sqrt(v^) + eps)``; AdamW also decays W (XPipe, Guan et al. 2019; PipeOptim, 2023).

    Where part of the next update's gradient is known, the moments are those after that update (ours): one
    update ahead is then exact, but for the parts to come.
    """

    takes_gradient = True

    def knows(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
        return "exp_avg" in state

    def write(self, targets: Any, weights: Any, group: Any, states: Any, s: float) -> None:
        alike: dict[tuple[float, bool], list[int]] = {}  # steps are, unless some were stepped less often
        steps = [state["step"] for state in states]
        if all(isinstance(step, Tensor) for step in steps):  # on a device where the optimizer is fused
            steps = accelerators.read(steps)
        for i, (state, taken) in enumerate(zip(states, steps, strict=True)):
            alike.setdefault((float(taken), "gradient" in state), []).append(i)
        beta1, beta2 = (float(b) for b in group["betas"])
        decay = group.get("weight_decay", 0.0)
        decoupled = group.get("decoupled_weight_decay", False)
        for (step, known), members in alike.items():
            ahead, true = (_as_real(given[i] for i in members) for given in (targets, weights))
            first: Any = _as_real(states[i]["exp_avg"] for i in members)
            second: Any = _as_real(states[i]["exp_avg_sq"] for i in members)
            if known:
                gradients: Any = [states[i]["gradient"] for i in members]
                if group.get("maximize"):
                    gradients = torch._foreach_neg(gradients)
                if decay and not decoupled:
                    gradients = torch._foreach_add(gradients, true, alpha=decay)
                first = torch._foreach_lerp(first, gradients, 1 - beta1)
                second = torch._foreach_mul(second, beta2)
                torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
                step += 1
            if group.get("amsgrad"):
                second = torch._foreach_maximum(
                    second, _as_real(states[i]["max_exp_avg_sq"] for i in members)
                )
            move = torch._foreach_div(first, 1 - beta1**step)
            scale = torch._foreach_div(second, 1 - beta2**step)
            torch._foreach_sqrt_(scale)
            torch._foreach_add_(scale, group["eps"])
            torch._foreach_div_(move, scale)
            torch._foreach_mul_(move, s * _lr(group))
            torch._foreach_copy_(ahead, true)
            torch._foreach_mul_(ahead, 1 - s * _lr(group) * (decay if decoupled else 0.0))
            torch._foreach_sub_(ahead, move)


def _as_real(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Adam steps real and imaginary parts each by itself."""
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


def _step_along(targets: Any, weights: Any, velocities: Any, distance: float) -> None:
    """``weights - distance * velocities``; first the product, then the difference, each rounded.

    On the host it costs memory traffic, so it is one pass: a division by one stands between product and sum,
    which would be rounded together otherwise.
    """
    if weights[0].device.type == "cpu" and weights[0].dtype in _ONE:
        one = _ONE[weights[0].dtype]
        for target, weight, velocity in zip(targets, weights, velocities, strict=True):
            torch.addcdiv(weight, velocity, one, value=-distance, out=target)
        return
    torch._foreach_copy_(targets, velocities)
    torch._foreach_mul_(targets, -distance)
    torch._foreach_add_(targets, weights)


_ONE = {dtype: torch.ones((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}


def auto(optimizer: type[Optimizer]) -> Formula:
    """Geometric for SGD with momentum, Adam for Adam and AdamW, Difference for the rest (ours).

    SGD without momentum has no velocity, and is not predicted: its next step depends on the next gradient
    alone.
    """
    if issubclass(optimizer, torch.optim.SGD):
        return Geometric()
    if issubclass(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return Adam()
    return Difference()


def predict_all(
    predictor: Predictor,
    weights: Sequence[Tensor],
    group: Mapping[str, Any],
    states: Sequence[Mapping[str, Any]],
    s: float,
    targets: Sequence[Tensor],
) -> None:
    """Write what ``predictor`` says of ``weights``, all of one group, into ``targets``; under ``no_grad``."""
    if not isinstance(predictor, Formula):  # a user's own
        for weight, state, target in zip(weights, states, targets, strict=True):
            target.copy_(predictor.predict(weight.detach(), group, state, s))
        return
    if not weights:
        return
    known = [i for i, state in enumerate(states) if predictor.knows(group, state)]
    if len(known) < len(weights):
        unknown = sorted(set(range(len(weights))).difference(known))
        torch._foreach_copy_([targets[i] for i in unknown], [weights[i] for i in unknown])
    elif not predictor.several_passes:
        predictor.write(targets, weights, group, states, s)
        return
    for few in _cached(known, weights):
        predictor.write(
            [targets[i] for i in few], [weights[i] for i in few], group, [states[i] for i in few], s
        )


def _cached(members: Sequence[int], weights: Tensors) -> Iterator[list[int]]:
    """Members in groups that a core's cache holds: a formula goes over its tensors several times."""
    most = AT_ONCE if accelerators.is_one(weights[0].device) else CACHED
    few: list[int] = []
    size = 0
    for i in members:
        few.append(i)
        size += weights[i].numel()
        if size >= most:
            yield few
            few, size = [], 0
    if few:
        yield few


BY_NAME: dict[str, Callable[[type[Optimizer]], Predictor]] = {
    "none": lambda _: NoPrediction(),
    "linear": lambda _: Linear(),
    "geometric": lambda _: Geometric(),
    "difference": lambda _: Difference(),
    "adam": lambda _: Adam(),
    "auto": auto,
}


def check_predictor(predictor: object) -> None:
    """Refuse what is neither a name nor an object with ``predict``.

    Raises
    ------
    ValueError, TypeError
        Unknown name; an object of the wrong kind.
    """
    if isinstance(predictor, str):
        one_of("predictor", predictor, BY_NAME)
    elif not isinstance(predictor, Predictor):
        raise TypeError(
            f"predictor {predictor!r}: expected a name or an object with "
            f"predict(weight, group, state, s) -> Tensor"
        )


_NO_VELOCITY = (
    torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax,
    torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Rprop, torch.optim.ASGD, torch.optim.Adafactor,
)  # fmt: skip
_NO_MOMENTS = (
    torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Rprop,
    torch.optim.ASGD, torch.optim.Adamax, torch.optim.Adafactor,
)  # fmt: skip


def check_fits(predictor: str | Predictor, optimizer: Optimizer) -> None:
    """Refuse a predictor that would find nothing to predict from in this optimizer's state.

    Only torch's own optimizers are known well enough to be refused.

    Raises
    ------
    ValueError
        It looks for state that the optimizer does not keep.
    """
    kind = type(optimizer).__name__
    advice = "use predictor='difference', which works with every optimizer, or 'auto'"
    if predictor in ("linear", "geometric"):
        if isinstance(optimizer, _NO_VELOCITY):
            raise ValueError(
                f"predictor={predictor!r} needs a velocity, which {kind} does not keep; {advice}"
            )
        if all(group.get("momentum") == 0 for group in optimizer.param_groups):
            raise ValueError(
                f"predictor={predictor!r} needs a velocity, but {kind}'s momentum is 0; {advice}"
            )
    if predictor == "adam" and isinstance(optimizer, _NO_MOMENTS):
        raise ValueError(f"predictor='adam' needs Adam's moments, which {kind} does not keep; {advice}")


def make_predictor(predictor: str | Predictor, optimizer: type[Optimizer]) -> Predictor:
    """The predictor of that name, or the user's own object."""
    check_predictor(predictor)
    if not isinstance(predictor, str):
        return predictor
    return BY_NAME[predictor](optimizer)


def asks_for(predictor: Predictor, what: str) -> bool:
    """Whether it has the attribute ``"needs_previous"`` or ``"takes_gradient"``, and true (`Predictor`)."""
    return bool(getattr(predictor, what, False))


def _lr(group: Mapping[str, Any]) -> float:
    return float(group["lr"])
