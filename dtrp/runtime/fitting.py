"""The loop over epochs that `Trainer.fit` runs, and what looks on: objects with ``on_step`` and the like."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import TYPE_CHECKING, Any

from .arguments import as_call, check_loader
from .config import short
from .progress import Bar

if TYPE_CHECKING:
    from .trainer import Trainer

MOMENTS = ("on_step", "on_epoch", "on_save")


class Callbacks:
    """Objects with some of the methods in `MOMENTS`; each is called with the trainer first.

    Raises
    ------
    TypeError
        One of them has none of these.
    """

    def __init__(self, given: Sequence[Any] = ()) -> None:
        if not isinstance(given, (list, tuple)):
            raise TypeError(f"callbacks={short(given)}: expected a list, such as [EarlyStopping(3)]")
        for one in given:
            if isinstance(one, type) or not any(callable(getattr(one, m, None)) for m in MOMENTS):
                raise TypeError(
                    f"callbacks has {short(one)}: expected an object with a method on_step(trainer, loss), "
                    f"on_epoch(trainer, row) or on_save(trainer, path)"
                )
        self.given = tuple(given)

    def call(self, moment: str, trainer: Trainer, what: Any) -> bool:
        """Tell all of them; whether one wants the run to end (returned True)."""
        ends = False
        for one in self.given:
            if hasattr(one, moment):
                ends |= getattr(one, moment)(trainer, what) is True
        return ends


def fit(
    trainer: Trainer, loader: Iterable[Any], epochs: int, val_loader: Iterable[Any] | None, metric: Any
) -> list[dict[str, Any]]:
    """See `Trainer.fit`."""
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
        raise ValueError(f"epochs={short(epochs)}: expected an int >= 0, as in fit(loader, epochs=10)")
    check_loader(loader, trainer.config.loss_fn is not None)
    if epochs > 1 and isinstance(loader, Iterator):
        raise ValueError(
            f"epochs={epochs} with a {type(loader).__name__}, which can be gone through only once; give "
            f"fit a list or a DataLoader, or train with epochs=1"
        )
    if 0 < trainer._exact_updates < 1:
        trainer._exact_updates = _share(trainer, loader, epochs)
    trainer._rebalancer.expect(loader, epochs, trainer._history.fed)
    history: list[dict[str, Any]] = []
    for epoch in range(epochs):
        before = trainer._history.fed
        ends = False
        with Bar(loader, f"epoch {epoch + 1}/{epochs}", trainer) as bar:
            for batch in bar:
                args, kwargs = as_call(batch)
                loss = trainer.step(*args, **kwargs)
                bar.show(loss)
                if ends := trainer._callbacks.call("on_step", trainer, loss):
                    break
        if trainer._history.fed == before:
            raise ValueError(
                f"the loader gave no batch in epoch {epoch + 1}; give fit a loader that can be gone "
                f"through once per epoch and is not empty (with drop_last=True, batch_size must not "
                f"exceed the data)"
            )
        trainer._drain(close_group=True)
        losses = [loss for loss in trainer.losses[before:] if math.isfinite(loss)]
        row: dict[str, Any] = {"train_loss": math.fsum(losses) / len(losses) if losses else math.nan}
        if val_loader is not None:
            row |= trainer.evaluate(val_loader, metric=metric)
        trainer.end_epoch(row.get("loss", row["train_loss"]))
        history.append(row)
        if trainer._callbacks.call("on_epoch", trainer, row) or ends:
            break
    return history


def _share(trainer: Trainer, loader: Iterable[Any], epochs: int) -> float:
    """The exact start in updates, given as a share."""
    if not isinstance(loader, Sized):
        raise ValueError(
            f"exact_start={trainer.config.exact_start!r} is a share of the run, whose length a "
            f"{type(loader).__name__} does not tell; give a number of updates"
        )
    return round(trainer._exact_updates * len(loader) * epochs / trainer.config.accumulate)
