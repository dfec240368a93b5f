"""What enters and leaves the stages, and how its sizes follow the axes: found on fake tensors.

    with a batch of 2, 3 and 11 a value has the shapes   (2, 8)   (3, 8)   (11, 8)      -> (batch, 8)
    a window attention's                              (128, 49) (192, 49) (704, 49)     -> (64*batch, 49)

A Python number that crosses stages (``x.shape[0]``, say) is a size too. ONNX hands tensors from stage to
stage, so a number never travels: one that is always the same becomes a constant of the stage that uses it,
one that varies is computed there again, from sizes of tensors that arrive anyway.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ...errors import ExportError
from ...wiring import CALLER, Source
from ..capture.ambient import quiet
from ..capture.example_values import batch_of
from ..capture.fakes import FakeWorld
from ..capture.graph import Signature
from ..split import SplitGraph
from .axes import Axis, Fixed, Member, find_axes
from .names import identifier
from .trace import FollowingInterpreter, NodeFailed


@dataclass(frozen=True)
class Affine:
    """A size that follows an axis: ``times * axis + plus``."""

    axis: str
    times: int = 1
    plus: int = 0

    def __str__(self) -> str:
        text = self.axis if self.times == 1 else f"{self.times}*{self.axis}"
        return text + (f"{self.plus:+d}" if self.plus else "")


Size = int | Affine | None
"""A size: fixed, following an axis, or varying in another way (None)."""


@dataclass(frozen=True)
class TensorEnd:
    """A tensor that enters or leaves a stage."""

    shape: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device
    example: tuple[int, ...]  # the shape with the axes' own sizes


@dataclass(frozen=True)
class SizeOf:
    """``product of sizes * times // over + plus``; each size is one of a tensor among a stage's inputs."""

    sizes: tuple[tuple[int, int], ...]  # input and dimension
    times: int
    over: int
    plus: int


@dataclass(frozen=True)
class ScalarEnd:
    """A value that is no tensor: a constant, or a number that varies."""

    value: Any
    varies: bool = False  # then, of a stage's input, ``value`` is a `SizeOf`


End = TensorEnd | ScalarEnd


@dataclass(frozen=True)
class Study:
    """The ends of the model and of all stages.

    ``reason`` says why the batch is not among the axes, if it is not.
    """

    batch: int  # the example's, or that of the axis
    batched: tuple[int, ...]  # which model inputs have the batch as their first dimension
    axes: tuple[Axis, ...]
    reason: str
    inputs: tuple[TensorEnd, ...]
    stage_inputs: tuple[tuple[End, ...], ...]
    stage_outputs: tuple[tuple[End, ...], ...]

    @property
    def dynamic(self) -> bool:
        """Whether any batch is taken."""
        return any(axis.name == "batch" for axis in self.axes)


def study(
    graph: SplitGraph,
    model: nn.Module,
    signature: Signature,
    inputs: Sequence[torch.Tensor],
    *,
    dynamic: bool,
    others: bool = False,
    reason: str = "",
) -> Study:
    """Look at the ends of all stages; ``inputs`` are (fake) tensors of the example's shapes.

    ``dynamic``: whether sizes may vary; ``others``: also others than the batch.

    Raises
    ------
    ExportError
        A stage does not run on fake tensors (its course depends on the data).
    """
    probe = _Probe(graph, model, signature, inputs)
    size, batched = batch_of(inputs)
    axes: list[Axis] = []
    if dynamic:
        names = [identifier(name) for name in signature.tensor_names]
        shapes = [tuple(t.shape) for t in inputs]
        with quiet():
            axes, reason = find_axes(names, shapes, batched, probe.attempt, others=others)
    while True:
        try:
            return _study(probe, size, batched, axes, reason if axes or reason else "dynamic_batch=False")
        except (Fixed, NodeFailed) as e:
            if axes:  # together they do what none does alone
                dropped = axes.pop()
                reason = reason or (str(e) if dropped.name == "batch" else "")
                continue
            raise ExportError(
                f"the sizes of the stages' values cannot be told: {e} on tensors without data. ONNX needs "
                f"sizes that do not depend on the data: rewrite it, or leave it out of the model that is "
                f"exported"
            ) from e


@dataclass(frozen=True)
class _Seen:
    """One run: the values at all ends, tensors as fakes."""

    inputs: list[Any]
    stage_inputs: list[list[Any]]
    stage_outputs: list[list[Any]]
    result: list[Any]
    looks: list[Any]  # numbers that guards depend on


