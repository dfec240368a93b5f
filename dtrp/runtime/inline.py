"""All stages in this process, taking turns: the reference that other executors must equal.

In a sweep each stage does one round, the last one first. Stage k is as many rounds behind stage 0 as the
schedule says (`Schedule.lag`), so that what it needs is there: sweep t is tick t of the published table.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections import defaultdict, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import accelerators
from ..errors import DtrpError, WorkerError
from ..exclusive import EXCLUSIVE
from .batch import Feed, Loss, Skip
from .config import TrainConfig
from .evaluation import Measure
from .links import QueueLinks
from .program import StageProgram
from .random import preserved
from .stage import Stage, Steps, finish
from .stats import StageStats
from .twins import private_copy

Results = Generator[Any, None, None]


class Inline:
    """Runs the stages of one training run. Trains the model's own parameters, in place, where they are on the
    stages' devices.

    `Workers` has the same methods, for stages in processes of their own.

    Attributes
    ----------
    shares : bool
        Whether all of the stages' tensors are the model's.
    """

    def __init__(
        self, programs: Sequence[StageProgram], config: TrainConfig, *, seed: int | None, record: bool = False
    ) -> None:
        self.config = config
        self.failure: WorkerError | None = None
        self._draws = seed is not None and any(p.draws for p in programs)
        held = [(p.device, t) for p in programs for t in (*p.module.parameters(), *p.module.buffers())]
        self.shares = all(accelerators.has(device, tensor) for device, tensor in held)
        queues: Any = defaultdict(deque)
        self.stages: list[Stage] = []
        for program in programs:
            with self._told_by(program.stage):
                links = QueueLinks(program.stage, queues)
                self.stages.append(Stage(private(program), config, links, seed=seed, record=record))
        self._running: list[Steps | None] = [None] * len(programs)

    # ---- training ------------------------------------------------------------------------------------------

    def feed(self, feeds: Sequence[Feed]) -> None:
        """A slot goes in; ``feeds[k]`` is what stage k gets of it."""
        for stage, feed in zip(self.stages, feeds, strict=True):
            if len(feeds) > 1:  # else nothing outlives this call
                feed = feed._replace(inputs=owned(feed.inputs), target=owned(feed.target))
            stage.held.append(feed)
        with self._as_in_workers():
            self._sweep()

    def drain(self, *, close_group: bool | str = False) -> None:
        """Until nothing is in flight (`Workers` does not wait for it)."""
        for k, stage in enumerate(self.stages):
            self._running[k] = _then(self._running[k], stage.drain(close_group=close_group))
        with self._as_in_workers():
            while any(self._running):
                if not self._sweep():
                    waiting = "; ".join(f"stage {s.stage}: {s.meter.phase}" for s in self.stages)
                    self.failure = WorkerError(f"no stage can go on: {waiting}")
                    raise self.failure

    def throttle(self) -> None:
        """Wait until the stages have caught up far enough for the next batch: here they always have."""

    def news(self, *, wait: bool = False) -> list[Loss | Skip]:
        """What the stages say of finished batches since the last call; ``wait``: of all that went in."""
        found: list[Loss | Skip] = []
        for stage in self.stages:
            if stage.reports or stage.updates.skips:
                with self._told_by(stage.stage):
                    found += stage.answers.news(wait=wait)
        return found

    def _sweep(self) -> bool:
        """Let each stage do its next round, unless that is not due yet; whether any did anything."""
        if self.failure is not None:
            raise self.failure.again()
        moved = False
        for k, stage in reversed(list(enumerate(self.stages))):
            if self._running[k] is None and stage.is_due:
                self._running[k] = stage.run(stage.held.popleft())
                moved = True
                self._go_on(k)
        goes = True
        while goes:  # what waited for another
            goes = sum(self._go_on(k) for k in reversed(range(len(self.stages)))) > 0
            moved |= goes
        return moved

    def _go_on(self, k: int) -> bool:
        """Let a stage go on with its round as far as it comes; whether it got anywhere. What breaks off in
        the middle leaves stages with different batches: the run cannot go on."""
        running, done = self._running[k], self.stages[k].meter.done
        if running is None:
            return False
        try:
            next(running)
        except StopIteration:
            self._running[k] = None
            return True
        except BaseException as e:
            self.failure = told(k, e)
            if isinstance(e, Exception):
                raise self.failure from e
            raise
        return self.stages[k].meter.done > done

    # ---- questions -----------------------------------------------------------------------------------------

    def evaluate(self, batches: Iterable[Sequence[Feed]], measure: Measure | None) -> Results:
        """``measure`` of every batch, in order, then its totals; ``batches`` gives lists of feeds, one per
        stage."""
        try:
            self.call("begin_evaluation", measure)
            for feeds in batches:
                result = None
                with self._as_in_workers():
                    for stage, feed in zip(self.stages, feeds, strict=True):
                        with self._told_by(stage.stage):
                            result = finish(stage.answers.evaluate(feed))
                yield result
            if measure is not None:
                yield self.call("totals")[-1]
        finally:
            self.call("end_evaluation")

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """A method of every stage's `Answers`, after the rounds due by now, with the same arguments; in
        stage order."""
        results = []
        for stage in self.stages:
            with self._told_by(stage.stage):
                results.append(getattr(stage.answers, method)(*arguments))
        return results

    def states(self) -> Iterable[dict[str, Any]]:
        """Every stage's `Answers.state`."""
        return self.call("state")

    def glance(self) -> list[StageStats] | None:
        """The stages' latest known measurements; does not wait."""
        return [stage.answers.stats() for stage in self.stages]

    def rescued(self) -> tuple[list[Loss | Skip], list[dict[str, Any]]]:
        """After a failure: what there is to say of finished batches, and the state of the stages, as far as
        it can be had."""
        news: list[Loss | Skip] = []
        with suppress(WorkerError):
            news = self.news()
        return news, [stage.answers.state() for stage in self.stages]

    def close(self) -> None:
        """Let go of everything; may be called twice."""
        self._running = []

    # ---- as if each stage had a process --------------------------------------------------------------------

    def _as_in_workers(self) -> Any:
        before = torch.get_num_threads()
        threads = self.config.threads if len(self.stages) > 1 else before
        return as_in_workers(threads, [s.program.device for s in self.stages] if self._draws else [])

    @contextmanager
    def _told_by(self, stage: int) -> Iterator[None]:
        """An exception in a stage reaches the caller as it would from a worker process."""
        try:
            yield
        except DtrpError:
            raise
        except Exception as e:
            raise told(stage, e) from e


