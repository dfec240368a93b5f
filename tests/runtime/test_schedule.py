"""Orders against the published table (DTRP, PLoS ONE 2023, Fig 1), and against runs of nothing but waits."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrp.runtime.clipping import Norms
from dtrp.runtime.links import Channel, Message, QueueLinks
from dtrp.runtime.meter import Meter
from dtrp.runtime.ports import receive
from dtrp.schedule import EXACT, ORDERS, Schedule, in_updates

STAGES = [1, 2, 3, 4, 5, 6, 7, 8]

# K = 3; paper counts from 1. (stage, tick) -> (batch backwarded, its weights' index, batch forwarded, index).
PUBLISHED = {
    (1, 1): (None, None, 1, 2), (1, 2): (None, None, 2, 3), (1, 3): (None, None, 3, 4),
    (1, 4): (None, None, 4, 5), (1, 5): (1, 5, 5, 6), (1, 6): (2, 6, 6, 7),
    (2, 2): (None, None, 1, 2), (2, 3): (None, None, 2, 3), (2, 4): (1, 3, 3, 4),
    (2, 5): (2, 4, 4, 5), (2, 6): (3, 5, 5, 6),
    (3, 3): (1, 1, 1, 1), (3, 4): (2, 2, 2, 2), (3, 5): (3, 3, 3, 3), (3, 6): (4, 4, 4, 4),
}  # fmt: skip


# --- The published table ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "tick"), PUBLISHED)
def test_the_published_table(stage: int, tick: int) -> None:
    """Stage k's round r is its tick r + k, and weights count on while the pipeline fills."""
    k, r = stage - 1, tick - stage
    found: dict[str, Any] = dict.fromkeys(("forward", "backward", "recompute"), (None, None))
    index = r + 1
    for kind, offset in Schedule("fig1", 3).pattern(k):
        if kind == "step":
            index += 1
        elif r + offset >= 0:
            found[kind] = r + offset + 1, index
    assert (*found["backward"], *found["forward"]) == PUBLISHED[stage, tick]
    assert stage == 3 or found["recompute"] == found["backward"]


def test_the_lists_of_three_stages() -> None:
    """What the module's docstring draws, written out."""
    short = {"forward": "F", "backward": "B", "recompute": "R", "step": "S"}

    def drawn(order: str, stage: int, slots: int, parts: int = 1) -> str:
        actions = Schedule(order, 3, parts).actions(stage, slots)
        return " ".join(f"{short[a.kind]}{a.slot}" for a in actions)

    assert drawn("fig1", 0, 5) == "F0 F1 F2 F3 R0 B0 S0 F4 R1 B1 S1 R2 B2 S2 R3 B3 S3 R4 B4 S4"
    assert drawn("fig1", 1, 3) == "F0 F1 R0 B0 S0 F2 R1 B1 S1 R2 B2 S2"
    assert drawn("fig1", 2, 2) == "F0 B0 S0 F1 B1 S1"
    assert drawn("lean", 0, 4) == "F0 F1 F2 R0 B0 S0 F3 R1 B1 S1 R2 B2 S2 R3 B3 S3"
    assert drawn("lean", 1, 3) == drawn("fig1", 1, 3)
    assert drawn("gpipe", 1, 3, 3) == "F0 F1 F2 R0 B0 S0 R1 B1 S1 R2 B2 S2"
    assert drawn("1f1b", 0, 4, 4) == drawn("lean", 0, 4)
    assert drawn("bp", 0, 2) == "F0 R0 B0 S0 F1 R1 B1 S1"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n_stages", STAGES)
