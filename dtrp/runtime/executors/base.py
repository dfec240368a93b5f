"""What every executor can do: run ticks of all stages and ask the stages for things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..batch import Feed
from ..stage import Measure


@dataclass(frozen=True)
class Loss:
    """The loss of a finished batch."""

    batch: int
    value: float
    skipped: bool = False


class Executor(Protocol):
    """Runs the stages of one training run."""

    def tick(self, feeds: Sequence[Feed | None]) -> None:
        """One tick of every stage; ``feeds[k]`` is what stage k gets of a new batch (``None``: no batch)."""
        ...

    def settle(self) -> None:
        """After the last tick of a drain: nothing stays on its way between stages. Waits for it."""
        ...

    def losses(self) -> list[Loss]:
        """Losses that have come in since the last call, in batch order; does not wait."""
        ...

    def evaluate(self, batches: Any, measure: Measure | None) -> list[Any]:
        """``measure`` of every batch (an iterable of lists of feeds, one per stage), in order."""
        ...

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        """Call a method of every `StageRunner`, after all ticks so far; results in stage order."""
        ...

    def close(self) -> None:
        """Let go of everything; may be called twice."""
        ...
