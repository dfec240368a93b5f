"""Which dimensions of the model's inputs may vary, found by running the stages with other sizes.

Dimensions of equal size in the example move together, then each by itself:

    ids (2, 7), mask (2, 7)      -> "batch" for both first dimensions, "ids_1" for both lengths
    image (2, 3, 32, 32)         -> "batch", "image_2" and "image_3"; with 4 channels no stage runs

A graph may hold guards: checks in the model's code whose answers are part of it. An exported file has none,
so an axis that a check looks at is open between the sizes that were tried, and no further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from .trace import NodeFailed

Member = tuple[int, int]
"""A model input and one of its dimensions."""

_STEPS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Axis:
    """A size that may vary."""

    name: str
    members: tuple[Member, ...]
    size: int  # where the stages are exported
    step: int = 1  # other sizes differ from it by multiples of this
    tried: tuple[int, ...] = ()  # two other sizes, the larger one last
    smallest: int = 0  # that runs
    largest: int | None = None  # that may be meant, where there are limits

    def at(self, size: int) -> dict[Member, int]:
        """All its dimensions with a size."""
        return dict.fromkeys(self.members, size)


class Fixed(Exception):
    """Why a size cannot vary."""


Try = Callable[[Mapping[Member, int]], Any]
"""Runs the stages with these sizes; gives what guards looked at, or raises `NodeFailed` or `Fixed`."""


def find_axes(
    names: Sequence[str],
    shapes: Sequence[Sequence[int]],
    batched: Sequence[int],
    attempt: Try,
    *,
    others: bool,
) -> tuple[list[Axis], str]:
    """All axes, the batch first if there is one; else why there is none. ``others``: besides the batch."""
    axes: list[Axis] = []
    reason = "" if batched else "no input has a batch dimension"
    if batched:
        # torch's exporter takes a size of 1 in its example for a constant.
        batch = Axis("batch", tuple((i, 0) for i in batched), max(shapes[batched[0]][0], 2))
        try:
            axes.append(_tried(batch, attempt, {}))
        except NodeFailed as e:
            reason = f"with another batch size, {e.where} fails: {e.why}"
        except Fixed as e:
            reason = str(e)
    base = axes[0].at(axes[0].size) if axes else {}
    for group in _alike(shapes, batched) if others else ():
        axes += _of_group(group, names, shapes, attempt, base)
    return axes, reason


def _alike(shapes: Sequence[Sequence[int]], batched: Sequence[int]) -> Iterator[tuple[Member, ...]]:
    """Dimensions of equal size, apart from the batch's and those of size 1, which values repeat along."""
    groups: dict[int, list[Member]] = {}
    for i, shape in enumerate(shapes):
        for d, size in enumerate(shape):
            if size > 1 and not (d == 0 and i in batched):
                groups.setdefault(size, []).append((i, d))
    return (tuple(group) for group in groups.values())


def _of_group(
    group: tuple[Member, ...],
    names: Sequence[str],
    shapes: Sequence[Sequence[int]],
    attempt: Try,
    base: Mapping[Member, int],
) -> list[Axis]:
    def axis(members: tuple[Member, ...], step: int) -> Axis | None:
        i, d = members[0]
        made = Axis(f"{names[i]}_{d}", members, shapes[i][d], step)
        try:
            return _tried(made, attempt, base)
        except (NodeFailed, Fixed):
            return None

    size = shapes[group[0][0]][group[0][1]]
    for step in (s for s in _STEPS if size % s == 0):
        together = axis(group, step)
        alone = {m: found for m in group if len(group) > 1 and (found := axis((m,), step)) is not None}
        left = tuple(m for m in group if m not in alone)
        rest = together if left == group else axis(left, step) if left else None
        if alone or rest is not None:
            return [*alone.values(), *([rest] if rest is not None else [])]
    return []


def _tried(axis: Axis, attempt: Try, base: Mapping[Member, int]) -> Axis:
    """The axis, after runs with its sizes."""

    def look(*sizes: int) -> tuple[int, Any]:
        """The first of these sizes that runs, and what guards looked at."""
        for size in sizes[:-1]:
            with suppress(NodeFailed, Fixed):
                return size, attempt({**base, **axis.at(size)})
        return sizes[-1], attempt({**base, **axis.at(sizes[-1])})

    size, step = axis.size, axis.step
    (_, usual), (near, second), (far, third) = (
        look(size),
        look(size + step),
        look(wanted := 4 * size + 3 * step, 2 * size + 2 * step, size + 2 * step),
    )
    small, _ = look(step if size % step == 0 else size, (size // 2) // step * step or size, size)
    decides = not usual == second == third
    return replace(axis, tried=(near, far), smallest=small, largest=far if decides or far < wanted else None)
