"""Callables that stand in graphs for what has no importable function of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import has_side_effect


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


class Rebuild:
    """Makes an object of a class that fx does not know from its attributes, as the target of a node."""

    def __init__(self, kind: type, names: tuple[str, ...]) -> None:
        self.kind, self.names = kind, names
        self.__name__ = self.__qualname__ = kind.__name__
        self.__module__ = kind.__module__

    def __call__(self, *values: Any) -> Any:
        """The object with these attributes."""
        made: Any = object.__new__(self.kind)
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
