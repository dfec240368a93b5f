"""The clock against closed formulas, timelines made by hand, and a slow clock that knows only definitions."""

from __future__ import annotations

import random
import time
from math import ceil
from typing import Any

import numpy as np
import pytest

from dtrp.partitioner.profile import Message, Profile, StageProfile
from dtrp.schedule import EXACT, ORDERS, Schedule
from dtrp.simulation.cluster import Cluster, Link
from dtrp.simulation.engine import KINDS, Lines, Work, listing, run
from dtrp.simulation.run import simulate

from .clock import Line, naive

FREE = Cluster(node=Link(float("inf")))


def equal(n_stages: int, forward: float = 1.0, backward: float = 2.0) -> Profile:
    """Stages alike that give each other values of one byte."""
    messages = tuple(Message(k, k + 1, 1, 1) for k in range(n_stages - 1))
    return Profile((StageProfile(forward, backward, 0.0),) * n_stages, messages)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("parts", [1, 3])
def test_it_follows_the_stages_own_lists(order: str, parts: int) -> None:
    """The arrays are `Schedule.actions`, one by one: else another order would be simulated than runs."""
    schedule = Schedule(order, 4, parts)
    for stage in range(4):
        for slots in (1, 3, 7):
            actions = [(a.kind, a.slot) for a in schedule.actions(stage, slots)]
            assert [(KINDS[c & 3], c >> 2) for c in listing(schedule, stage, slots)] == actions


# --- Closed formulas --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("n_stages", "parts"), [(1, 1), (2, 1), (2, 4), (3, 7), (4, 8), (7, 3), (8, 32)])
def test_the_bubble_of_exact_orders(n_stages: int, parts: int, order: str) -> None:
    """(K-1) / (M+K-1) for stages alike that keep their graphs, over free links (Huang et al. 2019)."""
    found = simulate(equal(n_stages), FREE, schedule=order, micro_batches=parts, recompute=False)
    assert [s.idle for s in found.stages] == pytest.approx(
        [(n_stages - 1) / (parts + n_stages - 1)] * n_stages
    )
    assert found.batch_time == pytest.approx(3 * (parts + n_stages - 1) / parts)


@pytest.mark.parametrize("n_stages", [1, 2, 5])
def test_back_propagation_takes_turns(n_stages: int) -> None:
    assert simulate(equal(n_stages), FREE, schedule="bp").batch_time == pytest.approx(3 * n_stages)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("order", ["fig1", "lean"])
def test_decoupled_orders_go_at_the_pace_of_the_slowest_stage(order: str, seed: int) -> None:
    """Over free links nothing but the slowest stage's own work limits them, however the others are."""
    rng = random.Random(seed)
    stages = tuple(
        StageProfile(rng.random(), 2 * rng.random(), 0.1 * rng.random()) for _ in range(rng.randint(1, 7))
    )
    recompute = [rng.random() < 0.5 for _ in stages]
    messages = tuple(Message(k, k + 1, 1, 1) for k in range(len(stages) - 1))
    found = simulate(Profile(stages, messages), FREE, schedule=order, recompute=recompute)
    assert found.batch_time == pytest.approx(max(s.work_time for s in found.stages), rel=1e-6)
    for k, stage in enumerate(stages):
        passes = 2 if recompute[k] and k < len(stages) - 1 else 1
        predicted = 0 if len(stages) == 1 else 2 if passes == 2 and k else 1
        work = passes * stage.forward + stage.backward + (7 + 4 * predicted) * stage.sweep
        assert found.stages[k].work_time == pytest.approx(work, rel=1e-6)
    assert "works all the time" in found.limit


def test_a_slow_link_limits() -> None:
    """As many bytes per second as it carries, and no more; the other way is another link."""
    messages = (Message(0, 1, 500, 100), Message(1, 2, 1, 0))
    found = simulate(Profile((StageProfile(1.0, 2.0, 0.0),) * 3, messages, bandwidth=100.0))
    assert found.batch_time == pytest.approx(5.0)
    shares = {(link.source, link.target): link.busy for link in found.links}
    assert shares == pytest.approx({(0, 1): 1, (1, 0): 0.2, (1, 2): 0.002})
    assert found.limit == "the link from stage 0 to 1 is busy all the time"


