"""What a run has done so far: which batches went in, whose loss has come back, how often it was updated."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import WorkerError
from .batch import Loss, Skip


@dataclass
class History:
    """Counts a run's batches and keeps their losses in order.

    The user's batches are counted apart from the mini-batches that enter the pipeline: there are fewer of
    these where several travel as one.
    """

    losses: list[float] = field(default_factory=list)  # of the user's batches
    skipped: int = 0  # the user's batches that were given up
    epochs: int = 0
    samples: int = 0  # since this trainer was made
    fed: int = 0  # the user's batches so far
    entered: int = 0  # mini-batches that went into the pipeline
    gathered: int = 0  # of them, since the last update
    updates: int = 0  # that those which went in bring
    lr: float | None = None  # of the newest finished batch
    tells_lr: bool = True  # the stage that tells losses trains something, and has one
    awaited: deque[int] = field(default_factory=deque)  # of how many of the user's each in flight consists

    def enter(self, batches: int, accumulate: int) -> None:
        """A mini-batch made of so many of the user's goes into the pipeline."""
        self.entered += 1
        self.awaited.append(batches)
        self.gathered += 1
        if self.gathered >= accumulate:
            self.close_group()

    def close_group(self) -> None:
        """An update with what was gathered."""
        self.updates += self.gathered > 0
        self.gathered = 0

    def settle(self, news: Iterable[Loss | Skip]) -> list[tuple[int, float]]:
        """Takes in what the stages say; the losses that came, with the numbers of the user's batches.

        Raises
        ------
        WorkerError
            They are not the next ones: the pipeline has lost a batch.
        """
        new = []
        for item in news:
            if isinstance(item, Skip):
                self.skipped += item.batches
                continue
            due = self.entered - len(self.awaited)
            if item.batch != due:
                raise WorkerError(f"the loss of batch {item.batch} came where {due} was due")
            self.tells_lr = item.lr is not None
            self.lr = self.lr if item.lr is None else item.lr
            for _ in range(self.awaited.popleft()):
                new.append((len(self.losses), item.value))
                self.losses.append(item.value)
        return new

    def export(self) -> dict[str, Any]:
        """As plain data, with nothing in flight."""
        return {
            "batches": self.fed,
            "entered": self.entered,
            "optimizer_steps": self.updates,
            "skipped": self.skipped,
            "epochs": self.epochs,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take over what `export` gave."""
        self.fed, self.entered = saved["batches"], saved["entered"]
        self.updates = saved.get("optimizer_steps", self.entered)  # files of 0.1 don't have it
        self.skipped, self.epochs = saved["skipped"], saved["epochs"]
        self.losses[:] = saved["losses"].tolist()
