"""How a model will be trained, as far as it decides what a stage costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..schedule import EXACT, Schedule

OF_DELAY = {False: 0.0175, True: 0.4}
"""What the first update of delay in stage 0 adds to the epochs, as a share, with prediction (ours). Steps
that are as long whatever a weight's gradients, as Adam's, do not get shorter where stale gradients disagree.
docs/results.md: SGD 1.00 with 0.75 updates, 1.01 with 1.5, 1.1 with 3, 1.3 with 5; Muon 1.00 with 0.75; AdamW
3.7 with 3, 1.12 with 0.75 and 1.02 with 0.5: less than the fit where part of the next gradient is known."""


def price_of_delay(updates: float, *, adaptive: bool) -> float:
    """Epochs for each one of exact training, where stage 0 is so many updates behind (a fit)."""
    return 1 + OF_DELAY[adaptive] * float(max(0.0, updates) ** 1.75)


@dataclass(frozen=True)
class Training:
    """What planning has to know of a run, or assumes of it.

    Attributes
    ----------
    optimizer_bytes : float
        Optimizer state per parameter byte: 0 for plain SGD, 1 with momentum, 2 for Adam's two moments.
    adaptive : bool
        Whether the optimizer makes each weight's steps as long whatever its gradients, as Adam does.
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
    replicas : tuple of int
        Devices of each stage, each for every so many parts of a batch; empty: one each.
    """

    optimizer_bytes: float = 2.0
    adaptive: bool = False
    predicts: bool = True
    horizon: str = "common"
    order: str = "fig1"
    micro_batches: int = 1
    recompute: bool = True
    loss_time: float = 0.0
    known: bool = False
    replicas: tuple[int, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether no weights are ever stale."""
        return self.order in EXACT

    def devices(self, k: int) -> int:
        """Of stage ``k`` (0-based)."""
        return self.replicas[k] if self.replicas else 1

    def schedule(self, n_stages: int) -> Schedule:
        """Who does what in which order."""
        return Schedule(self.order, n_stages, self.micro_batches, self.replicas)

    def in_flight(self, k: int, n_stages: int) -> float:
        """Batches that a device of stage ``k`` (0-based) holds when it begins a backward pass, that one
        included; the last stage none (it passes a batch back at once)."""
        return self.schedule(n_stages).held(k) / self.micro_batches

    def staleness(self, k: int, n_stages: int) -> int:
        """Updates between the two passes of a batch in stage ``k``, at most."""
        return self.schedule(n_stages).staleness(k)

    def price(self, n_stages: int) -> float:
        """Epochs for each one of exact training: what the delay of the first stage costs, with prediction."""
        if self.exact:
            return 1.0
        behind = self.in_flight(0, n_stages) - 1 / self.micro_batches
        return price_of_delay(behind * self.devices(0), adaptive=self.adaptive)

    def tied_bytes(self, k: int, ties: Iterable[tuple[int, int, int]]) -> int:
        """What stage ``k`` holds of gradients of tied weights besides those in their places, at most.

        Parameters
        ----------
        k
            0-based.
        ties
            Owner, guest (a later stage) and bytes of what they both hold. The guest sends its gradients to
            the owner, and gets the sums: both keep what they have sent until the other one has read it.
        """
        held = 0
        for owner, guest, size in ties:
            slots = self.schedule(guest + 1).tied_lag(owner, guest)  # from a gradient to its sum
            if k == owner:
                sums = 1 if self.exact else -(-slots // self.micro_batches)
                held += sums * size
            elif k == guest:
                held += (min(slots, self.micro_batches if self.exact else slots) - 1) * size
        return held

    def versions(self, k: int, n_stages: int, *, recompute: bool) -> float:
        """Versions of its weights that stage ``k`` holds on to: those that the graphs which it keeps were
        built on. Micro-batches between two updates share one; with an adaptive optimizer, where they aim at
        the same update."""
        graphs = round(self.in_flight(k, n_stages) * self.micro_batches)
        if recompute or self.exact or not graphs:
            return 0.0

        def version(slot: int) -> tuple[int, int]:
            aim = slot * self.devices(k) // self.micro_batches if self.adaptive and self.predicts else 0
            return (slot - graphs + 1) * self.devices(k) // self.micro_batches, aim

        return float(max(len(set(map(version, range(i, i + graphs)))) for i in range(self.micro_batches)))

    def batch_time(self, ticks: Sequence[float], cores: float = 0.0) -> float:
        """Seconds per batch of a pipeline whose stages take ``ticks``, on so many cores that their devices
        share (0: none is shared).

        Decoupled stages all work at once, so that the slowest counts; more stages than cores take turns,
        so that their sum counts. Exact orders fill and drain the pipeline with the parts of every batch.
        """
        parts, slowest = self.micro_batches, max(ticks)
        if self.exact:
            slowest = (sum(ticks) + (parts - 1) * slowest) / parts
        work = sum(tick * self.devices(k) for k, tick in enumerate(ticks))
        return max(slowest, work / cores) if cores else slowest


ASSUMED = Training()
"""What is planned for where no trainer is there yet."""
