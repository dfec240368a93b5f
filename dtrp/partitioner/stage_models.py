"""What each stage offers to the planner: what stage_cost.py says, as weights on the graph's attributes.

A sum over a stage's nodes, which is all that a solver can take: what several stages hold, or several nodes
read, counts for each.
"""

from __future__ import annotations

from collections.abc import Sequence

from .devices import DeviceSpec
from .partition import StageModel, StageOption
from .stage_cost import KEEP, LAST, PARTLY, RECOMPUTE, average_seconds, copies_of, predictions, suffix_of
from .training import ASSUMED, Training

SHARES = (0.25, 0.5, 0.75)
"""Of the forward pass of a stage that keeps its graphs: what it may compute again. Which nodes these are is
found for the stages that the solver chose (partly.py)."""


def stage_models(
    n_stages: int,
    *,
    recompute: bool | str | Sequence[bool] = "auto",
    devices: Sequence[int] | None = None,
    memory_limit: Sequence[float | None] | None = None,
    training: Training = ASSUMED,
    specs: Sequence[DeviceSpec] | None = None,
) -> list[StageModel]:
    """What each stage offers to the planner, as weights on the cost graph's attributes.

    Parameters
    ----------
    n_stages
        K.
    recompute
        For all stages but the last, which never does: ``True``, ``False``, ``"auto"`` (the planner's
        choice), or one truth value per stage. ``"partly"``: also in part; ``"at best"``: as if what is
        computed again took no time, for a bound.
    devices
        For each stage, which of the graph's devices it runs on. Default: the first.
    memory_limit
        Bytes, per stage; ``None``: none.
    training
        How it will go.
    specs
        Per stage, its device: what the loop takes there in every tick, and gradients over its link. Default:
        these take no time.
    """
    models = []
    for k in range(n_stages):
        suffix = suffix_of(0 if devices is None else devices[k])
        options = [
            _option(k, n_stages, *choice, suffix, training, None if specs is None else specs[k])
            for choice in _choices(k, n_stages, recompute if training.recompute else False)
        ]
        models.append(StageModel(tuple(options), None if memory_limit is None else memory_limit[k]))
    return models


def _choices(
    k: int, n_stages: int, recompute: bool | str | Sequence[bool]
) -> tuple[tuple[bool, float, float], ...]:
    """Whether the stage recomputes; what share of its forward pass, in time and in memory."""
    keep, whole = (False, 0.0, 0.0), (True, 1.0, 1.0)
    if k == n_stages - 1:
        return (keep,)
    if recompute == "auto":
        return (keep, whole)
    if recompute == "partly":
        return (keep, *((False, share, share) for share in SHARES), whole)
    if recompute == "at best":
        return (False, 0.0, 1.0), whole
    if isinstance(recompute, str):
        raise ValueError(
            f"recompute must be True, False, 'auto' or one truth value per stage; got {recompute!r}"
        )
    return (whole if (recompute if isinstance(recompute, bool) else recompute[k]) else keep,)


def _option(
    k: int,
    n_stages: int,
    recompute: bool,
    again: float,
    dropped: float,
    suffix: str,
    training: Training,
    spec: DeviceSpec | None,
) -> StageOption:
    last, optimizer_bytes, part = k == n_stages - 1, training.optimizer_bytes, 1 / training.micro_batches
    in_flight, devices = training.in_flight(k, n_stages), training.devices(k)
    share, overhead = 1 / devices, spec.tick_overhead if spec else 0.0
    parts = max(training.micro_batches, spec.parts if spec else 1)
    passes = predictions(k, n_stages, recompute=recompute, training=training)
    sweeps = 3 + 2 * optimizer_bytes + passes * (2 + optimizer_bytes)
    stashed = training.versions(k, n_stages, recompute=recompute)
    copies = copies_of(passes, recomputes=recompute, is_last=last)
    held = max(in_flight, part)  # batches, the one that is passed back included
    return StageOption(
        label=LAST if last else RECOMPUTE if recompute else PARTLY if dropped else KEEP,
        time={
            f"forward_time{suffix}": share * (1.0 + again),
            f"backward_time{suffix}": share,
            f"sweep_time{suffix}": sweeps,
        }
        | (_of_parts(training.micro_batches, devices, 1 + again, spec) if spec else {}),
        memory={
            "params_bytes": 1.0,
            "buffer_bytes": 1.0,
            "gradient_bytes": 1.0 + optimizer_bytes + copies + stashed,
            "kept_bytes": dropped * part + (1 - dropped) * held,
            "first_input_bytes": held,
        },
        input_memory=held,
        fixed_time=share * (overhead * parts + (training.loss_time if last else 0.0)),
    )


def _of_parts(parts: int, devices: int, runs: float, spec: DeviceSpec) -> dict[str, float]:
    """What a device spends besides its share of a batch: launches and weights of its parts, which are not
    shared out, and the sum of the devices' gradients."""
    more = max(0, parts - spec.parts) / devices
    if not more and devices == 1:
        return {}
    return {
        "forward_ops": more * runs * spec.launch_overhead,
        "backward_ops": more * spec.launch_overhead,
        "params_bytes": more * runs / spec.memory_bandwidth,
        "gradient_bytes": more * 3 / spec.memory_bandwidth + average_seconds(1.0, devices, spec),
    }