def test_on_a_cpu_messages_take_the_stages_own_time() -> None:
    """Sent and received, there and back, by cores that would compute: as the planner adds them up."""
    cpu = Profile((StageProfile(1.0, 2.0, 0.0),) * 2, (Message(0, 1, 50, 20),), 100.0, 0.1, overlaps=False)
    assert simulate(cpu, recompute=False).batch_time == pytest.approx(3 + 0.5 + 0.1 + 0.2 + 0.1)


def test_replicas_step_together() -> None:
    """A ring moves 2 (r-1)/r of the gradients over its slowest link; the slowest replica sets the pace."""
    stages = Profile((StageProfile(1.0, 2.0, 0.0, gradients=300),) * 2, (Message(0, 1, 1, 1),))
    apart = Cluster(replicas=3, per_node=2, node=Link(1e9), net=Link(100.0, latency=0.5), speed={3: 0.5})
    found = simulate(stages, apart, recompute=False)
    assert found.batch_time == pytest.approx(3 / 0.5 + 2 * 2 * (300 / 3 / 100 + 0.5))
    assert found.throughput == pytest.approx(3 / found.batch_time)
    together = simulate(stages, Cluster(replicas=3, node=Link(1e9), net=Link(100.0)), recompute=False)
    assert together.batch_time == pytest.approx(3.0, rel=1e-5)  # nobody leaves the node


# --- Timelines made by hand -------------------------------------------------------------------------------


def test_two_stages_by_hand() -> None:
    """ "lean", K = 2, F = 1, B = 2, recomputing, latency 1 s each way.

    stage 0   F0 F1 R0 .  .  B0 B0 F2 R1 ...      R0 hides a second of the wait; B0 waits for t = 5
    stage 1   .  .  F0 B0 B0 F1 B1 B1
    """
    work = Work(
        Schedule("lean", 2), 1, np.array([[1.0, 1.0], [1.0, 0.0], [2.0, 2.0], [0.0, 0.0]]),
        Lines(np.array([0, 1]), np.array([1, 0]), np.array([False, True]), np.array([3, 3]),
              np.zeros(2), np.ones(2), np.zeros(2)), np.zeros(2),
    )  # fmt: skip
    events = {
        (d, KINDS[kind], slot): (start, end) for d, kind, slot, start, end in run(work, 3, record=True).events
    }
    assert [events[0, "forward", s] for s in (0, 1, 2)] == [(0, 1), (1, 2), (8, 9)]
    assert [events[0, "recompute", s] for s in (0, 1)] == [(2, 3), (9, 10)]
    assert [events[0, "backward", s] for s in (0, 1)] == [(6, 8), (10, 12)]
    assert [events[1, "forward", s] for s in (0, 1, 2)] == [(2, 3), (5, 6), (10, 11)]
    assert [events[1, "backward", s] for s in (0, 1, 2)] == [(3, 5), (6, 8), (11, 13)]


# --- A slow clock -----------------------------------------------------------------------------------------


