"""How to train: everything that `Pipeline.trainer` was told, checked and immutable."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from ..names import one_of
from ..schedule import EXACT, Horizon, Schedule
from .groups import Group
from .predictors import Predictor, check_predictor

EXECUTORS = ("auto", "inline", "workers", "torchrun")
MOST_PARTS = 254  # micro-batches that wait on a line at once: the number of a place is a byte
METHODS = ("dtrp", "dtr", "fdg", "adl", "bp", "1f1b", "gpipe")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run, the same for every stage.

    Attributes mirror the arguments of `Pipeline.trainer`; section 3 and 4 of the algorithm's description
    say what they mean.
    """

    loss_fn: Callable[..., torch.Tensor] | None
    optimizer: Callable[[Any], Optimizer]
    lr_scheduler: Callable[[Optimizer], Any] | None = None
    method: str = "dtrp"
    predictor: str | Predictor = "auto"
    horizon: Horizon = "common"
    horizon_scale: float = 1.0
    lr_shrink: float = 1.0
    grad_shrink: float = 1.0
    accumulate: int = 1
    max_grad_norm: float | None = None
    max_grad_norm_lag: bool = False
    autocast: torch.dtype | None = None
    seed: int | None = None
    on_nonfinite: Literal["raise", "skip"] = "raise"
    param_groups: Callable[[str, torch.nn.Parameter], dict[str, Any]] | None = None
    scheduler_step: Literal["update", "epoch"] = "update"
    compile_stages: bool = False
    threads: int = 1
    order: str = "fig1"  # of the methods that are decoupled; "auto": to be chosen for the first batch
    micro_batches: int | Literal["auto"] = 1
    least_part: int = 1  # samples that a micro-batch has at least
    ignored: int = -100  # the class target that the loss leaves out of its mean; found on the first batch
    exact_start: int | float = 0
    groups: tuple[Group, ...] | None = None  # of the whole model's optimizer, for the stages
    replicas: tuple[int, ...] = ()  # processes of each stage; empty: one each

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        one_of("horizon", self.horizon, ("common", "stage"))
        one_of("on_nonfinite", self.on_nonfinite, ("raise", "skip"))
        one_of("scheduler_step", self.scheduler_step, ("update", "epoch"))
        one_of("schedule", self.order, ("fig1", "lean", "auto"))
        check_predictor(self.predictor)
        flag("max_grad_norm_lag", self.max_grad_norm_lag)
        flag("compile_stages", self.compile_stages)
        for name in ("optimizer", "loss_fn", "lr_scheduler", "param_groups"):
            value = getattr(self, name)
            if value is None and name != "optimizer":
                continue
            if not callable(value) or isinstance(value, Optimizer):
                raise TypeError(f"{name}={short(value)}: expected {EXPECTED[name]}")
        loss = self.loss_fn.func if isinstance(self.loss_fn, partial) else self.loss_fn
        if isinstance(loss, type) and issubclass(loss, torch.nn.Module):
            raise TypeError(
                f"loss_fn={short(self.loss_fn)} is a class: make the loss first, {loss.__name__}(...)"
            )
        _number("horizon_scale", self.horizon_scale, low=0.0)
        _number("lr_shrink", self.lr_shrink, above=0.0)
        _number("grad_shrink", self.grad_shrink, above=0.0)
        if self.max_grad_norm is not None:
            _number("max_grad_norm", self.max_grad_norm, above=0.0)
        for name in ("accumulate", "threads", "micro_batches"):
            if (name, getattr(self, name)) != ("micro_batches", "auto"):
                _count(name, getattr(self, name))
        _number("exact_start", self.exact_start, low=0.0)
        if isinstance(self.exact_start, float) and self.exact_start >= 1:
            raise ValueError(
                f"exact_start={self.exact_start!r}: expected an int (updates) or a share below 1"
            )
        if self.seed is not None and (isinstance(self.seed, bool) or not hasattr(self.seed, "__index__")):
            raise TypeError(f"seed={self.seed!r}: expected an int or None")
        if self.autocast is not None and not isinstance(self.autocast, torch.dtype):
            raise TypeError(f"autocast={self.autocast!r}: expected a dtype such as torch.bfloat16")
        if self.autocast is not None and not self.autocast.is_floating_point:
            raise ValueError(f"autocast={self.autocast!r}: expected a dtype such as torch.bfloat16")
        self._check_combination()

    def _check_combination(self) -> None:
        predicts = self.predictor not in ("none", "auto")
        if predicts and self.method in _WHY_NONE:
            raise ValueError(
                f"method={self.method!r} with predictor={self.predictor!r}: {_WHY_NONE[self.method]}; "
                f"use method='dtrp', or predictor='none'"
            )
        # "none" and a scale of 0 are the ends of dtrp's own scale, and dtr is their other name: there an aim
        # is idle, not wrong, so that one sweep can run over all of them.
        aimed = self.horizon != "common" and self.method not in ("dtrp", "dtr")
        scaled = self.horizon_scale not in (0.0, 1.0) and self.method != "dtrp"
        if aimed or scaled:
            raise ValueError(
                f"method={self.method!r} with predictor={self.predictor!r}, horizon={self.horizon!r} and "
                f"horizon_scale={self.horizon_scale!r}: nothing is predicted, so there is nothing to aim; "
                f"leave horizon and horizon_scale out, or use method='dtrp' with a predictor"
            )
        if self.exact and (self.lr_shrink != 1.0 or self.grad_shrink != 1.0):
            raise ValueError(
                f"method={self.method!r} is exact back-propagation: lr_shrink and grad_shrink compensate a "
                f"delay that it does not have; leave them at 1"
            )
        if self.method == "gpipe" and self.micro_batches != "auto" and self.micro_batches > MOST_PARTS:
            raise ValueError(
                f"method='gpipe' with micro_batches={self.micro_batches}: a stage would hold them all, and a "
                f"line between stages has {MOST_PARTS} places at most; use '1f1b', which has the same bubble"
            )
        several = max(self.replicas, default=1)
        few = self.micro_batches != "auto" and self.micro_batches < several
        if several > 1 and (self.method == "bp" or few):
            raise ValueError(
                f"method={self.method!r}, micro_batches={self.micro_batches!r}: a stage of {several} devices "
                f"shares out the parts of a batch; give micro_batches of at least {several}, or 'auto', and "
                f"a method that cuts batches ('1f1b' is exact)"
            )
        if several > 1 and self.scales:
            raise ValueError(
                "autocast=torch.float16 needs a loss that is scaled, which stages of several devices do not "
                "agree on: use torch.bfloat16"
            )
        if self.max_grad_norm_lag and self.max_grad_norm is None:
            raise ValueError("max_grad_norm_lag=True without max_grad_norm: there is nothing to clip by")

    @property
    def predicts(self) -> bool:
        """Whether passes run on predicted weights."""
        return self.method == "dtrp" and self.predictor != "none" and self.horizon_scale > 0

    @property
    def scales(self) -> bool:
        """Whether the loss is scaled, so that small gradients do not vanish in float16."""
        return self.autocast is torch.float16

    @cached_property
    def gives_up(self) -> bool:
        """Whether mini-batches may be given up half-way."""
        return self.scales or self.on_nonfinite == "skip"

    @property
    def is_open(self) -> bool:
        """Whether order or parts are still to be chosen."""
        return "auto" in (self.order, self.micro_batches)

    @property
    def exact(self) -> bool:
        """Whether the pipeline is drained after each mini-batch."""
        return self.method in EXACT

    def decided(self, order: str = "fig1", micro_batches: int = 1, least_part: int = 1) -> TrainConfig:
        """With these in the places of what is still to be chosen."""
        if not self.is_open:
            return self
        order = order if self.order == "auto" else self.order
        if self.micro_batches != "auto":
            micro_batches, least_part = self.micro_batches, self.least_part
        return replace(self, order=order, micro_batches=micro_batches, least_part=least_part)

    @property
    def parts(self) -> int:
        """Micro-batches of a mini-batch at most, once that is decided."""
        assert self.micro_batches != "auto"
        return self.micro_batches

    def schedule(self, n_stages: int, *, exact: bool = False) -> Schedule:
        """The order that stages follow; ``exact``: while the exact start lasts."""
        order = self.method if self.exact else "1f1b" if exact else self.order
        return Schedule(order, n_stages, self.parts, self.replicas, self.accumulate)

    def recompute(self, planned: bool) -> bool:
        """Whether a stage recomputes, given the plan's choice."""
        if self.method in ("fdg", "adl", "bp"):
            return False
        return planned


