"""Other ways to use the same devices: fewer stages, of several devices each (ours).

A stage of r devices hands them the parts of a batch in turn, and they add up their gradients before the
update: data parallelism inside the pipeline. The best partition and numbers of devices are found for each
number of stages (`solvers.devices`), from one, which is plain data parallelism, to as many as there are
devices. Which number is best depends on delay as well: a deeper pipeline trains on older weights, for more
epochs (`Training.price`); parts make it less old, and take time themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import networkx as nx

from dtrp.errors import InfeasiblePlanError
from dtrp.partitioner.devices import DeviceSpec
from dtrp.partitioner.partition import DeviceClass, Partition, StageModel, partition
from dtrp.partitioner.stage_cost import (
    RECOMPUTE,
    StageCost,
    overlaps,
    stage_costs,
    transfer_attribute,
)
from dtrp.partitioner.stage_models import stage_models
from dtrp.partitioner.training import Training
from dtrp.partitioner.units import duration

GAIN = 0.99
"""What stages of unequal numbers of devices must take at most of the time of equal ones to be told."""


@dataclass(frozen=True)
class Layout:
    """One way to use some devices.

    Attributes
    ----------
    replicas : tuple of int
        Devices of each stage.
    micro_batches : int
        Parts of each batch.
    seconds : float
        Per batch.
    staleness : int
        Updates between the two passes of a batch in the first stage.
    price : float
        Epochs for each one of exact training.
    slowest : str
        What the slowest stage does most of the time.
    optimal : bool
        Whether it is proven that no cut and no numbers of devices have a smaller tick, with so many stages
        and parts.
    """

    replicas: tuple[int, ...]
    micro_batches: int
    seconds: float
    staleness: int
    price: float
    slowest: str
    optimal: bool
    stage_of: Mapping[str, int] = field(repr=False)
    recompute: tuple[bool, ...] = field(repr=False)

    @property
    def exact_seconds(self) -> float:
        """Seconds for what a batch of exact training achieves: what layouts are compared by."""
        return self.seconds * self.price

    @property
    def alike(self) -> bool:
        """Whether all stages have as many devices."""
        return len(set(self.replicas)) == 1

    @property
    def name(self) -> str:
        """Such as ``"4 stages x 2"``, ``"data parallel x 8"`` or ``"3 stages on 4 + 3 + 1"``."""
        k, first = len(self.replicas), self.replicas[0]
        if k == 1:
            return f"data parallel x {first}" if first > 1 else "1 device"
        if not self.alike:
            return f"{k} stages on {' + '.join(map(str, self.replicas))}"
        return f"{k} stages" if first == 1 else f"{k} stages x {first}"


def summary(layout: Layout) -> dict[str, Any]:
    """What `comparison` shows, as plain data."""
    left_out = ("stage_of", "recompute")
    data = {f.name: getattr(layout, f.name) for f in fields(layout) if f.name not in left_out}
    return {"name": layout.name, "exact_seconds": layout.exact_seconds} | data


def layouts(
    graph: nx.DiGraph,
    n_devices: int,
    *,
    groups: Iterable[Collection[str]],
    order: Iterable[tuple[str, str]],
    training: Training,
    recompute: bool | str = "auto",
    memory_limit: float | None = None,
    most_parts: int = 1 << 30,
    time_limit: float = 2.0,
) -> list[Layout]:
    """For each number of stages the best cut with as many devices for all stages, and with other numbers for
    each where that is better; the best layout first.

    Parameters
    ----------
    graph
        From `dtrp.partitioner.costs.cost_graph`. All devices are like its first one.
    n_devices
        How many there are; a layout may leave some out.
    groups, order, training, recompute
        As for `dtrp.partitioner.planner.solve`. Where ``training`` is not known yet, the order is "lean".
    memory_limit
        Bytes of each device; ``None``: no limit.
    most_parts
        Of a batch, such as its number of samples.
    time_limit
        Seconds of planning for each number of stages and parts.

    Raises
    ------
    ValueError
        No number of devices; devices in several nodes: their links are not part of this search.
    """
    if isinstance(n_devices, bool) or not isinstance(n_devices, int) or n_devices < 1:
        raise ValueError(f"n_devices={n_devices!r}: expected an int >= 1")
    if graph.graph["links"].count(n_devices) > 1:
        raise ValueError(
            "stages of several devices are planned for one kind of link: give one bandwidth, the slower one"
        )
    training = training if training.known else replace(training, order="lean")
    together, order = [list(group) for group in groups if len(group) > 1], list(order)
    best: dict[tuple[int, bool], Layout] = {}
    for k, parts in itertools.product(range(1, n_devices + 1), _numbers_of_parts(n_devices, most_parts)):
        how = replace(training, micro_batches=parts)
        for each in (n_devices // k, None):
            if each and (each * k != n_devices or parts % each):
                continue
            how = replace(how, replicas=(each,) * k if each else ())
            try:
                result = _best(graph, k, n_devices, together, order, how, recompute, memory_limit, time_limit)
            except (ValueError, InfeasiblePlanError):
                continue
            found = _priced(graph, result, how)
            key = k, found.alike
            if key not in best or found.exact_seconds < best[key].exact_seconds:
                best[key] = found
    kept = [
        layout for (k, alike), layout in best.items() if _tells(layout, best.get((k, not alike)), n_devices)
    ]
    return sorted(kept, key=lambda layout: layout.exact_seconds)


def _tells(layout: Layout, other: Layout | None, n_devices: int) -> bool:
    """Whether a layout is worth a line beside the ``other`` one of as many stages."""
    if other is None or (layout.alike and sum(layout.replicas) == n_devices):
        return True
    return layout.exact_seconds < GAIN * other.exact_seconds


def _numbers_of_parts(n_devices: int, most: int) -> list[int]:
    """Every device of a stage does as many parts: what can be shared out among several."""
    halves = {2**i for i in range(n_devices.bit_length())}
    evenly = {r for r in range(1, n_devices + 1) if n_devices % r == 0}
    return sorted(parts for parts in halves | evenly if parts <= most)


def _best(
    graph: nx.DiGraph,
    n_stages: int,
    n_devices: int,
    groups: list[list[str]],
    order: list[tuple[str, str]],
    training: Training,
    recompute: bool | str,
    memory_limit: float | None,
    time_limit: float,
) -> Partition:
    """``training.replicas``: how many devices all stages have; empty: that is to be found."""
    spec: DeviceSpec = graph.graph["specs"][0]

    def offer(devices: int) -> tuple[StageModel, ...]:
        """Of every stage on so many; how deep it is depends on the others, of which all might come behind."""
        models = []
        for k in range(n_stages):
            behind = n_stages - 1 - k
            rest = (n_devices - devices - k - (behind - 1),) + (1,) * (behind - 1) if behind else ()
            how = replace(training, replicas=training.replicas or (1,) * k + (devices, *rest))
            limits, specs = [memory_limit] * n_stages, [spec] * n_stages
            models.append(
                stage_models(n_stages, recompute=recompute, memory_limit=limits, training=how, specs=specs)[k]
            )
        return tuple(models)

    most, parts = n_devices - n_stages + 1, training.micro_batches
    overlapping, more, single = overlaps(graph), {}, offer(1)
    if training.replicas:  # seconds of all devices together: transfers count as they are
        single = tuple(_times(training.devices(0), model) for model in single)
    else:
        more = {r: offer(r) for r in range(2, min(most, parts) + 1) if parts % r == 0}
    return partition(
        graph,
        n_stages,
        classes=[DeviceClass(n_devices, single, more)] if more else None,
        stage_models=None if more else single,
        transfer=transfer_attribute(overlapping),
        size="transfer_bytes",
        overlap=overlapping,
        colocate=groups,
        order=order,
        time_limit=time_limit,
    )


def _times(devices: int, model: StageModel) -> StageModel:
    options = tuple(
        replace(
            option,
            time={name: devices * weight for name, weight in option.time.items()},
            fixed_time=devices * option.fixed_time,
        )
        for option in model.options
    )
    return replace(model, options=options)


def _priced(graph: nx.DiGraph, result: Partition, training: Training) -> Layout:
    k = result.n_stages
    training = replace(training, replicas=result.replicas or training.replicas or (1,) * k)
    stage_of = {str(node): stage for node, stage in result.stage_of.items()}
    recompute = tuple(option == RECOMPUTE for option in result.options)
    costs = stage_costs(graph, stage_of, recompute, training=training)
    ticks = [cost.tick for cost in costs]
    return Layout(
        replicas=training.replicas,
        micro_batches=training.micro_batches,
        seconds=training.batch_time(ticks, graph.graph["specs"][0].shared(sum(training.replicas))),
        staleness=max(training.staleness(s, k) for s in range(k)),
        price=training.price(k),
        slowest=_does(max(costs, key=lambda cost: cost.tick)),
        optimal=result.optimal,
        stage_of=stage_of,
        recompute=recompute,
    )


def _does(cost: StageCost) -> str:
    """What a stage does most of the time."""
    parts = {
        "computing": cost.forward + cost.recompute + cost.backward,
        "updating": cost.update + cost.prediction,
        "starting parts": cost.loop,
        "summing gradients": cost.average,
        "sending and receiving": cost.transfer,
    }
    most = max(parts, key=lambda name: parts[name])
    return f"{100 * parts[most] / cost.tick if cost.tick else 0:.0f} % {most}"


def comparison(found: Sequence[Layout]) -> str:
    """The layouts as a table, the best first."""
    rows = [
        (
            each.name,
            str(each.micro_batches),
            duration(each.seconds),
            str(each.staleness),
            f"{each.price:.2f}",
            duration(each.exact_seconds),
            each.slowest + ("" if each.optimal else " (not proven best)"),
        )
        for each in found
    ]
    head = ("layout", "parts", "one batch per", "stale by", "epochs", "by epochs", "slowest stage")
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:-1], widths[1:-1], strict=True))
        + f"  {row[-1]}"
        for row in (head, *rows)
    ]
    return "\n".join([*lines, *map(_how_to_run, found[:1])])


def _how_to_run(layout: Layout) -> str:
    """In words, of the best layout."""
    k, replicas = len(layout.replicas), layout.replicas[0] if layout.alike else layout.replicas
    given = "" if replicas == 1 else f", replicas={replicas}"
    parts = layout.micro_batches
    return f"To run {layout.name}: dtrp.compile(model, n_gpus={k}{given}), micro_batches={parts}."
