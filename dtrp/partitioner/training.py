"""How a model will be trained, as far as it decides what a stage costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EXACT = ("1f1b", "gpipe", "bp")


@dataclass(frozen=True)
class Training:
    """What planning has to know of a run, or assumes of it.

    Attributes
    ----------
    optimizer_bytes : float
        Optimizer state per parameter byte: 0 for plain SGD, 1 with momentum, 2 for Adam's two moments.
    predicts : bool
        Whether passes run on predicted weights.
    horizon : str
        Which moment these aim at, ``"common"`` or ``"stage"``.
    order : str
        ``"fig1"``, ``"lean"``, ``"1f1b"``, ``"gpipe"`` or ``"bp"``.
    micro_batches : int
        Parts of a batch that travel one by one.
    recompute : bool
        Whether stages recompute where the plan says so; else they keep their graphs.
    loss_time : float
        Seconds that the loss takes in the last stage, there and back (0 until it was measured).
    known : bool
        Whether a trainer has said so; else it is assumed.
    """

    optimizer_bytes: float = 2.0
    predicts: bool = True
    horizon: str = "common"
    order: str = "fig1"
    micro_batches: int = 1
    recompute: bool = True
    loss_time: float = 0.0
    known: bool = False

    def in_flight(self, k: int, n_stages: int) -> float:
        """Batches that stage ``k`` (0-based) holds when it begins a backward pass, that one included; the
        last stage none (it passes a batch back at once)."""
        above = n_stages - 1 - k
        if above == 0:
            return 0.0
        depths = {"fig1": 2 * above, "gpipe": self.micro_batches, "bp": 1}
        return depths.get(self.order, above + 1) / self.micro_batches

    def staleness(self, k: int, n_stages: int) -> int:
        """Updates between the two passes of a batch in stage ``k``, at most."""
        depth = round(self.in_flight(k, n_stages) * self.micro_batches)
        return 0 if self.order in EXACT else -(-max(0, depth - 1) // self.micro_batches)

    def versions(self, k: int, n_stages: int, *, recompute: bool) -> float:
        """Versions of its weights that stage ``k`` holds on to: one for each graph that it keeps."""
        if recompute or self.order in EXACT:
            return 0.0
        return self.in_flight(k, n_stages) * self.micro_batches

    def batch_time(self, ticks: Sequence[float], cores: float = 0.0) -> float:
        """Seconds per batch of a pipeline whose stages take ``ticks``, on so many cores that they share (0:
        none is shared).

        Decoupled stages all work at once, so that the slowest counts; more stages than cores take turns,
        so that their sum counts. Exact orders fill and drain the pipeline with the parts of every batch.
        """
        parts, slowest = self.micro_batches, max(ticks)
        if self.order in EXACT:
            slowest = (sum(ticks) + (parts - 1) * slowest) / parts
        return max(slowest, sum(ticks) / cores) if cores else slowest


ASSUMED = Training()
"""What is planned for where no trainer is there yet."""
