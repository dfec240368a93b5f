"""The user's handle on a training run: batches in, losses out, weights back in the model."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from torch.utils.data import DistributedSampler

from . import evaluation, interrupts
from .checkpoint import as_folder
from .config import Launch, TrainConfig
from .events import Event, write_timeline
from .fitting import Callbacks, fit, stepped_on
from .rebalance import Rebalancer
from .run import Run, refuse_inference
from .stats import StageStats

if TYPE_CHECKING:
    from ..planning import Planning


_NUMBER = (
    "If this was asked of what trainer.step gave: that is the newest finished batch's loss, a number, and "
    "None while the pipeline fills; trainer.losses has all of them. The stages go backward and step by "
    "themselves: there is nothing to call."
)


class Trainer:
    """Trains a compiled model as a decoupled pipeline. A context manager.

    Made by `Pipeline.trainer`, whose documentation explains the settings. Workers start at the first batch
    and end when the context is left; the trained weights are in the model then. They are there too after
    `flush`, `evaluate`, `fit` and `save`, and after a stage has failed.
    """

    def __init__(self, compiled: Planning, config: TrainConfig, launch: Launch) -> None:
        self._run = Run(compiled, config, launch)
        self.progress = launch.progress and self._run.world.rank == 0
        self._history = self._run.history
        self._rebalancer = Rebalancer(launch.rebalance)
        self._callbacks = Callbacks()  # of the `fit` that runs
        self._launch, self._saved = launch, time.monotonic()
        self._events: list[Event] = []
        self._stats: list[StageStats] = []

    def __getattr__(self, name: str) -> Any:
        if hasattr(type(self), name):  # a property failed: let it say why
            return object.__getattribute__(self, name)
        raise AttributeError(
            f"a Trainer has no {name!r}; step(x, y) does forward, backward and the optimizer's step, rates "
            f"follow the lr_scheduler given to pipe.trainer(...), the model is yours"
        )

    @property
    def config(self) -> TrainConfig:
        """The settings; once the first batch has been seen, with all of them decided."""
        return self._run.config

    @property
    def losses(self) -> list[float]:
        """The losses of all finished batches, in batch order."""
        return self._run.heard.losses

    @property
    def skipped(self) -> int:
        """Batches given up because their loss or gradients were not finite (``on_nonfinite="skip"``)."""
        return self._run.heard.skipped

    @property
    def epochs(self) -> int:
        """Epochs that `fit` has finished, or `end_epoch` was called for; saved and restored."""
        return self._history.epochs

    @property
    def samples(self) -> int:
        """Samples fed since this trainer was made."""
        return self._history.samples

    @property
    def updates(self) -> int:
        """Optimizer updates that the batches fed so far bring, batches in flight included."""
        return self._history.updates

    @property
    def lr(self) -> float:
        """The learning rate of the first group of parameters, as of the newest finished batch."""
        lr, executor = self._run.heard.lr, self._run.executor
        if executor is not None and not self._history.tells_lr and self._run.world.executor != "torchrun":
            lr = next((lr for lrs in executor.call("learning_rates") for lr in lrs), lr)
        return math.nan if lr is None else lr

    @lr.setter
    def lr(self, value: float) -> None:
        raise AttributeError(
            "the learning rate is the optimizer's, and follows lr_scheduler=..., such as "
            "partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=f)"
        )

    @property
    def grad_norm(self) -> float:
        """The norm of the gradients that the stages stepped with last, before clipping, over all stages.

        Asks the stages, and so waits for the batches that are with them.
        """
        executor = self._run.executor
        return math.nan if executor is None else math.sqrt(math.fsum(executor.call("last_squared_norm")))

    # ---- training --------------------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> float | None:
        """Feed one batch: ``step(*inputs, target, **inputs_by_name)``.

        The last positional argument is the target (with ``loss_fn=None`` there is none), keyword arguments
        go to the model. ``extra={"beta": 0.5}`` gives the loss of this batch arguments by name: tensors
        (cut into micro-batches where they are as long as the batch), numbers, strings. The batch is copied:
        its tensors may be filled again at once.

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
        self._run.not_asked()
        refuse_inference()
        executor, tensors, target = self._run.ready(args, kwargs)
        with interrupts.held(), self._run.rescued():
            self._run.add(executor, tensors, target)
        self._rebalancer.after_step(self)
        loss = self._history.losses[-1] if self._history.losses else None
        if self._launch.autosave is not None:
            path, seconds = self._launch.autosave
            if self._run.world.due("autosave", self._saved + seconds):
                self.save(path)
        return loss

    def flush(self) -> None:
        """Train until nothing is in flight; the model has the newest weights then.

        What is written into the model's weights after that, before the next batch, counts.
        """
        self._run.drain()

    def fit(
        self,
        loader: Iterable[Any],
        epochs: int,
        val_loader: Iterable[Any] | None = None,
        *,
        metric: Any = None,
        callbacks: Sequence[Any] = (),
        resume: str | os.PathLike[str] | None = None,
    ) -> list[dict[str, Any]]:
        """Train ``epochs`` times over ``loader``, with a progress bar if the trainer was given one.

        At the end of an epoch an incomplete group of accumulated batches is stepped with, as a mean of its
        own, as accelerate and Lightning do.

        Parameters
        ----------
        loader : iterable
            Of ``(*inputs, target)``, or dicts of keyword arguments of `step` (with a ``"target"``).
        epochs : int
            How often.
        val_loader : iterable, optional
            Evaluated after each epoch.
        metric
            As in `evaluate`.
        callbacks : list
            Objects with any of ``on_step(trainer, loss)``, ``on_epoch(trainer, row)`` (the numbers of this
            epoch) and ``on_save(trainer, path)``. One that returns True ends the run. `dtrp.callbacks` has
            some.

        resume : path, optional
            Of a file or folder of `save`. If there is one, its run is taken over first, and goes on at the
            batch after the last one that it had trained; epochs that are over count. It is saved there at the
            end of every epoch (and within, by ``autosave`` with the same path). So a script that a launcher
            starts again goes on by itself.

        Returns
        -------
        list of dict
            Per epoch: ``train_loss`` (mean over its batches that were not skipped); with a ``val_loader``
            what `evaluate` gives, too: ``loss``, and ``accuracy`` or the metrics by their names.

        Raises
        ------
        ValueError
            A loader gives no batch in some epoch (a generator can be gone through only once).
        """
        self._callbacks = Callbacks(callbacks)
        try:
            return fit(self, loader, epochs, val_loader, metric, resume)
        finally:
            self._run.loop = None
            self._callbacks = Callbacks()

    def end_epoch(self, *metrics: float | Mapping[str, Any]) -> None:
        """Step the learning-rate schedulers, where they step per epoch (``scheduler_step="epoch"``).

        `fit` does this by itself; in a loop of one's own, call it after each epoch. Where the scheduler wants
        a metric (``ReduceLROnPlateau``): with its value, or with what `evaluate` gave, of which it is the
        loss, or with ``mode="max"`` the metric.

        Raises
        ------
        TypeError, ValueError
            The scheduler wants a metric, and it is not told which.
        """
        executor = self._run.executor
        if self.config.scheduler_step == "epoch" and executor is not None:
            self.flush()
            aims = [aim for aim in executor.call("scheduler_aims_at") if aim]
            metrics = (stepped_on(metrics, aims[0]),) if aims else ()
            executor.call("schedulers", *metrics)
            self._history.lr = next((lr for lrs in executor.call("learning_rates") for lr in lrs), None)
        self._history.epochs += 1

    def evaluate(self, loader: Iterable[Any], metric: Any = None) -> dict[str, Any]:
        """Loss and metrics over ``loader``, in eval mode, with the current weights.

        Drains the pipeline first; training goes on afterwards as if nothing had been.

        Parameters
        ----------
        loader : iterable
            As for `fit`; any batch sizes.
        metric : callable, torchmetrics.Metric, MetricCollection, or dict of such, optional
            ``(output, target) -> number``, a mean over the batch; or an object of torchmetrics, which sees
            all batches and is asked at the end (a copy is; it gets the output's ``logits``, where there are
            any). Default: accuracy, for class targets.

        Returns
        -------
        dict
            ``loss`` and the metrics, means weighted by batch size, or what torchmetrics computes: numbers,
            or tensors of more than one. Empty for an empty loader.
        """
        return evaluation.evaluate(self._run, loader, metric)

    def predict(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The model's output for each batch, in eval mode, with the current weights; in host memory.

        Drains the pipeline first; training goes on afterwards as if nothing had been. Before the first
        step, and after the last, ``pipe(x)`` gives outputs.

        Parameters
        ----------
        loader : iterable
            Of the model's arguments: a tensor, a tuple, or a dict by name; no targets.

        Yields
        ------
        What the model returns.
        """
        yield from evaluation.predict(self._run, loader)

    def sampler(
        self, dataset: Any, *, shuffle: bool = True, seed: int = 0, drop_last: bool = False
    ) -> DistributedSampler[Any]:
        """Shares a data set out among replicas: ``DataLoader(data, 64, sampler=trainer.sampler(data))``.

        All stages of a replica get the same samples. With one replica those are all samples. `fit` tells it
        each epoch (``set_epoch``); in a loop of one's own, call that before each.

        Parameters
        ----------
        dataset
            With a length.
        shuffle, seed, drop_last
            As of ``torch.utils.data.DistributedSampler``.
        """
        replicas, replica = self._run.world.replicas
        return DistributedSampler(
            dataset, num_replicas=replicas, rank=replica, shuffle=shuffle, seed=seed, drop_last=drop_last
        )

    # ---- seeing it run ---------------------------------------------------------------------------------

    @property
    def stats(self) -> list[StageStats]:
        """Each stage's measurements so far; empty before the first batch."""
        if (executor := self._run.alive) is not None:
            self._stats = executor.call("stats")
        return self._stats

    @property
    def report(self) -> Any:
        """Predicted beside measured: a `dtrp.TrainingReport`; print it.

        Raises
        ------
        RuntimeError
            No batch was trained yet.
        """
        stats = self.stats
        if not stats:
            raise RuntimeError(
                "nothing was measured yet: trainer.report needs some batches, trainer.step(...)"
            )
        run, moves = self._run, self._rebalancer.moves
        return run.compiled.report_on(run.config, run.expected, stats, self._run.world.executor, moves)

    def glance(self) -> list[StageStats] | None:
        """Each stage's measurements of a moment ago, without waiting for the stages."""
        return None if self._run.executor is None else self._run.executor.glance()

    @property
    def events(self) -> list[Event]:
        """What each stage did when, so far (with ``record=True`` or a timeline)."""
        if (executor := self._run.alive) is not None:
            taken = executor.call("take_events")
            self._events += [event for events in taken for event in events]
        return self._events

    # ---- the model and this run ------------------------------------------------------------------------

    def sync(self) -> None:
        """Bring the present weights, buffers and attributes into ``model``; batches in flight stay there.

        Only needed in the middle, and only where no method of the model is called or asked (looks.py): after
        `flush`, `evaluate`, `fit` and `save` they are there.
        """
        self._run.changes.hand_in(last=True)
        self._run.sync()

    def save(self, path: str | os.PathLike[str], *, format: str | None = None) -> None:
        """Write the run to disk: weights, optimizers, schedulers, counters, losses, random states.

        Drains the pipeline first. What is written is written aside and renamed: a crash or a full disk in
        the middle leaves the previous one. A file is plain data, so ``torch.load(path,
        weights_only=True)["model"]`` is the model's ``state_dict`` (original names), for
        ``load_state_dict`` with ``strict=True``.

        Parameters
        ----------
        path : path-like
            Of the file; ending in ``/``: of a folder of torch.distributed.checkpoint.
        format : {"file", "dcp"}, optional
            Says which of the two, whatever the path's end.

        Raises
        ------
        CheckpointError
            It cannot be written; the previous one is as it was.
        """
        folder = as_folder(path, format)
        if self._run.closed:
            raise RuntimeError("this trainer is closed; save before leaving it")
        self._run.world.write(path, self._run, folder=folder)
        self._saved = time.monotonic()
        self._callbacks.call("on_save", self, path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over a run that `save` wrote: the next step is the one that would have come next.

        The number of stages, the plan and the executor may be others. Batches in flight are finished first;
        what they trained is then overwritten. Reading executes no code from the file.

        Raises
        ------
        CheckpointError
            It is truncated, foreign or altered, or belongs to another model or optimizer. Nothing in
            memory was changed.
        """
        self._run.load(path)

    def close(self) -> None:
        """Finish the batches in flight, bring the weights into ``model`` and end the workers."""
        self._leave(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        if self._run.closed:
            return
        try:
            asked = isinstance(error, AttributeError) and isinstance(error.obj, float | None) and error.name
            if error is not None and (asked or (isinstance(error, TypeError) and "NoneType" in str(error))):
                error.add_note(_NUMBER)
            if error is not None:
                self._run.world.leave(error)
            if self._run.alive:
                if error is None:
                    self._run.changes.hand_in(last=True, leaving=True)
                    self.flush()
                with interrupts.held(), self._run.rescued():
                    self._run.sync(news=True)
                    self._stats = self.stats
                    events = self.events if self._run.records else []
                    if self._launch.timeline is not None and self._run.world.rank == 0:
                        write_timeline(self._launch.timeline, events)
        finally:
            self._run.close()