class _Probe:
    """Runs the stages on fake tensors."""

    def __init__(
        self, graph: SplitGraph, model: nn.Module, signature: Signature, inputs: Sequence[torch.Tensor]
    ) -> None:
        self.graph, self.model, self.signature, self.examples = graph, model, signature, inputs
        self.world = FakeWorld()
        self._runs: dict[tuple[tuple[int, ...], ...], _Seen] = {}
        self._models_say = True

    def shapes(self, sizes: Mapping[Member, int]) -> tuple[tuple[int, ...], ...]:
        """The inputs' shapes where some dimensions are not the example's."""
        return tuple(
            tuple(sizes.get((i, d), size) for d, size in enumerate(t.shape))
            for i, t in enumerate(self.examples)
        )

    def _inputs(self, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        with self.world.mode:
            return [
                torch.empty(s, dtype=t.dtype, device=t.device)
                for s, t in zip(shapes, self.examples, strict=True)
            ]

    def attempt(self, sizes: Mapping[Member, int]) -> list[Any]:
        """A run that must be right: what guards looked at in it."""
        seen = self.run(sizes)
        self._check_model(sizes, seen)
        return seen.looks

    def run(self, sizes: Mapping[Member, int]) -> _Seen:
        """Run the stages with other sizes."""
        shapes = self.shapes(sizes)
        if shapes not in self._runs:
            self._runs[shapes] = self._run(self._inputs(shapes))
        return self._runs[shapes]

    def _run(self, inputs: list[torch.Tensor]) -> _Seen:
        given: list[list[Any]] = []
        made: list[list[Any]] = []
        looks: list[Any] = []

        def fetch(source: Source) -> Any:
            return inputs[source.index] if source.stage == CALLER else made[source.stage][source.index]

        with ExitStack() as stack:
            # The stages hold some tensors themselves, others inside the model's modules.
            for module in (self.model, *self.graph.modules):
                stack.enter_context(self.world.inhabited_by(module))
            stack.enter_context(torch.no_grad())
            for k, (module, wires) in enumerate(
                zip(self.graph.modules, self.graph.wiring.stages, strict=True)
            ):
                given.append([fetch(s) for s in wires.inputs])
                runner = FollowingInterpreter(module, k)
                made.append(list(runner.run(*given[-1])))
                looks += runner.looks
        result = [fetch(leaf) for leaf in self.graph.wiring.result if isinstance(leaf, Source)]
        return _Seen(inputs, given, made, result, looks)

    def _check_model(self, sizes: Mapping[Member, int], seen: _Seen) -> None:
        """Whether the model itself takes these sizes, and gives results of the stages' shapes.

        A graph in which the example's sizes are fixed may run with others all the same.
        """
        if not self._models_say:  # its course depends on data: fake tensors cannot tell
            return
        usual = self.shapes(sizes) == self.shapes({})
        leaves = [i for i, leaf in enumerate(self.graph.wiring.result) if isinstance(leaf, Source)]
        try:
            output = self._model(self.shapes(sizes))
        except Exception as e:
            if usual or self._fails({}):
                self._models_say = False
                return
            text = (str(e).strip().splitlines() or [""])[0]
            raise Fixed(f"with other sizes the model fails: {type(e).__name__}: {text}") from e
        for leaf, ours in zip(leaves, seen.result, strict=True):
            theirs = output[leaf] if leaf < len(output) else None
            if isinstance(theirs, torch.Tensor) and theirs.shape != ours.shape:
                raise Fixed(
                    f"with other sizes the model gives {list(theirs.shape)}, its graph {list(ours.shape)}: "
                    f"the example's are fixed in it"
                )

    def _fails(self, sizes: Mapping[Member, int]) -> bool:
        try:
            self._model(self.shapes(sizes))
        except Exception:
            return True
        return False

    def _model(self, shapes: Sequence[Sequence[int]]) -> list[Any]:
        args, kwargs = self.signature.unflatten(self._inputs(shapes))
        with self.world.inhabited_by(self.model), torch.no_grad():
            return pytree.tree_leaves(self.model(*args, **kwargs))


def _study(probe: _Probe, size: int, batched: tuple[int, ...], axes: Sequence[Axis], reason: str) -> Study:
    base = {axis.name: axis.size for axis in axes}
    calls = [base, *({**base, a.name: n} for a in axes for n in a.tried)]
    if len(axes) > 1:  # what is a product of two sizes shows in this one
        calls.append({a.name: a.size + (2 + i) * a.step for i, a in enumerate(axes)})
    seen = [probe.run({m: n for a in axes for m, n in a.at(call[a.name]).items()}) for call in calls]

    def ends(rows: Sequence[Sequence[Any]], where: str) -> list[End]:
        return [_end(values, calls, where) for values in zip(*rows, strict=True)]

    n = len(probe.graph.modules)
    entering = [ends([s.stage_inputs[k] for s in seen], f"stage {k}") for k in range(n)]
    for k, row in enumerate(entering):
        arrivals = [s.stage_inputs[k] for s in seen]
        row[:] = [_computed(end, arrivals, k) if isinstance(end, ScalarEnd) else end for end in row]
    inputs = ends([s.inputs for s in seen], "the model's inputs")
    return Study(
        batch=base.get("batch", size),
        batched=batched,
        axes=tuple(axes),
        reason=reason,
        inputs=tuple(e for e in inputs if isinstance(e, TensorEnd)),
        stage_inputs=tuple(map(tuple, entering)),
        stage_outputs=tuple(tuple(ends([s.stage_outputs[k] for s in seen], f"stage {k}")) for k in range(n)),
    )


def _end(values: Sequence[Any], calls: Sequence[Mapping[str, int]], where: str) -> End:
    first = values[0]
    if isinstance(first, torch.Tensor):
        if len({(v.dim(), v.dtype) if isinstance(v, torch.Tensor) else None for v in values}) > 1:
            raise Fixed(f"a value of {where} changes its kind with the sizes")
        shape = tuple(_size(column, calls) for column in zip(*(v.shape for v in values), strict=True))
        return TensorEnd(shape, first.dtype, first.device, tuple(map(int, first.shape)))
    if all(type(v) is type(first) and v == first for v in values):
        return ScalarEnd(first)
    if all(type(v) is int for v in values):
        return ScalarEnd(tuple(values), varies=True)
    raise Fixed(
        f"a value of {where} that is no tensor changes with the sizes: {', '.join(map(repr, values))}"
    )


def _size(values: Sequence[int], calls: Sequence[Mapping[str, int]]) -> Size:
    if len(set(values)) == 1:
        return int(values[0])
    for axis in calls[0]:
        fit = _linear(values, [call[axis] for call in calls])
        if fit is not None and fit[0] > 0 and fit[1] == 1:
            return Affine(axis, fit[0], fit[2])
    return None


def _linear(values: Sequence[int], sizes: Sequence[int]) -> tuple[int, int, int] | None:
    """``times, over, plus`` with ``values == sizes * times // over + plus``."""
    other = next((i for i, s in enumerate(sizes) if s != sizes[0]), None)
    if other is None:
        return None
    rise, run = values[other] - values[0], sizes[other] - sizes[0]
    if rise % run == 0:
        fit = rise // run, 1, values[0] - rise // run * sizes[0]
    elif rise and run % rise == 0 and run // rise > 0:
        fit = 1, run // rise, 0
    else:
        return None
    times, over, plus = fit
    return fit if all(v == s * times // over + plus for v, s in zip(values, sizes, strict=True)) else None


def _computed(end: ScalarEnd, arrivals: Sequence[Sequence[Any]], stage: int) -> ScalarEnd:
    """A number that varies, from the sizes of tensors that arrive with it; ``arrivals``: of each run."""
    if not end.varies:
        return end
    for sizes, column in _columns(arrivals):
        fit = _linear(end.value, column)
        if fit is not None:
            return ScalarEnd(SizeOf(sizes, *fit), varies=True)
    raise Fixed(
        f"stage {stage} needs a size that no tensor which it gets tells: {end.value[0]} in the example"
    )


def _columns(arrivals: Sequence[Sequence[Any]]) -> Iterator[tuple[tuple[tuple[int, int], ...], list[int]]]:
    """Sizes of the tensors that arrive, and products of two, as they were in each run."""
    single = [
        (((i, d),), column)
        for i, first in enumerate(arrivals[0])
        if isinstance(first, torch.Tensor)
        for d in range(first.dim())
        if len(set(column := [int(values[i].shape[d]) for values in arrivals])) > 1
    ]
    yield from single
    for (a, x), (b, y) in itertools.combinations(single, 2):
        yield (*a, *b), [math.prod(pair) for pair in zip(x, y, strict=True)]
