"""What a user sees while a run goes on: a bar with loss, throughput and balance."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .stats import balance

if TYPE_CHECKING:
    from .trainer import Trainer

PACE = 0.5  # seconds between looks at the stages


class Bar:
    """A tqdm bar over a loader, or nothing."""

    def __init__(self, loader: Iterable[Any], title: str, trainer: Trainer) -> None:
        from tqdm.auto import tqdm

        self.trainer = trainer
        self.bar = tqdm(loader, desc=title, unit="batch", disable=not trainer.progress)
        self.looked = time.monotonic()
        self.samples = trainer.samples

    def __enter__(self) -> Bar:
        return self

    def __iter__(self) -> Any:
        return iter(self.bar)

    def show(self, loss: float | None) -> None:
        """The newest loss, and now and then how fast and how even the stages run."""
        now = time.monotonic()
        if self.bar.disable or now - self.looked < PACE:
            return
        rate = (self.trainer.samples - self.samples) / (now - self.looked)
        self.looked, self.samples = now, self.trainer.samples
        shown = {"loss": "-" if loss is None else f"{loss:.4f}", "samples/s": f"{rate:.0f}"}
        if stats := self.trainer.glance():
            shown["balance"] = f"{balance(stats):.2f}"
        self.bar.set_postfix(shown, refresh=False)

    def __exit__(self, *exc: object) -> None:
        self.bar.close()
