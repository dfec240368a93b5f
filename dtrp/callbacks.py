"""What can look on while `Trainer.fit` trains: stop early, keep the best, average weights, write a CSV file.

Any object with one of these methods will do; returning True ends the run:

    on_step(trainer, loss)      after each batch, with the newest finished batch's loss (or None)
    on_epoch(trainer, row)      after each epoch, with its numbers
    on_save(trainer, path)      after each `Trainer.save` during `fit`
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from .runtime.trainer import Trainer

__all__ = ["EMA", "CSVLog", "EarlyStopping", "SaveBest"]


class _Best:
    """The best value so far of one of an epoch's numbers.

    Parameters
    ----------
    monitor : str, optional
        Which of the row's numbers. Default: ``loss``, or ``train_loss`` where nothing is evaluated.
    larger : bool
        Whether larger is better, as for accuracy.
    min_delta : float
        By how much it has to be better.
    """

    def __init__(self, monitor: str | None, *, larger: bool, min_delta: float = 0.0) -> None:
        self.monitor, self.larger, self.min_delta = monitor, larger, min_delta
        self.value = -math.inf if larger else math.inf
        self.heard = 0  # epochs

    def new(self, trainer: Trainer, row: Mapping[str, Any]) -> list[bool]:
        """Whether epochs since the last call are better than all before, ``row`` last: of a resumed run, all
        of its epochs."""
        rows = trainer._run.loop.rows if trainer._run.loop is not None else [row]
        since, self.heard = [*rows[self.heard : -1], row], len(rows)
        return [self.improves(one) for one in since]

    def improves(self, row: Mapping[str, Any]) -> bool:
        name = self.monitor or ("loss" if "loss" in row else "train_loss")
        if name not in row:
            raise ValueError(f"monitor={name!r}: an epoch's numbers are {', '.join(row)}")
        value = float(row[name])
        better = value > self.value + self.min_delta if self.larger else value < self.value - self.min_delta
        if better:
            self.value = value
        return better


class EarlyStopping:
    """Ends the run when a number has not improved for ``patience`` epochs.

    Parameters
    ----------
    patience : int
        Epochs without improvement.
    monitor : str, optional
        Which of the epoch's numbers. Default: ``loss``, or ``train_loss`` where nothing is evaluated.
    larger : bool
        Whether larger is better, as for accuracy.
    min_delta : float
        By how much it has to be better to count.
    """

    def __init__(
        self, patience: int, *, monitor: str | None = None, larger: bool = False, min_delta: float = 0.0
    ) -> None:
        self.patience, self.waited = patience, 0
        self.best = _Best(monitor, larger=larger, min_delta=min_delta)

    def on_epoch(self, trainer: Trainer, row: Mapping[str, Any]) -> bool:
        for better in self.best.new(trainer, row):
            self.waited = 0 if better else self.waited + 1
        return self.waited >= self.patience


class SaveBest:
    """Saves the run (`Trainer.save`) after each epoch that is better than all before.

    Parameters
    ----------
    path : path
        Of the file; overwritten by the next best.
    monitor, larger
        As in `EarlyStopping`.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, monitor: str | None = None, larger: bool = False
    ) -> None:
        self.path, self.best = path, _Best(monitor, larger=larger)

    def on_epoch(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        if self.best.new(trainer, row)[-1]:
            trainer.save(self.path)


class EMA:
    """An exponential moving average of the weights, in ``ema.module``, a copy of the model.

    Parameters
    ----------
    model : nn.Module
        The model that is trained.
    decay : float
        Of the average, per batch.
    every : int
        Batches between two looks at the weights, which each bring them here from the stages; the average then
        decays by ``decay ** every``.

    Notes
    -----
    A look does not drain the pipeline: each stage is as far as it is (`Trainer.sync`). Buffers are copied. A
    run that is resumed begins the average anew.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, *, every: int = 10) -> None:
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        self.model, self.every, self.steps = model, every, 0
        average: Any = get_ema_multi_avg_fn(decay**every)  # type: ignore[no-untyped-call]
        self.average = AveragedModel(model, multi_avg_fn=average)

    @property
    def module(self) -> nn.Module:
        """The model with averaged weights."""
        found: nn.Module = self.average.module
        return found

    def on_step(self, trainer: Trainer, loss: float | None) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            trainer.sync()
            self.average.update_parameters(self.model)


class CSVLog:
    """Writes each epoch's numbers as a row of a CSV file; a file that is there is gone on with.

    Parameters
    ----------
    path : path
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def on_epoch(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        if trainer._run.world.rank != 0:  # one of several processes: the first one writes
            return
        numbers = {"epoch": trainer.epochs, "updates": trainer.updates, "lr": trainer.lr, **row}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists() or self.path.stat().st_size == 0
        with self.path.open("a", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            if new:
                rows.writerow(numbers)
            rows.writerow(numbers.values())
