"""Parameters that are stepped together: the user's optimizer over them, its scheduler, their prediction."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..names import nearest
from .config import EXPECTED, TrainConfig, short
from .groups import arrange, groups_of, shown
from .predictors import Predictor, asks_for, check_fits, make_predictor, predict_all
from .random import preserved


@dataclass
class ParameterSet:
    """Parameters, and what steps them.

    Attributes
    ----------
    names : dict
        The parameters by name.
    lr_factor : float
        Multiplies the learning rate, unseen by the scheduler.
    groups : list of dict
        All groups of the model, those without a parameter here included.
    members : list of frozenset of str
        Of each group, the names in the model.
    previous : dict
        Values before the last update, where the predictor asks for them.
    waiting : int
        Mini-batches whose gradients have been gathered since the last step.
    accumulate : int
        Mini-batches of which an update's gradient is the mean.
    gathered : float
        Of how many it holds the mean so far, parts of them included.
    clipped : float
        What the last gradient was multiplied with, to clip it.
    """

    names: dict[str, nn.Parameter]
    optimizer: Optimizer
    scheduler: Any
    predictor: Predictor
    lr_factor: float
    keeps_previous: bool
    groups: list[dict[str, Any]]
    members: list[frozenset[str]]
    previous: dict[Tensor, Tensor] = field(default_factory=dict)
    waiting: int = 0
    accumulate: int = 1
    gathered: float = 0.0
    clipped: float = 1.0

    @classmethod
    def of(
        cls, names: Mapping[str, nn.Parameter], config: TrainConfig, lr_factor: float
    ) -> ParameterSet | None:
        """As `build`; ``None`` where a stage has nothing that the user's optimizer takes."""
        try:
            return cls.build(names, config, lr_factor) if names else None
        except ValueError as e:
            if "empty parameter list" in str(e):  # torch's own words
                return None
            raise

    @classmethod
    def build(cls, names: Mapping[str, nn.Parameter], config: TrainConfig, lr_factor: float) -> ParameterSet:
        """Optimizer and scheduler as the user's callables make them for these parameters."""
        optimizer = build_optimizer(names, config)
        predictor = make_predictor(config.predictor if config.predicts else "none", type(optimizer))
        plan = groups_of(optimizer, names, {}) if config.groups is None else config.groups
        groups = arrange(optimizer, names, plan)
        scheduler = None
        if config.lr_scheduler is not None:
            with shown(optimizer, groups):
                scheduler = _made("lr_scheduler", config.lr_scheduler, optimizer)
            if not callable(getattr(scheduler, "step", None)):
                raise TypeError(
                    f"lr_scheduler: the callable returned {type(scheduler).__name__}, expected a scheduler; "
                    f"pass for example partial(torch.optim.lr_scheduler.StepLR, step_size=30)"
                )
            if asked := _needs(scheduler.step, "metrics"):
                raise TypeError(
                    f"lr_scheduler: {type(scheduler).__name__}.step() asks for {asked!r}; expected step() "
                    f"alone, as torch's schedulers have it: wrap it in an object whose step() counts, and "
                    f"which has state_dict() and load_state_dict()"
                )
        made = cls(
            dict(names),
            optimizer,
            scheduler,
            predictor,
            lr_factor,
            config.predicts and asks_for(predictor, "needs_previous"),
            groups,
            [group.members for group in plan],
            accumulate=config.accumulate,
        )
        if made.aims_at and config.scheduler_step == "update":
            raise ValueError(
                f"{type(scheduler).__name__} steps on a metric, which there is none of after an update; "
                f"use scheduler_step='epoch'"
            )
        return made

    def __post_init__(self) -> None:
        self.parameters: list[Tensor] = list(self.names.values())
        self.numbers, self.keeps_outside = numbers_of(self.optimizer), ""
        self.moment = 0  # counts what changes weights or rates
        places = {id(p): i for i, p in enumerate(self.parameters)}
        # Which parameters each of the optimizer's groups has, and those that the user's optimizer leaves out.
        self._members = [[places[id(p)] for p in g["params"]] for g in self.optimizer.param_groups]
        self._left_out = sorted(set(places.values()).difference(*self._members))
        # What a scheduler like ReduceLROnPlateau wants of the metric that it steps on: "min" or "max".
        self.aims_at: str | None = None
        if self.scheduler is not None and "metrics" in inspect.signature(self.scheduler.step).parameters:
            self.aims_at = getattr(self.scheduler, "mode", "min")

    def write_ahead(self, targets: list[Any], s: float, lr_scale: float) -> None:
        """Write each parameter's value ``s`` updates ahead into ``targets``, in the order of ``names``."""
        if s <= 0:
            torch._foreach_copy_(targets, self.parameters)
            return
        with scaled_lr(self.optimizer, self.lr_factor * lr_scale):
            for group, members in zip(self.optimizer.param_groups, self._members, strict=True):
                weights = [self.parameters[i] for i in members]
                states = [self._state(p) for p in weights]
                predict_all(self.predictor, weights, group, states, s, [targets[i] for i in members])
        if self._left_out:
            torch._foreach_copy_(
                [targets[i] for i in self._left_out], [self.parameters[i] for i in self._left_out]
            )

    def _state(self, parameter: Tensor) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self.optimizer.state.get(parameter, {})
        more: dict[str, Tensor] = {}
        if parameter in self.previous:
            more["previous"] = self.previous[parameter]
        momentum = state.get("momentum_buffer")
        if isinstance(momentum, Tensor) and momentum.is_sparse:  # SGD's, of an embedding with sparse=True
            more["momentum_buffer"] = momentum.to_dense()
        gradient = parameter.grad if self.gathered else None
        if gradient is not None and gradient.layout is torch.strided and not gradient.is_complex():
            more["gradient"] = gradient * (self.clipped * self.accumulate / self.gathered)
        return {**state, **more} if more else state

    def step(self, lr_scale: float = 1.0) -> None:
        """One optimizer update with the gradients at hand, which are then dropped."""
        self.moment += 1
        if self.keeps_previous:
            self.previous = {p: p.detach().clone() for p in self.names.values()}
        with scaled_lr(self.optimizer, self.lr_factor * lr_scale):
            self.optimizer.step()
        self.drop_gradients()

    def schedule(self, *metrics: float) -> None:
        """One step of the learning-rate scheduler, if there is one; a metric for those that ask for one."""
        self.moment += 1
        if self.scheduler is not None:
            with shown(self.optimizer, self.groups):
                self.scheduler.step(*(metrics if self.aims_at else ()))

    def drop_gradients(self) -> None:
        """After a step, or instead of one. Also of parameters that the user's optimizer leaves out."""
        for p in self.names.values():
            p.grad = None
        self.waiting, self.gathered = 0, 0.0


