"""What one stage is given to run: its module, its wires, its place. Immutable, picklable, free of graphs."""

from __future__ import annotations

import copy
import linecache
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..wiring import Wiring


@dataclass(frozen=True)
class Code:
    """Generated Python source of a ``forward`` and the globals that it names."""

    source: str
    globals: Mapping[str, Any]

    def compile(self) -> Callable[..., tuple[Any, ...]]:
        """The function ``forward(self, *inputs) -> tuple of outputs``."""
        scope, name = dict(self.globals), f"<dtrp stage {zlib.crc32(self.source.encode()):x}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)  # for tracebacks
        exec(compile(self.source, name, "exec"), scope)
        function: Callable[..., tuple[Any, ...]] = scope["forward"]
        return function


class StageModule(nn.Module):
    """One stage as an ordinary module: the model's own submodules under their own names, one code per mode.

    Which code runs follows ``self.training``. It pickles as source text, where an ``fx.GraphModule`` would
    be traced anew. ``attributes`` are assigned in the order given; a module comes before what is inside it.
    """

    def __init__(self, attributes: Mapping[str, Any], train: Code, evaluate: Code) -> None:
        super().__init__()
        for name, value in attributes.items():
            _assign(self, name, value)
        # What is in train mode while the stage trains: frozen parts may be in eval mode all the time.
        self._flags = [m.training for m in self.modules()]
        self._code = {True: train, False: evaluate}
        self._compiles = False
        self._make_forward()

    def train(self, mode: bool = True) -> StageModule:
        """Into train mode as the stage was made, or all into eval mode."""
        for module, flag in zip(self.modules(), self._flags, strict=True):
            module.training = mode and flag
        return self

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """Outputs of the stage, in the order of its wires."""
        return self._forward[self.training](self, *inputs)

    def compile_training(self) -> None:
        """Have torch.compile compile what runs in training mode, here and in copies.

        Each module gets a function of its own: torch keeps what it compiled, and counts how often it had
        to, by code object, and code that all stages share would soon have used up the tries.
        """
        self._compiles = True
        self._make_forward()

    def _make_forward(self) -> None:
        self._forward = {mode: code.compile() for mode, code in self._code.items()}
        if self._compiles:
            self._forward[True] = torch.compile(self._forward[True])

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k != "_forward"}
        return {**state, "_hooks": _gradient_hooks(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        hooks = state.pop("_hooks")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name, parameter in self.named_parameters():
            if name in hooks and parameter.requires_grad and not any(hooks_of(parameter)):
                for before in hooks[name][0]:
                    parameter.register_hook(before)  # type: ignore[no-untyped-call]
                for after in hooks[name][1]:
                    parameter.register_post_accumulate_grad_hook(after)  # type: ignore[no-untyped-call]
        self._make_forward()

    def __deepcopy__(self, memo: dict[int, Any]) -> StageModule:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        state = self.__getstate__()
        as_it_is = {name: state.pop(name) for name in ("_code", "_hooks")}
        new.__setstate__({**copy.deepcopy(state, memo), **as_it_is})
        return new


Hooks = tuple[list[Callable[..., Any]], list[Callable[..., Any]]]


def hooks_of(parameter: nn.Parameter) -> Hooks:
    """The user's hooks on a parameter's gradient, before and after it is added up."""
    before, after = parameter._backward_hooks or {}, parameter._post_accumulate_grad_hooks or {}
    of_replicas = f"{__package__}.replicas"  # by which they notice gradients
    return list(before.values()), [
        hook for hook in after.values() if getattr(hook, "__module__", "") != of_replicas
    ]


def _gradient_hooks(module: nn.Module) -> dict[str, Hooks]:
    """Hooks on parameters' gradients, which torch neither copies nor pickles with them."""
    return {name: hooks for name, p in module.named_parameters() if any(hooks := hooks_of(p))}


@dataclass(frozen=True)
class Tie:
    """One trainable parameter that several stages hold: ``(stage, name there)``, the owner first.

    The owner is the lowest stage that takes part in the backward pass, whose backward of a batch comes last;
    it alone steps with the sum of all stages' gradients of that batch, then hands the sum to the others.
    """

    holders: tuple[tuple[int, str], ...]

    @property
    def owner(self) -> int:
        return self.holders[0][0]

    def name_in(self, stage: int) -> str | None:
        """The parameter's name in ``stage``, ``None`` where it is not held."""
        return dict(self.holders).get(stage)


@dataclass(frozen=True)
class StageProgram:
    """All that a stage needs to know, whoever runs it."""

    stage: int
    module: StageModule
    train: Wiring
    evaluate: Wiring
    recompute: bool
    device: torch.device
    ties: tuple[Tie, ...] = ()
    writes_inputs: bool = False  # the stage changes some of its inputs in place
    draws: bool = True  # its passes may draw random numbers
    devices: tuple[torch.device, ...] = ()  # of each of its processes, where it has several

    @cached_property
    def n_stages(self) -> int:
        return self.train.n_stages

    @cached_property
    def is_last(self) -> bool:
        return self.stage == self.n_stages - 1

    @property
    def guests(self) -> dict[str, int]:
        """Parameters that this stage holds and another one owns: their names here and their owners."""
        return {
            name: tie.owner
            for tie in self.ties
            if tie.owner != self.stage and (name := tie.name_in(self.stage)) is not None
        }

    def wiring(self, training: bool) -> Wiring:
        return self.train if training else self.evaluate


def trained(programs: Sequence[StageProgram], first_names: Mapping[str, str]) -> set[str]:
    """The parameters that stages train, by their first names."""
    held = [named for one in programs for named in one.module.named_parameters()]
    return {first_names.get(name, name) for name, p in held if p.requires_grad}


def _assign(root: nn.Module, name: str, value: Any) -> None:
    """Set ``root.a.b.c``, making plain modules on the way; what is already there as itself stays."""
    *path, last = name.split(".")
    module = root
    for part in path:
        child = getattr(module, part, None)
        if child is None:
            child = nn.Module()
            module.add_module(part, child)
        module = child
    if getattr(module, last, None) is value:
        return
    if last in module.__dict__:  # a plain attribute of a module that is kept whole; its own value is newer
        return
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        module.register_buffer(last, value, persistent=False)
    else:
        setattr(module, last, value)
