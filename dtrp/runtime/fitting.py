"""The loop over epochs that `Trainer.fit` runs, and what looks on: a bar, objects with ``on_step`` and the
like."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arguments import as_call, check_loader, length
from .checkpoint import is_savable
from .config import short
from .evaluation import Measure
from .folder import existing
from .random import random_state, set_random_state
from .stats import balance

if TYPE_CHECKING:
    from .trainer import Trainer

log = logging.getLogger("dtrp")
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
PACE = 0.5  # seconds between looks at the stages, while a bar is shown
_EMPTY = (
    "gave no batch in epoch {}; give fit a loader that can be gone through once per epoch and is not empty "
    "(with drop_last=True, batch_size must not exceed the data)"
)
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
                said = getattr(one, moment)(trainer, what)  # a truth value of numpy's or torch's counts, too
                ends |= str(getattr(said, "dtype", type(said).__name__)).endswith("bool") and bool(said)
        return ends


@dataclass
class Loop:
    """Where a `fit` is: what a run that is saved in the middle of it has to know to go on from there.

    Attributes
    ----------
    rows : list
        Of the epochs that are over.
    fed : int
        Batches of the present one.
    begun : dict
        The generators' states when it began, the caller's and those of the loader; between two, the latter.
    ended : bool
        Whether the run was ended before its last epoch.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    fed: int = 0
    begun: dict[str, Any] = field(default_factory=dict)
    ended: bool = False
    generators: Sequence[torch.Generator] = ()

    def export(self) -> dict[str, Any]:
        """As plain data."""
        rows = [{name: value for name, value in row.items() if is_savable(value)} for row in self.rows]
        begun = self.begun if self.fed else {"loader": self._states()}
        return {"rows": rows, "fed": self.fed, "begun": begun, "ended": self.ended}

    def epoch(self, loader: Any, number: int) -> Iterator[Any]:
        """The batches that are still to come of an epoch, counted over all calls of `fit`: the same ones as
        if nothing had been."""
        for part in _parts(loader):
            if hasattr(part, "set_epoch"):
                part.set_epoch(number)
        found = (getattr(part, "generator", None) for part in _parts(loader))
        self.generators = list(dict.fromkeys(g for g in found if isinstance(g, torch.Generator)))
        skip, now = self.fed, random_state() if self.fed else None
        if (states := self.begun.get("loader")) is not None:  # resumed
            states = [states] if isinstance(states, Tensor) else states  # before there could be several
            for generator, state in zip(self.generators, states, strict=False):
                generator.set_state(state)
        if skip:
            set_random_state(self.begun["random"])
        else:
            self.begun = {"random": random_state(), "loader": self._states()}
        for i, batch in enumerate(loader):
            if i < skip:
                if i == skip - 1 and now is not None:  # the next batch's own draws begin there
                    set_random_state(now)
                continue
            self.fed += 1
            yield batch

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self.generators]

    def close(self, row: dict[str, Any]) -> None:
        """The epoch is over."""
        self.rows.append(row)
        self.fed, self.begun = 0, {}


def _parts(loader: Any) -> list[Any]:
    """A loader, and whatever of it may have another order, or other samples, in each epoch."""
    groups = getattr(loader, "batch_sampler", None)
    found = loader, getattr(loader, "sampler", None), groups, getattr(groups, "sampler", None)
    return list({id(part): part for part in (*found, getattr(loader, "dataset", None))}.values())


