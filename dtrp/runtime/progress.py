"""What a user sees while a run goes on: a bar with loss, throughput and balance."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .arguments import length
from .stats import balance

if TYPE_CHECKING:
    from .trainer import Trainer

PACE = 0.5  # seconds between looks at the stages


class Bar:
    """A loader with a tqdm bar over it, or just the loader.

    tqdm never sees the loader itself: ``tqdm.auto`` would ask it for an iterator that nobody uses, which
    moves on the generator that a `DataLoader` shuffles by and starts its worker processes twice.
    """

    def __init__(self, loader: Iterable[Any], title: str, trainer: Trainer) -> None:
        self.loader, self.trainer = loader, trainer
        self.bar: Any = None
        if trainer.progress:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=length(loader), desc=title, unit="batch")
        self.looked = time.monotonic()
        self.samples = trainer.samples

    def __enter__(self) -> Bar:
        return self

    def over(self, batches: Iterable[Any]) -> Iterator[Any]:
        """These batches, of the loader's; the bar moves with them."""
        if self.bar is not None and not self.trainer.samples:
            self.bar.set_postfix_str("waiting for the stages to start")
        for batch in batches:
            yield batch
            if self.bar is not None:
                self.bar.update()

    def show(self, loss: float | None) -> None:
        """The newest loss, and now and then how fast and how even the stages run."""
        now = time.monotonic()
        if self.bar is None or now - self.looked < PACE:
            return
        rate = (self.trainer.samples - self.samples) / (now - self.looked)
        self.looked, self.samples = now, self.trainer.samples
        shown = {"loss": "-" if loss is None else f"{loss:.4f}", "samples/s": f"{rate:.0f}"}
        if stats := self.trainer.glance():
            shown["balance"] = f"{balance(stats):.2f}"
        self.bar.set_postfix(shown, refresh=False)

    def end(self, row: Mapping[str, Any]) -> None:
        """What the epoch came to; it stays on the screen."""
        if self.bar is not None:
            self.bar.set_postfix({k: f"{v:.4f}" for k, v in row.items() if isinstance(v, (int, float))})

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.close()
