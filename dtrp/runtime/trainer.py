"""The user's handle on a training run: batches in, losses out, weights back in the model."""

from __future__ import annotations

import logging
import math
import os
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from ..errors import WorkerError
from . import interrupts
from .arguments import (
    as_call,
    check_loader,
    feeds,
    follow_batch,
    n_samples,
    split_batch,
    take_target,
    what_step_takes,
)
from .batch import Feed
from .checkpoint import as_folder
from .compensation import WARMUP, Joiner, Mini
from .compiled import Compiled
from .config import TrainConfig, check_launch
from .evaluation import Measure, combine
from .events import Event
from .fitting import Callbacks, Loop, fit
from .handback import Owner, loss_with_tensors
from .history import History
from .inline import Inline
from .loggers import Loggers
from .loss import held_loss, ignored_target
from .optim import state_bytes
from .program import StageProgram
from .rebalance import Move, Rebalancer, check_rebalance
from .run_state import RunState, check_builds, model_groups
from .stats import StageStats
from .timeline import write_timeline
from .world import join

if TYPE_CHECKING:
    from .ranks import Ranks
    from .workers import Workers

    Executor = Inline | Workers | Ranks

_LEFT = (
    "a trainer was let go of without trainer.close(): batches in flight are lost, with worker processes all "
    "since the last flush; use `with pipe.trainer(...) as trainer:`"
)
_ORDER = ("order", "micro_batches", "least_part")  # settings that are chosen for the first batch
log = logging.getLogger("dtrp")


