"""Callables that stand in graphs for what has no importable function of its own."""

from __future__ import annotations

from typing import Any

import torch


class GradientFunction:
    """``function.apply`` of a custom `torch.autograd.Function`, as the target of a node."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        # fx names nodes and their code after these two.
        self.__name__ = self.__qualname__ = function.__name__
        self.__module__ = function.__module__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it: forward now, its own backward later."""
        return self.function.apply(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GradientFunction) and other.function is self.function

    def __hash__(self) -> int:
        return hash(self.function)

    def __reduce__(self) -> tuple[Any, ...]:
        return GradientFunction, (self.function,)
