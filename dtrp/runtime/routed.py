"""Stages of several processes: their numbers, and which of them a message is for (ours).

    stage 0, 1 process        stage 1, 2 processes        stage 2, 1 process
                     slot 0, 2, ..  ->  process 1  ->
        process 0                                             process 3
                     slot 1, 3, ..  ->  process 2  ->

A slot belongs to one process of each stage, in turn. What concerns all of a stage's processes, as norms and
sums of tied gradients do, which all of another stage's know, comes to each from one of these.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from .links import Channel, LostStage, Message

if TYPE_CHECKING:
    from .group_links import GroupLinks
    from .shared import SharedLinks

OF_ALL = ("norm", "tied-sum")


@dataclass(frozen=True)
class Seats:
    """How many processes each stage has. They are numbered stage by stage."""

    replicas: tuple[int, ...]

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """Of each stage."""
        return tuple(accumulate(self.replicas, initial=0))[:-1]

    @cached_property
    def stages(self) -> tuple[int, ...]:
        """Each process's."""
        return tuple(k for k, r in enumerate(self.replicas) for _ in range(r))

    def of(self, stage: int) -> range:
        """The processes of a stage."""
        return range(self.firsts[stage], self.firsts[stage] + self.replicas[stage])

    def turn(self, process: int) -> tuple[int, int]:
        """``(i, n)``: which slots it has, every n-th from i."""
        stage = self.stages[process]
        return process - self.firsts[stage], self.replicas[stage]

    def at(self, stage: int, slot: int) -> int:
        """Whose that slot is."""
        return self.firsts[stage] + slot % self.replicas[stage]

    def pairs(self, stages: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
        """Who sends to whom where these stages do."""
        return {(i, j) for a, b in stages for i in self.of(a) for j in self.of(b) if i != j}

    def name(self, process: int) -> str:
        """What to call it in messages."""
        stage, (i, n) = self.stages[process], self.turn(process)
        return f"stage {stage}" if n == 1 else f"stage {stage} ({i + 1} of {n})"


class Routed:
    """One process's links to stages, over its lines to processes."""

    def __init__(self, links: SharedLinks | GroupLinks, seats: Seats, process: int) -> None:
        self.links, self.seats, self.process = links, seats, process
        self.turn = seats.turn(process)

    @property
    def full(self) -> int | None:
        full = self.links.full
        return None if full is None else self.seats.stages[full]

    def send(self, channel: Channel, message: Message) -> None:
        seats, (i, n) = self.seats, self.turn
        if channel.kind in OF_ALL:
            targets = list(seats.of(channel.target))[i::n]
        elif channel.kind == "evaluate":
            targets = [seats.firsts[channel.target]]
        else:
            targets = [seats.at(channel.target, message.slot)]
        for target in targets:
            self.links.send(Channel(channel.kind, self.process, target), message)

    def take(self, channel: Channel, slot: int) -> Message:
        seats = self.seats
        if channel.kind in OF_ALL:
            source = seats.at(channel.source, self.turn[0])
        elif channel.kind == "evaluate":
            source = seats.firsts[channel.source]
        else:
            source = seats.at(channel.source, slot)
        try:
            return self.links.take(Channel(channel.kind, source, self.process))
        except LostStage as e:
            raise LostStage(e.peer, e.why, seats.name(e.peer)) from None

    def waiting(self) -> int:
        return self.links.waiting()
