"""Callables that stand in graphs for what has no importable function of its own."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import has_side_effect
from torch.utils import _pytree as pytree

from .structure import Classes, flatten_output, mutable, rebuilt


@has_side_effect
def guard(condition: torch.Tensor, expected: bool, place: str) -> None:
    """Refuse a batch that does not pass a check in the model's own code.

    Raises
    ------
    RuntimeError
        ``bool(condition)`` is not ``expected``.
    """
    if not isinstance(condition, FakeTensor) and not condition.is_meta and bool(condition) is not expected:
        raise RuntimeError(
            f"this batch does not pass the model's check at {place}: its condition is {not expected}. Call "
            "the plain model on it to see the check's own message."
        )


class OtherSizes(RuntimeError):
    """A batch has sizes that a graph is not for."""


@has_side_effect
def same_size(value: Any, expected: Any, place: str) -> None:
    """Refuse sizes with which the model's code would take another course.

    Raises
    ------
    OtherSizes
        ``value`` is not ``expected``.
    """
    if value != expected:
        raise OtherSizes(
            f"the model's code{place and ' at ' + place} needs a plain Python value that depends on sizes, "
            f"which is {value} now and was {expected} when the model was compiled"
        )


@has_side_effect
def same_form(result: Any, module: str, form: str, shown: str) -> None:
    """Refuse a module's result that has another structure, or other Python values, than its example.

    For modules kept whole because they decide by values: the code behind them was recorded for one form.

    Raises
    ------
    RuntimeError
        ``form_of(result)`` is not ``(form, shown)``.
    """
    now = form_of(result)
    if now[0] != form:
        raise RuntimeError(
            f"module {module!r} gave {now[1]} now and {shown} when the model was captured: the code behind "
            "it was recorded for that form. Let it give tensors in one structure, or call it in a module "
            "together with the code that uses its result."
        )


def form_of(result: Any) -> tuple[str, str]:
    """What `same_form` compares, and the same for a reader."""
    leaves, spec = flatten_output(_unordered(result))
    told = [_Text("a tensor" if isinstance(leaf, torch.Tensor) else _plain(leaf)) for leaf in leaves]
    text = str(pytree.tree_unflatten(told, spec))
    return f"{spec} of {told}", text if len(text) <= 200 else text[:197] + "..."


class _Text(str):
    """Shown without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def _plain(leaf: Any) -> str:
    return repr(leaf) if isinstance(leaf, (bool, int, float, complex, str, type(None))) else "an object"


def _unordered(value: Any) -> Any:
    """Graphs hand on plain dicts in place of ordered ones."""
    if type(value) in (list, tuple):
        return type(value)(_unordered(x) for x in value)
    return {k: _unordered(v) for k, v in value.items()} if type(value) in (dict, OrderedDict) else value


# Targets of nodes. fx names nodes, and calls them in their code, by ``__name__``.


@dataclass(frozen=True)
class Rebuild:
    """Makes an object of a class that fx does not know from its attributes."""

    kind: type
    names: tuple[str, ...]
    classes: Classes

    @property
    def __name__(self) -> str:
        return self.kind.__name__

    def __call__(self, *values: Any) -> Any:
        """The object with these attributes."""
        return rebuilt(self.kind, self.names, mutable(values), self.classes)


@dataclass(frozen=True)
class GradientFunction:
    """``function.apply`` of a custom `torch.autograd.Function`: forward now, its own backward later."""

    function: type[torch.autograd.Function]

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self.function.apply(*args, **kwargs)


@dataclass(frozen=True)
class Under:
    """A function or method that runs in a region of ``torch.autocast`` of the model's own."""

    target: Any
    regions: tuple[tuple[str, bool, torch.dtype], ...]

    @property
    def __name__(self) -> str:
        return self.target if isinstance(self.target, str) else str(self.target.__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it, with autocast as it was there."""
        function = self.target
        if isinstance(function, str):
            function, args = getattr(args[0], function), args[1:]
        with contextlib.ExitStack() as stack:
            for device, enabled, dtype in self.regions:
                stack.enter_context(torch.autocast(device, dtype, enabled))
            return function(*args, **kwargs)
