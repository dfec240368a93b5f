"""Moving the cuts while a run goes on: when to look, and the move itself (ours).

A look takes what the stages measured since the last one and asks the compiled model for a better cut. A move
is a save and a load without the disk: the pipeline drains, the run's state is gathered by parameter name, the
model is cut anew, and the new stages take the state over. So what is trained from there on is, bit for bit,
what a run would train that was saved at this batch and loaded under the new plan. It is not what the run
without a move would: other updates lie between a batch's two passes.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from . import interrupts
from .arguments import length
from .stats import StageStats

if TYPE_CHECKING:
    from .trainer import Trainer

log = logging.getLogger("dtrp")

WARM_UP = (20, 20.0)  # batches and seconds that come before what is measured
FIRST = (50, 40.0)  # that the first look measures
LATER = (25, 20.0)  # that later ones do
LOOKS = 2  # in a row that must find a better cut
A_MOVE = 5.0  # seconds that the first move is taken to cost


@dataclass(frozen=True)
class Move:
    """One move of the cuts.

    Attributes
    ----------
    before, after : tuple of float
        Seconds of each stage's tick: as measured, and as predicted for the new cut.
    seconds_before, seconds_after : float
        Per batch of the pipeline, likewise.
    nodes : int
        How many of the graph's nodes changed their stage.
    batch : int
        How many batches had been trained with the old cut.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]
    seconds_before: float
    seconds_after: float
    nodes: int
    cut: Any = field(repr=False, compare=False)
    batch: int = 0

    def __str__(self) -> str:
        def ms(ticks: tuple[float, ...]) -> str:
            return " + ".join(f"{tick * 1e3:.3g}" for tick in ticks)

        return (
            f"after batch {self.batch}: {self.nodes} nodes to other stages, from "
            f"{self.seconds_before * 1e3:.3g} ms per batch ({ms(self.before)}) to a predicted "
            f"{self.seconds_after * 1e3:.3g} ms ({ms(self.after)})"
        )


class Rebalancer:
    """Looks at a run now and then, and moves its cuts where that pays.

    Parameters
    ----------
    when : "auto", False or int
        ``"auto"``: after a minute, then every 20 s, not inline; a move needs two looks that agree. A number:
        whenever so many batches are done, of which the first half warms up. Under a launcher rank 0 looks.
    """

    def __init__(self, when: Literal["auto", False] | int) -> None:
        self.when = when
        self.moves: list[Move] = []
        self.total: int | None = None  # batches of the whole run, where they are known
        self._begun = time.monotonic()
        self._since: list[StageStats] | None = None  # what was measured before this window
        self._batch = 0  # fed, when it began
        self._agreed = 0
        self._looks = 0
        self._cost = A_MOVE

    def expect(self, loader: Any, epochs: int, done: int) -> None:
        """So much is to come."""
        batches = length(loader)
        self.total = None if batches is None else done + batches * epochs

    def after_step(self, trainer: Trainer) -> bool:
        """A batch went in; whether the cuts were moved."""
        if not self._due(trainer):
            return False
        if trainer._run.owner.on_meta:  # stages on other ranks have not what a move would bring
            self.when = False
            return False
        stats, fed = trainer.stats, trainer._history.fed
        before, self._since = self._since, stats
        self._batch, self._begun = fed, time.monotonic()
        if before is None or any(s.ticks < b.ticks for s, b in zip(stats, before, strict=True)):
            return False  # or other stages have begun since (changes.py)
        self._looks += 1
        window = [s.since(b) for s, b in zip(stats, before, strict=True)]
        try:
            move = trainer._run.world.first("rebalancing", lambda: self._look(trainer, window, fed))
        except Exception as e:  # training goes on as it is
            log.warning("no other cut is looked for any more: %s", e)
            self.when = False
            return False
        if move is not None:
            self._move(trainer, replace(move, batch=fed))
        return move is not None

    def _look(self, trainer: Trainer, window: list[StageStats], fed: int) -> Move | None:
        """The move that is to be made, if one is."""
        move = trainer._run.compiled.better_cut(trainer._run.expected, window)
        self._agreed = 0 if move is None else self._agreed + 1
        agreed = self._agreed >= (LOOKS if self.when == "auto" else 1)
        return move if move is not None and agreed and self._pays(move, fed) else None

    def _due(self, trainer: Trainer) -> bool:
        kind = trainer._run.world.executor
        if self.when is False or trainer._run.executor is None:
            return False
        if trainer._run.wiring.n_stages < 2 or not trainer._run.compiled.training:
            return False
        done = trainer._history.fed - self._batch
        if self.when != "auto":
            warm_up = self.when // 2
            return done >= (warm_up if self._since is None else self.when - (0 if self._looks else warm_up))
        batches, seconds = WARM_UP if self._since is None else LATER if self._looks else FIRST
        due = kind != "inline" and done >= batches
        return due and trainer._run.world.due("rebalancing", self._begun + seconds)

    def _pays(self, move: Move, fed: int) -> bool:
        """Within what is left of the run; unless that is known, as much again as has been."""
        left = fed if self.total is None else self.total - fed
        return (move.seconds_before - move.seconds_after) * left > self._cost

    def _move(self, trainer: Trainer, move: Move) -> None:
        start = time.monotonic()
        trainer.flush()
        _ = trainer.events
        log.info("the cuts are moved %s", move)
        with interrupts.held(), trainer._run.rescued():
            trainer._run.recut(move)
        self.moves.append(move)
        self._cost, self._agreed, self._since = time.monotonic() - start, 0, None
        self._batch, self._begun = trainer._history.fed, time.monotonic()
