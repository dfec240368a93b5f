"""Callables that stand in graphs for what has no importable function of its own."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import has_side_effect
from torch.utils import _pytree as pytree

from .structure import blank, flatten_output


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


class Rebuild:
    """Makes an object of a class that fx does not know from its attributes, as the target of a node."""

    def __init__(self, kind: type, names: tuple[str, ...]) -> None:
        self.kind, self.names = kind, names
        self.__name__ = self.__qualname__ = kind.__name__
        self.__module__ = kind.__module__

    def __call__(self, *values: Any) -> Any:
        """The object with these attributes."""
        made = blank(self.kind)
        for name, value in zip(self.names, values, strict=True):
            object.__setattr__(made, name, value)
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rebuild) and (other.kind, other.names) == (self.kind, self.names)

    def __hash__(self) -> int:
        return hash((self.kind, self.names))

    def __reduce__(self) -> tuple[Any, ...]:
        return Rebuild, (self.kind, self.names)


class GradientFunction:
    """``function.apply`` of a custom `torch.autograd.Function`, as the target of a node."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        # fx names nodes and their code after these; what has a name in torch it takes from there.
        self.__name__ = self.__qualname__ = function.__name__
        self.__module__ = __name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it: forward now, its own backward later."""
        return self.function.apply(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GradientFunction) and other.function is self.function

    def __hash__(self) -> int:
        return hash(self.function)

    def __reduce__(self) -> tuple[Any, ...]:
        return GradientFunction, (self.function,)


class Under:
    """A function or method that runs in a region of ``torch.autocast`` of the model's own."""

    def __init__(self, target: Any, regions: tuple[tuple[str, bool, torch.dtype], ...]) -> None:
        self.target, self.regions = target, regions
        self.__name__ = self.__qualname__ = target if isinstance(target, str) else target.__name__
        self.__module__ = __name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it, with autocast as it was there."""
        function = self.target
        if isinstance(function, str):
            function, args = getattr(args[0], function), args[1:]
        with contextlib.ExitStack() as stack:
            for device, enabled, dtype in self.regions:
                stack.enter_context(torch.autocast(device, dtype, enabled))
            return function(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Under) and (other.target, other.regions) == (self.target, self.regions)

    def __hash__(self) -> int:
        return hash((self.target, self.regions))

    def __reduce__(self) -> tuple[Any, ...]:
        return Under, (self.target, self.regions)


class SameForm:
    """Refuses a module's result that has another form than its example, as the target of a node.

    For modules kept whole because they decide by values: the code behind them was recorded for one form.
    """

    def __init__(self, module: str, form: Any, plain: tuple[Any, ...]) -> None:
        self.module, self.form, self.plain = module, form, plain
        has_side_effect(self)
        self.__name__ = self.__qualname__ = "same_form"
        self.__module__ = __name__

    @classmethod
    def of(cls, module: str, result: Any) -> SameForm:
        """Expects what looks like ``result``."""
        return cls(module, *_form(result))

    def __call__(self, result: Any) -> None:
        """Compare structure, and what is no tensor."""
        form, plain = _form(result)
        if form != self.form or not _equal(plain, self.plain):
            raise RuntimeError(
                f"module {self.module!r} gave {_shown(plain, form)} now and "
                f"{_shown(self.plain, self.form)} when the model was captured: the code behind it was "
                "recorded for that form. Let it give tensors in one structure, or call it in a module "
                "together with the code that uses its result."
            )

    def __repr__(self) -> str:
        return f"same_form({self.module})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SameForm) or (other.module, other.form) != (self.module, self.form):
            return False
        return _equal(self.plain, other.plain)

    def __hash__(self) -> int:
        return hash(self.module)

    def __reduce__(self) -> tuple[Any, ...]:
        return SameForm, (self.module, self.form, self.plain)


def _form(result: Any) -> tuple[Any, tuple[Any, ...]]:
    leaves, form = flatten_output(_unordered(result))
    return form, tuple(torch.Tensor if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)


def _unordered(value: Any) -> Any:
    """Graphs hand on plain dicts in place of ordered ones."""
    if type(value) in (list, tuple):
        return type(value)(_unordered(x) for x in value)
    return {k: _unordered(v) for k, v in value.items()} if type(value) in (dict, OrderedDict) else value


def _equal(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    simple = (bool, int, float, complex, str, type(None))
    return all(x == y for x, y in zip(a, b, strict=True) if isinstance(x, simple) or isinstance(y, simple))


def _shown(plain: tuple[Any, ...], form: Any) -> str:
    names = ["a tensor" if leaf is torch.Tensor else repr(leaf) for leaf in plain]
    text = str(pytree.tree_unflatten(names, form))
    return text if len(text) <= 200 else text[:197] + "..."
