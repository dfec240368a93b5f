"""Optimizer and scheduler of a set of parameters, by parameter name: what lets a run resume in other stages.

The names are those of ``torch.distributed.checkpoint.state_dict`` with ``flatten_optimizer_state_dict``:
``state.<parameter>.<key>`` and ``param_groups.<parameter>.<option>``. Its functions themselves do not hold
for what must work here: they step an optimizer that has no state yet (Adam then counts one step too many,
and one that decays regardless of ``lr`` changes the weights), take nothing over where a gradient waits, and
refuse parameters that have had no gradient so far, empty groups, and state that is no number or tensor.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from .checkpoint import digest
from .optim import ParameterSet, numbers_of

log = logging.getLogger("dtrp")

Saved = Mapping[str, Any]
SECTIONS = ("optimizer", "gradients", "previous", "waiting")
"""What is kept by parameter name."""

_OUTSIDE = (
    "%s keeps tensors in %r, of which nothing is saved, nor taken along where stages are made anew (a layer "
    "that is unfrozen, cuts that move): keep what belongs to a parameter in self.state[parameter]"
)
_TORCHS = ("param_groups", "state", "defaults")


def export_set(parameters: ParameterSet, names: Mapping[str, str]) -> dict[str, Any]:
    """The state of one set of parameters; ``names``: names here -> names to save under, where they differ."""
    optimizer, scheduler = parameters.optimizer, parameters.scheduler
    saved_as: dict[Any, str] = {p: names.get(n, n) for n, p in parameters.names.items()}
    flat: dict[str, Any] = {}
    waiting: dict[str, int] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            flat.update(flat_options(saved_as[p], _options(group)))
            waiting[saved_as[p]] = parameters.waiting
    by_key = optimizer.state_dict()["state"]  # an optimizer around another one gives that one's
    whole = {k: v for k, v in by_key.items() if isinstance(k, str)}  # of no one parameter
    flat.update(flat_state("", whole))
    for p, i in _places(optimizer).items():
        if i in by_key:
            flat.update(flat_state(saved_as[p], by_key[i]))
    if parameters.keeps_outside != (outside := _outside(optimizer)):
        parameters.keeps_outside = outside
        log.warning(_OUTSIDE, type(optimizer).__name__, outside)
    saved = {
        "optimizer": flat,
        "gradients": {n: p.grad for p, n in saved_as.items() if p.grad is not None},
        "previous": {n: parameters.previous[p] for p, n in saved_as.items() if p in parameters.previous},
        "waiting": waiting,
        "groups": [_options(group) for group in parameters.groups],
        "training": {
            "optimizer": type(optimizer).__name__,
            "groups": len(parameters.groups),
            "members": [sorted(names) for names in parameters.members],
            "numbers": dict(numbers_of(optimizer).items() - parameters.numbers.items()),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
        },
    }
    on_host: dict[str, Any] = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().cpu(), saved)
    return {key: _without_callables(value) for key, value in on_host.items()}


def check_set(parameters: ParameterSet, saved: Saved) -> None:
    """Whether `import_set` would succeed, for all parameters of the model.

    Raises
    ------
    ValueError
        It would not; says why.
    """
    there, kind = saved["training"], type(parameters.optimizer).__name__
    if there["optimizer"] != kind:
        raise ValueError(f"it was saved with the optimizer {there['optimizer']}, this trainer uses {kind}")
    if (there["scheduler"] is None) != (parameters.scheduler is None):
        was, is_ = ("without", "with") if there["scheduler"] is None else ("with", "without")
        raise ValueError(f"it was saved {was} a learning-rate scheduler, this trainer is {is_} one")
    if parameters.scheduler is not None and there["groups"] != len(parameters.groups):
        raise ValueError(
            f"its learning-rate scheduler has {there['groups']} groups of parameters, this trainer's has "
            f"{len(parameters.groups)}"
        )
    known, mine = set(saved["waiting"]), {n for members in parameters.members for n in members}
    if known != mine:
        lacks, has = sorted(mine - known), sorted(known - mine)
        raise ValueError(
            f"trained parameters differ: it lacks {lacks[:3]}, and has {has[:3]} that are not here"
        )
    options, _ = unflattened(saved["optimizer"])
    for group in parameters.members:
        first, *others = sorted(group)
        for n in others:
            if digest(options.get(n, {})) != digest(options.get(first, {})):
                raise ValueError(f"parameters {first!r} and {n!r} were in groups of different options")


def import_set(parameters: ParameterSet, saved: Saved, names: Mapping[str, str], *, gradients: bool) -> None:
    """Take over the saved state of these parameters.

    Parameters
    ----------
    saved
        What `export_set` gave, of all stages together.
    names
        The names here -> the names there, where they differ.
    gradients : bool
        Whether gradients that wait for their update belong here (a guest's wait at the owner).
    """
    optimizer = parameters.optimizer
    options, state = unflattened(saved["optimizer"])
    saved_as = {p: names.get(n, n) for n, p in parameters.names.items()}
    index = _places(optimizer)
    packed: list[dict[str, Any]] = []
    for group, members in zip(parameters.groups, parameters.members, strict=True):
        candidates = [*(saved_as[p] for p in group["params"]), *sorted(members)]
        group.update(copy.deepcopy(next((options[n] for n in candidates if n in options), {})))
        if group["params"]:
            packed.append({**group, "params": [index[p] for p in group["params"]]})
    states = {index[p]: state[n] for p, n in saved_as.items() if p in index and n in state}
    states |= state.get("", {})  # of the optimizer as a whole
    optimizer.load_state_dict({"state": copy.deepcopy(states), "param_groups": packed})
    vars(optimizer).update(saved["training"].get("numbers", {}))
    loaded = iter(optimizer.param_groups)  # other objects than before
    parameters.groups = [next(loaded) if group["params"] else group for group in parameters.groups]
    parameters.previous = {
        p: saved["previous"][n].to(p.device, copy=True) for p, n in saved_as.items() if n in saved["previous"]
    }
    for p, n in saved_as.items():
        waits = gradients and n in saved["gradients"]
        p.grad = saved["gradients"][n].to(p.device, copy=True) if waits else None
    counts = [saved["waiting"][n] for n in saved_as.values() if n in saved["waiting"]]
    parameters.waiting = counts[0] if gradients and counts else 0
    parameters.gathered = float(parameters.waiting)
    if parameters.scheduler is not None:
        state = copy.deepcopy(saved["training"]["scheduler"])
        had = saved["training"].get("members", [])  # not of earlier versions
        of = [next((i for i, m in enumerate(had) if not n.isdisjoint(m)), None) for n in parameters.members]
        if had and of != [*range(len(had))]:
            state = _regrouped(state, parameters.scheduler.state_dict(), of, len(had))
        parameters.scheduler.load_state_dict(state)


def _regrouped(saved: Any, fresh: Any, of: Sequence[int | None], count: int) -> Any:
    """A scheduler's state where the groups are others: what it had of each (``of``: which that was, of
    ``count``), and what it begins with of new ones."""
    if isinstance(saved, dict) and isinstance(fresh, dict):
        return {key: _regrouped(value, fresh.get(key), of, count) for key, value in saved.items()}
    if not (isinstance(saved, list) and isinstance(fresh, list)):
        return saved
    if any(isinstance(one, dict) for one in saved):  # schedulers in a scheduler
        return [_regrouped(one, other, of, count) for one, other in zip(saved, fresh, strict=True)]
    if (len(saved), len(fresh)) == (count, len(of)):
        return [fresh[i] if group is None else saved[group] for i, group in enumerate(of)]
    return saved


def complete(content: dict[str, Any], fresh: ParameterSet, one: Mapping[str, Any]) -> None:
    """Add what no stage uses, or is trainable only now: the options are those that its group has by now,
    of a new group as the user's callable makes them.

    Parameters
    ----------
    fresh
        All trainable parameters of the model.
    one
        What a stage gave (`export_set`); each has all groups.
    """
    waits = max(content["waiting"].values(), default=0)
    had = list(zip(one["training"]["members"], one["groups"], strict=True))
    for members, made in zip(fresh.members, fresh.groups, strict=True):
        options = next((o for names, o in had if not members.isdisjoint(names)), _options(made))
        for name in sorted(fresh.names.keys() & members - content["waiting"].keys()):
            content["optimizer"].update(flat_options(name, options))
            content["waiting"][name] = waits


def _places(optimizer: Optimizer) -> dict[Any, int]:
    """Parameters -> their numbers in its ``state_dict``."""
    return {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}


def _outside(optimizer: Optimizer) -> str:
    """An attribute of the optimizer's own with tensors that are no parameters; ``""``: none."""
    places = _places(optimizer)
    for name, value in vars(optimizer).items():
        leaves = () if name in _TORCHS else pytree.tree_leaves(value)
        if any(isinstance(leaf, torch.Tensor) and leaf not in places for leaf in leaves):
            return name
    return ""


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}


