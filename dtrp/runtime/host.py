"""What a trainer asks of the compiled model that it trains: the seam between compiler and runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .program import StageProgram


class Host(Protocol):
    """What a trainer asks of the compiled model that it trains."""

    model: nn.Module

    def prepare(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Plan for this example, unless planned already."""
        ...

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The model inputs of one call, in the wiring's order; refuses what does not fit."""
        ...

    def programs(self) -> list[StageProgram]:
        """What each stage runs, with the model's present parameters."""
        ...

    def check_loss(self, config: TrainConfig, inputs: Sequence[Tensor], target: Any) -> None:
        """Refuse a loss function that does not give a scalar, without computing anything."""
        ...

    def memory_limits(self) -> Sequence[int | None]:
        """Bytes that each stage may use, ``None`` where nobody said."""
        ...


def write_back(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a stage's tensors to the model's of the same names; constants of the graph are passed over."""
    with torch.no_grad():
        for name, value in state.items():
            tensor = _attribute(model, name)
            if isinstance(tensor, Tensor) and tensor.data_ptr() != value.data_ptr():
                tensor.copy_(value)


def _attribute(model: nn.Module, name: str) -> Any:
    """``model.a.b.c``, ``None`` where the model has no such thing (a constant of the graph)."""
    value: Any = model
    for part in name.split("."):
        value = getattr(value, part, None)
    return value
