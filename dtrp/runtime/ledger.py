"""Which batches went in, and whose loss has come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import WorkerError
from .executors.base import Loss


@dataclass
class Ledger:
    """Counts a run's batches and keeps their losses in order.

    The user's batches are counted apart from those that enter the pipeline: there are fewer of these where
    several travel as one.
    """

    losses: list[float] = field(default_factory=list)  # of the user's batches
    skipped: int = 0  # the user's batches that were given up
    epochs: int = 0
    samples: int = 0  # since this trainer was made
    fed: int = 0  # the user's batches so far
    entered: int = 0  # batches that went into the pipeline
    awaited: deque[int] = field(default_factory=deque)  # of how many of the user's each in it consists

    def enter(self, batches: int) -> None:
        """A batch made of so many of the user's goes into the pipeline."""
        self.entered += 1
        self.awaited.append(batches)

    def settle(self, losses: Iterable[Loss]) -> list[tuple[int, float]]:
        """Losses that came back; each with the number of the user's batch, from 0.

        Raises
        ------
        WorkerError
            They are not the next ones: the pipeline has lost a batch.
        """
        new = []
        for loss in losses:
            due = self.entered - len(self.awaited)
            if loss.batch != due:
                raise WorkerError(f"the loss of batch {loss.batch} came where {due} was due")
            batches = self.awaited.popleft()
            self.skipped += batches if loss.skipped else 0
            for _ in range(batches):
                new.append((len(self.losses), loss.value))
                self.losses.append(loss.value)
        return new

    @property
    def outstanding(self) -> int:
        """The user's batches whose loss has not come yet."""
        return self.fed - len(self.losses)

    def export(self) -> dict[str, Any]:
        """As plain data, with nothing in flight."""
        return {
            "batches": self.fed,
            "entered": self.entered,
            "skipped": self.skipped,
            "epochs": self.epochs,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take over what `export` gave."""
        self.fed, self.entered = saved["batches"], saved["entered"]
        self.skipped, self.epochs = saved["skipped"], saved["epochs"]
        self.losses[:] = saved["losses"].tolist()