def flat_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's group's options."""
    return {f"param_groups.{name}.{k}": v for k, v in options.items()}


def flat_state(name: str, state: Any) -> dict[str, Any]:
    """A parameter's state; what is not keyed by simple names stays whole, under an empty key."""
    if isinstance(state, Mapping) and all(isinstance(k, str) and k and "." not in k for k in state):
        return {f"state.{name}.{k}": v for k, v in state.items()}
    return {f"state.{name}.": state}


def unflattened(flat: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options and state, by parameter."""
    options: dict[str, Any] = {}
    state: dict[str, Any] = {}
    for full, value in flat.items():
        kind, _, rest = full.partition(".")
        name, _, key = rest.rpartition(".")
        found = options if kind == "param_groups" else state
        if key:
            found.setdefault(name, {})[key] = value
        else:
            found[name] = value
    return options, state


def _without_callables(value: Any) -> Any:
    """Functions, and numpy's arrays, stay with the optimizer or scheduler that has them; everything else is
    plain data."""
    if isinstance(value, dict):
        data = {k: v for k, v in value.items() if not (callable(v) or isinstance(v, np.ndarray))}
        kept = {k: _without_callables(v) for k, v in data.items()}
        return type(value)(kept) if isinstance(value, (OrderedDict, Counter)) else kept
    if isinstance(value, list):
        return [_without_callables(v) for v in value]
    return value
