"""The schedule against the published table (DTRP, PLoS ONE 2023, Fig 1), written out cell by cell."""

from __future__ import annotations

import pytest

from dtrp.runtime.schedule import (
    backward_horizon,
    backward_slot,
    backward_tick,
    drain_ticks,
    forward_horizon,
    forward_slot,
    in_updates,
    max_in_flight,
    weight_version,
)

# K = 3; paper counts from 1. (stage, tick) -> (batch backwarded, its weights' index, batch forwarded, index).
PUBLISHED = {
    (1, 1): (None, None, 1, 2), (1, 2): (None, None, 2, 3), (1, 3): (None, None, 3, 4),
    (1, 4): (None, None, 4, 5), (1, 5): (1, 5, 5, 6), (1, 6): (2, 6, 6, 7),
    (2, 2): (None, None, 1, 2), (2, 3): (None, None, 2, 3), (2, 4): (1, 3, 3, 4),
    (2, 5): (2, 4, 4, 5), (2, 6): (3, 5, 5, 6),
    (3, 3): (1, 1, 1, 1), (3, 4): (2, 2, 2, 2), (3, 5): (3, 3, 3, 3), (3, 6): (4, 4, 4, 4),
}  # fmt: skip


@pytest.mark.parametrize(("stage", "tick"), PUBLISHED)
def test_the_published_table(stage: int, tick: int) -> None:
    backward, backward_version, forward, forward_version = PUBLISHED[stage, tick]
    k, t = stage - 1, tick - 1
    assert forward_slot(k, t) + 1 == forward
    slot = backward_slot(k, t, 3)
    assert (slot + 1 if slot >= 0 else None) == backward
    last = stage == 3
    assert weight_version(k, t) - last == forward_version
    if backward is not None:
        assert weight_version(k, t) - 1 == backward_version


@pytest.mark.parametrize("n_stages", [1, 2, 3, 4, 8])
def test_messages_are_made_one_tick_before_they_are_needed(n_stages: int) -> None:
    """What stage k makes at a tick, its neighbours use at the next: else the pipeline stalls."""
    for k in range(n_stages - 1):
        for tick in range(50):
            assert forward_slot(k + 1, tick + 1) == forward_slot(k, tick)
            assert backward_slot(k, tick + 1, n_stages) == backward_slot(k + 1, tick, n_stages)


@pytest.mark.parametrize("n_stages", [1, 2, 3, 4, 8])
def test_the_last_stage_does_both_in_one_tick_and_draining_is_enough(n_stages: int) -> None:
    last = n_stages - 1
    for tick in range(50):
        assert backward_slot(last, tick, n_stages) == forward_slot(last, tick)
    assert backward_tick(0, 9, n_stages) == 9 + drain_ticks(n_stages)
    assert all(backward_slot(k, backward_tick(k, 5, n_stages), n_stages) == 5 for k in range(n_stages))


@pytest.mark.parametrize("n_stages", [2, 3, 4, 8])
def test_the_delay_between_both_passes(n_stages: int) -> None:
    """d_k = 2(K-k) - 1 updates (paper, k from 1), and as many batches in flight as ticks lie between."""
    for k in range(n_stages - 1):
        delay = 2 * (n_stages - (k + 1)) - 1
        assert forward_horizon(k, n_stages, "stage") == delay
        assert max_in_flight(k, n_stages) == delay + 2
    assert forward_horizon(n_stages - 1, n_stages, "stage") == 0
    assert all(backward_horizon(k, n_stages, "stage") == 0 for k in range(n_stages))


def test_the_common_aim_of_four_stages() -> None:
    """K = 4: first forward 5, 4, 3; recompute 0, 1, 2; the last stage 3."""
    assert [forward_horizon(k, 4, "common") for k in range(4)] == [5, 4, 3, 3]
    assert [backward_horizon(k, 4, "common") for k in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("n_stages", [2, 3, 4, 8])
def test_both_aims_agree_for_the_first_stage(n_stages: int) -> None:
    assert forward_horizon(0, n_stages, "common") == forward_horizon(0, n_stages, "stage")
    assert backward_horizon(0, n_stages, "common") == 0


def test_horizons_count_updates() -> None:
    assert in_updates(5, 1) == 5
    assert float(in_updates(5, 2)) == 2.5
