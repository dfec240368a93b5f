"""Losses, evaluations and the stages' measurements, told to the loggers that users have already.

A logger is what their own library makes: TensorBoard's ``SummaryWriter``, a run of Weights & Biases, one of
Lightning's, or a function ``(numbers, step)``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .stats import StageStats, balance

PACE = 5.0  # seconds between the stages' measurements

Write = Callable[[Mapping[str, float], int], None]


class Loggers:
    """Tells a run's numbers.

    Parameters
    ----------
    loggers
        One, or a list of them.
    folder : path, optional
        Of a `SummaryWriter` more, which is closed at the end; the others are their makers' to close.

    Raises
    ------
    TypeError
        One of them is no logger.
    ImportError
        TensorBoard is not installed.
    """

    def __init__(self, loggers: Any, folder: str | os.PathLike[str] | None = None) -> None:
        several = loggers if isinstance(loggers, (list, tuple)) else [loggers]
        self.writers = [writer(one) for one in several if one is not None]
        self._board = None if folder is None else summary_writer(folder)
        if self._board is not None:
            self.writers.append(writer(self._board))
        self.looked = time.monotonic()

    def losses(self, new: Sequence[tuple[int, float]]) -> None:
        """Losses by batch."""
        for batch, value in new:
            self._tell({"loss": value}, batch)

    def due(self) -> bool:
        """Whether the stages' measurements are to be told again."""
        return bool(self.writers) and time.monotonic() - self.looked >= PACE

    def stages(self, batch: int, stats: list[StageStats]) -> None:
        """The stages' measurements after ``batch``."""
        self.looked = time.monotonic()
        numbers = {"balance": balance(stats)}
        for s in stats:
            for name in ("tick_time", "busy", "wait_time", "queue_depth"):
                numbers[f"stage {s.stage}/{name}"] = getattr(s, name)
            numbers[f"stage {s.stage}/peak_memory_MiB"] = s.peak_memory / 2**20
        self._tell(numbers, batch)

    def evaluation(self, batch: int, found: Mapping[str, Any]) -> None:
        """What an evaluation gave, as far as it is numbers."""
        numbers = {f"evaluation/{k}": v for k, v in found.items() if isinstance(v, (int, float))}
        self._tell(numbers, batch)

    def _tell(self, numbers: Mapping[str, float], batch: int) -> None:
        for write in self.writers:
            write(numbers, batch)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def writer(logger: Any) -> Write:
    """How to tell a logger numbers."""
    if callable(getattr(logger, "add_scalar", None)):  # torch.utils.tensorboard, tensorboardX

        def scalars(numbers: Mapping[str, float], step: int) -> None:
            for name, value in numbers.items():
                logger.add_scalar(name, value, step)

        return scalars
    if callable(getattr(logger, "log_metrics", None)):  # Lightning's
        return lambda numbers, step: logger.log_metrics(dict(numbers), step=step)
    if callable(getattr(logger, "log", None)):  # Weights & Biases
        return lambda numbers, step: logger.log(dict(numbers), step=step)
    if callable(logger) and not isinstance(logger, type):
        return lambda numbers, step: logger(dict(numbers), step)
    raise TypeError(
        f"logger={logger!r}: expected a SummaryWriter of TensorBoard, a run of Weights & Biases "
        f"(wandb.init(...)), a logger of Lightning, or a function (numbers, step)"
    )


def summary_writer(folder: str | os.PathLike[str]) -> Any:
    """TensorBoard's own."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ImportError(
            "tensorboard=... needs the package tensorboard: pip install 'dtrp[tensorboard]'"
        ) from e
    return SummaryWriter(os.fspath(folder))