def fit(
    trainer: Trainer,
    loader: Iterable[Any],
    epochs: int,
    val_loader: Iterable[Any] | None,
    metric: Any,
    resume: str | os.PathLike[str] | None = None,
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
    if val_loader is not None:
        check_loader(val_loader, trainer.config.loss_fn is not None)
        Measure.of(trainer._run.loss_fn, metric)
        if epochs > 1 and isinstance(val_loader, Iterator):
            raise ValueError(
                f"epochs={epochs} with a {type(val_loader).__name__} as val_loader, which can be gone "
                f"through only once; give a list or a DataLoader"
            )
    if 0 < trainer._run.exact_updates < 1:
        trainer._run.exact_updates = _share(trainer, loader, epochs)
    loop = trainer._run.loop = Loop() if resume is None else resumed(trainer, resume)
    if len(loop.rows) >= epochs > 0:
        log.warning("%s has %d epochs already, of %d: none is trained now", resume, len(loop.rows), epochs)
    if loop.ended:
        done = len(loop.rows), epochs
        log.warning("%s was ended by a callback, after %d of %d epochs: none is trained now", resume, *done)
    trainer._rebalancer.expect(loader, epochs - len(loop.rows), trainer._history.fed - loop.fed)
    while len(loop.rows) < epochs and not loop.ended:
        epoch, before = len(loop.rows), trainer._history.fed - loop.fed
        ends = False
        with Bar(loader, f"epoch {epoch + 1}/{epochs}", trainer) as bar:
            for batch in bar.over(loop.epoch(loader, trainer.epochs)):
                args, kwargs = as_call(batch)
                loss = trainer.step(*args, **kwargs)
                bar.show(loss)
                if ends := trainer._callbacks.call("on_step", trainer, loss):
                    break
            if trainer._history.fed == before:
                raise ValueError(f"the loader {_EMPTY.format(epoch + 1)}")
            trainer._run.drain(close_group=True)
            losses = [loss for loss in trainer._history.losses[before:] if math.isfinite(loss)]
            row: dict[str, Any] = {"train_loss": math.fsum(losses) / len(losses) if losses else math.nan}
            if val_loader is not None:
                found = trainer.evaluate(val_loader, metric=metric)
                if not found:
                    raise ValueError(f"the val_loader {_EMPTY.format(epoch + 1)}")
                row |= found
            bar.end(row)
        trainer.end_epoch(row)
        loop.close(row)
        loop.ended = trainer._callbacks.call("on_epoch", trainer, row) or ends
        if resume is not None:
            trainer.save(resume)
    return loop.rows


def stepped_on(metrics: Sequence[float | Mapping[str, Any]], aim: str) -> float:
    """What a scheduler steps on that asks for a metric to be small ("min") or large ("max"): a value, or the
    one among an epoch's numbers that is meant."""
    if not metrics:
        raise TypeError(
            "the lr_scheduler steps on a metric: end_epoch(loss), or end_epoch(trainer.evaluate(val_loader))"
        )
    found = metrics[0]
    if not isinstance(found, Mapping):
        return found
    losses = [name for name in ("loss", "train_loss") if name in found]
    names = losses[:1] if aim == "min" else [name for name in found if name not in losses]
    if len(names) != 1:
        raise ValueError(
            f"the lr_scheduler has mode='max': it steps on a metric that is to grow, and the epoch has "
            f"{', '.join(names) or 'none'}. Give fit a val_loader and one metric=, or choose the value in a "
            f"loop of your own: end_epoch(value)"
        )
    value: float = found[names[0]]
    return value


def resumed(trainer: Trainer, path: str | os.PathLike[str]) -> Loop:
    """Where the run was that was saved there, and that the trainer has taken over; the start, without one."""
    if not trainer._run.world.first("looking for a saved run", lambda: existing(Path(path)).exists()):
        return Loop()
    return Loop(**trainer._run.load(path).get("loop", {}))


def _share(trainer: Trainer, loader: Iterable[Any], epochs: int) -> float:
    """The exact start in updates, given as a share."""
    batches = length(loader)
    if batches is None:
        raise ValueError(
            f"exact_start={trainer.config.exact_start!r} is a share of the run, whose length a "
            f"{type(loader).__name__} does not tell; give a number of updates"
        )
    of_each = trainer.config.accumulate * trainer._run.joiner.size
    return round(trainer._run.exact_updates * batches * epochs / of_each)


class Bar:
    """A loader with a tqdm bar over it, or just the loader.

    tqdm never sees the loader itself: ``tqdm.auto`` would ask it for an iterator that nobody uses, which
    moves on the generator that a `DataLoader` shuffles by and starts its worker processes twice.
    """

    def __init__(self, loader: Iterable[Any], title: str, trainer: Trainer) -> None:
        self.loader, self.trainer = loader, trainer
        self.bar: Any = None
        if trainer.progress:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=length(loader), desc=title, bar_format=_BAR)
        self.looked = time.monotonic()
        self.samples = trainer.samples

    def __enter__(self) -> Bar:
        return self

    def over(self, batches: Iterable[Any]) -> Iterator[Any]:
        """These batches, of the loader's; the bar moves with them."""
        if self.bar is not None and not self.trainer.samples:
            self.bar.set_postfix_str("waiting for the stages to start")
        for batch in batches:
            yield batch
            if self.bar is not None:
                self.bar.update()

    def show(self, loss: float | None) -> None:
        """The newest loss, and now and then how fast and how even the stages run."""
        now = time.monotonic()
        if self.bar is None or now - self.looked < PACE:
            return
        if loss is None:
            self.bar.set_postfix_str("the pipeline fills")
            return
        rate = (self.trainer.samples - self.samples) / (now - self.looked)
        self.looked, self.samples = now, self.trainer.samples
        shown = {"train_loss": f"{loss:.4f}", "samples/s": f"{rate:.0f}"}
        if stats := self.trainer.glance():
            shown["balance"] = f"{balance(stats):.2f}"
        self.bar.set_postfix(shown)

    def end(self, row: Mapping[str, Any]) -> None:
        """What the epoch came to; it stays on the screen."""
        if self.bar is not None:
            self.bar.bar_format = "{desc}: {n_fmt} batches, {elapsed}{postfix}"  # with room for the numbers
            self.bar.set_postfix({k: f"{v:.4f}" for k, v in row.items() if isinstance(v, (int, float))})

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.close()
