"""Weight prediction: where the weights will be when a batch's gradient is applied.

A predictor is an object with one method (`Predictor`); a user can write their own. The formulas are not the
DTRP paper's, which are not public; each class names its source. ``s`` is the horizon in updates, already
multiplied by ``horizon_scale`` (our delay regulator), and may be fractional.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer


@runtime_checkable
class Predictor(Protocol):
    """What a user's own predictor looks like.

    ``needs_previous`` (optional attribute, default False) asks for ``state["previous"]``: the parameter's
    value before the last update, kept by the stage (one more copy of the weights).
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


class NoPrediction:
    """The true weights: DTR, the paper's scheme without prediction."""

    def predict(self, weight: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], s: float) -> Tensor:
        return weight


class Linear:
    """``W - s lr v`` (SpecTrain, Chen et al. 2018; LWPv, Kosson et al. 2021)."""

    def predict(self, weight: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], s: float) -> Tensor:
        velocity = state.get("momentum_buffer")
        if velocity is None:
            return weight
        ahead: Tensor = weight - (s * _lr(group)) * velocity
        return ahead


class Geometric:
    """``W - lr v (m - m^(s+1)) / (1 - m)``: the velocity decays, future gradients are zero (FTPipe, 2021)."""

    def predict(self, weight: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], s: float) -> Tensor:
        velocity, m = state.get("momentum_buffer"), float(group.get("momentum", 0.0))
        if velocity is None or m == 0.0:
            return weight
        reach = s if m == 1.0 else (m - m ** (s + 1)) / (1 - m)
        ahead: Tensor = weight - (_lr(group) * reach) * velocity
        return ahead


class Difference:
    """``W + s (W_tau - W_(tau-1))``: works with every optimizer (LWPw, Kosson et al. 2021)."""

    needs_previous = True

    def predict(self, weight: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], s: float) -> Tensor:
        previous = state.get("previous")
        return weight if previous is None else weight + s * (weight - previous)


class Adam:
    """``W - s lr m^ / (sqrt(v^) + eps)``; AdamW also decays W (XPipe, Guan et al. 2019; PipeOptim, 2023)."""

    def predict(self, weight: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], s: float) -> Tensor:
        if "exp_avg" not in state:
            return weight
        beta1, beta2 = (float(b) for b in group["betas"])
        step = float(state["step"])
        mean = state["exp_avg"] / (1 - beta1**step)
        second = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
        scale = (second / (1 - beta2**step)).sqrt() + group["eps"]
        decay = group.get("weight_decay", 0.0) if group.get("decoupled_weight_decay") else 0.0
        ahead: Tensor = weight * (1 - s * _lr(group) * decay) - (s * _lr(group)) * (mean / scale)
        return ahead


class Auto:
    """Geometric for SGD with momentum, Adam for Adam and AdamW, Difference for the rest (ours).

    None for SGD without momentum, whose next step depends on the next gradient alone.
    """

    def __init__(self, optimizer: type[Optimizer]) -> None:
        self.chosen: Predictor
        if issubclass(optimizer, torch.optim.SGD):
            self.chosen = Geometric()
        elif issubclass(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            self.chosen = Adam()
        else:
            self.chosen = Difference()
        self.needs_previous = isinstance(self.chosen, Difference)

    def predict(self, weight: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], s: float) -> Tensor:
        return self.chosen.predict(weight, group, state, s)


BY_NAME: dict[str, type] = {
    "none": NoPrediction,
    "linear": Linear,
    "geometric": Geometric,
    "difference": Difference,
    "adam": Adam,
    "auto": Auto,
}


def check_predictor(predictor: object) -> None:
    """Refuse what is neither a name nor an object with ``predict``.

    Raises
    ------
    ValueError, TypeError
        Unknown name; an object of the wrong kind.
    """
    if isinstance(predictor, str):
        if predictor not in BY_NAME:
            raise ValueError(f"predictor {predictor!r}: expected one of {', '.join(map(repr, BY_NAME))}")
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
    made: Predictor = Auto(optimizer) if predictor == "auto" else BY_NAME[predictor]()
    return made


def needs_previous(predictor: Predictor) -> bool:
    """Whether the stage must keep each weight's value before its last update."""
    return bool(getattr(predictor, "needs_previous", False))


def grouped(optimizer: Optimizer) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Each parameter with its group."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, group


def _lr(group: Mapping[str, Any]) -> float:
    return float(group["lr"])