@contextmanager
def as_in_workers(threads: int, draw: Sequence[torch.device]) -> Iterator[None]:
    """As many threads as a worker process would use (sums may depend on their number), and the caller's
    generators left alone, where stages on these devices draw."""
    before = torch.get_num_threads()
    trains = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
    with EXCLUSIVE, trains, preserved(draw) if draw else nullcontext():
        if before != threads:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            if before != threads:
                torch.set_num_threads(before)


def told(stage: int, error: BaseException) -> WorkerError:
    if isinstance(error, WorkerError):
        return error
    if not isinstance(error, Exception):
        return WorkerError(f"{type(error).__name__} in the middle of a tick")
    text = "".join(traceback.format_exception(error))
    return WorkerError(
        f"stage {stage} failed: {type(error).__name__}: {error}", stage=stage, remote_traceback=text
    )


def _then(first: Steps | None, second: Steps) -> Steps:
    if first is not None:
        yield from first
    yield from second


def owned(tree: Any) -> Any:
    """What is in flight stays as it is when the caller fills its tensors again."""
    if tree is None or isinstance(tree, Tensor):  # a walk over a tree takes longer than a small copy
        return tree if tree is None else tree.detach().clone()
    if type(tree) is list:
        return [owned(value) for value in tree]
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), tree)


def private(program: StageProgram, *, apart: bool = True) -> StageProgram:
    """The program with module objects of its own, as a worker process has them: the model's `train` and
    `eval` are not the trainer's. Tensors are shared, but (``apart``) for parameters that belong to another
    stage, and what is not on the stage's device: the model stays where it is."""
    parameters = dict(program.module.named_parameters())
    tensors = [*program.module.parameters(), *program.module.buffers()]
    held = {id(parameters[name]) for name in program.guests}
    held |= {id(t) for t in tensors if not accelerators.has(program.device, t)}
    module = private_copy(program.module, [(t, t) for t in tensors if not (apart and id(t) in held)])
    return dataclasses.replace(program, module=module)