def test_every_slot_is_done_once_and_in_order(n_stages: int, order: str) -> None:
    for slots in (0, 1, n_stages, 3 * n_stages + 1):
        schedule = Schedule(order, n_stages, max(1, slots))
        for k in range(n_stages):
            actions = schedule.actions(k, slots)
            kinds = ["forward", "backward", "step"] + ["recompute"] * (k < n_stages - 1)
            for kind in kinds:
                assert [a.slot for a in actions if a.kind == kind] == list(range(slots))
            assert len(actions) == len(kinds) * slots
            for b in range(slots):
                of_slot = [a.kind for a in actions if a.slot == b]
                last = k == n_stages - 1
                assert of_slot == [
                    "forward", *([] if last else ["recompute"]), "backward", "step"
                ]  # fmt: skip


@pytest.mark.parametrize("n_stages", STAGES)
def test_depths(n_stages: int) -> None:
    for k in range(n_stages - 1):
        above = n_stages - (k + 1)  # the paper's K - k
        assert Schedule("fig1", n_stages).depth(k) == 2 * above
        assert Schedule("lean", n_stages, 3).depth(k) == Schedule("1f1b", n_stages, 3).depth(k) == above + 1
        assert Schedule("gpipe", n_stages, 7).depth(k) == 7
        assert Schedule("bp", n_stages, 7).depth(k) == 1
    assert all(Schedule(order, n_stages, 4).depth(n_stages - 1) == 0 for order in ORDERS)


def test_two_stages_are_the_same_in_fig1_and_lean() -> None:
    fig1, lean = Schedule("fig1", 2), Schedule("lean", 2)
    assert all(fig1.actions(k, 9) == lean.actions(k, 9) for k in range(2))


@pytest.mark.parametrize("n_stages", STAGES)
def test_messages_are_made_one_tick_before_they_are_needed(n_stages: int) -> None:
    """What stage k makes at a tick, its neighbours use at the next: else the pipeline stalls."""
    schedule = Schedule("fig1", n_stages)

    def tick(k: int, kind: Any, slot: int) -> int:
        return slot - dict(schedule.pattern(k))[kind] + k

    for k in range(n_stages - 1):
        for slot in range(10):
            assert tick(k + 1, "forward", slot) == tick(k, "forward", slot) + 1
            assert tick(k, "backward", slot) == tick(k + 1, "backward", slot) + 1
    for slot in range(10):
        last = n_stages - 1
        assert tick(last, "forward", slot) == tick(last, "backward", slot) == slot + last
        assert tick(0, "backward", slot) == slot + 2 * last  # B batches take B + 2K - 2 ticks


# --- How far ahead passes look ----------------------------------------------------------------------------


@pytest.mark.parametrize("n_stages", [2, 3, 4, 8])
def test_the_delay_between_both_passes(n_stages: int) -> None:
    """d_k = 2(K-k) - 1 updates (paper, k from 1); lean: K - k."""
    for order, delay in (("fig1", lambda above: 2 * above - 1), ("lean", lambda above: above)):
        schedule = Schedule(order, n_stages)
        for k in range(n_stages - 1):
            assert schedule.forward_horizon(k, "stage") == schedule.staleness(k) == delay(n_stages - k - 1)
        assert schedule.forward_horizon(n_stages - 1, "stage") == schedule.staleness(n_stages - 1) == 0
        assert all(schedule.backward_horizon(k, "stage") == 0 for k in range(n_stages))


