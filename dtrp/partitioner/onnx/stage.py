"""One stage's graph as torch's exporter takes it, and what comes out."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from ...errors import ExportError
from ..capture.ambient import plain_attention
from .failure import explain, lacks_operator, root_cause
from .study import Affine, End, SizeOf, Study, TensorEnd
from .trace import FollowingInterpreter, NodeFailed, first_line


class NotDynamic(Exception):
    """A stage that can only be exported with fixed sizes; the text says why."""


class Exportable(nn.Module):
    """A stage that takes and gives tensors only, under the original names of its parameters.

    It is interpreted rather than compiled to code: an exporter's failure can then name the node, and every
    node of the exported program knows the stage's node that it comes from.
    """

    def __init__(
        self, module: fx.GraphModule, stage: int, inputs: Sequence[End], outputs: Sequence[End]
    ) -> None:
        super().__init__()
        self.__dict__.update(module.__dict__)  # its parameters, buffers and modules, by their names
        self.__dict__["_dtrp"] = module.graph, stage, inputs, outputs  # a part may be called "stage"

    @property
    def dtrp_stage(self) -> tuple[fx.Graph, int, Sequence[End], Sequence[End]]:
        """Its graph, its number, and what comes in and goes out."""
        known: tuple[fx.Graph, int, Sequence[End], Sequence[End]] = self.__dict__["_dtrp"]
        return known

    def forward(self, *tensors: torch.Tensor) -> Any:
        """The stage's tensor outputs."""
        graph, stage, inputs, outputs = self.dtrp_stage
        given = iter(tensors)
        # A stage may write to what it was handed. Programs of ONNX do not: they work on a copy, which the
        # optimiser takes away where nothing writes.
        arrived = [next(given).clone() if isinstance(end, TensorEnd) else end.value for end in inputs]
        values = [_number(value, arrived) for value in arrived]
        # The manifest has the sizes' limits, and no guards are asked.
        made = FollowingInterpreter(self, stage, graph, guarded=False).run(*values)
        return tuple(v for v, end in zip(made, outputs, strict=True) if isinstance(end, TensorEnd))


def _number(value: Any, arrived: Sequence[Any]) -> Any:
    """A number that crosses stages, as this stage gets it."""
    if not isinstance(value, SizeOf):
        return value
    return math.prod(arrived[i].shape[d] for i, d in value.sizes) * value.times // value.over + value.plus


def export_program(module: Exportable, study: Study, *, traced: bool = False) -> ExportedProgram:
    """The stage through ``torch.export``; ``traced``: its nodes know which nodes they come from.

    Raises
    ------
    NotDynamic
        It needs the example's sizes.
    ExportError
        It cannot be exported at all: names the node, its module and line, and the stage.
    """
    graph, stage, inputs, _ = module.dtrp_stage
    tensors = [end for end in inputs if isinstance(end, TensorEnd)]
    examples = tuple(torch.zeros(end.example, dtype=end.dtype, device=end.device) for end in tensors)
    problem = ""
    for shapes in _dynamic_shapes(tensors, study) if study.axes else [None]:
        try:
            with _quiet(traced):
                program = torch.export.export(module, examples, dynamic_shapes=shapes, strict=False)
        except Exception as e:
            problem = problem or (str(e) if isinstance(e, NodeFailed) else f"stage {stage}: {first_line(e)}")
            if not study.axes:
                raise explain(e, graph, stage, "torch.export") from e
            continue
        if fixed := _specialised(program, tensors):
            problem = problem or f"stage {stage} needs {fixed}"
            continue
        return program
    raise NotDynamic(problem)


def _dynamic_shapes(tensors: Sequence[TensorEnd], study: Study) -> list[Any]:
    """What to tell ``torch.export`` of the sizes, best first."""
    if not any(not isinstance(s, int) for t in tensors for s in t.shape):
        return [None]
    dims = {axis.name: Dim(axis.name) for axis in study.axes}

    def named(size: Affine) -> Any:
        axis: Any = dims[size.axis]
        dim = axis if size.times == 1 else size.times * axis
        return dim + size.plus if size.plus > 0 else dim - -size.plus if size.plus else dim

    told = [
        {
            d: named(s) if isinstance(s, Affine) else Dim.AUTO
            for d, s in enumerate(t.shape)
            if not isinstance(s, int)
        }
        for t in tensors
    ]
    # torch finds the relations between the sizes itself; it may then also find one to be constant.
    found = [{d: Dim.AUTO for d, s in enumerate(t.shape) if not isinstance(s, int)} for t in tensors]
    return [(tuple(told),), (tuple(found),)]


def _specialised(program: ExportedProgram, tensors: Sequence[TensorEnd]) -> str:
    """Which size torch took for a constant, if any."""
    names = program.graph_signature.user_inputs
    nodes = {n.name: n for n in program.graph.find_nodes(op="placeholder")}
    for name, end in zip(names, tensors, strict=True):
        value = nodes[str(name)].meta["val"]
        for d, size in enumerate(end.shape):
            if not isinstance(size, int) and isinstance(value.shape[d], int):
                return f"size {value.shape[d]} along dimension {d} of an input"
    return ""


def _check_writes(program: ExportedProgram | None, stage: int) -> None:
    if program is None:
        return
    if written := sorted(set(program.graph_signature.buffers_to_mutate.values())):
        raise ExportError(
            f"stage {stage} writes to {', '.join(map(repr, written))} in eval mode; stages in ONNX "
            f"keep no state between calls. Make it an input and an output of the model, or write to it only "
            f"in train mode"
        )


def convert(module: Exportable, study: Study, opset: int | None) -> Any:
    """The stage as a ``torch.onnx.ONNXProgram``.

    Raises
    ------
    NotDynamic
        It needs the example's sizes.
    ExportError
        An operator has no counterpart in ONNX, or ``opset`` cannot be had.
    """

    graph, stage, *_ = module.dtrp_stage

    def attempt(traced: bool) -> Any:
        program = export_program(module, study, traced=traced)
        with _quiet(traced):
            return torch.onnx.export(program, (), dynamo=True, opset_version=opset, verbose=False)

    failure: Exception | None = None
    try:
        converted = attempt(traced=False)
    except (NotDynamic, ExportError):
        raise
    except Exception as e:
        if study.axes and not lacks_operator(e):
            raise NotDynamic(f"stage {stage}: {first_line(root_cause(e))}") from e
        failure = e
    if failure is not None:
        # Again, to tell which node it is. Not at first: torch refuses some graphs whose nodes know it.
        try:
            attempt(traced=True)
        except Exception as e:
            failure = e if lacks_operator(e) == lacks_operator(failure) else failure
        raise explain(failure, graph, stage, "torch's ONNX exporter") from failure
    _check_writes(converted.exported_program, stage)
    got = converted.model.opset_imports.get("")
    if opset is not None and got != opset:
        raise ExportError(
            f"stage {stage} cannot be written with opset {opset}: torch's exporter gives opset {got}, "
            f"and what the stage uses has no form in {opset}. Leave opset out, or take {got}"
        )
    return converted


@contextmanager
def _quiet(traced: bool = False) -> Iterator[None]:
    """No gradient, no fast paths that only exist as one fused operator, no warnings of torch's own making."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if traced:
            stack.enter_context(fx.traceback.preserve_node_meta())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in ("onnxscript", "onnx_ir", "torch.onnx"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        stack.enter_context(plain_attention())
        yield
