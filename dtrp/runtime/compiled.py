"""The seam between compiler and runtime: all that a trainer asks of the model that was compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from .config import TrainConfig
from .optim import OptimizerKind
from .program import StageProgram
from .rebalance import Move
from .stats import StageStats


class Compiled(Protocol):
    """What a trainer asks of the compiled model that it trains: the seam between compiler and runtime."""

    model: nn.Module

    def expect(self, config: TrainConfig, optimizer: OptimizerKind) -> Any:
        """How training will go; for `report_on`."""
        ...

    def report_on(
        self,
        config: TrainConfig,
        training: Any,
        stats: Sequence[StageStats],
        executor: str,
        moves: Sequence[Move],
    ) -> Any:
        """What was predicted of a run beside what it measured."""
        ...

    @property
    def n_stages(self) -> int: ...
    @property
    def training(self) -> bool:
        """Whether any part of the model is in train mode."""
        ...

    def better_cut(self, training: Any, stats: Sequence[StageStats]) -> Move | None:
        """Other stages that would be faster, as far as these measurements tell."""
        ...

    def recut(self, move: Move, loss: nn.Module | None) -> tuple[list[StageProgram], Any]:
        """As `programs`, of the stages that a move makes, and what stands for the training from now on."""
        ...

    def prepare(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Plan for this example, unless planned already."""
        ...

    def changed(self) -> str:
        """What of the model's structure or attributes is not as it was then; ``""`` if all is."""
        ...

    def planned(self) -> str:
        """The plan as text, for another process to `adopt`."""
        ...

    def adopt(self, text: str) -> None:
        """Follow the plan that another process made."""
        ...

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The model inputs of one call, in the wiring's order; refuses what does not fit."""
        ...

    def choose_order(self, config: TrainConfig, inputs: Sequence[Tensor], target: Any) -> TrainConfig:
        """The settings with order and micro-batches decided, for batches like this one."""
        ...

    def programs(self, loss: nn.Module | None) -> list[StageProgram]:
        """What each stage runs, with the model's present parameters; ``loss`` as part of the last one."""
        ...

    def check_loss(self, config: TrainConfig, inputs: Sequence[Tensor], target: Any) -> None:
        """Refuse a loss function that does not give a scalar, without computing anything."""
        ...
