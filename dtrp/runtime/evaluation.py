"""Evaluation: batches through the stages in eval mode, what the last one computes of each, how it adds up."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import WorkerError
from .arguments import Call, as_call, check_loader, feeds, n_samples, take_target
from .batch import Feed, WithExtra
from .config import short
from .loss import scalar_loss

if TYPE_CHECKING:
    from .run import Run

Metric = Callable[[Any, Any], Any]
Measured = dict[str, tuple[Any, float]] | WorkerError  # the latter where a metric raised


@dataclass(frozen=True)
class Measure:
    """Maps ``(output, target)`` of a batch to ``{name: (mean, weight)}``; the weight is the target's rows, or
    where it has none that can be told (detections, an object, a model that gives its own loss) the samples.

    Objects that gather what they see (`gathers`) get every batch, and are asked at the end (`totals`).
    """

    loss_fn: Callable[..., Tensor] | None
    metrics: Mapping[str, Metric]
    accuracy: bool
    gathering: Mapping[str, Any]
    ignored: int = -100  # the class target that the loss leaves out

    @classmethod
    def of(cls, loss_fn: Callable[..., Tensor] | None, metric: Any) -> Measure:
        """From what the user passed as ``metric``: nothing, a metric, or metrics by name.

        Raises
        ------
        TypeError
            Something else.
        """
        if metric is None:
            return cls(loss_fn, {}, True, {})
        named = metric if isinstance(metric, Mapping) else {"" if gathers(metric) else _name(metric): metric}
        if not all(gathers(m) or (callable(m) and not isinstance(m, type)) for m in named.values()):
            raise TypeError(
                f"metric={short(metric)}: expected a callable (output, target) -> number, a metric of "
                f"torchmetrics (an object, such as MulticlassF1Score(10)), a dict of such by name, or None"
            )
        if "loss" in named:
            raise ValueError(
                "a metric is called 'loss', as the loss is: give it another name, metric={'name': f}"
            )
        each = {name: m for name, m in named.items() if not gathers(m)}
        return cls(loss_fn, each, False, {name: m for name, m in named.items() if gathers(m)})

    def begin(self, device: torch.device) -> Measure:
        """The same for one evaluation on ``device``: with objects of its own, that have seen nothing yet."""
        gathering = {name: copy.deepcopy(metric) for name, metric in self.gathering.items()}
        for metric in gathering.values():
            metric.reset()
            metric.to(device)
            for part in metric.modules() if isinstance(metric, nn.Module) else (metric,):
                # torchmetrics would ask all ranks, of which only last stages have it: others never answer.
                part.sync_on_compute = part._to_sync = False
        return replace(self, gathering=gathering)

    def with_loss(self, loss_fn: Callable[..., Tensor]) -> Measure:
        """The same with another loss: the last stage's own module."""
        return replace(self, loss_fn=loss_fn)

    def __call__(self, output: Any, target: Any, samples: float) -> Measured:
        loss = float(scalar_loss(self.loss_fn, output, target))
        if isinstance(target, WithExtra):
            target = target.target
        size = _rows(target, samples)
        found = {"loss": (loss, size)}
        scores = class_scores(output)
        for name, metric in {**self.metrics, **self.gathering}.items():
            try:
                if name in self.gathering:
                    metric.update(output if scores is None else scores, target)
                else:
                    found[name] = (float(metric(output, target)), size)
            except Exception as e:
                return _failed(name or _name(metric), e)
        if self.accuracy and (hits := class_hits(output, target, self.ignored)) is not None and hits.numel():
            found["accuracy"] = (float(hits.double().mean()), float(hits.numel()))
        return found

    def totals(self) -> Measured:
        """What the metrics say that have seen all batches: in the form of one more batch, of no weight."""
        found: dict[str, Any] = {}
        for name, metric in self.gathering.items():
            try:
                value = metric.compute()
            except Exception as e:
                return _failed(name or _name(metric), e)
            if isinstance(value, Mapping):
                found |= {f"{name}/{key}" if name else key: v for key, v in value.items()}
            else:
                found[name or _name(metric)] = value
        return {name: (_plain(value), 0.0) for name, value in found.items()}


def gathers(metric: Any) -> bool:
    """Whether it is a metric as torchmetrics has them: gathers batches by ``update``, ``compute`` tells."""
    verbs = ("update", "compute", "reset", "to")
    return not isinstance(metric, type) and all(callable(getattr(metric, verb, None)) for verb in verbs)


def _name(metric: Any) -> str:
    function = metric.func if isinstance(metric, partial) else metric
    name = str(getattr(function, "__name__", type(function).__name__))
    return "metric" if name == "<lambda>" else name