EXPECTED = {
    "optimizer": "a callable that takes parameters and returns a torch.optim.Optimizer, such as "
    "partial(torch.optim.SGD, lr=0.1); several optimizers are a trainer each",
    "loss_fn": "a callable (output, target) -> scalar tensor, such as F.cross_entropy, or None if the model "
    "gives its own loss",
    "lr_scheduler": "a callable that takes an optimizer and returns a scheduler, such as "
    "partial(torch.optim.lr_scheduler.StepLR, step_size=30)",
    "param_groups": "a callable (name, parameter) -> dict of optimizer options",
}

_WHY_NONE = {
    "dtr": "dtr is the scheme without weight prediction",
    **dict.fromkeys(EXACT, "back-propagation has no delay to predict over"),
    "fdg": "fdg keeps each batch's graph on the weights that its forward used",
    "adl": "adl keeps each batch's graph on the weights that its forward used",
}


@dataclass(frozen=True)
class Launch:
    """How one training run is carried out: who runs the stages, what is told and kept of it.

    Attributes mirror the arguments of `Pipeline.trainer`.
    """

    executor: str = "auto"
    watchdog: float = 60.0
    batch_compensation: int = 1
    compensation_warmup: int = 100
    rebalance: Literal["auto", False] | int = False
    init: Any = None
    autosave: tuple[str | os.PathLike[str], float] | None = None
    record: bool = False
    timeline: str | os.PathLike[str] | None = None
    progress: bool = False
    tensorboard: str | os.PathLike[str] | None = None
    logger: Any = None

    def __post_init__(self) -> None:
        flag("progress", self.progress)
        flag("record", self.record)
        looks = self.rebalance
        number = isinstance(looks, int) and not isinstance(looks, bool) and looks >= 2
        if not number and looks is not False and looks != "auto":
            raise ValueError(
                f"rebalance={short(self.rebalance)}: expected 'auto', False, or after how many batches (an "
                f"int >= 2) the cuts are to be looked at"
            )
        if self.timeline is not None and not isinstance(self.timeline, (str, os.PathLike)):
            raise TypeError(f"timeline={self.timeline!r}: expected the path of a file to write")
        one_of("executor", self.executor, EXECUTORS)
        watchdog, autosave = self.watchdog, self.autosave
        if isinstance(watchdog, bool) or not isinstance(watchdog, (int, float)) or not watchdog > 0:
            raise ValueError(f"watchdog={watchdog!r}: expected a number of seconds > 0")
        _count("batch_compensation", self.batch_compensation)
        _count("compensation_warmup", self.compensation_warmup)
        if autosave is not None:
            if (
                not isinstance(autosave, tuple)
                or len(autosave) != 2
                or not isinstance(autosave[0], (str, os.PathLike))
            ):
                raise TypeError(f"autosave={autosave!r}: expected (path, seconds), such as ('run.ckpt', 600)")
            _number("autosave's seconds", autosave[1], above=0.0)


def flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False.

    Raises
    ------
    TypeError
    """
    if value not in (True, False):
        raise TypeError(f"{name}={value!r}: expected True or False")


def _count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r}: expected an int >= 1")
    if value < 1:
        raise ValueError(f"{name}={value!r}: expected an int >= 1")


def _number(name: str, value: Any, *, low: float | None = None, above: float | None = None) -> None:
    text = f">= {low:g}" if low is not None else f"> {above:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r}: expected a number {text}")
    number = float(value)
    if (
        not math.isfinite(number)
        or (low is not None and number < low)
        or (above is not None and number <= above)
    ):
        raise ValueError(f"{name}={value!r}: expected a finite number {text}")


def short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
