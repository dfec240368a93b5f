"""What `Trainer.evaluate` and `Trainer.predict` do: batches through the stages in eval mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import chain
from typing import Any

from .arguments import as_call, check_loader, feeds
from .batch import Feed
from .evaluation import Measure, combine
from .run import Run


def evaluate(run: Run, loader: Iterable[Any], metric: Any) -> dict[str, Any]:
    """See `Trainer.evaluate`."""
    measure = Measure.of(run.loss_fn, metric)
    check_loader(loader, run.config.loss_fn is not None)
    run.drain()
    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        return {}
    executor, *_ = run.ready(*as_call(first))

    def fed() -> Iterator[list[Feed]]:
        for number, batch in enumerate(chain([first], batches)):
            _, tensors, target = run.ready(*as_call(batch), follow=False)
            yield feeds(run.eval_wiring, number, tensors, target)

    with run.rescued(), closing(executor.evaluate(fed(), measure)) as results:
        found = combine(results)
    run.loggers.evaluation(len(run.history.losses), found)
    return found


def predict(run: Run, loader: Iterable[Any]) -> Iterator[Any]:
    """See `Trainer.predict`."""
    executor = run.executor
    if executor is None:
        raise RuntimeError("no stage runs before the first step (and after the last): use pipe(x)")
    run.drain()

    def fed() -> Iterator[list[Feed]]:
        for number, batch in enumerate(loader):
            tensors = run.compiled.bind(*as_call(batch))
            yield feeds(run.eval_wiring, number, tensors, None)

    with run.rescued(), closing(executor.evaluate(fed(), None)) as outputs:
        yield from outputs
