"""Who does what at which tick: pure functions, the published table (DTRP, PLoS ONE 2023, Fig 1).

Stages, ticks and batches count from 0 here; the paper counts from 1. With K stages, at tick t stage k
forwards batch t - k and recomputes and backwards batch t - 2(K-1) + k. So batch b is forwarded by stage k
at tick b + k and backwarded at tick b + 2(K-1) - k; the last stage does both at tick b + K - 1.

    K = 3        t=0   t=1   t=2     t=3     t=4        t=5
    stage 0      F0    F1    F2      F3      B0 F4      B1 F5
    stage 1            F0    F1      B0 F2   B1 F3      B2 F4
    stage 2                  F0 B0   F1 B1   F2 B2      F3 B3

Inside one tick every stage but the last goes backward first, then forward; the last goes forward first.
A "batch" here is a slot of the pipeline: while it drains, slots are empty.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

Horizon = Literal["common", "stage"]


def forward_slot(stage: int, tick: int) -> int:
    """The slot that ``stage`` forwards at ``tick``; negative while the pipeline fills."""
    return tick - stage


def backward_slot(stage: int, tick: int, n_stages: int) -> int:
    """The slot that ``stage`` backwards at ``tick``; negative while the pipeline fills."""
    return tick - 2 * (n_stages - 1) + stage


def backward_tick(stage: int, slot: int, n_stages: int) -> int:
    """The tick at which ``stage`` backwards ``slot``."""
    return slot + 2 * (n_stages - 1) - stage


def drain_ticks(n_stages: int) -> int:
    """Empty ticks after the last batch until nothing is in flight: B batches need B + 2K - 2 ticks."""
    return 2 * (n_stages - 1)


def max_in_flight(stage: int, n_stages: int) -> int:
    """How many batches' inputs a stage holds at most, the one that is running included: 2(K-k) + 1."""
    return 2 * (n_stages - 1 - stage) + 1


def weight_version(stage: int, tick: int) -> int:
    """The paper's index of the weights that the *forward* part of a tick uses on any stage but the last.

    W_j is the weights after j - 1 local updates; local time also advances while the pipeline fills. The
    backward part of the same tick, and the last stage, use the version before.
    """
    return tick - stage + 2


def forward_horizon(stage: int, n_stages: int, aim: Horizon) -> int:
    """Updates that lie between a stage's first forward of a batch and the moment that it aims at.

    ``"stage"`` (our reading of the paper): the stage's own backward of that batch. ``"common"`` (ours): the
    tick at which stage 0 backwards it, for all stages alike.
    """
    last = stage == n_stages - 1
    if aim == "stage":
        return 0 if last else 2 * (n_stages - 1 - stage) - 1
    return n_stages - 1 if last else 2 * n_stages - stage - 3


def backward_horizon(stage: int, n_stages: int, aim: Horizon) -> int:
    """Updates that lie between a stage's recompute of a batch and the moment that it aims at."""
    return stage if aim == "common" else 0


def in_updates(batches: int, accumulate: int) -> Fraction:
    """A horizon in batches as one in updates, where a stage steps every ``accumulate`` batches."""
    return Fraction(batches, accumulate)
