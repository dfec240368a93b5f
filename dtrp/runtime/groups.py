"""The groups of parameters that the user's optimizer has over the whole model: every stage has the same ones.

A plain script calls the optimizer once, with all parameters; a scheduler then knows all groups. A stage calls
it with its own parameters, and might get fewer groups, or others (where options follow a position in the
list). So the trainer builds the optimizer over the whole model once, and tells the stages which groups there
are. Groups without a parameter in a stage are shown to its scheduler alone (`shown`): schedulers are then in
the same state everywhere, and belong to no partition. The optimizer itself never sees an empty group.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Group:
    """One group of the model's parameters.

    Attributes
    ----------
    options : mapping
        What are numbers, text, or tuples of such; anything else is the stage's own optimizer's to make.
    members : frozenset of str
        Under every name that they have in the model.
    """

    options: Mapping[str, Any]
    members: frozenset[str]


def groups_of(
    optimizer: Optimizer, names: Mapping[str, nn.Parameter], first_names: Mapping[str, str]
) -> tuple[Group, ...]:
    """The groups of an optimizer over these parameters; ``first_names``: any name -> that in ``names``."""
    name_of = {id(p): n for n, p in names.items()}
    made = []
    for group in optimizer.param_groups:
        held = {name_of[id(p)] for p in group["params"]}
        members = held | {alias for alias, first in first_names.items() if first in held}
        options = {k: v for k, v in group.items() if k not in ("params", "param_names") and _is_option(v)}
        made.append(Group(options, frozenset(members)))
    return tuple(made)


def arrange(
    optimizer: Optimizer, names: Mapping[str, nn.Parameter], groups: Sequence[Group]
) -> list[dict[str, Any]]:
    """Give a stage's optimizer the model's groups; all of them, those without a parameter here included."""
    held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    arranged = []
    for group in groups:
        here = [p for n, p in names.items() if n in group.members]
        made = held.get(id(here[0]), {}) if here else {}
        if {id(p) for p in made.get("params", ())} != {id(p) for p in here} or not here:
            made = {**made, "params": here}
        made.update(copy.deepcopy(dict(group.options)))
        arranged.append(made)
    optimizer.param_groups[:] = [group for group in arranged if group["params"]]
    return arranged


@contextmanager
def shown(optimizer: Optimizer, groups: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Inside, the optimizer has all groups, for a scheduler to see."""
    present = optimizer.param_groups
    if len(present) == len(groups):
        yield
        return
    held = list(present)
    present[:] = groups
    try:
        yield
    finally:
        present[:] = held


def _is_option(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_option(v) for v in value)
    if isinstance(value, Tensor):  # a learning rate may be one
        return value.numel() == 1
    return isinstance(value, (bool, int, float, complex, str, type(None)))
