"""The parameters of one stage: their optimizer, their predicted values, their gradients.

A stage owns most of its parameters. Of a parameter that several stages hold (`Tie`) only the lowest holder
is the owner; elsewhere it is a *guest*, with an optimizer of its own per owner, because its update comes
when the owner's sum arrives and not when the stage itself steps.

A pass runs either on the parameters themselves or on *leaves*: tensors in their place, made for this pass.
True weights are never overwritten by predicted ones, so there is nothing to restore.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .config import TrainConfig
from .predictors import Predictor, check_fits, grouped, make_predictor, needs_previous

Leaves = dict[str, Tensor]


@dataclass
class ParameterSet:
    """Parameters that are stepped together, and what steps them."""

    names: dict[str, nn.Parameter]
    optimizer: Optimizer
    scheduler: Any
    predictor: Predictor
    lr_factor: float
    keeps_previous: bool
    previous: dict[Tensor, Tensor] = field(default_factory=dict)  # before the last update
    waiting: int = 0  # gradients gathered since the last step

    @classmethod
    def build(cls, names: Mapping[str, nn.Parameter], config: TrainConfig, lr_factor: float) -> ParameterSet:
        """Optimizer and scheduler as the user's callables make them for these parameters."""
        optimizer = build_optimizer(names, config)
        predictor = make_predictor(config.predictor if config.predicts else "none", type(optimizer))
        scheduler = None
        if config.lr_scheduler is not None:
            scheduler = config.lr_scheduler(optimizer)
            if not callable(getattr(scheduler, "step", None)):
                raise TypeError(
                    f"lr_scheduler: the callable returned {type(scheduler).__name__}, expected a scheduler; "
                    f"pass for example partial(torch.optim.lr_scheduler.StepLR, step_size=30)"
                )
            if config.scheduler_step == "update" and _wants_metric(scheduler):
                raise ValueError(
                    f"{type(scheduler).__name__} steps on a metric, which there is none of after an update; "
                    f"use scheduler_step='epoch'"
                )
        return cls(
            dict(names),
            optimizer,
            scheduler,
            predictor,
            lr_factor,
            config.predicts and needs_previous(predictor),
        )

    def predict(self, s: float, lr_scale: float) -> Iterator[tuple[str, Tensor]]:
        """``(name, value s updates ahead)`` of each parameter whose prediction is not itself."""
        groups = {id(p): g for p, g in grouped(self.optimizer)}
        with _scaled_lr(self.optimizer, self.lr_factor * lr_scale), torch.no_grad():
            for name, parameter in self.names.items():
                state = dict(self.optimizer.state.get(parameter, {}))
                if parameter in self.previous:
                    state["previous"] = self.previous[parameter]
                weight = parameter.detach()
                ahead = self.predictor.predict(weight, groups[id(parameter)], state, s)
                if ahead is not weight:
                    yield name, ahead.detach()

    def step(self, lr_scale: float = 1.0) -> None:
        """One optimizer update with the gradients at hand, which are then dropped."""
        if self.keeps_previous:
            self.previous = {p: p.detach().clone() for p in self.names.values()}
        with _scaled_lr(self.optimizer, self.lr_factor * lr_scale):
            self.optimizer.step()
        self.drop_gradients()
        self.waiting = 0

    def schedule(self, *metrics: float) -> None:
        """One step of the learning-rate scheduler, if there is one; a metric for those that ask for one."""
        if self.scheduler is not None:
            self.scheduler.step(*(metrics if _wants_metric(self.scheduler) else ()))

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


def _wants_metric(scheduler: Any) -> bool:
    """Whether it is one of those that `torch.optim.lr_scheduler.ReduceLROnPlateau` is the model of."""
    return "metrics" in inspect.signature(scheduler.step).parameters


def build_optimizer(names: Mapping[str, nn.Parameter], config: TrainConfig) -> Optimizer:
    """The user's optimizer over these parameters.

    Raises
    ------
    TypeError
        The callable did not return an optimizer.
    ValueError
        The optimizer cannot be used here, or the predictor finds nothing in its state.
    """
    parameters: list[Any] = list(names.values())
    if config.param_groups is not None:
        parameters = [
            {**dict(options), "params": [names[n] for n in members]}
            for options, members in _grouped_by_options(names, config.param_groups)
        ]
    optimizer = config.optimizer(parameters)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer: the callable returned {type(optimizer).__name__}, expected a torch.optim.Optimizer; "
            f"pass for example partial(torch.optim.SGD, lr=0.1)"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS evaluates the loss several times per step, which a pipeline with batches in flight cannot "
            "do; use a first-order optimizer such as SGD or AdamW"
        )
    if config.predicts:
        check_fits(config.predictor, optimizer)
    return optimizer


def _grouped_by_options(
    names: Mapping[str, nn.Parameter], options_of: Callable[[str, nn.Parameter], dict[str, Any]]
) -> list[tuple[dict[str, Any], list[str]]]:
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for name, parameter in names.items():
        options = options_of(name, parameter) or {}
        for known, members in groups:
            if known == options:
                members.append(name)
                break
        else:
            groups.append((options, [name]))
    return groups


@contextmanager
def _scaled_lr(optimizer: Optimizer, factor: float) -> Iterator[None]:
    """Inside, every group's learning rate is ``factor`` times its own (the scheduler never sees it)."""
    if factor == 1.0:
        yield
        return
    true = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
    try:
        yield
    finally:
        for group, lr in zip(optimizer.param_groups, true, strict=True):
            group["lr"] = lr


class Weights:
    """All trainable parameters of a stage.

    Parameters
    ----------
    module : nn.Module
        The stage's module.
    owner_of : mapping of str to int
        Owners of the parameters that this stage holds as a guest.
    """

    def __init__(
        self,
        module: nn.Module,
        owner_of: Mapping[str, int],
        config: TrainConfig,
        lr_factors: Sequence[float],
        stage: int,
    ) -> None:
        trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
        own = {n: p for n, p in trainable.items() if n not in owner_of}
        self.own = ParameterSet.build(own, config, lr_factors[stage]) if own else None
        self.guests: dict[int, ParameterSet] = {}
        for owner in sorted(set(owner_of.values())):
            names = {n: trainable[n] for n, o in owner_of.items() if o == owner and n in trainable}
            self.guests[owner] = ParameterSet.build(names, config, lr_factors[owner])
        self.trainable = trainable

    @property
    def sets(self) -> list[ParameterSet]:
        return [*([self.own] if self.own else []), *self.guests.values()]

    def ahead(self, horizon: float, guest_horizon: float, lr_scale: float = 1.0) -> Leaves:
        """Predicted values by name, as tensors that require gradient; parameters that stay are left out."""
        leaves: Leaves = {}
        for parameters in self.sets:
            s = horizon if parameters is self.own else guest_horizon
            if s > 0:
                leaves.update(parameters.predict(s, lr_scale))
        return {name: leaf.requires_grad_() for name, leaf in leaves.items()}

    def stash(self, leaves: Leaves) -> Leaves:
        """``leaves``, completed by copies of the true weights: a version that updates cannot reach."""
        return {
            name: leaves[name] if name in leaves else p.detach().clone().requires_grad_()
            for name, p in self.trainable.items()
        }

    def absorb(self, leaves: Leaves) -> None:
        """Move the gradients that a pass left on ``leaves`` to the parameters themselves."""
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                parameter = self.trainable[name]
                parameter.grad = leaf.grad if parameter.grad is None else parameter.grad + leaf.grad
                leaf.grad = None
