"""All stages in this process, one after the other: the reference that other executors must equal."""

from __future__ import annotations

import copy
import dataclasses
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...errors import DtrpError, WorkerError
from ..batch import Feed, Report
from ..config import TrainConfig
from ..links import InlineLinks
from ..program import StageProgram
from ..stage import Measure, StageRunner
from ..stats import StageStats
from .base import Loss, again


class InlineExecutor:
    """Runs the stages' ticks in stage order. Trains the model's own parameters, in place."""

    def __init__(
        self, programs: Sequence[StageProgram], config: TrainConfig, *, seed: int | None, record: bool = False
    ) -> None:
        self.config = config
        self.links = InlineLinks()
        self.reports: deque[Report] = deque()
        self.failure: WorkerError | None = None
        self.runners: list[StageRunner] = []
        for program in programs:
            with _blamed(program.stage):
                runner = StageRunner(
                    _private(program),
                    config,
                    self.links,
                    seed=seed,
                    report=self.reports.append,
                    record=record,
                )
            self.runners.append(runner)

    def tick(self, feeds: Sequence[Feed | None]) -> None:
        if self.failure is not None:
            raise again(self.failure)
        with self._all_or_failed(), self._threads():
            squared_norm = 0.0
            for runner, feed in zip(self.runners, feeds, strict=True):
                with _blamed(runner.stage):
                    squared_norm += runner.begin(feed)
            for runner in self.runners:
                with _blamed(runner.stage):
                    runner.finish(squared_norm)

    def throttle(self) -> None:
        pass

    def settle(self) -> None:
        self.call("settle")

    def losses(self) -> list[Loss]:
        found = []
        while self.reports and self.reports[0].ready():
            report = self.reports.popleft()
            with self._all_or_failed(), _blamed(len(self.runners) - 1):
                found.append(Loss(report.batch, report.value(), report.skipped))
        return found

    def evaluate(self, batches: Any, measure: Measure | None) -> list[Any]:
        results = []
        try:
            self.call("begin_evaluation", [(measure,)] * len(self.runners))
            for slot, feeds in enumerate(batches):
                result = None
                with self._threads():
                    for runner, feed in zip(self.runners, feeds, strict=True):
                        with _blamed(runner.stage):
                            result = runner.evaluate(slot, feed)
                results.append(result)
        finally:
            self.call("end_evaluation")
        return results

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        results = []
        for k, runner in enumerate(self.runners):
            with _blamed(runner.stage):
                results.append(getattr(runner, method)(*(arguments[k] if arguments else ())))
        return results

    def glance(self) -> list[StageStats] | None:
        return [runner.stats() for runner in self.runners]

    def close(self) -> None:
        self.links.clear()

    @contextmanager
    def _all_or_failed(self) -> Iterator[None]:
        """What breaks off in the middle leaves stages with different batches: the run cannot go on."""
        try:
            yield
        except WorkerError as e:
            self.failure = e
            raise
        except BaseException as e:
            self.failure = WorkerError(f"{type(e).__name__} in the middle of a tick")
            raise

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """As many threads as a worker process would use: sums may depend on their number."""
        if len(self.runners) == 1:
            yield
            return
        before = torch.get_num_threads()
        torch.set_num_threads(self.config.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _private(program: StageProgram) -> StageProgram:
    """The program with module objects of its own, as a worker process has them: the model's `train` and
    `eval` are not the trainer's. Tensors are shared, but for parameters that belong to another stage."""
    parameters = dict(program.module.named_parameters())
    held = [parameters[name] for name in program.guests]
    shared: dict[int, Any] = {
        id(t): t
        for t in (*program.module.parameters(), *program.module.buffers())
        if not any(t is p for p in held)
    }
    module = copy.deepcopy(program.module, shared)
    return dataclasses.replace(program, module=module)


@contextmanager
def _blamed(stage: int) -> Iterator[None]:
    """An exception in a stage reaches the caller as it would from a worker process."""
    try:
        yield
    except DtrpError:
        raise
    except Exception as e:
        text = "".join(traceback.format_exception(e))
        raise WorkerError(
            f"stage {stage} failed: {type(e).__name__}: {e}", stage=stage, remote_traceback=text
        ) from e
