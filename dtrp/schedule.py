"""Who does what in which order: every order of training is a list of actions per stage, as plain data.

Stages, batches and rounds count from 0 here; the paper counts from 1. A *slot* is what travels through the
pipeline at once: a mini-batch, or one of its micro-batches. Slots come in *segments*: a segment ends when the
pipeline is drained, and its slots count from 0 again. In round r of a segment a stage does

    any stage but the last       recompute, backward, step of slot r - n       then forward of slot r
    the last stage               forward, backward, step of slot r

as far as those slots exist, where n is its *depth*, the number of slots that it has in flight. Nothing needs
a clock: a stage that follows its list gives the same bits whatever the others' timing. With the depths of
"fig1", and slot b entering stage k at tick b + k, this is the published table (DTRP, PLoS ONE 2023, Fig 1):

    K = 3        t=0   t=1   t=2     t=3     t=4        t=5
    stage 0      F0    F1    F2      F3      B0 F4      B1 F5
    stage 1            F0    F1      B0 F2   B1 F3      B2 F4
    stage 2                  F0 B0   F1 B1   F2 B2      F3 B3

| order | depth of stage k < K-1 | drained | whose |
|---|---|---|---|
| fig1 | 2 (K-1-k) | when asked | the paper's |
| lean | K-k | when asked | the depth of PipeDream's 1F1B (Narayanan et al. 2019), with re-computation |
| 1f1b | K-k | after each mini-batch | exact (PipeDream-flush, Narayanan et al. 2021) |
| gpipe | all its micro-batches | after each mini-batch | exact (Huang et al. 2019) |
| bp | 1 | after each mini-batch | exact back-propagation |

A stage may have several processes (`replicas`), each with a device of its own, for every so many slots
(`routed.py`). Each follows the stage's one list, and leaves out what belongs to others' slots. Above, K-k is
then the number of processes of stage k and all stages behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Literal, NamedTuple

Horizon = Literal["common", "stage"]
Kind = Literal["forward", "recompute", "backward", "step"]

ORDERS = ("fig1", "lean", "1f1b", "gpipe", "bp")
EXACT = ("1f1b", "gpipe", "bp")

BACKWARD_SHARE = Fraction(1, 2)
"""Of a tick, the share that a backward takes: half, where B = 2F and the forward runs twice."""


class Action(NamedTuple):
    """One thing that a stage does to one slot of the segment."""

    kind: Kind
    slot: int


@dataclass(frozen=True)
class Schedule:
    """An order for ``n_stages`` stages, of mini-batches that travel in at most ``parts`` micro-batches;
    ``replicas``: processes of each stage (empty: one each)."""

    order: str
    n_stages: int
    parts: int = 1
    replicas: tuple[int, ...] = ()
    accumulate: int = 1

    @property
    def exact(self) -> bool:
        """Whether the pipeline is drained after each mini-batch, so that no weights are ever stale."""
        return self.order in EXACT

    def depth(self, stage: int) -> int:
        """Rounds between a slot's forward and its backward in ``stage``: the slots that it has in flight."""
        above = self._processes(stage + 1, self.n_stages)
        if above == 0:
            return 0
        if self.order == "fig1":
            return 2 * above
        mine = self._processes(stage, stage + 1)
        return {"lean": above + mine, "1f1b": above + mine, "gpipe": self.parts, "bp": 1}[self.order]

    def held(self, stage: int) -> int:
        """Of the slots that ``stage`` has in flight, those of one of its processes, at most."""
        return -(-self.depth(stage) // self._processes(stage, stage + 1))

    def _processes(self, start: int, end: int) -> int:
        """Of the stages from ``start`` up to ``end``: slots that they work on at a time."""
        return sum(self.replicas[start:end]) if self.replicas else max(0, end - start)

    @cache  # noqa: B019
    def lag(self, stage: int) -> int:
        """How many slots must have come in behind one before ``stage`` begins the round of that one.

        Then nothing that the round waits for, norms of stages before it included, needs a slot that the
        caller has not given yet: a question to a stage is answered, and means the same moment whoever runs
        the stages. Exact orders are asked only when they are drained.
        """
        if self.exact:
            return 0
        ahead = [self.depth(k) + self._behind(k) for k in range(self.n_stages)]
        return max(ahead) - ahead[stage]

    @cache  # noqa: B019  (a few schedules live as long as the process)
    def pattern(self, stage: int) -> tuple[tuple[Kind, int], ...]:
        """What ``stage`` does in every round: each kind of action, and to which slot, counted from the
        round's own."""
        back = -self.depth(stage)
        if stage == self.n_stages - 1:
            return ("forward", 0), ("backward", back), ("step", back)
        return ("recompute", back), ("backward", back), ("step", back), ("forward", 0)

    def actions(self, stage: int, slots: int) -> list[Action]:
        """The whole list of a segment of so many slots, drained at its end."""
        rounds = range(slots + self.depth(stage))
        every = (Action(kind, r + offset) for r in rounds for kind, offset in self.pattern(stage))
        return [a for a in every if 0 <= a.slot < slots]

    # ---- what several stages have to agree on ----------------------------------------------------------

    def places(self, source: int, target: int, *, tied: bool = False) -> int:
        """Messages with tensors that must be able to wait on the way from one stage to another.

        As many as the one may be ahead by its list before the other comes to the first of them: with fewer,
        both would wait for each other, or the one for the other and that for the caller's next slot (`lag`).
        ``tied``: with the sums of gradients of weights that the one owns and the other has as a guest.
        """
        ahead = abs(self.depth(source) - self.depth(target)) + 1
        sums = self.tied_lag(source, target) if tied else 0
        return max(abs(target - source) + 2, ahead) + sums

    def norm_offset(self, stage: int, other: int) -> int:
        """Whose gradients are clipped together: ``stage``'s of mini-batch m with ``other``'s of m + this.

        In "fig1" with whole batches, an update each, those are the ones of one tick, which are made at the
        same time; elsewhere those of one mini-batch.
        """
        return self._behind(other) - self._behind(stage)

    def _behind(self, stage: int) -> int:
        """Mini-batches that a stage has backwarded before stage 0 has, where ticks are clipped together."""
        return stage if self.order == "fig1" and self.parts == self.accumulate == 1 else 0

    def tied_lag(self, owner: int, guest: int) -> int:
        """Slots between a guest's own backward and the newest sum of tied gradients that it must have seen.

        The owner is so many stages below, and comes to the slot so much later.
        """
        below = self._processes(owner, guest)
        return below + 1 if self.order == "fig1" else -(-below // 2) + 1

    # ---- how far ahead a pass looks ----------------------------------------------------------------------

    def forward_horizon(self, stage: int, aim: Horizon) -> Fraction:
        """Slots that are backwarded between a stage's first forward of a slot and the moment it aims at.

        ``"stage"`` (our reading of the paper): the stage's own backward of that slot. ``"common"`` (ours):
        the moment at which stage 0 backwards it, for all stages alike.
        """
        last = stage == self.n_stages - 1
        if aim == "stage" or self.exact:
            return Fraction(0 if last or self.exact else self.depth(stage) - 1)
        if last:
            return self.backward_horizon(stage, aim)
        return self.backward_horizon(stage, aim) + self.depth(stage) - 1

    def backward_horizon(self, stage: int, aim: Horizon) -> Fraction:
        """Slots that are backwarded between a stage's recompute of a slot and the moment it aims at.

        In "fig1" a gradient takes a tick per stage, in which each stage backwards one slot; in "lean" it
        climbs as fast as backwards follow each other, and stages have done less by then.
        """
        if aim == "stage" or self.exact:
            return Fraction(0)
        below = Fraction(self._processes(0, stage))
        return below if self.order == "fig1" else below * BACKWARD_SHARE

    def staleness(self, stage: int) -> int:
        """Updates between the two passes of one slot in ``stage``, at most."""
        between = max(0, self.held(stage) - 1) * self._processes(stage, stage + 1)
        return 0 if self.exact else -(-between // self.parts)


def in_updates(slots: Fraction | int, per_update: int) -> Fraction:
    """A horizon in slots as one in updates, where a stage steps every ``per_update`` slots."""
    return Fraction(slots) / per_update