def _failed(name: str, error: Exception) -> WorkerError:
    """What to answer for a metric that raises: the run itself is none the worse for it."""
    text = f"metric {name!r} failed: {type(error).__name__}: {error}"
    return WorkerError(text, remote_traceback=traceback.format_exc())


def _plain(value: Any) -> Any:
    """A number; a tensor of several stays one."""
    if not isinstance(value, Tensor):
        return float(value)
    return value.item() if value.numel() == 1 else value.cpu()


def combine(batches: Iterable[Measured]) -> dict[str, Any]:
    """Weighted means over all batches; empty for no batch.

    Raises
    ------
    WorkerError
        A metric failed on one of them.
    """
    total: dict[str, list[Any]] = {}
    whole: dict[str, Any] = {}
    for batch in batches:
        if isinstance(batch, WorkerError):
            raise batch
        for name, (mean, weight) in batch.items():
            if weight == 0.0:
                if name in whole:
                    raise WorkerError(
                        f"metric {name!r} has to see all batches, of which each replica, or form of batch, "
                        f"has its own; give a function (output, target) -> number, whose mean is taken, or "
                        f"use one replica and batches of one form"
                    )
                whole[name] = mean
                continue
            entry = total.setdefault(name, [0.0, 0.0])
            entry[0] = entry[0] + mean * weight
            entry[1] += weight
    return {name: value / weight for name, (value, weight) in total.items()} | whole


def class_hits(output: Any, target: Any, ignored: int = -100) -> Tensor | None:
    """For scores of several classes and integer targets: which predictions are right (negative targets, and
    those that the loss leaves out, not counted).

    The classes lie along the last dimension, or along dimension 1 as ``cross_entropy`` has it for images.
    """
    scores = class_scores(output)
    if scores is None or not isinstance(target, Tensor):
        return None
    if target.is_floating_point() or target.dtype == torch.bool or scores.dim() != target.dim() + 1:
        return None
    last, second = scores.shape[:-1] == target.shape, scores.shape[:1] + scores.shape[2:] == target.shape
    axis = -1 if last else 1
    if not (last or second) or scores.shape[axis] == 1:  # one score is no choice among classes
        return None
    return (scores.argmax(axis) == target)[(target >= 0) & (target != ignored)]


def class_scores(output: Any) -> Tensor | None:
    """A model's output, or the ``logits`` in it."""
    scores = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return scores if isinstance(scores, Tensor) else None


def _rows(target: Any, samples: float) -> float:
    """Of a target's first tensor; a list of other things has one for each sample, which may have any rows."""
    if type(target) is list and not all(isinstance(t, Tensor) for t in target):
        return samples
    rows = (float(t.shape[0]) for t in pytree.tree_leaves(target) if isinstance(t, Tensor) and t.dim() > 0)
    return next(rows, samples)


def evaluate(run: Run, loader: Iterable[Any], metric: Any) -> dict[str, Any]:
    """See `Trainer.evaluate`."""
    measure = replace(Measure.of(run.loss_fn, metric), ignored=run.config.ignored)
    check_loader(loader, run.config.loss_fn is not None)
    run.not_asked()
    run.drain()
    with closing(_answers(run, loader, measure)) as answers:
        found = combine(answers)
    if found:
        run.loggers.evaluation(len(run.history.losses), found)
    return found


def predict(run: Run, loader: Iterable[Any]) -> Iterator[Any]:
    """See `Trainer.predict`."""
    if run.executor is None:
        raise RuntimeError("no stage runs before the first step (and after the last): use pipe(x)")
    run.not_asked()
    run.drain()
    yield from _answers(run, loader, None)


def _answers(run: Run, loader: Iterable[Any], measure: Measure | None) -> Generator[Any, None, None]:
    """What the last stage gives for each batch, which has a target where there is a ``measure``. Batches of
    another form than those before go through stages for these."""
    targets = measure is not None
    has_target = targets and run.config.loss_fn is not None

    def form(call: Call) -> int:
        inputs, named, _ = take_target(run.compiled.model, *call, has_target=has_target)
        return run.compiled.form_of(inputs, named)

    def feed(numbered: tuple[int, Call]) -> list[Feed]:
        number, call = numbered
        _, tensors, target = run.ready(*call, targets=targets, follow=False)
        samples = float(n_samples(tensors))
        return [f._replace(share=samples) for f in feeds(run.eval_wiring, number, tensors, target)]

    run.asked = True  # the stages are in eval mode until all is answered
    try:
        for _, calls in groupby(map(as_call, loader), form):
            first = next(calls)
            executor, *_ = run.ready(*first, targets=targets)

            fed = map(feed, enumerate(chain([first], calls)))  # noqa: B031
            with run.rescued(), closing(executor.evaluate(fed, measure)) as found:
                yield from found
    finally:
        run.asked = False