class Trainer:
    """Trains a compiled model as a decoupled pipeline. A context manager.

    Made by `Pipeline.trainer`, whose documentation explains the settings. Workers start at the first batch
    and end when the context is left; the trained weights are in the model then. They are there too after
    `flush`, `evaluate`, `fit` and `save`, and after a stage has failed.
    """

    def __init__(
        self,
        compiled: Compiled,
        config: TrainConfig,
        *,
        executor: str = "auto",
        progress: bool = False,
        record: bool = False,
        timeline: str | os.PathLike[str] | None = None,
        watchdog: float = 60.0,
        batch_compensation: int = 1,
        compensation_warmup: int = WARMUP,
        tensorboard: str | os.PathLike[str] | None = None,
        logger: Any = None,
        autosave: tuple[str | os.PathLike[str], float] | None = None,
        init: Any = None,
        rebalance: Literal["auto", False] | int = False,
    ) -> None:
        check_rebalance(rebalance)
        check_launch(executor, watchdog, batch_compensation, compensation_warmup, autosave, timeline)
        self.config = config
        self._compiled = compiled
        self._record = record or timeline is not None
        self._timeline = timeline
        self._autosave = autosave
        self._init = init
        self._saved = time.monotonic()
        self._owner = Owner(compiled.model, loss_with_tensors(config.loss_fn))
        # A loss with tensors is a module of the last stage.
        self._stage_config = config if self._owner.loss is None else replace(config, loss_fn=held_loss)
        optimizer = check_builds(self._owner, config)
        self._history = History(lr=optimizer.param_groups[0].get("lr"))
        self._optimizer_bytes = state_bytes(optimizer)
        self._expected = compiled.expect(config, self._optimizer_bytes)
        self._rebalancer = Rebalancer(rebalance)
        self._joiner = Joiner(batch_compensation, compensation_warmup)
        self._world = join(executor, compiled.n_stages, float(watchdog))
        first = self._world.rank == 0  # who shows and writes
        self.progress = progress and first
        self._loggers = Loggers(logger if first else None, tensorboard if first else None)
        self._callbacks = Callbacks()  # of the `fit` that runs
        self._events: list[Event] = []
        self._stats: list[StageStats] = []
        self._run: Executor | None = None
        self._loop: Loop | None = None  # of the `fit` that runs
        self._resume: RunState | None = None  # loaded, to be handed to the stages when they start
        self._seed: int | None = None
        self._in_flight = self._stale = (
            False  # in the pipeline; newer weights in the stages than in the model
        )
        self._rescued = _Rescued(self)
        self._modes: list[tuple[nn.Module, bool]] = []  # of all modules, when training began
        self._along: list[bool] = []  # which model inputs have a row for each sample
        self._exact = False  # the exact order is followed for now
        self._exact_updates: float = config.exact_start
        self._closed = False

    @property
    def losses(self) -> list[float]:
        """The losses of all finished batches, in batch order."""
        return self._history.losses

    @property
    def skipped(self) -> int:
        """Batches given up because their loss or gradients were not finite (``on_nonfinite="skip"``)."""
        return self._history.skipped

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
        return math.nan if self._history.lr is None else self._history.lr

    @property
    def grad_norm(self) -> float:
        """The norm of the gradients that the stages stepped with last, before clipping, over all stages.

        Asks the stages, and so waits for the batches that are with them.
        """
        if self._run is None:
            return math.nan
        return math.sqrt(math.fsum(self._run.call("last_squared_norm")))

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
        run, tensors, target = self._ready(args, kwargs)
        with interrupts.held(), self._rescued:
            mini = self._joiner.add(tensors, target)
            self._history.fed += 1
            self._history.samples += n_samples(tensors)
            if mini is not None:
                self._enter(run, mini)
            loss = self._collect()
        if self._rebalancer.after_step(self):
            loss = self.losses[-1]
        if self._autosave is not None and self._world.due(self._history.fed, self._saved + self._autosave[1]):
            self.save(self._autosave[0])
        return loss

    def flush(self) -> None:
        """Train until nothing is in flight; the model has the newest weights then."""
        self._drain()

    def _drain(self, *, close_group: bool = False) -> None:
        if self._run is None:
            return
        with interrupts.held(), self._rescued:
            mini = self._joiner.rest()
            if mini is not None:
                self._enter(self._run, mini)
            closes = close_group and self._history.gathered > 0
            if self._in_flight or closes:
                self._run.drain(close_group=closes)
                self._in_flight = False
            if closes:
                self._history.close_group()
            self._collect(wait=True)
            self.sync()

    def _enter(self, run: Executor, mini: Mini) -> None:
        """A mini-batch goes into the pipeline."""
        parts, weight = list(self._parts(mini)), self._world.weight(mini, self.config)
        for i, (tensors, target, share) in enumerate(parts):
            slot = feeds(self._wiring, self._history.entered, tensors, target, mini.update)
            if len(parts) > 1 or weight != 1.0:
                slot = [feed._replace(part=i, parts=len(parts), share=share * weight) for feed in slot]
            run.feed(slot)
        self._history.enter(mini.update.batches, self.config.accumulate)
        self._in_flight = self._stale = True
        if self.config.exact or self._exact:
            run.drain()
            self._in_flight = False
        if self._exact and self.updates >= self._exact_updates:
            self._follow(run, exact=False)
        run.throttle()

    def _parts(self, mini: Mini) -> Iterator[tuple[Sequence[Tensor], Any, float]]:
        config = self.config
        return split_batch(
            mini.tensors,
            mini.target,
            config.parts,
            least=config.least_part,
            ignored=ignored_target(config.loss_fn),
            along=self._along,
        )

    def _follow(self, run: Executor, *, exact: bool) -> None:
        run.call("follow", exact)
        self._exact = exact

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
            Per epoch: ``train_loss`` (mean over its batches that were not skipped) and what `evaluate` gives.

        Raises
        ------
        ValueError
            The loader gives no batch in some epoch (a generator can be gone through only once).
        """
        self._callbacks = Callbacks(callbacks)
        try:
            return fit(self, loader, epochs, val_loader, metric, resume)
        finally:
            self._loop = None
            self._callbacks = Callbacks()

    def end_epoch(self, *metrics: float) -> None:
        """Step the learning-rate schedulers, where they step per epoch (``scheduler_step="epoch"``).

        `fit` does this by itself; in a loop of one's own, call it after each epoch, with the validation
        loss where the scheduler wants a metric (``ReduceLROnPlateau``).
        """
        self._history.epochs += 1
        if self.config.scheduler_step == "epoch" and self._run is not None:
            self.flush()
            self._run.call("schedulers", *metrics)
            self._history.lr = next((lr for lrs in self._run.call("learning_rates") for lr in lrs), None)

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
        measure = Measure.of(self._stage_config.loss_fn, metric)
        check_loader(loader, self.config.loss_fn is not None)
        self.flush()
        batches = iter(loader)
        first = next(batches, None)
        if first is None:
            return {}
        run, *_ = self._ready(*as_call(first))

        def fed() -> Iterator[list[Feed]]:
            for number, batch in enumerate(chain([first], batches)):
                _, tensors, target = self._ready(*as_call(batch))
                yield feeds(self._eval_wiring, number, tensors, target)

        with self._rescued, closing(run.evaluate(fed(), measure)) as results:
            found = combine(results)
        self._loggers.evaluation(len(self.losses), found)
        return found

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
        if self._run is None:
            raise RuntimeError("no stage runs before the first step (and after the last): use pipe(x)")
        self.flush()
        run = self._run

        def fed() -> Iterator[list[Feed]]:
            for number, batch in enumerate(loader):
                tensors = self._compiled.bind(*as_call(batch))
                yield feeds(self._eval_wiring, number, tensors, None)

        with self._rescued, closing(run.evaluate(fed(), None)) as outputs:
            yield from outputs

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
        replicas, replica = self._world.replicas
        return DistributedSampler(
            dataset, num_replicas=replicas, rank=replica, shuffle=shuffle, seed=seed, drop_last=drop_last
        )

    # ---- seeing it run ---------------------------------------------------------------------------------

    @property
    def stats(self) -> list[StageStats]:
        """Each stage's measurements so far; empty before the first batch."""
        if self._alive:
            self._stats = self._run.call("stats")  # type: ignore[union-attr]
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
        moves, kind = self._rebalancer.moves, self._world.executor
        return self._compiled.report_on(self.config, self._expected, stats, kind, moves)

    def glance(self) -> list[StageStats] | None:
        """Each stage's measurements of a moment ago, without waiting for the stages."""
        return None if self._run is None else self._run.glance()

    @property
    def events(self) -> list[Event]:
        """What each stage did when, so far (with ``record=True`` or a timeline)."""
        if self._alive:
            self._events += [e for taken in self._run.call("take_events") for e in taken]  # type: ignore[union-attr]
        return self._events

    # ---- the model and this run ------------------------------------------------------------------------

    def sync(self) -> None:
        """Bring the present weights, buffers and attributes into ``model``; batches in flight stay there.

        Only needed in the middle: after `flush`, `evaluate`, `fit` and `save` they are there.
        """
        if self._run is None or not self._stale:
            return
        for state in self._run.states():
            self._owner.take(state)
        self._stale = self._in_flight
        for name in self._owner.switched():
            log.warning(
                "requires_grad of %r was changed after training began, which stages need not notice; close "
                "this trainer and make a new one with pipe.trainer(...)",
                name,
            )

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
        if self._closed:
            raise RuntimeError("this trainer is closed; save before leaving it")
        self._world.write(path, self, folder=folder)
        self._saved = time.monotonic()
        self._callbacks.call("on_save", self, path)

    def _content(self) -> dict[str, Any]:
        """All that this run is (run_state.py), with nothing in flight."""
        self.flush()
        stages = [] if self._run is None else self._run.call("training_state", self._owner.first_names())
        state = self._resume or RunState.gather(self._owner, self.config, stages, self._counters())
        return state.to_write(self._owner)

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
        if self._closed:
            raise RuntimeError("this trainer is closed; make a new one with pipe.trainer(...)")
        self._take_over(path)

    def _take_over(self, path: str | os.PathLike[str]) -> Mapping[str, Any]:
        """See `load`; how far that run was."""
        state = RunState.read(self._world.read(path), os.fspath(path))
        self._adopt(state)
        return state.counters

    def _adopt(self, state: RunState) -> None:
        """Go on from this state."""
        state.check(self._owner, self.config)
        self.flush()
        with interrupts.held(), self._rescued:
            state.restore(self._owner, draws_here=self._draws_here)
            self._history.restore(state.counters)
            self._joiner.updates = state.counters["updates"]
            if self._run is None:
                self._resume = state
            else:
                self._hand_over(self._run, state)

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
        if self._closed:
            return
        try:
            if error is not None:
                self._world.leave(error)
            if self._alive:
                if error is None:
                    self.flush()
                with interrupts.held(), self._rescued:
                    self.sync()
                    self._stats = self.stats
                    events = self.events if self._record else []
                    if self._timeline is not None and self._world.rank == 0:
                        write_timeline(self._timeline, events)
        finally:
            self._closed = True
            self._loggers.close()
            if self._run is not None:
                self._reminder.detach()
                self._run.close()
                self._run = None
            self._world.leave(None)

    # ---- how -------------------------------------------------------------------------------------------

    @property
    def _alive(self) -> bool:
        return self._run is not None and self._run.failure is None

    def _ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Executor, list[Tensor], Any]:
        """The running stages, a batch's tensors and its target; what can be refused is refused first."""
        if self._closed:
            raise RuntimeError("this trainer is closed; make a new one with pipe.trainer(...)")
        inputs, named, target = take_target(
            self._compiled.model, args, kwargs, has_target=self.config.loss_fn is not None
        )
        if self._run is not None:
            self._check_modes()
        elif not self._compiled.model.training:
            self._compiled.model.train()
        try:
            if self._run is None:
                self._world.prepare(self._compiled, inputs, named)
            tensors = self._compiled.bind(inputs, named)
        except TypeError as e:
            raise TypeError(f"{e}; {what_step_takes(args, self.config.loss_fn is not None)}") from None
        if self._run is None:
            self._compiled.check_loss(self.config, tensors, target)
            self._choose_order(tensors, target)
            self._run = self._start()
            self._reminder = weakref.finalize(self, log.warning, _LEFT)
        return self._run, tensors, target

    def _choose_order(self, tensors: Sequence[Tensor], target: Any) -> None:
        """A resumed run goes on in the order that it was saved with, unless another was asked for."""
        self._along = follow_batch(tensors)
        saved = {} if self._resume is None else self._resume.counters.get("order", {})
        config = self.config.decided(**saved) if saved else self.config
        if config.is_open or config.parts > 1:
            config = self._compiled.choose_order(config, tensors, target)
        mine = {name: getattr(config, name) for name in _ORDER}
        decided = self._world.first("choosing the order", lambda: mine)
        if decided != mine:
            config = replace(config, **decided)
        if config is not self.config:
            self._expected = self._compiled.expect(config, self._optimizer_bytes)
        self.config = config
        self._stage_config = replace(self._stage_config, **{name: getattr(config, name) for name in _ORDER})

    def _check_modes(self) -> None:
        """Stages have the modes of the moment when training began. (A model that is in eval mode as a whole
        is being looked at; that changes nothing here.)"""
        if self._compiled.model.training:
            for module, mode in self._modes:
                if module.training is not mode:
                    raise RuntimeError(
                        f"a {type(module).__name__} was put into {'eval' if mode else 'train'} mode after "
                        f"training began, which its stage cannot follow; leave this trainer and go on with a "
                        f"new one, pipe.trainer(...), which takes the modes as it finds them"
                    )

    def _start(self) -> Executor:
        """Start the stages."""
        self._world.same_weights(self._owner)
        self._modes = [(m, m.training) for m in self._compiled.model.modules()]
        programs = self._compiled.programs(self._owner.loss)
        if self._init is not None and self._world.materialise(self._owner, programs, self._init):
            programs = self._compiled.programs(self._owner.loss)
        self._owner.begin()
        resume, self._resume = self._resume, None
        self._seed = self._base_seed(len(programs), resume)
        run = self._launch(programs)
        try:
            if resume is not None:
                self._hand_over(run, resume)
            if 0 < self._exact_updates < 1:
                raise ValueError(
                    f"exact_start={self.config.exact_start!r} is a share of the run, which only fit knows; "
                    f"give a number of updates"
                )
            if self.updates < self._exact_updates and not self.config.exact:
                self._follow(run, exact=True)
        except BaseException:
            run.close()
            raise
        return run

    def _launch(self, programs: list[StageProgram]) -> Executor:
        """Stages for these programs."""
        self._wiring, self._eval_wiring = programs[0].train, programs[0].evaluate
        config = replace(self._stage_config, groups=model_groups(self._owner, self.config))
        return self._world.start(programs, config, seed=self._seed, record=self._record, there=self._run)

    def _recut(self, move: Move) -> None:
        """Other stages go on from here, as if this run had been saved and loaded."""
        state, old = RunState(self._content()), self._run
        programs, self._expected = self._compiled.recut(move, self._owner.loss)
        self._run = self._launch(programs)
        if old is not None and old is not self._run:
            old.close()
        self._hand_over(self._run, state)
        if self._exact:
            self._follow(self._run, exact=True)

    def _base_seed(self, n_stages: int, resume: RunState | None) -> int | None:
        """The passes' base seed; one stage draws from the ambient generators, as the plain loop does."""
        seed = self.config.seed
        if n_stages > 1:
            if resume is not None and resume.counters["seed"] is not None:
                return int(resume.counters["seed"])  # and nothing is drawn that was drawn before
            drawn = int(torch.randint(2**62, ())) if seed is None else seed  # by all, lest generators differ
            return int(self._world.first("the seed", lambda: drawn))
        if seed is not None and resume is None:
            torch.manual_seed(seed)
        return None

    @property
    def _draws_here(self) -> bool:
        """Whether a lone stage draws from this process's generators, as the plain loop does."""
        return self._compiled.n_stages == 1 and self._world.executor != "workers"

    def _hand_over(self, run: Executor, state: RunState) -> None:
        """Bring the stages to a loaded state."""
        if self._seed is not None and state.counters["seed"] is not None:
            self._seed = state.counters["seed"]
        run.call("load_state", *state.modules())
        run.call("load_training_state", *state.training(self._owner, draws_here=self._draws_here))

    def _collect(self, *, wait: bool = False) -> float | None:
        if self._run is not None:
            new = self._history.settle(self._run.news(wait=wait))
            self._loggers.losses(new)
            if self._loggers.due() and (stats := self.glance()):
                self._loggers.stages(len(self.losses), stats)
        return self.losses[-1] if self.losses else None

    def _counters(self) -> dict[str, Any]:
        order = {} if self.config.is_open else {name: getattr(self.config, name) for name in _ORDER}
        done = {"updates": self._joiner.updates, "seed": self._seed, "order": order}
        loop = {} if self._loop is None else {"loop": self._loop.export()}
        return {**self._history.export(), **done, **loop}


class _Rescued:
    """Around what stages do: what was trained is in the model also when one has failed."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        run = self.trainer._run
        if isinstance(error, WorkerError) and run is not None:
            for state in run.rescued():
                self.trainer._owner.take(state)
