"""Optimizer and scheduler of a set of parameters, by parameter name: what lets a run resume in other stages.

An optimizer's own ``state_dict`` numbers parameters, and so belongs to one partition. Here each parameter's
state carries its name, each group's options the names of its members. A set of another make-up takes what
its own parameters need from whichever sets they were in.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .checkpoint import digest
from .optim import ParameterSet

Saved = Mapping[str, Any]


def export_set(parameters: ParameterSet) -> dict[str, Any]:
    """The state of one set of parameters."""
    optimizer = parameters.optimizer
    name_of = {id(p): n for n, p in parameters.names.items()}
    scheduler = parameters.scheduler
    return {
        "optimizer": type(optimizer).__name__,
        "groups": [
            {
                "options": {k: v for k, v in group.items() if k not in ("params", "param_names")},
                "names": [name_of[id(p)] for p in group["params"]],
            }
            for group in optimizer.param_groups
        ],
        "state": {
            n: {k: _on_host(v) for k, v in optimizer.state[p].items()}
            for n, p in parameters.names.items()
            if p in optimizer.state
        },
        "scheduler": None if scheduler is None else _without_callables(scheduler.state_dict()),
        "previous": {
            n: _on_host(parameters.previous[p])
            for n, p in parameters.names.items()
            if p in parameters.previous
        },
        "waiting": parameters.waiting,
        "gradients": {n: _on_host(p.grad) for n, p in parameters.names.items() if p.grad is not None},
    }


def check_set(parameters: ParameterSet, sets: Sequence[Saved], names: Mapping[str, str]) -> None:
    """Whether `import_set` would succeed.

    Raises
    ------
    ValueError
        It would not; says why.
    """
    kind = type(parameters.optimizer).__name__
    for saved in sets:
        if saved["optimizer"] != kind:
            raise ValueError(
                f"it was saved with the optimizer {saved['optimizer']}, this trainer uses {kind}"
            )
        if (saved["scheduler"] is None) != (parameters.scheduler is None):
            was, is_ = ("without", "with") if saved["scheduler"] is None else ("with", "without")
            raise ValueError(f"it was saved {was} a learning-rate scheduler, this trainer is {is_} one")
    known = {n for saved in sets for group in saved["groups"] for n in group["names"]}
    mine = {names.get(n, n) for n in parameters.names}
    if known != mine:
        lacks, has = sorted(mine - known), sorted(known - mine)
        raise ValueError(
            f"trained parameters differ: it lacks {lacks[:3]}, and has {has[:3]} that are not here"
        )
    for members in _members(parameters):
        places = [_place(sets, names.get(n, n)) for n in members]
        first = digest(places[0][0]["groups"][places[0][1]]["options"])
        for n, (saved, at) in zip(members, places, strict=True):
            if digest(saved["groups"][at]["options"]) != first:
                raise ValueError(f"parameters {members[0]!r} and {n!r} were in groups of different options")


def import_set(
    parameters: ParameterSet, sets: Sequence[Saved], names: Mapping[str, str], *, gradients: bool
) -> None:
    """Take over the saved state of these parameters.

    Parameters
    ----------
    sets
        What `export_set` gave, of all stages.
    names
        The names here -> the names there, where they differ.
    gradients : bool
        Whether gradients that wait for their update belong here (a guest's wait at the owner).
    """
    places = {n: _place(sets, names.get(n, n)) for n in parameters.names}
    first_of_group = [places[members[0]] for members in _members(parameters)]
    index: dict[int, int] = {}
    packed: list[dict[str, Any]] = []
    for group, (saved, at) in zip(parameters.optimizer.param_groups, first_of_group, strict=True):
        for p in group["params"]:
            index[id(p)] = len(index)
        options = copy.deepcopy(saved["groups"][at]["options"])
        packed.append({**options, "params": [index[id(p)] for p in group["params"]]})
    state, parameters.previous = {}, {}
    for n, p in parameters.names.items():
        saved, there = places[n][0], names.get(n, n)
        if there in saved["state"]:
            state[index[id(p)]] = copy.deepcopy(saved["state"][there])
        if there in saved["previous"]:
            parameters.previous[p] = saved["previous"][there].to(p.device, copy=True)
        waits = gradients and there in saved["gradients"]
        p.grad = saved["gradients"][there].to(p.device, copy=True) if waits else None
    parameters.optimizer.load_state_dict({"state": state, "param_groups": packed})
    parameters.waiting = first_of_group[0][0]["waiting"] if gradients else 0
    if parameters.scheduler is not None:
        counts = [len(saved["groups"]) for saved, _ in first_of_group]
        parameters.scheduler.load_state_dict(
            _regrouped(
                parameters.scheduler.state_dict(),
                [copy.deepcopy(saved["scheduler"]) for saved, _ in first_of_group],
                [at for _, at in first_of_group],
                counts,
            )
        )


def renamed(saved: Saved, names: Mapping[str, str]) -> dict[str, Any]:
    """The same state under other names."""
    swap = {
        key: {names.get(n, n): v for n, v in saved[key].items()} for key in ("state", "previous", "gradients")
    }
    groups = [{**g, "names": [names.get(n, n) for n in g["names"]]} for g in saved["groups"]]
    return {**saved, **swap, "groups": groups}


def _members(parameters: ParameterSet) -> list[list[str]]:
    name_of = {id(p): n for n, p in parameters.names.items()}
    return [[name_of[id(p)] for p in group["params"]] for group in parameters.optimizer.param_groups]


def _place(sets: Sequence[Saved], name: str) -> tuple[Saved, int]:
    """The set, and the index of the group in it, that holds ``name``."""
    for saved in sets:
        for at, group in enumerate(saved["groups"]):
            if name in group["names"]:
                return saved, at
    raise KeyError(name)


def _regrouped(fresh: Any, saved: list[Any], at: list[int], counts: list[int]) -> Any:
    """A scheduler's state, its per-group lists put together anew.

    ``saved[i]`` is the state of the scheduler that had this set's group i as its group ``at[i]`` of
    ``counts[i]``; ``fresh`` is the state of the scheduler that will take it, whose lists of one entry per
    group show which lists are meant. All else is the same in every saved state.
    """
    first = saved[0]
    if isinstance(first, dict):
        inner = fresh if isinstance(fresh, dict) else {}
        made = {k: _regrouped(inner.get(k), [s[k] for s in saved], at, counts) for k in first}
        return type(first)(made)
    if isinstance(first, list) and isinstance(fresh, list):
        if len(fresh) == len(first) and any(isinstance(v, dict) for v in first):
            return [_regrouped(f, [s[i] for s in saved], at, counts) for i, f in enumerate(fresh)]
        if len(fresh) == len(at) and all(len(s) == n for s, n in zip(saved, counts, strict=True)):
            return [s[i] for s, i in zip(saved, at, strict=True)]
    return first


def _without_callables(value: Any) -> Any:
    """Functions stay with the scheduler that has them; everything else is plain data."""
    if isinstance(value, dict):
        return type(value)({k: _without_callables(v) for k, v in value.items() if not callable(v)})
    if isinstance(value, list):
        return [_without_callables(v) for v in value]
    return value


def _on_host(value: Any) -> Any:
    return value.detach().to("cpu") if isinstance(value, torch.Tensor) else value
