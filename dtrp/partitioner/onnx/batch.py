"""Which sizes follow the batch: the stages run on fake tensors with several batch sizes, and are compared.

    with 2, 3 and 11 samples a value has the shapes   (2, 8)   (3, 8)   (11, 8)      -> (batch, 8)
    a window attention's                              (128, 49) (192, 49) (704, 49)  -> (64*batch, 49)

A Python number that crosses stages (``x.shape[0]``, say) is a size too. ONNX hands tensors from stage to
stage, so a number never travels: one that is always the same becomes a constant of the stage that uses it,
one that follows the batch is computed there again, from the size of a tensor that arrives anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ...errors import ExportError
from ...wiring import CALLER, Source
from ..capture.fakes import FakeWorld
from ..capture.graph import Signature
from ..capture.sizes import batch_of
from ..split import SplitGraph
from .trace import FollowingInterpreter, NodeFailed


@dataclass(frozen=True)
class Affine:
    """A size that follows the batch: ``times * batch + plus``."""

    times: int
    plus: int = 0

    def __str__(self) -> str:
        text = "batch" if self.times == 1 else f"{self.times}*batch"
        return text + (f"{self.plus:+d}" if self.plus else "")

    def at(self, batch: int) -> int:
        """The size for a batch of this many samples."""
        return self.times * batch + self.plus


Size = int | Affine | None
"""A size: fixed, following the batch, or varying in another way (None)."""


@dataclass(frozen=True)
class TensorEnd:
    """A tensor that enters or leaves a stage."""

    shape: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device
    example: tuple[int, ...]  # the shape with `Study.size` samples


@dataclass(frozen=True)
class ScalarEnd:
    """A value that is no tensor: a constant, or a number that follows the batch."""

    value: Any  # Affine where it follows the batch


End = TensorEnd | ScalarEnd


@dataclass(frozen=True)
class Study:
    """The ends of the model and of all stages.

    ``size`` is the batch size of the examples; ``reason`` says why the batch is not dynamic, if it is not.
    """

    size: int
    batched: tuple[int, ...]  # which model inputs have the batch as their first dimension
    dynamic: bool
    reason: str
    inputs: tuple[TensorEnd, ...]
    stage_inputs: tuple[tuple[End, ...], ...]
    stage_outputs: tuple[tuple[End, ...], ...]


def study(
    graph: SplitGraph,
    model: nn.Module,
    signature: Signature,
    inputs: Sequence[torch.Tensor],
    *,
    dynamic: bool,
    reason: str = "",
) -> Study:
    """Look at the ends of all stages; ``inputs`` are (fake) tensors of the example's shapes.

    Raises
    ------
    ExportError
        A stage does not run on fake tensors (its course depends on the data).
    """
    size, batched = batch_of(inputs)
    probe = _Probe(graph, model, signature, inputs, batched)
    if dynamic and not batched:
        dynamic, reason = False, "no input has a batch dimension"
    if dynamic:
        # ONNX gets its sizes as symbols from an example; torch takes sizes of 1 for constants.
        size = max(size, 2)
        sizes = (size, size + 1, 4 * size + 3)
        try:
            seen = [probe.run(s) for s in sizes]
            probe.check_model(sizes, seen)
            return _compare(probe, sizes, seen)
        except _Fixed as e:
            reason = str(e)
        except NodeFailed as e:
            reason = f"with another batch size, {e.where} fails: {e.why}"
        size = batch_of(inputs)[0]
    try:
        return _compare(probe, (size,), [probe.run(size)], reason or "dynamic_batch=False")
    except NodeFailed as e:
        raise ExportError(
            f"the sizes of the stages' values cannot be told: {e.where} fails on tensors without data: "
            f"{e.why}. ONNX needs sizes that do not depend on the data: rewrite it, or leave it out of the "
            f"model that is exported"
        ) from e


class _Fixed(Exception):
    """Why the batch cannot be dynamic."""


@dataclass(frozen=True)
class _Seen:
    """One run: the values at all ends, tensors as fakes."""

    inputs: list[Any]
    stage_inputs: list[list[Any]]
    stage_outputs: list[list[Any]]
    result: list[Any]


class _Probe:
    """Runs the stages on fake tensors."""

    def __init__(
        self,
        graph: SplitGraph,
        model: nn.Module,
        signature: Signature,
        inputs: Sequence[torch.Tensor],
        batched: tuple[int, ...],
    ) -> None:
        self.graph, self.model, self.signature = graph, model, signature
        self.examples, self.batched = inputs, batched
        self.world = FakeWorld()

    def inputs(self, size: int) -> list[torch.Tensor]:
        """Fake inputs with ``size`` samples."""
        with self.world.mode:
            return [
                torch.empty(
                    (size, *t.shape[1:]) if i in self.batched else t.shape, dtype=t.dtype, device=t.device
                )
                for i, t in enumerate(self.examples)
            ]

    def run(self, size: int) -> _Seen:
        inputs = self.inputs(size)
        given: list[list[Any]] = []
        made: list[list[Any]] = []

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
                made.append(list(FollowingInterpreter(module, k).run(*given[-1])))
        result = [fetch(leaf) for leaf in self.graph.wiring.result if isinstance(leaf, Source)]
        return _Seen(inputs, given, made, result)

    def check_model(self, sizes: Sequence[int], seen: Sequence[_Seen]) -> None:
        """Whether the model itself takes these sizes, and gives results of the stages' shapes.

        A graph in which the example's batch size is fixed may run with another one all the same.
        """
        leaves = [i for i, leaf in enumerate(self.graph.wiring.result) if isinstance(leaf, Source)]
        for i, (size, run) in enumerate(zip(sizes, seen, strict=True)):
            try:
                output = pytree.tree_leaves(self._model(size))
            except Exception as e:
                if i == 0:
                    return  # its course depends on data: fake tensors cannot say
                text = (str(e).strip().splitlines() or [""])[0]
                raise _Fixed(f"with {size} samples the model fails: {type(e).__name__}: {text}") from e
            for leaf, ours in zip(leaves, run.result, strict=True):
                theirs = output[leaf] if leaf < len(output) else None
                if isinstance(theirs, torch.Tensor) and theirs.shape != ours.shape:
                    if i == 0:
                        return
                    raise _Fixed(
                        f"with {size} samples the model gives {list(theirs.shape)}, its graph "
                        f"{list(ours.shape)}: the example's batch size is fixed in it"
                    )

    def _model(self, size: int) -> Any:
        args, kwargs = self.signature.unflatten(self.inputs(size))
        with self.world.inhabited_by(self.model), torch.no_grad():
            return self.model(*args, **kwargs)


def _compare(probe: _Probe, sizes: Sequence[int], seen: Sequence[_Seen], reason: str = "") -> Study:
    dynamic = len(sizes) > 1

    def ends(rows: Sequence[Sequence[Any]], where: str) -> tuple[End, ...]:
        return tuple(_end(values, sizes, where) for values in zip(*rows, strict=True))

    n = len(probe.graph.modules)
    stage_inputs = tuple(ends([s.stage_inputs[k] for s in seen], f"stage {k}") for k in range(n))
    for k, entering in enumerate(stage_inputs):
        follows = any(isinstance(e, ScalarEnd) and isinstance(e.value, Affine) for e in entering)
        if follows and batch_axis(entering) is None:
            raise _Fixed(f"stage {k} needs the batch size, and no tensor that it gets has it")
    inputs = ends([s.inputs for s in seen], "the model's inputs")
    return Study(
        size=sizes[0],
        batched=probe.batched,
        dynamic=dynamic,
        reason=reason,
        inputs=tuple(e for e in inputs if isinstance(e, TensorEnd)),
        stage_inputs=stage_inputs,
        stage_outputs=tuple(ends([s.stage_outputs[k] for s in seen], f"stage {k}") for k in range(n)),
    )


def _end(values: Sequence[Any], sizes: Sequence[int], where: str) -> End:
    first = values[0]
    if isinstance(first, torch.Tensor):
        if len({(v.dim(), v.dtype) if isinstance(v, torch.Tensor) else None for v in values}) > 1:
            raise _Fixed(f"a value of {where} changes its kind with the batch size")
        shape = tuple(_size(column, sizes) for column in zip(*(v.shape for v in values), strict=True))
        return TensorEnd(shape, first.dtype, first.device, tuple(map(int, first.shape)))
    if all(type(v) is type(first) and v == first for v in values):
        return ScalarEnd(first)
    if all(type(v) is int for v in values):
        size = _size(values, sizes)
        if isinstance(size, Affine):
            return ScalarEnd(size)
    raise _Fixed(
        f"a value of {where} that is no tensor changes with the batch size: {', '.join(map(repr, values))}"
    )


def _size(values: Sequence[int], sizes: Sequence[int]) -> Size:
    if len(set(values)) == 1:
        return int(values[0])
    times, rest = divmod(values[1] - values[0], sizes[1] - sizes[0])
    fit = Affine(times, values[0] - times * sizes[0])
    fits = rest == 0 and all(fit.at(s) == v for s, v in zip(sizes, values, strict=True))
    return fit if fits and times > 0 else None


def batch_axis(ends: Sequence[End]) -> tuple[int, int, Affine] | None:
    """A tensor among ``ends``, and its dimension, that tell the batch size."""
    for i, end in enumerate(ends):
        for d, size in enumerate(end.shape if isinstance(end, TensorEnd) else ()):
            if isinstance(size, Affine):
                return i, d, size
    return None
