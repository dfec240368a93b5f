"""What every executor can do: run ticks of all stages and ask the stages for things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...errors import WorkerError
from ..batch import Feed
from ..stage import Measure
from ..stats import StageStats


@dataclass(frozen=True)
class Loss:
    """The loss of a finished batch."""

    batch: int
    value: float
    skipped: bool = False


class Executor(Protocol):
    """Runs the stages of one training run.

    ``failure`` is the error that ended it, if there was one: then only `close` is left to do.
    """

    failure: WorkerError | None

    def tick(self, feeds: Sequence[Feed | None]) -> None:
        """One tick of every stage; ``feeds[k]`` is what stage k gets of a new batch (``None``: no batch)."""
        ...

    def throttle(self) -> None:
        """Wait until the stages have caught up far enough for the next tick."""
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

    def glance(self) -> list[StageStats] | None:
        """The stages' latest known measurements; does not wait."""
        ...

    def close(self) -> None:
        """Let go of everything; may be called twice."""
        ...


def again(failure: WorkerError) -> WorkerError:
    """What a failed run answers from then on."""
    return WorkerError(
        f"this trainer has failed before and cannot go on: {failure.args[0].splitlines()[0]}",
        stage=failure.stage,
        remote_traceback=failure.remote_traceback,
    )
