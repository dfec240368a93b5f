"""Which order to train in, and in how many parts a batch travels, where the user leaves it open (ours).

Delay is better avoided than corrected. Parts make it smaller, and cost what a pass costs however few samples
it has; the "lean" order makes it smaller, and costs where a hop takes a good part of a tick.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .partitioner.compiler import Compiled
from .partitioner.devices import DeviceSpec
from .partitioner.report_parts import StageReport
from .partitioner.training import Training
from .parts_check import check_parts, differs_in_parts
from .runtime.arguments import n_samples
from .runtime.config import TrainConfig

log = logging.getLogger("dtrp")

PRICE = 1.05
"""What a tick in parts may cost in any case, as a multiple of the tick of whole batches."""

HOP = 0.1
"""The share of a slot's tick that a hop may take in "lean"."""

DEAR = 1.5
"""The price of delay from which training is warned of it."""

STATISTICS = 16
"""Samples that BatchNorm's statistics are taken over at least."""


def choose_order(
    compiled: Compiled, training: Training, config: TrainConfig, inputs: Sequence[Tensor], target: Any
) -> TrainConfig:
    """The settings with ``order`` and ``micro_batches`` decided, for batches like this one."""
    chosen, why = decide(compiled, training, config, inputs, target)
    n_stages = compiled.plan.n_stages
    log.info("schedule=%r, micro_batches=%d%s", chosen.order, chosen.parts, f" ({why})" if why else "")
    _warn(_known(training, chosen, n_stages), n_stages, n_samples(inputs), why)
    return chosen


def decide(
    compiled: Compiled, training: Training, config: TrainConfig, inputs: Sequence[Tensor], target: Any
) -> tuple[TrainConfig, str]:
    """As `choose_order`; and why such a batch is not to be cut, if it is not."""
    model, samples, stages = compiled.captured.model, n_samples(inputs), compiled.report.stages
    spec: DeviceSpec = compiled.graph.graph["specs"][0]
    chosen, parts = config.micro_batches, config.micro_batches
    least = 1
    if _takes_statistics(model):
        # A number that was asked for is kept, but for batches that would leave one sample alone in a part.
        alone = chosen != "auto" and chosen <= samples < 2 * chosen
        least = STATISTICS if chosen == "auto" else 1 if alone else 2
        if config.replicas and chosen == "auto":  # each device is to have its share
            least = max(2, min(least, samples // least_parts(config.replicas)))
    if parts == "auto":
        parts = most_parts(stages, training, config, samples, least, max(training.micro_batches, spec.parts))
    why = differs_in_parts(compiled, config, inputs, target) if min(parts, samples) > 1 else ""
    if why and config.replicas and chosen == "auto":
        raise ValueError(
            f"stages of several devices share out the parts of a batch, and this one is not cut by itself: "
            f"{why}; give each stage one device, or micro_batches=n if that is meant"
        )
    if why and chosen == "auto":
        parts = 1
    elif why:
        check_parts(compiled, replace(config, micro_batches=parts, least_part=least), inputs, target)
        log.warning("micro_batches=%d may change what is trained, unlike micro_batches=1: %s", parts, why)
    elif min(parts, samples) > 1 and chosen != "auto" and config.exact and _takes_statistics(model):
        log.warning(
            "micro_batches=%d: BatchNorm takes its statistics from each part, not from the whole batch", parts
        )
    order = config.order
    if order == "auto":
        sent = max(stage.output_bytes for stage in stages) / parts if spec.overlaps else 0
        hop = spec.link_latency + sent / (compiled.graph.graph["links"].net or spec.link_bandwidth)
        order = "lean" if hop <= HOP * max(stage.tick_time for stage in stages) / parts else "fig1"
    return replace(config, order=order, micro_batches=parts, least_part=least), why


def most_parts(
    stages: Sequence[StageReport],
    training: Training,
    config: TrainConfig,
    samples: int,
    least: int = 1,
    priced: int = 1,
) -> int:
    """The parts of so many samples, ``least`` in each, that train to the same loss soonest; more where a tick
    hardly gets longer. ``priced``: those that the stages' ticks have.

    Exact orders have no delay but bubbles: theirs is the number that makes a batch fastest.
    """
    n_stages, even = len(stages), least_parts(config.replicas)
    if (n_stages == 1 and even == 1) or config.method == "bp":
        return 1
    order = "lean" if config.order == "auto" else config.order

    def price(parts: int) -> float:
        decided = replace(config, order=order, micro_batches=parts)
        return _known(training, decided, n_stages).price(n_stages)

    def tick(parts: int) -> float:
        return max(stage.tick_time + (parts - priced) * stage.slot_time for stage in stages)

    # With so many, the delay is a quarter of an update: there is nothing left to gain. All parts but the last
    # are as large, so that some numbers never come about: sixteen samples in five parts are four of four.
    limit = max(1, min(samples // least, max(2 * even, 4 * ((sum(config.replicas) or n_stages) - 1))))
    sizes = {-(-samples // parts) for parts in range(1, limit + 1)}
    candidates = sorted({-(-samples // size) for size in sizes if size}) or [1]
    candidates = [n for n in candidates if n % even == 0] or [even]
    if config.exact:
        return min(candidates, key=lambda parts: tick(parts) * (1 + (n_stages - 1) / parts))
    soonest = min(candidates, key=lambda parts: tick(parts) * price(parts))
    return max(parts for parts in candidates if parts == soonest or tick(parts) <= PRICE * tick(1))


def least_parts(replicas: Sequence[int]) -> int:
    """With so many parts of a batch, or a multiple, all devices of a stage have as many."""
    return math.lcm(*replicas)


def _known(training: Training, config: TrainConfig, n_stages: int) -> Training:
    """With the order and the parts of these settings; mini-batches that share an update are parts of it."""
    schedule = config.schedule(n_stages)
    return replace(training, order=schedule.order, micro_batches=schedule.parts * config.accumulate)


def _warn(training: Training, n_stages: int, samples: int, why: str) -> None:
    """Of delay that is known to cost more epochs than devices can win; ``why`` a batch is not cut."""
    price = training.price(n_stages)
    if price > DEAR:
        parts = 2 * (n_stages - 1)
        cut = "" if why or parts > samples else f"micro_batches={parts} or more, "
        log.warning(
            "weights are %d updates old in stage 0: with this optimizer expect %.1f times the epochs; "
            "%sfewer stages, or method='1f1b' avoid that (docs/recipe.md)%s",
            training.staleness(0, n_stages),
            price,
            cut,
            f"; batches are not cut into parts: {why}" if why else "",
        )


def _takes_statistics(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())
