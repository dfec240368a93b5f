"""Losses and the stages' measurements for TensorBoard (the extra ``dtrp[tensorboard]``)."""

from __future__ import annotations

import os
import time
from typing import Any

from .stats import StageStats, balance

PACE = 5.0  # seconds between the stages' measurements


class TensorBoard:
    """Writes a run's numbers to an event file in ``folder``.

    Raises
    ------
    ImportError
        TensorBoard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise ImportError(
                "tensorboard=... needs the package tensorboard: pip install 'dtrp[tensorboard]'"
            ) from e
        self.writer: Any = SummaryWriter(os.fspath(folder))
        self.looked = time.monotonic()

    def losses(self, new: list[tuple[int, float]]) -> None:
        """Losses by batch."""
        for batch, value in new:
            self.writer.add_scalar("loss", value, batch)

    def due(self) -> bool:
        """Whether the stages' measurements are to be written again."""
        return time.monotonic() - self.looked >= PACE

    def stages(self, batch: int, stats: list[StageStats]) -> None:
        """The stages' measurements after ``batch``."""
        self.looked = time.monotonic()
        self.writer.add_scalar("balance", balance(stats), batch)
        for s in stats:
            for name in ("tick_time", "busy", "wait_time", "queue_depth"):
                self.writer.add_scalar(f"stage {s.stage}/{name}", getattr(s, name), batch)
            self.writer.add_scalar(f"stage {s.stage}/peak_memory_MiB", s.peak_memory / 2**20, batch)

    def evaluation(self, batch: int, found: dict[str, float]) -> None:
        """What an evaluation gave."""
        for name, value in found.items():
            self.writer.add_scalar(f"evaluation/{name}", value, batch)

    def close(self) -> None:
        self.writer.close()