def test_the_common_aim_of_four_stages() -> None:
    """K = 4: first forward 5, 4, 3; recompute 0, 1, 2; the last stage 3."""
    schedule = Schedule("fig1", 4)
    assert [schedule.forward_horizon(k, "common") for k in range(4)] == [5, 4, 3, 3]
    assert [schedule.backward_horizon(k, "common") for k in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("n_stages", [2, 3, 4, 8])
def test_the_common_aim(n_stages: int) -> None:
    """In the paper's counting: fig1 2K-k-2, k-1, K-1; lean (k-1) B/T + K-k, (k-1) B/T, (K-1) B/T."""
    share = Fraction(1, 2)
    fig1, lean = Schedule("fig1", n_stages), Schedule("lean", n_stages)
    for k in range(1, n_stages):
        assert fig1.forward_horizon(k - 1, "common") == 2 * n_stages - k - 2
        assert fig1.backward_horizon(k - 1, "common") == k - 1
        assert lean.forward_horizon(k - 1, "common") == (k - 1) * share + n_stages - k
        assert lean.backward_horizon(k - 1, "common") == (k - 1) * share
    assert fig1.forward_horizon(n_stages - 1, "common") == n_stages - 1
    assert lean.forward_horizon(n_stages - 1, "common") == (n_stages - 1) * share


@pytest.mark.parametrize("order", ["fig1", "lean"])
@pytest.mark.parametrize("n_stages", [2, 3, 4, 8])
def test_both_aims_agree_for_the_first_stage(n_stages: int, order: str) -> None:
    schedule = Schedule(order, n_stages)
    assert schedule.forward_horizon(0, "common") == schedule.forward_horizon(0, "stage")
    assert schedule.backward_horizon(0, "common") == 0


@pytest.mark.parametrize("order", EXACT)
def test_exact_orders_have_nothing_to_look_ahead_to(order: str) -> None:
    schedule = Schedule(order, 4, 3)
    assert schedule.exact
    for aim in ("common", "stage"):
        assert {schedule.forward_horizon(k, aim) for k in range(4)} == {0}
        assert {schedule.backward_horizon(k, aim) for k in range(4)} == {0}
    assert {schedule.staleness(k) for k in range(4)} == {0}


def test_horizons_count_updates() -> None:
    assert in_updates(5, 1) == 5
    assert float(in_updates(5, 2)) == 2.5


# --- Runs of nothing but waits ----------------------------------------------------------------------------


@dataclass
class Told:
    """What a simulated stage did."""

    staleness: list[int] = field(default_factory=list)
    most_in_flight: int = 0
    totals: list[float] = field(default_factory=list)  # squared norms to clip by
    guests_lag: list[int] = field(default_factory=list)  # sums of slots that a guest had not seen in its step


class Counted(QueueLinks):
    """Notices whether anything has moved."""

    moved = 0

    def send(self, channel: Channel, message: Message) -> None:
        Counted.moved += 1
        super().send(channel, message)

    def take(self, channel: Channel, slot: int = -1) -> Message | None:
        message = super().take(channel, slot)
        Counted.moved += message is not None
        return message


@dataclass
class Simulation:
    """All stages follow their lists and wait for each other as stages do, with nothing computed.

    ``segments`` holds, per segment, the number of micro-batches of each mini-batch. A line carries at most
    so many messages with tensors as the shared memory between processes has places. ``tied``: (owner, guest).
    ``stops``: the caller gives the last slot, does not drain and waits for an answer.
    """

    schedule: Schedule
    segments: list[list[int]]
    skips: frozenset[tuple[int, int]] = frozenset()
    clips: bool = False
    lag: bool = False
    tied: tuple[int, int] | None = None
    stops: bool = False

    def __post_init__(self) -> None:
        n = self.schedule.n_stages
        self.queues: Any = defaultdict(deque)
        self.sends = {(k, k + 1) for k in range(n - 1)} | {(i, j) for i, j in self.skips if i < j < n}
        self.told = [Told() for _ in range(n)]

    def run(self, choose: Any) -> list[Told]:
        """``choose`` picks the next stage of those that may not be blocked."""
        n = self.schedule.n_stages
        running = {k: self.stage(k) for k in range(n)}
        blocked: set[int] = set()
        while running:
            able = sorted(running.keys() - blocked)
            assert able, f"deadlock: stages {sorted(running)} wait for each other"
            k = choose(able)
            before = Counted.moved
            if next(running[k], "end") == "end":
                del running[k]
            elif Counted.moved == before:
                blocked.add(k)
            if Counted.moved > before:
                blocked.clear()
        assert self.stops or not any(self.queues.values()), "a message was never taken"
        return self.told

    def squared(self, k: int, segment: int, mini: int) -> float:
        """A norm of its own for each stage and mini-batch."""
        return float(1 + k + 10 * mini + 1000 * segment)

    def stage(self, k: int) -> Iterator[None]:
        schedule, told = self.schedule, self.told[k]
        n, depth = schedule.n_stages, schedule.depth(k)
        links, meter = Counted(k, self.queues), Meter(k, n, torch.device("cpu"), record=False)
        norms = Norms(schedule, k, range(n), links, meter, lag=self.lag)
        sources = sorted(i for i, j in self.sends if j == k)
        targets = sorted(j for i, j in self.sends if i == k)
        first_slot = updates = 0
        due: deque[int] = deque()  # slots whose sum of tied gradients has not been taken yet

        def put(kind: str, to: int, slot: int) -> Iterator[Any]:
            channel = Channel(kind, k, to)  # type: ignore[arg-type]
            places = schedule.places(k, to, tied=self.tied == (k, to))
            while (
                sum(len(q) for c, q in self.queues.items() if c[1:] == (k, to) and c[0] != "norm") >= places
            ):
                yield None
            links.send(channel, Message(slot, []))

        def get(kind: str, source: int, slot: int) -> Iterator[Any]:
            yield from receive(links, meter, Channel(kind, source, k), slot)  # type: ignore[arg-type]

        def collect(upto: int | None) -> Iterator[Any]:
            assert self.tied is not None
            while due and (upto is None or due[0] <= upto):
                yield from get("tied-sum", self.tied[0], due[0])
                due.popleft()

        for segment, minis in enumerate(self.segments):
            slots = [(m, part == parts - 1) for m, parts in enumerate(minis) for part in range(parts)]
            made_at: dict[int, int] = {}
            fed = 0
            for r in range(len(slots) - schedule.lag(k) if self.stops else len(slots) + depth):
                if r < len(slots):
                    fed += slots[r][1]
                if self.tied is not None and k == self.tied[1]:
                    yield from collect(first_slot + r - depth - schedule.tied_lag(*self.tied))
                for kind, offset in schedule.pattern(k):
                    place = r + offset
                    if not 0 <= place < len(slots):
                        continue
                    slot, (mini, closes) = first_slot + place, slots[place]
                    if kind == "forward":
                        for i in sources:
                            yield from get("forward", i, slot)
                        made_at[slot] = updates
                        told.most_in_flight = max(told.most_in_flight, len(made_at))
                        if self.tied is not None and k == self.tied[1]:
                            due.append(slot)
                        for j in targets:
                            yield from put("forward", j, slot)
                    elif kind == "backward":
                        for j in reversed(targets):
                            yield from get("backward", j, slot)
                        told.staleness.append(updates - made_at[slot])
                        for i in sources:
                            yield from put("backward", i, slot)
                        if self.tied is not None and k == self.tied[1]:
                            told.guests_lag.append(sum(s < slot for s in due))
                            if k > self.tied[0]:
                                yield from put("tied-gradient", self.tied[0], slot)
                        if self.tied is not None and k == self.tied[0] < self.tied[1]:
                            yield from get("tied-gradient", self.tied[1], slot)
                    elif kind == "step":
                        del made_at[slot]
                        if closes and self.clips:
                            total = yield from norms.total(mini, fed, self.squared(k, segment, mini))
                            told.totals.append(total)
                        if self.tied is not None and k == self.tied[0]:
                            yield from put("tied-sum", self.tied[1], slot)
                        updates += closes
            if self.stops:
                return
            if self.clips:
                yield from norms.settle(fed)
            if self.tied is not None and k == self.tied[1]:
                yield from collect(None)
            first_slot += len(slots)


def simulate(schedule: Schedule, segments: list[list[int]], **knobs: Any) -> list[Told]:
    """The same, whichever stage is the fastest."""
    rng = random.Random(0)
    runs = [Simulation(schedule, segments, **knobs).run(c) for c in (min, max, rng.choice, rng.choice)]
    assert all(run == runs[0] for run in runs), "the bits would depend on timing"
    return runs[0]


def segments_of(order: str, parts: int, minis: int) -> list[list[int]]:
    """A run that is drained twice; exact orders drain after each mini-batch."""
    if order in EXACT:
        return [[parts]] * minis
    return [[parts] * minis, [parts], [parts] * (minis // 2)]


EVERY = [(order, n, m) for order in ORDERS for n in (2, 3, 4, 5, 6, 7, 8) for m in (1, 2, 5)]


@pytest.mark.parametrize(("order", "n_stages", "parts"), EVERY)
def test_nobody_waits_for_ever_and_weights_are_as_stale_as_the_table_says(
    order: str, n_stages: int, parts: int
) -> None:
    schedule = Schedule(order, n_stages, parts)
    told = simulate(schedule, segments_of(order, parts, 2 * n_stages + 3))
    for k, stage in enumerate(told):
        depth = schedule.depth(k)
        assert stage.most_in_flight == max(1, min(depth, parts) if schedule.exact else depth)
        between = {"fig1": 2 * (n_stages - 1 - k) - 1, "lean": n_stages - 1 - k}.get(order, 0)
        if k == n_stages - 1:
            between = 0
        assert max(stage.staleness) == schedule.staleness(k) == ceil(between / parts)
        settled = stage.staleness[depth + parts : (2 * n_stages + 3) * parts]
        assert all(s in (between // parts, ceil(between / parts)) for s in settled)


@pytest.mark.parametrize(("order", "n_stages", "parts"), [e for e in EVERY if e[1] in (3, 6) and e[2] < 5])
def test_skips_over_all_stages(order: str, n_stages: int, parts: int) -> None:
    """Each stage sends to all after it, through lines that hold j - i + 2 slots."""
    every = frozenset((i, j) for i in range(n_stages) for j in range(i + 1, n_stages))
    chain = simulate(Schedule(order, n_stages, parts), segments_of(order, parts, n_stages + 3))
    skips = simulate(Schedule(order, n_stages, parts), segments_of(order, parts, n_stages + 3), skips=every)
    assert skips == chain


@pytest.mark.parametrize(("order", "n_stages", "parts"), [e for e in EVERY if e[1] in (2, 3, 4, 7)])
def test_norms_of_all_stages_come_together(order: str, n_stages: int, parts: int) -> None:
    """Each stage clips by the same sums as those whose gradients stand beside its own."""
    schedule = Schedule(order, n_stages, parts)
    segments = segments_of(order, parts, 2 * n_stages + 1)
    simulation = Simulation(schedule, segments, clips=True)
    told = simulate(schedule, segments, clips=True)
    for k in range(n_stages):
        expected = []
        for s, minis in enumerate(segments):
            for m in range(len(minis)):
                beside = [(j, m + schedule.norm_offset(k, j)) for j in range(n_stages)]
                expected.append(sum(simulation.squared(j, s, b) for j, b in beside if 0 <= b < len(minis)))
        assert told[k].totals == expected


@pytest.mark.parametrize("order", ["fig1", "lean"])
@pytest.mark.parametrize("n_stages", [2, 3, 5, 8])
def test_lagging_norms_are_those_of_a_batch_that_all_have_finished(n_stages: int, order: str) -> None:
    segments = segments_of(order, 1, 2 * n_stages + 1)
    simulation = Simulation(Schedule(order, n_stages), segments)
    told = simulate(Schedule(order, n_stages), segments, clips=True, lag=True)
    for k in range(n_stages):
        done = [sum(simulation.squared(j, s, m) for j in range(n_stages))
                for s, minis in enumerate(segments) for m in range(len(minis))]  # fmt: skip
        expected = []
        first = 0
        for s, minis in enumerate(segments):
            for m in range(len(minis)):
                known = first if m <= k else first + m - k
                expected.append(done[known - 1] if known else simulation.squared(k, s, m))
            first += len(minis)
        assert told[k].totals == expected


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n_stages", [2, 3, 4, 8])
def test_tied_weights_of_any_two_stages(n_stages: int, order: str) -> None:
    """Also where the guest comes before its owner: one that takes no part in the backward pass sends nothing,
    and waits all the same. A guest's weights are as old as the schedule says, whichever stage is fast."""
    pairs = [(i, j) for i in range(n_stages) for j in range(n_stages) if i != j]
    if n_stages == 8:
        pairs = [(0, 7), (3, 7), (0, 1), (6, 7), (2, 5), (7, 0), (5, 1)]
    for parts in (1, 3):
        schedule = Schedule(order, n_stages, parts)
        segments = segments_of(order, parts, n_stages + 6)
        longest = max(map(sum, segments))
        for owner, guest in pairs:
            told = simulate(schedule, segments, tied=(owner, guest))
            lag = schedule.tied_lag(owner, guest)
            assert lag == (max(0, guest - owner) if order == "fig1" else ceil(max(0, guest - owner) / 2)) + 1
            assert max(told[guest].guests_lag) == min(lag - 1, longest - 1)


@settings(max_examples=60, deadline=None)
@given(
    order=st.sampled_from(ORDERS),
    n_stages=st.integers(1, 8),
    parts=st.integers(1, 6),
    segments=st.lists(st.lists(st.integers(1, 6), max_size=14), min_size=1, max_size=3),
    clips=st.booleans(),
    lag=st.booleans(),
    pair=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    skips=st.frozensets(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=6),
)
def test_any_run_comes_to_its_end(
    order: str,
    n_stages: int,
    parts: int,
    segments: list[list[int]],
    clips: bool,
    lag: bool,
    pair: tuple[int, int],
    skips: frozenset[tuple[int, int]],
) -> None:
    """Mini-batches of fewer micro-batches than usual, too (a loader's last, smaller one)."""
    segments = [[min(p, parts) for p in minis] for minis in segments]
    if order in EXACT:
        segments = [[p] for minis in segments for p in minis]
    tied = pair if pair[0] != pair[1] and max(pair) < n_stages else None
    schedule = Schedule(order, n_stages, parts)
    told = simulate(schedule, segments, clips=clips, lag=lag and order not in EXACT, tied=tied, skips=skips)
    slots = sum(map(sum, segments))
    for k, stage in enumerate(told):
        assert len(stage.staleness) == slots
        assert stage.most_in_flight <= max(1, schedule.depth(k))
        assert all(s <= max(0, schedule.depth(k) - 1) for s in stage.staleness)
        assert not schedule.exact or not any(stage.staleness)


@settings(max_examples=100, deadline=None)
@given(
    order=st.sampled_from(sorted(set(ORDERS).difference(EXACT))),
    n_stages=st.integers(2, 8),
    minis=st.lists(st.integers(1, 6), min_size=1, max_size=20),
    clips=st.booleans(),
    pair=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    skips=st.frozensets(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=6),
)
def test_a_question_is_answered_wherever_the_caller_stops(
    order: str,
    n_stages: int,
    minis: list[int],
    clips: bool,
    pair: tuple[int, int],
    skips: frozenset[tuple[int, int]],
) -> None:
    """All stages come to the end of the rounds that are due. With too few places on a line, who sends would
    wait for who takes, and that one for the caller: two stages with tied weights did, in "lean"."""
    parts = max(minis)
    tied = pair if pair[0] != pair[1] and max(pair) < n_stages else None
    schedule = Schedule(order, n_stages, parts)
    simulate(schedule, [minis], clips=clips, tied=tied, skips=skips, stops=True)