def numbers_of(optimizer: Optimizer) -> dict[str, Any]:
    """Numbers in its attributes, such as steps that it counts. (Flags with an underscore are torch's own.)"""
    found = {k: v for k, v in vars(optimizer).items() if isinstance(v, (int, float))}
    return {k: v for k, v in found.items() if not (isinstance(v, bool) and k.startswith("_"))}


def _made(name: str, build: Callable[[Any], Any], argument: Any) -> Any:
    """What the user's callable gives.

    Raises
    ------
    TypeError
        It takes other arguments.
    """
    try:
        return build(argument)
    except TypeError as e:
        raise TypeError(f"{name}={short(build)}: {e}; expected {EXPECTED[name]}") from e


def _needs(step: Callable[..., Any], *known: str) -> str:
    """An argument without which it cannot be called; ``""``: none but those that are known."""
    for name, parameter in inspect.signature(step).parameters.items():
        positional = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if positional and parameter.default is parameter.empty and name not in known:
            return name
    return ""


JOINT = (
    "a parameter's step by %s depends on the gradients of the others (a norm of all of them), of which "
    "each stage sees its own: one optimizer over all does otherwise. max_grad_norm= clips over all stages"
)


UNREAD = "a group of parameters has what is no option of %s, which does not read it: %s"


OF_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")
"""What torch's schedulers write into the groups for themselves."""


def unread_options(optimizer: Optimizer) -> list[str]:
    """What its groups have, and it does not read: known of torch's own optimizers."""
    if not type(optimizer).__module__.startswith("torch."):
        return []
    given = sorted({option for group in optimizer.param_groups for option in group})
    read = {*optimizer.defaults, "params", "param_names", "name", *OF_SCHEDULERS}
    return [repr(option) + nearest(option, optimizer.defaults) for option in given if option not in read]


