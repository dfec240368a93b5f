"""The user's handle on a training run: batches in, losses out, weights back in the model at the end."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from types import TracebackType
from typing import Any, Literal, Self

from torch import Tensor

from . import interrupts
from .arguments import as_call, feeds, n_samples, take_target
from .batch import Feed
from .board import Board
from .checkpoint import read_checkpoint, write_checkpoint
from .compensation import WARMUP, Joiner, check_compensation
from .config import TrainConfig
from .evaluation import Measure, combine
from .events import Event
from .executors import EXECUTORS
from .executors.base import Executor
from .host import Host
from .ledger import Ledger
from .progress import Bar
from .run_state import RunState, check_builds
from .session import Session
from .stats import StageStats
from .timeline import write_timeline


class Trainer:
    """Trains a compiled model as a decoupled pipeline. A context manager.

    Made by `Pipeline.trainer`, whose documentation explains the settings. Workers start at the first batch
    and end when the context is left; the trained weights are in the model then.
    """

    def __init__(
        self,
        host: Host,
        config: TrainConfig,
        *,
        executor: str = "auto",
        progress: bool = False,
        record: bool = False,
        timeline: str | os.PathLike[str] | None = None,
        watchdog: float = 60.0,
        batch_compensation: int | Literal["auto"] = 1,
        compensation_warmup: int = WARMUP,
        tensorboard: str | os.PathLike[str] | None = None,
    ) -> None:
        if executor not in EXECUTORS:
            raise ValueError(f"executor={executor!r}: expected one of {', '.join(map(repr, EXECUTORS))}")
        if isinstance(watchdog, bool) or not isinstance(watchdog, (int, float)) or not watchdog > 0:
            raise ValueError(f"watchdog={watchdog!r}: expected a number of seconds > 0")
        check_compensation(batch_compensation, compensation_warmup)
        check_builds(host.model, config)
        self.config = config
        self._ledger = Ledger()
        self.progress = progress
        self._host = host
        self._launch: dict[str, Any] = {
            "kind": executor,
            "record": record or timeline is not None,
            "watchdog": float(watchdog),
        }
        self._timeline = timeline
        self._events: list[Event] = []
        self._session: Session | None = None
        self._joiner = Joiner(1 if batch_compensation == "auto" else batch_compensation, compensation_warmup)
        self._tunes = batch_compensation == "auto"  # and has not found a size yet
        self._resume: RunState | None = None  # loaded, to be handed to the stages when they start
        self._board = None if tensorboard is None else Board(tensorboard)
        self._stats: list[StageStats] = []
        self._closed = False

    @property
    def losses(self) -> list[float]:
        """The losses of all finished batches, in batch order."""
        return self._ledger.losses

    @property
    def skipped(self) -> int:
        """Batches that were given up because their loss was not finite (``on_nonfinite="skip"``)."""
        return self._ledger.skipped

    @property
    def epochs(self) -> int:
        """Epochs that `fit` has finished, or `end_epoch` was called for; saved and restored."""
        return self._ledger.epochs

    @property
    def samples(self) -> int:
        """Samples fed since this trainer was made."""
        return self._ledger.samples

    # ---- training --------------------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> float | None:
        """Feed one batch: ``step(*inputs, target, **inputs_by_name)``.

        The last positional argument is the target (with ``loss_fn=None`` there is none), keyword arguments
        go to the model.

        Returns
        -------
        float or None
            The newest finished batch's loss; ``None`` while the pipeline fills. Never waits for a device
            just to read a loss.

        Raises
        ------
        WorkerError
            A stage failed, on this batch or an earlier one.
        TypeError, ValueError
            The arguments do not fit the model.
        """
        session, tensors, target = self._ready(args, kwargs)
        with interrupts.held():
            joint = self._joiner.add(tensors, target)
            self._ledger.fed += 1
            self._ledger.samples += n_samples(tensors)
            if joint is not None:
                session.enter(joint)
            return self._collect()

    def flush(self) -> None:
        """Train until nothing is in flight."""
        if self._session is None:
            return
        with interrupts.held():
            joint = self._joiner.rest()
            if joint is not None:
                self._session.enter(joint)
            self._session.drain()
            self._collect()

    def fit(
        self,
        loader: Iterable[Any],
        epochs: int,
        val_loader: Iterable[Any] | None = None,
        *,
        metric: Any = None,
    ) -> list[dict[str, float]]:
        """Train ``epochs`` times over ``loader``, with a progress bar if the trainer was given one.

        Parameters
        ----------
        loader : iterable
            Of ``(*inputs, target)``, or dicts of keyword arguments (with a ``"target"``).
        epochs : int
            How often.
        val_loader : iterable, optional
            Evaluated after each epoch.
        metric
            As in `evaluate`.

        Returns
        -------
        list of dict
            Per epoch: ``train_loss`` (mean over its batches that were not skipped) and what `evaluate` gives.
        """
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
            raise ValueError(f"epochs={epochs!r}: expected an int >= 0")
        history: list[dict[str, float]] = []
        for epoch in range(epochs):
            first = len(self.losses) + self._ledger.outstanding
            with Bar(loader, f"epoch {epoch + 1}/{epochs}", self) as bar:
                for batch in bar:
                    args, kwargs = as_call(batch)
                    bar.show(self.step(*args, **kwargs))
            self.flush()
            losses = [loss for loss in self.losses[first:] if math.isfinite(loss)]
            row = {"train_loss": math.fsum(losses) / len(losses) if losses else math.nan}
            if val_loader is not None:
                row |= self.evaluate(val_loader, metric=metric)
            self.end_epoch(row.get("loss", row["train_loss"]))
            history.append(row)
        return history

    def end_epoch(self, *metrics: float) -> None:
        """Step the learning-rate schedulers, where they step per epoch (``scheduler_step="epoch"``).

        `fit` does this by itself; in a loop of one's own, call it after each epoch, with the validation
        loss where the scheduler wants a metric (``ReduceLROnPlateau``).
        """
        self._ledger.epochs += 1
        if self.config.scheduler_step == "epoch" and self._session is not None:
            self.flush()
            self._session.call("schedule", *metrics)

    def evaluate(self, loader: Iterable[Any], metric: Any = None) -> dict[str, float]:
        """Loss and metrics over ``loader``, in eval mode, with the current weights.

        Drains the pipeline first; training goes on afterwards as if nothing had been.

        Parameters
        ----------
        loader : iterable
            As for `fit`; any batch sizes.
        metric : callable or dict of callables, optional
            ``(output, target) -> number``, a mean over the batch. Default: accuracy, for class targets.

        Returns
        -------
        dict
            ``loss`` and the metrics, means weighted by batch size; empty for an empty loader.
        """
        measure = Measure.of(self.config.loss_fn, metric)
        self.flush()
        batches = iter(loader)
        first = next(batches, None)
        if first is None:
            return {}

        def fed() -> Iterator[list[Feed | None]]:
            for number, batch in enumerate(chain([first], batches)):
                session, tensors, target = self._ready(*as_call(batch))
                yield feeds(session.evaluation, number, tensors, target)

        session, *_ = self._ready(*as_call(first))
        found = combine(session.executor.evaluate(fed(), measure))
        if self._board is not None:
            self._board.evaluation(len(self.losses), found)
        return found

    # ---- seeing it run ---------------------------------------------------------------------------------

    @property
    def stats(self) -> list[StageStats]:
        """Each stage's measurements so far; empty before the first batch."""
        if self._executor is not None and self._executor.failure is None:
            self._stats = self._executor.call("stats")
        return self._stats

    def glance(self) -> list[StageStats] | None:
        """Each stage's measurements of a moment ago, without waiting for the stages."""
        return None if self._executor is None else self._executor.glance()

    @property
    def events(self) -> list[Event]:
        """What each stage did when, so far (with ``record=True`` or a timeline)."""
        if self._executor is not None and self._executor.failure is None:
            self._events += [e for taken in self._executor.call("take_events") for e in taken]
        return self._events

    # ---- the model and this run ------------------------------------------------------------------------

    def sync(self) -> None:
        """Bring the present weights and buffers into ``model``; batches in flight stay in flight."""
        if self._session is not None:
            self._session.sync()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the run to one file: weights, optimizers, schedulers, counters, losses, random states.

        Drains the pipeline first. The file is written aside and renamed: a crash or a full disk in the
        middle leaves the previous one. It is plain data, so ``torch.load(path, weights_only=True)["model"]``
        is the model's ``state_dict`` (original names), for ``load_state_dict`` with ``strict=True``.

        Raises
        ------
        CheckpointError
            It cannot be written; the previous file is as it was.
        """
        if self._closed:
            raise RuntimeError("this trainer is closed; save before leaving it")
        self.flush()
        self.sync()
        stages = [] if self._executor is None else self._executor.call("training_state")
        state = self._resume or RunState.gather(self._host.model, self.config, stages, self._counters())
        write_checkpoint(path, state.content(self._host.model))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over a run that `save` wrote: the next step is the one that would have come next.

        The number of stages, the plan and the executor may be others. Batches in flight are finished first;
        what they trained is then overwritten. Reading executes no code from the file.

        Raises
        ------
        CheckpointError
            The file is truncated, foreign or altered, or belongs to another model or optimizer. Nothing in
            memory was changed.
        """
        if self._closed:
            raise RuntimeError("this trainer is closed; make a new one with pipe.trainer(...)")
        state = RunState.read(read_checkpoint(path), os.fspath(path))
        state.check(self._host.model, self.config)
        self.flush()
        with interrupts.held():
            state.restore_model(self._host.model)
            state.restore_random()
            self._restore_counters(state.counters)
            if self._session is None:
                self._resume = state
            else:
                self._session.hand_over(state)

    def close(self) -> None:
        """Finish the batches in flight, bring the weights into ``model`` and end the workers."""
        self._leave(finish=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(finish=kind is None)

    def _leave(self, *, finish: bool) -> None:
        if self._closed:
            return
        try:
            if self._executor is not None and self._executor.failure is None:
                if finish:
                    self.flush()
                with interrupts.held():
                    self.sync()
                    self._stats = self.stats
                    if self._timeline is not None:
                        write_timeline(self._timeline, self.events)
                    elif self._launch["record"]:
                        _ = self.events
        finally:
            self._closed = True
            if self._board is not None:
                self._board.close()
            if self._session is not None:
                self._session.executor.close()
                self._session = None

    # ---- how -------------------------------------------------------------------------------------------

    @property
    def _executor(self) -> Executor | None:
        return None if self._session is None else self._session.executor

    def _ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Session, list[Tensor], Any]:
        """The running stages, a batch's tensors and its target; what can be refused is refused first."""
        if self._closed:
            raise RuntimeError("this trainer is closed; make a new one with pipe.trainer(...)")
        inputs, named, target = take_target(args, kwargs, has_target=self.config.loss_fn is not None)
        if self._session is None:
            self._host.prepare(inputs, named)
        tensors = self._host.bind(inputs, named)
        if self._session is None:
            self._host.check_loss(self.config, tensors, target)
            self._session = Session(
                self._host,
                self.config,
                self._ledger,
                self._joiner,
                tunes=self._tunes,
                resume=self._resume,
                **self._launch,
            )
            self._resume = None
        return self._session, tensors, target

    def _collect(self) -> float | None:
        if self._executor is not None:
            new = self._ledger.settle(self._executor.losses())
            if self._board is not None:
                self._board.losses(new)
                if self._board.due() and (stats := self.glance()):
                    self._board.stages(len(self.losses), stats)
        return self.losses[-1] if self.losses else None

    # ---- resuming --------------------------------------------------------------------------------------

    def _counters(self) -> dict[str, Any]:
        if self._session is not None:
            self._tunes = self._session.tuner is not None
        return {
            **self._ledger.export(),
            "updates": self._joiner.updates,
            "joined": self._joiner.size,
            "tunes": self._tunes,
            "seed": None if self._session is None else self._session.seed,
        }

    def _restore_counters(self, counters: Mapping[str, Any]) -> None:
        self._ledger.restore(counters)
        self._joiner.updates = counters["updates"]
        if self._tunes and not counters["tunes"]:
            self._tunes, self._joiner.size = False, counters["joined"]
            if self._session is not None:
                self._session.tuner = None
