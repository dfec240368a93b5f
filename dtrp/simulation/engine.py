"""The clock: every device follows its stage's list of actions, and waits for messages as stages do.

An action begins when the device is free and what it needs has come, and ends with sending what it made:

    [1] take the messages that the action waits for     their places on the line are free again
    [2] compute
    [3] wait for a free place on the lines out, send    the message arrives so much later

Lines have as many places as stages' own have (`Schedule.places`); messages of one line follow each other.
Where nothing overlaps (a CPU), [1] and [3] take both devices' own time.

Nothing depends on the order in which events are looked at, since each line has one end that writes and one
that reads: the times of an action follow from those of its causes. So the loop does not pick the earliest
event: in each round it takes every device whose next action has all its causes, all at once, in arrays. That
is what makes a thousand stages quick.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtrp.schedule import Schedule

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

KINDS = ("forward", "recompute", "backward", "step")
FORWARD, RECOMPUTE, BACKWARD, STEP = range(4)


@dataclass(frozen=True, eq=False)
class Lines:
    """One direction between two devices each: values downstream, or gradients upstream. Arrays of one length.

    Attributes
    ----------
    source, target : array of int
        Devices.
    gradient : array of bool
        Whether it carries gradients.
    places : array of int
        Messages that may be on the way.
    seconds, latency, jitter : array of float
        For one slot's message: how long the line is busy, how much later it is there, and by how much more
        on average.
    """

    source: Ints
    target: Ints
    gradient: NDArray[np.bool_]
    places: Ints
    seconds: Floats
    latency: Floats
    jitter: Floats


@dataclass(frozen=True, eq=False)
class Work:
    """What is simulated; devices are numbered replica after replica.

    Attributes
    ----------
    schedule : Schedule
    replicas : int
    seconds : array, shape (4, replicas * n_stages)
        Of each kind of action (`KINDS`), for one slot; a step's are for a mini-batch.
    lines : Lines
    reduction : array, shape (n_stages,)
        Seconds in which the replicas of a stage average their gradients.
    overlaps : bool
        Whether devices compute while they send and receive.
    jitter : float
        Relative standard deviation of an action's time.
    """

    schedule: Schedule
    replicas: int
    seconds: Floats
    lines: Lines
    reduction: Floats
    overlaps: bool = True
    jitter: float = 0.0


@dataclass(frozen=True, eq=False)
class Trace:
    """What came of it.

    Attributes
    ----------
    ended, busy : array, shape (batches, devices)
        Seconds when each device had stepped after each mini-batch, and of these the busy ones.
    in_flight : array, shape (devices,)
        The most slots that each held.
    events : list
        (device, kind, slot, start, end) of each action, if that was asked for.
    """

    ended: Floats
    busy: Floats
    in_flight: Ints
    events: list[tuple[int, int, int, float, float]]


def listing(schedule: Schedule, stage: int, slots: int) -> Ints:
    """`Schedule.actions` as an array of ``4 * slot + kind``."""
    pattern = schedule.pattern(stage)
    rounds = np.arange(slots + schedule.depth(stage))[:, None]
    slot = rounds + np.array([offset for _, offset in pattern])
    codes = 4 * slot + np.array([KINDS.index(kind) for kind, _ in pattern])
    chosen: Ints = codes[(slot >= 0) & (slot < slots)]
    return chosen


def run(work: Work, batches: int, *, seed: int = 0, record: bool = False) -> Trace:
    """Simulate until every device has stepped after so many mini-batches."""
    return _Run(work, batches, seed, record).trace()


class _Run:
    def __init__(self, work: Work, batches: int, seed: int, record: bool) -> None:
        self.work, self.batches, self.record = work, batches, record
        schedule, k = work.schedule, work.schedule.n_stages
        self.parts = schedule.parts
        # An exact order drains after each mini-batch. Else the list is so long that nobody comes to its end.
        self.segment = self.parts * (1 if schedule.exact else batches + -(-schedule.depth(0) // self.parts))
        lists = [listing(schedule, stage, self.segment) for stage in range(k)]
        self.length = np.tile([len(actions) for actions in lists], work.replicas)
        self.table = np.zeros((k, max(map(len, lists))), dtype=np.int64)
        for row, actions in zip(self.table, lists, strict=True):
            row[: len(actions)] = actions
        self.random = np.random.default_rng(seed)
        n, lines = k * work.replicas, work.lines
        self.stage = np.tile(np.arange(k), work.replicas)
        self.at = np.zeros(n, dtype=np.int64)  # in the list
        self.segments = np.zeros(n, dtype=np.int64)  # done
        self.code = self.table[self.stage, self.at]
        self.sending = np.zeros(n, dtype=bool)
        self.now = np.zeros(n)
        self.busy = np.zeros(n)
        self.held = np.zeros(n, dtype=np.int64)
        self.most_held = np.zeros(n, dtype=np.int64)
        self.ended = np.full((batches, n), np.nan)
        self.busy_then = np.full((batches, n), np.nan)
        self.left = n  # devices that are not through yet
        self.base = np.concatenate(([0], np.cumsum(lines.places)))[:-1].astype(np.int64)
        self.sent = np.zeros(len(lines.source), dtype=np.int64)
        self.taken = np.zeros(len(lines.source), dtype=np.int64)
        self.arrives = np.zeros(int(lines.places.sum()))  # by place
        self.freed = np.zeros(int(lines.places.sum()))
        self.free = np.zeros(len(lines.source))  # when the line is
        self.arrived = np.zeros(len(lines.source))  # its latest message
        self.kind_of_line = np.where(lines.gradient, BACKWARD, FORWARD)
        self.events: list[tuple[int, int, int, float, float]] = []

    def trace(self) -> Trace:
        while self.left:
            began = self._begin()
            if not self._send() and not began:
                raise RuntimeError("every device waits for another: the lists contradict each other")
        return Trace(self.ended, self.busy_then, self.most_held, self.events)

    # ---- [1] and [2] ---------------------------------------------------------------------------------------

    def _begin(self) -> bool:
        """Every device whose next action has what it needs does it; whether there was any."""
        work, lines = self.work, self.work.lines
        kind = self.code & 3
        free = ~self.sending
        needed = (kind[lines.target] == self.kind_of_line) & free[lines.target]
        go = free.copy()
        go[lines.target[needed & (self.sent == self.taken)]] = False
        if work.replicas > 1:
            self._together(kind, go)
        devices = np.flatnonzero(go)
        if not len(devices):
            return False
        taking = np.flatnonzero(needed & go[lines.target])
        if len(taking):
            self._take(taking)
        kinds = kind[devices]
        seconds = work.seconds[kinds, devices]
        if work.jitter:
            sigma = np.sqrt(np.log1p(work.jitter**2))
            seconds = seconds * self.random.lognormal(-(sigma**2) / 2, sigma, len(devices))
        if self.parts > 1:  # only the last part of a mini-batch brings an update
            seconds = np.where((kinds == STEP) & ~self._closes(devices), 0.0, seconds)
        start = self.now[devices]
        self.now[devices] = start + seconds
        self.busy[devices] += seconds
        if self.record:
            slots = (self.code[devices] >> 2) + self.segments[devices] * self.segment
            ends = self.now[devices]
            self.events += zip(*(a.tolist() for a in (devices, kinds, slots, start, ends)), strict=True)
        self.sending[devices] = True
        return True

    def _together(self, kind: Ints, go: NDArray[np.bool_]) -> None:
        """Replicas of a stage step when all of them have their gradients, and these are averaged."""
        shape = (self.work.replicas, -1)
        waits = go & (kind == STEP)
        waits[waits] = self._closes(np.flatnonzero(waits))
        all_there = waits.reshape(shape).all(axis=0)
        go &= ~waits | np.tile(all_there, self.work.replicas)
        latest = self.now.reshape(shape).max(axis=0) + self.work.reduction
        both = np.tile(all_there, self.work.replicas)
        self.now[both] = np.tile(latest, self.work.replicas)[both]

    def _take(self, taking: Ints) -> None:
        lines = self.work.lines
        target = lines.target[taking]
        place = self.base[taking] + self.taken[taking] % lines.places[taking]
        np.maximum.at(self.now, target, self.arrives[place])
        if not self.work.overlaps:
            seconds = lines.seconds[taking]
            np.add.at(self.now, target, seconds)
            np.add.at(self.busy, target, seconds)
        self.freed[place] = self.now[target]
        self.taken[taking] += 1

    # ---- [3] -----------------------------------------------------------------------------------------------

    def _send(self) -> bool:
        """Every device that has computed, and has a place for what it made, sends it and goes on."""
        lines = self.work.lines
        kind = self.code & 3
        made = (kind[lines.source] == self.kind_of_line) & self.sending[lines.source]
        go = self.sending.copy()
        go[lines.source[made & (self.sent - self.taken == lines.places)]] = False
        devices = np.flatnonzero(go)
        if not len(devices):
            return False
        leaving = np.flatnonzero(made & go[lines.source])
        if len(leaving):
            self._leave(leaving)
        self.sending[devices] = False
        kinds = kind[devices]
        self.held[devices] += (kinds == FORWARD).astype(np.int64) - (kinds == STEP)
        np.maximum(self.most_held, self.held, out=self.most_held)
        stepped = devices[kinds == STEP]
        if len(stepped):
            self._note(stepped[self._closes(stepped)])
        self.at[devices] += 1
        ended = devices[self.at[devices] == self.length[devices]]
        self.at[ended] = 0
        self.segments[ended] += 1
        self.code[devices] = self.table[self.stage[devices], self.at[devices]]
        return True

    def _leave(self, leaving: Ints) -> None:
        work, lines = self.work, self.work.lines
        source, seconds = lines.source[leaving], lines.seconds[leaving]
        place = self.base[leaving] + self.sent[leaving] % lines.places[leaving]
        np.maximum.at(self.now, source, self.freed[place])
        if work.overlaps:
            self.free[leaving] = np.maximum(self.free[leaving], self.now[source]) + seconds
            arrives = self.free[leaving] + lines.latency[leaving]
        else:
            np.add.at(self.now, source, seconds)
            np.add.at(self.busy, source, seconds)
            arrives = self.now[source] + lines.latency[leaving]
        if lines.jitter.any():
            arrives = arrives + self.random.exponential(1.0, len(leaving)) * lines.jitter[leaving]
        self.arrived[leaving] = np.maximum(self.arrived[leaving], arrives)
        self.arrives[place] = self.arrived[leaving]
        self.sent[leaving] += 1

    def _closes(self, devices: Ints) -> NDArray[np.bool_]:
        closes: NDArray[np.bool_] = (self.code[devices] >> 2) % self.parts == self.parts - 1
        return closes

    def _note(self, devices: Ints) -> None:
        """These have stepped."""
        batch = (self.code[devices] >> 2) // self.parts + self.segments[devices] * (
            self.segment // self.parts
        )
        known = batch < self.batches
        devices, batch = devices[known], batch[known]
        self.ended[batch, devices] = self.now[devices]
        self.busy_then[batch, devices] = self.busy[devices]
        self.left -= int((batch == self.batches - 1).sum())