class OptimizerKind(NamedTuple):
    """What planning has to know of an optimizer.

    Attributes
    ----------
    state_bytes : float
        Bytes of state per byte of a parameter.
    adaptive : bool
        Whether it makes each weight's steps as long whatever the weight's gradients, as Adam does.
    joint : bool
        Whether a parameter's steps depend on those of others, as by a norm over all of them.
    """

    state_bytes: float
    adaptive: bool
    joint: bool = False

    @classmethod
    def of(cls, optimizer: Optimizer) -> OptimizerKind:
        """Found by the first step of another of its type; Adam's where that cannot be done."""
        taken = inspect.signature(type(optimizer)).parameters
        options = {k: v for k, v in optimizer.param_groups[0].items() if k in taken and k != "params"}
        if "lr" in options:
            options["lr"] = 1e-3  # a warm-up may begin with none
        slope = torch.linspace(0.1, 1.0, 64, device="cpu").expand(64, 64)

        def tried(*beside: float) -> tuple[nn.Parameter, Any, Tensor]:
            """A weight after two steps, its state, and its first step; beside one whose gradients grow."""
            weights = [nn.Parameter(torch.zeros(64, 64, device="cpu")) for _ in (1, *beside)]
            other: Any = type(optimizer)(weights, **options)
            steps: list[Tensor] = []
            for i in range(2):
                for weight, size in zip(weights, (1, *beside), strict=True):
                    weight.grad = slope * size**i
                other.step()
                steps.append(weights[0].detach().clone())
            return weights[0], other.state[weights[0]], steps[0]

        try:
            weight, state, first = tried()
            joint = not torch.allclose(weight, tried(1000.0)[0], rtol=1e-3)
        except Exception:  # an optimizer of the user's, with arguments or steps of its own
            return cls(2.0, True)
        held = [t for t in state.values() if isinstance(t, Tensor)]
        steps = first[0].abs()
        size = sum(t.nbytes for t in held if t.numel() > 1) / weight.nbytes
        return cls(size, bool(steps[0] > steps[-1] / 2), joint)


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
    optimizer = _made("optimizer", config.optimizer, parameters)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer: the callable returned {type(optimizer).__name__}, expected a torch.optim.Optimizer; "
            f"pass for example partial(torch.optim.SGD, lr=0.1); several optimizers are a trainer each"
        )
    if _needs(optimizer.step):
        raise _evaluates_again(optimizer)
    known = {id(p) for p in names.values()}
    foreign = sum(id(p) not in known for group in optimizer.param_groups for p in group["params"])
    if foreign:
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} holds {foreign} parameter(s) that it was not given; use "
            f"the parameters that the callable is called with, optimizer=lambda parameters: ..., not those "
            f"of a model (each stage has its own); options by a parameter's name are for param_groups=lambda "
            f"name, parameter: {{...}}"
        )
    if config.predicts:
        check_fits(config.predictor, optimizer)
    return optimizer


def check_steps(optimizer: Optimizer) -> None:
    """Refuse an optimizer that steps with a closure alone, as a copy of it shows with a few numbers.

    Raises
    ------
    ValueError
        ``step()`` fails and ``step(closure)`` works.
    """
    if type(optimizer).__module__.startswith("torch."):
        return
    held = [p for group in optimizer.param_groups for p in group["params"]]
    few = [nn.Parameter(torch.zeros((1,) * p.dim(), dtype=p.dtype, device=p.device)) for p in held]

    def loss() -> Tensor:
        for p in few:
            p.grad = torch.zeros_like(p)
        return torch.zeros(())

    def works(*closure: Callable[[], Tensor]) -> bool:
        loss()
        try:
            copy: Any = object.__new__(type(optimizer))  # torch's own copies lack what a subclass adds
            copied = deepcopy(vars(optimizer), {id(p): small for p, small in zip(held, few, strict=True)})
            vars(copy).update(copied, _optimizer_step_pre_hooks={}, _optimizer_step_post_hooks={})
            copy.step(*closure)
        except Exception:
            return False
        return True

    with preserved({p.device for p in held}):
        if not works() and works(loss):
            raise _evaluates_again(optimizer)


def _evaluates_again(optimizer: Optimizer) -> ValueError:
    return ValueError(
        f"{type(optimizer).__name__} evaluates the loss several times per step (closure), which a pipeline "
        f"with batches in flight cannot do; use a first-order optimizer such as SGD or AdamW"
    )


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


class scaled_lr:
    """Inside, every group's learning rate is ``factor`` times its own (the scheduler never sees it)."""

    def __init__(self, optimizer: Optimizer, factor: float) -> None:
        self.groups = [] if factor == 1.0 else optimizer.param_groups
        self.factor = factor

    def __enter__(self) -> None:
        self.true = [group["lr"] for group in self.groups]
        for group in self.groups:
            group["lr"] = group["lr"] * self.factor

    def __exit__(self, *_: object) -> None:
        for group, lr in zip(self.groups, self.true, strict=True):
            group["lr"] = lr