def compare(rng: random.Random) -> None:
    """One random pipeline, with skips, both ways."""
    k, parts = rng.randint(1, 5), rng.choice([1, 1, 2, 5])
    order = rng.choice(ORDERS)
    schedule = Schedule(order, k, 1 if order == "bp" else parts)
    overlaps, batches = rng.random() < 0.6, rng.randint(2, 9)
    seconds = [{kind: rng.random() for kind in KINDS} for _ in range(k)]
    pairs = [(i, j) for i in range(k) for j in range(i + 1, k) if j == i + 1 or rng.random() < 0.4]
    slow: list[Line] = []
    for i, j in pairs:
        for a, b, kind in ((i, j, "forward"), (j, i, "backward")):
            if kind == "forward" or rng.random() < 0.8:
                price, late = rng.random() * rng.choice([0, 0.3, 2]), rng.random() * rng.choice([0, 1])
                slow.append(Line(a, b, kind, price, late, schedule.places(a, b)))
    columns: Any = [
        [getattr(x, name) for x in slow] for name in ("source", "target", "places", "seconds", "latency")
    ]
    source, target, places, price, late = (np.array(c) for c in columns)
    if not slow:
        source = target = places = np.zeros(0, dtype=np.int64)
    lines = Lines(
        source, target, np.array([x.kind == "backward" for x in slow], dtype=bool), places,
        price.astype(float), late.astype(float), np.zeros(len(slow)),
    )  # fmt: skip
    table = np.array([[s[kind] for s in seconds] for kind in KINDS])
    found = run(Work(schedule, 1, table, lines, np.zeros(k), overlaps), batches).ended
    # The engine's list of a decoupled order is longer than the batches that are asked for: so is this one.
    more = batches if schedule.exact else batches + ceil(schedule.depth(0) / schedule.parts)
    expected = np.array(naive(schedule, seconds, slow, more, overlaps)).T[:batches]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_a_slow_clock(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(25):
        compare(rng)


@pytest.mark.slow
def test_agrees_with_a_slow_clock_thousands_of_times() -> None:
    rng = random.Random(99)
    for _ in range(3000):
        compare(rng)


# --- What the lists say -----------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("order", ORDERS)
def test_staleness_is_the_lists_own(order: str, parts: int) -> None:
    """Updates between a slot's two passes, counted off the lists; whole batches: algorithm.md's table."""
    k = 5
    parts = 1 if order == "bp" else parts
    schedule = Schedule(order, k, parts)
    found = simulate(equal(k), FREE, schedule=order, micro_batches=parts)
    for stage in range(k):
        counted, updates, seen = 0, 0, {}
        for kind, slot in schedule.actions(stage, parts if order in EXACT else 60):
            if kind == "forward":
                seen[slot] = updates
            elif kind == "backward":
                counted = max(counted, updates - seen[slot])
            elif kind == "step":
                updates += slot % parts == parts - 1
        assert found.stages[stage].staleness == counted
        table = {"fig1": max(0, 2 * (k - 1 - stage) - 1), "lean": k - 1 - stage}
        assert parts > 1 or counted == table.get(order, 0)
        held = {"fig1": 2 * (k - 1 - stage), "lean": k - stage, "1f1b": min(parts, k - stage), "gpipe": parts}
        assert found.stages[stage].in_flight == (1 if stage == k - 1 else held.get(order, 1))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("parts", [1, 4, 40])
def test_no_order_waits_in_a_circle(order: str, parts: int) -> None:
    """With as many places as `Schedule.places` says, over skips of any length, lists never block each other.

    A stage runs so far ahead of another in "gpipe" that three places were too few: workers hung.
    """
    k = 6
    schedule = Schedule(order, k, 1 if order == "bp" else parts)
    pairs = [(i, j) for i in range(k) for j in range(k) if i != j]
    lines = Lines(
        *(np.array([p[i] for p in pairs]) for i in (0, 1)), np.array([i > j for i, j in pairs]),
        np.array([schedule.places(i, j) for i, j in pairs]), *(np.zeros(len(pairs)) for _ in range(3)),
    )  # fmt: skip
    assert np.isfinite(run(Work(schedule, 1, np.ones((4, k)), lines, np.zeros(k)), 5).ended).all()


# --- Jitter, size -----------------------------------------------------------------------------------------


def test_jitter_is_seeded_and_has_the_mean_that_was_asked_for() -> None:
    alone = Profile((StageProfile(1.0, 2.0, 0.0),))
    found = [simulate(alone, {"jitter": 0.2}, seed=s, batches=1500).batch_time for s in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert found == pytest.approx([3.0] * 3, rel=0.02)
    shaky = Cluster(node=Link(1e9, jitter=2.0))
    assert simulate(equal(4), shaky).batch_time > simulate(equal(4), FREE).batch_time * 1.02


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_a_thousand_stages_in_seconds(order: str) -> None:
    start = time.perf_counter()
    found = simulate(equal(1024), {"node": {"bandwidth": 100, "latency": 0.1}}, schedule=order)
    assert time.perf_counter() - start < 10
    if order in ("fig1", "lean"):
        assert found.batch_time == pytest.approx(4.0)
