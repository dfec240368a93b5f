"""Losses and skips on their way to every rank: they ride in the notes that stages send each other anyway.

Each stage keeps the run's losses, and its skips, as two lists. A note to an earlier stage carries the losses
that were not yet sent there, one to a later stage the skips; every item has its number in its list, so that
what comes by several ways counts once. A stage that nobody sends gradients to (a frozen one) hears of losses
when the pipeline is drained.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from .batch import Loss, Skip

ITEM = struct.Struct("<Bqqd?d")  # kind, number in its list, batch, value (or count), has a rate, rate
MOST = 12  # items in one note
LOSSES, SKIPS = 0, 1

Item = Loss | Skip


class News:
    """One process's knowledge. ``ask``: what its stage itself has to say."""

    def __init__(self, process: int, ask: Callable[[], Sequence[Item]]) -> None:
        self.process, self.ask = process, ask
        self.known: tuple[list[Item], list[Item]] = ([], [])
        self._sent: dict[int, int] = defaultdict(int)  # to each stage, of the list that goes there
        self._taken, self._common = [0, 0], [0, 0]  # how many were given on; how many all stages know

    def add(self, items: Iterable[Item]) -> None:
        """The stage's own."""
        for item in items:
            self.known[LOSSES if isinstance(item, Loss) else SKIPS].append(item)

    def pack(self, target: int) -> bytes:
        """What a note to ``target`` is to carry."""
        self.add(self.ask())
        kind = LOSSES if target < self.process else SKIPS
        known, start = self.known[kind], self._sent[target]
        items = known[start : start + MOST]
        self._sent[target] = start + len(items)
        return b"".join(_packed(kind, start + i, item) for i, item in enumerate(items))

    def unpack(self, data: memoryview) -> None:
        """What a note carried."""
        for kind, number, batch, value, has_rate, rate in ITEM.iter_unpack(data):
            if number == len(self.known[kind]):
                item = Loss(batch, value, rate if has_rate else None)
                self.known[kind].append(item if kind == LOSSES else Skip(batch, int(value)))

    def rest(self) -> tuple[list[Item], ...]:
        """What others may not know yet."""
        self.add(self.ask())
        return tuple(known[start:] for known, start in zip(self.known, self._common, strict=True))

    def learn(self, rests: Sequence[tuple[list[Item], ...]]) -> None:
        """All stages' `rest`, told at the same moment."""
        for kind, known in enumerate(self.known):
            longest: list[Item] = max([rest[kind] for rest in rests], key=len)
            known[self._common[kind] :] = longest
            self._common[kind] = len(known)

    def take(self) -> list[Item]:
        """What is new since the last call."""
        self.add(self.ask())
        new = [item for kind in (SKIPS, LOSSES) for item in self.known[kind][self._taken[kind] :]]
        self._taken = [len(known) for known in self.known]
        return new


def _packed(kind: int, number: int, item: Item) -> bytes:
    if isinstance(item, Loss):
        return ITEM.pack(kind, number, item.batch, item.value, item.lr is not None, item.lr or 0.0)
    return ITEM.pack(kind, number, item.batch, item.batches, False, 0.0)
