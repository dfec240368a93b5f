"""What tests and benchmarks look at inside a trainer, in one place: nothing else may know how it is built."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from dtrp.runtime import workers
from dtrp.runtime.inline import Inline
from dtrp.runtime.shared import SharedLinks, Wait, open_line
from dtrp.runtime.stage import Stage
from dtrp.runtime.workers import Workers

if TYPE_CHECKING:
    import pytest


def stages(trainer: Any) -> list[Stage]:
    """The stages of a run in this process."""
    assert isinstance(trainer._run.executor, Inline)
    return trainer._run.executor.stages


def kept_versions(stage: Stage) -> int:
    """Copies of its weights that graphs of a stage were built on."""
    return len(stage.weights._versions)


def processes(trainer: Any) -> list[int]:
    """The process of each stage of a run in worker processes."""
    assert isinstance(trainer._run.executor, Workers)
    return [process.pid for process in trainer._run.executor.crew.processes]


def entered(trainer: Any) -> int:
    """Mini-batches that have gone into the pipeline."""
    count: int = trainer._history.entered
    return count


def refuse_workers(patch: pytest.MonkeyPatch) -> None:
    """Make starting a worker process an error."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a worker was started")

    patch.setattr(workers, "Processes", refuse)


def both_ends(
    most: int | None = None,
    wait: Wait | None = None,
    first: int = 0,
    device: torch.device | None = None,
) -> tuple[SharedLinks, SharedLinks]:
    """Stages 0 (or the caller) and 1 with a line in each direction, as two processes have them: descriptors
    of their own."""
    there, back = open_line(first, 1, device), open_line(1, first, device)
    mine = [line._replace(memory=os.dup(line.memory)) for line in (there, back)]
    return SharedLinks(first, mine, most=most, wait=wait), SharedLinks(1, [there, back], most=most, wait=wait)
