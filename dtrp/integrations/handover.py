"""What a library's own optimizer and scheduler say, handed to the stages; and their state, handed back.

Trainer libraries build an optimizer over the whole model, step it and its scheduler, save and load both. Here
the stages step. The library's optimizer stays where it is and is kept still (inline, the model's gradients
are the stages' own): its groups say how the stages' optimizers are to be, and in the moment of saving it
gets their state, so that a checkpoint is the library's own, and loads without dtrp.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..compiling import compile
from ..names import nearest
from ..pipeline import Pipeline
from ..runtime.run_state import RunState
from ..runtime.trainer import Trainer
from ..runtime.training_state import flat_options, flat_state, unflattened

REST = ("counters", "previous")
"""What a run is besides what libraries save themselves."""


class SameOptimizer:
    """Builds an optimizer like another one, for `Pipeline.trainer`.

    Over all parameters of the model that are trainable then, in their order, it has the same groups; a
    stage's are arranged by these (runtime/groups.py).

    Raises
    ------
    TypeError
        No such optimizer can be made from its settings alone.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        self.kind = type(optimizer)
        takes = inspect.signature(self.kind.__init__).parameters
        any_name = any(p.kind is p.VAR_KEYWORD for p in takes.values())
        self.defaults = {k: v for k, v in optimizer.defaults.items() if any_name or k in takes}
        self.model: nn.Module | None = model
        trainable = self._trainable()
        known = {id(p) for p in trainable}
        self.groups: list[tuple[dict[str, Any], list[Tensor]]] = []
        for group in optimizer.param_groups:
            options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            members = [p for p in group["params"] if p.requires_grad]
            foreign = sum(id(p) not in known for p in members)
            if foreign:
                raise TypeError(f"{self.kind.__name__} holds {foreign} parameter(s) that are not the model's")
            self.groups.append((options, members))
        try:
            self(trainable)
        except TypeError as e:
            raise TypeError(
                f"{self.kind.__name__} cannot be made anew for each stage from its settings: {e}; use an "
                f"optimizer whose constructor takes parameters and options, as torch.optim's do"
            ) from e

    def __call__(self, parameters: Iterable[Any]) -> Optimizer:
        given, trainable = list(parameters), self._trainable()
        if len(given) != len(trainable):
            return self.kind(given, **self.defaults)
        at = {id(p): new for p, new in zip(trainable, given, strict=True)}
        groups = [
            {**options, "params": [at[id(p)] for p in members if id(p) in at]}
            for options, members in self.groups
        ]
        return self.kind(groups, **self.defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "model": None, "groups": []}  # a stage is told its groups

    def _trainable(self) -> list[nn.Parameter]:
        return [] if self.model is None else [p for p in self.model.parameters() if p.requires_grad]


class SameScheduler:
    """Builds a scheduler like another one, in the state that it is in."""

    def __init__(self, scheduler: Any) -> None:
        self.absent = _Absent()
        self.template = copy.deepcopy(scheduler, {id(scheduler.optimizer): self.absent})

    def __call__(self, optimizer: Optimizer) -> Any:
        rates = [group["lr"] for group in optimizer.param_groups]
        # A scheduler's constructor lets the optimizer note its steps, and sets the rates.
        torch.optim.lr_scheduler.LambdaLR(optimizer, _one)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return copy.deepcopy(self.template, {id(self.absent): optimizer})


class _Absent:
    """Stands for an optimizer."""


def _one(_: int) -> float:
    return 1.0


def keep_still(optimizer: Optimizer) -> None:
    """From now on, its step does nothing but call its closure, and it leaves gradients alone."""

    def step(closure: Callable[[], Any] | None = None) -> Any:
        optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers look
        return None if closure is None else closure()

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # and here, too
    optimizer.step = step  # type: ignore[method-assign]
    optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]


