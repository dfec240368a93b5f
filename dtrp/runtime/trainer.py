"""The user's handle on a training run: batches in, losses out, weights back in the model at the end."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from ..errors import WorkerError
from ..wiring import Wiring
from .batch import Feed
from .config import TrainConfig
from .evaluation import Measure, combine
from .events import Event
from .executors.base import Executor
from .program import StageProgram
from .schedule import drain_ticks
from .timeline import write_timeline

log = logging.getLogger("dtrp")

EXECUTORS = ("auto", "inline", "workers")


class Host(Protocol):
    """What a trainer asks of the compiled model that it trains."""

    model: nn.Module

    def prepare(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Plan for this example, unless planned already."""
        ...

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The model inputs of one call, in the wiring's order; refuses what does not fit."""
        ...

    def programs(self) -> list[StageProgram]:
        """What each stage runs, with the model's present parameters."""
        ...

    def check_loss(self, config: TrainConfig, inputs: Sequence[Tensor], target: Any) -> None:
        """Refuse a loss function that does not give a scalar, without computing anything."""
        ...


class Trainer:
    """Trains a compiled model as a decoupled pipeline. A context manager.

    Made by `Pipeline.trainer`, whose documentation explains the settings. Workers start at the first batch
    and end when the context is left; the trained weights are in the model then.

    Attributes
    ----------
    losses : list of float
        The losses of all finished batches, in batch order.
    skipped : int
        Batches that were given up because their loss was not finite (``on_nonfinite="skip"``).
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
    ) -> None:
        if executor not in EXECUTORS:
            raise ValueError(f"executor={executor!r}: expected one of {', '.join(map(repr, EXECUTORS))}")
        if isinstance(watchdog, bool) or not isinstance(watchdog, (int, float)) or not watchdog > 0:
            raise ValueError(f"watchdog={watchdog!r}: expected a number of seconds > 0")
        self.config = config
        self.losses: list[float] = []
        self.skipped = 0
        self.progress = progress
        self._host = host
        self._kind = executor
        self._record = record or timeline is not None
        self._timeline = timeline
        self._events: list[Event] = []
        self._watchdog = float(watchdog)
        self._executor: Executor | None = None
        self._train: Wiring | None = None
        self._eval: Wiring | None = None
        self._batches = 0  # fed so far
        self._in_flight = False
        self._closed = False

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
        inputs, named, target = self._arguments(args, kwargs)
        executor, tensors = self._ready(inputs, named, target)
        assert self._train is not None
        executor.tick(_feeds(self._train, self._batches, tensors, target))
        self._batches += 1
        self._in_flight = True
        if self.config.one_batch_at_a_time:
            self._drain()
        return self._collect()

    def flush(self) -> None:
        """Train until nothing is in flight."""
        if self._in_flight:
            self._drain()
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
            Per epoch: ``train_loss`` (mean over its batches) and what `evaluate` gives.
        """
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
            raise ValueError(f"epochs={epochs!r}: expected an int >= 0")
        history: list[dict[str, float]] = []
        for epoch in range(epochs):
            first = len(self.losses) + self._awaited()
            with _bar(loader, f"epoch {epoch + 1}/{epochs}", self.progress) as (batches, show):
                for batch in batches:
                    args, kwargs = self._batch(batch)
                    show(self.step(*args, **kwargs))
            self.flush()
            losses = self.losses[first:]
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
        if self.config.scheduler_step == "epoch" and self._executor is not None:
            self.flush()
            self._executor.call("schedule", [metrics] * self._stages)

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

        def feeds() -> Iterator[list[Feed | None]]:
            number = 0
            batch = first
            while batch is not None:
                args, kwargs = self._batch(batch)
                inputs, named, target = self._arguments(args, kwargs)
                _, tensors = self._ready(inputs, named, target)
                assert self._eval is not None
                yield _feeds(self._eval, number, tensors, target)
                number += 1
                batch = next(batches, None)

        args, kwargs = self._batch(first)
        inputs, named, target = self._arguments(args, kwargs)
        executor, _ = self._ready(inputs, named, target)
        return combine(executor.evaluate(feeds(), measure))

    @property
    def events(self) -> list[Event]:
        """What each stage did when, so far (with ``record=True`` or a timeline)."""
        if self._executor is not None:
            self._events += [e for taken in self._executor.call("take_events") for e in taken]
        return self._events

    # ---- the model and this run ------------------------------------------------------------------------

    def sync(self) -> None:
        """Bring the present weights and buffers into ``model``; batches in flight stay in flight."""
        if self._executor is None:
            return
        for state in self._executor.call("state"):
            with torch.no_grad():
                for name, value in state.items():
                    tensor = _attribute(self._host.model, name)
                    if isinstance(tensor, Tensor) and tensor.data_ptr() != value.data_ptr():
                        tensor.copy_(value)

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
            if self._executor is not None and getattr(self._executor, "failure", None) is None:
                if finish:
                    self.flush()
                self.sync()
                if self._timeline is not None:
                    write_timeline(self._timeline, self.events, self._stages)
                elif self._record:
                    _ = self.events
        finally:
            self._closed = True
            if self._executor is not None:
                self._executor.close()
                self._executor = None

    # ---- how -------------------------------------------------------------------------------------------

    def _arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Inputs, inputs by name and target of a call of `step`."""
        if self.config.loss_fn is None:
            return args, kwargs, None
        if "target" in kwargs:
            named = {k: v for k, v in kwargs.items() if k != "target"}
            return args, named, kwargs["target"]
        if not args:
            raise TypeError(
                "step() got no target: the last positional argument is the target; pass loss_fn=None to "
                "trainer() if the model gives its own loss"
            )
        return args[:-1], kwargs, args[-1]

    def _batch(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """One item of a loader as arguments of `step`."""
        if isinstance(batch, Mapping):
            return (), dict(batch)
        if isinstance(batch, (tuple, list)):
            return tuple(batch), {}
        return (batch,), {}

    def _ready(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], target: Any
    ) -> tuple[Executor, list[Tensor]]:
        """The running executor, and this call's tensors; everything that can be refused is refused first."""
        if self._closed:
            raise RuntimeError("this trainer is closed; make a new one with pipe.trainer(...)")
        if self._executor is None:
            self._host.prepare(args, kwargs)
        tensors = self._host.bind(args, kwargs)
        if self._executor is None:
            self._host.check_loss(self.config, tensors, target)
            self._start()
        assert self._executor is not None
        return self._executor, tensors

    def _start(self) -> None:
        programs = self._host.programs()
        self._stages = len(programs)
        self._train, self._eval = programs[0].train, programs[0].evaluate
        kind = self._kind
        if kind == "auto":
            kind = "inline" if self._stages == 1 else "workers"
        seed = self.config.seed
        if self._stages == 1:
            if seed is not None:
                torch.manual_seed(seed)
        elif seed is None:
            seed = int(torch.randint(2**62, ()))
        if not self._host.model.training:
            self._host.model.train()
        executor: Executor
        if kind == "inline":
            from .executors.inline import InlineExecutor

            executor = InlineExecutor(
                programs, self.config, seed=seed if self._stages > 1 else None, record=self._record
            )
        else:
            from .executors.workers import WorkersExecutor

            if all(p.device.type == "cpu" for p in programs):
                log.info("no CUDA devices are used: %d stages run on CPU worker processes", self._stages)
            executor = WorkersExecutor(
                programs, self.config, seed=seed, record=self._record, watchdog=self._watchdog
            )
        self._executor = executor

    def _drain(self) -> None:
        assert self._executor is not None
        for _ in range(drain_ticks(self._stages)):
            self._executor.tick([None] * self._stages)
        self._executor.settle()
        self._in_flight = False

    def _awaited(self) -> int:
        """Batches that were fed and whose loss has not come yet."""
        return self._batches - len(self.losses)

    def _collect(self) -> float | None:
        if self._executor is None:
            return self.losses[-1] if self.losses else None
        for loss in self._executor.losses():
            if loss.batch != len(self.losses):
                raise WorkerError(f"the loss of batch {loss.batch} came where {len(self.losses)} was due")
            self.losses.append(loss.value)
            self.skipped += loss.skipped
        return self.losses[-1] if self.losses else None


def _feeds(wiring: Wiring, batch: int, tensors: Sequence[Tensor], target: Any) -> list[Feed | None]:
    """What each stage gets of a batch: the model inputs that it uses; the last stage also the target."""
    last = wiring.n_stages - 1
    return [
        Feed(batch, tuple(tensors[i] for i in wiring.caller_inputs(k)), target if k == last else None)
        for k in range(wiring.n_stages)
    ]


def _attribute(model: nn.Module, name: str) -> Any:
    """``model.a.b.c``, ``None`` where the model has no such thing (a constant of the graph)."""
    value: Any = model
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


class _bar:
    """A tqdm bar over a loader, or nothing."""

    def __init__(self, loader: Iterable[Any], title: str, show: bool) -> None:
        from tqdm.auto import tqdm

        self.bar = tqdm(loader, desc=title, unit="batch", disable=not show)

    def __enter__(self) -> tuple[Iterable[Any], Any]:
        return self.bar, self._show

    def _show(self, loss: float | None) -> None:
        if loss is not None and not self.bar.disable:
            self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    def __exit__(self, *exc: object) -> None:
        self.bar.close()
