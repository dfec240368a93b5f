"""Who runs the stages: this process (inline.py) or a process per stage (workers.py)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..config import TrainConfig
from ..program import StageProgram
from .base import Executor

log = logging.getLogger("dtrp")

EXECUTORS = ("auto", "inline", "workers")


def start(
    kind: str,
    programs: Sequence[StageProgram],
    config: TrainConfig,
    *,
    seed: int | None,
    record: bool,
    watchdog: float,
) -> Executor:
    """The executor of that name, running; ``"auto"``: workers, unless there is one stage only."""
    if kind == "inline" or (kind == "auto" and len(programs) == 1):
        from .inline import InlineExecutor

        return InlineExecutor(programs, config, seed=seed, record=record)
    from .workers import WorkersExecutor

    if all(p.device.type == "cpu" for p in programs):
        log.info("no CUDA devices are used: %d stages run on CPU worker processes", len(programs))
    return WorkersExecutor(programs, config, seed=seed, record=record, watchdog=watchdog)