def check_rates(optimizer: Optimizer, expected: Sequence[Any]) -> None:
    """Refuse rates that a hook or callback has set on an optimizer that is kept still.

    Raises
    ------
    ValueError
    """
    for i, (group, rate) in enumerate(zip(optimizer.param_groups, expected, strict=False)):
        if not math.isclose(group["lr"], rate, rel_tol=1e-6, abs_tol=1e-12):
            raise ValueError(
                f"a hook or callback has set lr={float(group['lr']):g} in group {i} of the optimizer, where "
                f"{float(rate):g} is its or its scheduler's: the stages would not follow; let a scheduler "
                f"(torch.optim.lr_scheduler.LambdaLR) say the rates"
            )


def export_state(run: Trainer, optimizer: Optimizer, scheduler: Any = None) -> dict[str, Any]:
    """Bring the stages' state into a library's optimizer (and scheduler), to be saved by it.

    Returns
    -------
    dict
        What else the run is, as plain data for `import_state`.
    """
    content = run._run.content()
    options, state = unflattened(content["optimizer"])
    names = {p: n for n, p in run._run.owner.named_parameters()}
    for group in optimizer.param_groups:
        held = [names[p] for p in group["params"] if names[p] in options]
        group.update(options[held[0]] if held else {})
        for p in group["params"]:
            if names[p] in state:
                optimizer.state[p] = state[names[p]]
    if scheduler is not None and content["training"]["scheduler"] is not None:
        scheduler.load_state_dict(content["training"]["scheduler"])
    return {**{key: content[key] for key in REST}, "scale": content["training"]["scale"]}


def import_state(
    run: Trainer, optimizer: Optimizer, scheduler: Any, rest: Mapping[str, Any] | None, updates: int
) -> None:
    """Hand a loaded optimizer's and scheduler's state to the stages, before the first batch.

    Parameters
    ----------
    rest
        What `export_state` gave; ``None``: the checkpoint is of a run without dtrp.
    updates : int
        How many were made by then.
    """
    content = run._run.content()
    names = {p: n for n, p in run._run.owner.named_parameters()}
    flat: dict[str, Any] = {}
    for group in optimizer.param_groups:
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        for p in group["params"]:
            if p.requires_grad:
                flat |= flat_options(names[p], options)
                flat |= flat_state(names[p], optimizer.state[p]) if p in optimizer.state else {}
    content["optimizer"] = flat
    content["training"] = {**content["training"]}
    if scheduler is not None:
        content["training"]["scheduler"] = scheduler.state_dict()
    if rest is None:
        content["counters"] = {**content["counters"], "updates": updates, "optimizer_steps": updates}
    else:
        content |= {key: rest[key] for key in REST}
        content["training"]["scale"] = rest["scale"]
    run._run.adopt(RunState(content, "the checkpoint"))
    release(optimizer)


def release(optimizer: Optimizer) -> None:
    """The stages have the state; here it only takes memory."""
    optimizer.state.clear()


def options(
    pipeline: Any, training: Any, told: Mapping[str, str], source: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of `dtrp.compile` and `Pipeline.trainer` that a user gave; a number is one of stages.

    Parameters
    ----------
    told
        Options of `Pipeline.trainer` that the library's own settings determine, and which of them.

    Raises
    ------
    TypeError
        They are none, or are ``told``.
    """
    if type(pipeline) is int:
        pipeline = {"n_gpus": pipeline}
    checked = []
    for name, given, function, example in (
        ("pipeline", pipeline, compile, "{'n_gpus': 4}"),
        ("training", training, Pipeline.trainer, "{'method': '1f1b'}"),
    ):
        if not isinstance(given, Mapping | None):
            raise TypeError(f"{name}={given!r}: expected options by name, such as {name}={example}")
        known = set(inspect.signature(function).parameters) - {"self", "model"}
        for option in given or {}:
            if option not in known:
                choice = ", ".join(sorted(known - set(told)))
                hint = nearest(option, known) or f": expected one of {choice}"
                raise TypeError(f"{name}={{{option!r}: ...}} is no option of {function.__qualname__}{hint}")
        checked.append(dict(given or {}))
    if twice := [option for option in checked[1] if option in told]:
        instead = ", ".join(f"{option} comes from {told[option]}" for option in twice)
        raise TypeError(f"training={dict.fromkeys(twice, ...)}: {instead}; set it in {source}")
    return checked[0], checked[1]
