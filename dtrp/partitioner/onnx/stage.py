"""One stage's graph as torch's exporter takes it, and what comes out."""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.node import map_arg

from ...errors import ExportError
from ..capture.ambient import plain_attention
from ..capture.custom import same_size
from .failure import explain, lacks_operator, root_cause
from .study import Affine, End, ScalarEnd, SizeOf, Study, TensorEnd
from .trace import FollowingInterpreter, NodeFailed, first_line


class NotDynamic(Exception):
    """A stage that can only be exported with fixed sizes; the text says why."""


class Exportable(nn.Module):
    """A stage that takes and gives tensors only, under the original names of its parameters.

    It is interpreted rather than compiled to code: an exporter's failure can then name the node, and every
    node of the exported program knows the stage's node that it comes from.
    """

    def __init__(self, module: fx.GraphModule, graph: fx.Graph, stage: int) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, child)
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name in {str(n.target) for n in graph.find_nodes(op="get_attr")}:
            if "." not in name and not hasattr(self, name):
                setattr(self, name, getattr(module, name))
        self.stage = stage
        self.graph = graph

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The stage's tensor outputs."""
        return FollowingInterpreter(self, self.stage, self.graph).run(*inputs)


def exportable(
    module: fx.GraphModule, stage: int, inputs: Sequence[End], outputs: Sequence[End]
) -> Exportable:
    """The stage with its numbers folded: see batch.py."""
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    placeholders = module.graph.find_nodes(op="placeholder")
    for node, end in zip(placeholders, inputs, strict=True):
        if isinstance(end, TensorEnd):
            values[node] = graph.node_copy(node)
    tensors = [node for node, end in zip(placeholders, inputs, strict=True) if isinstance(end, TensorEnd)]
    arrived = {node: values[node] for node in tensors}
    for node in tensors:
        # A stage may write to what it was handed. Programs of ONNX do not: they work on a copy, which the
        # optimiser takes away where nothing writes.
        values[node] = graph.call_method("clone", (arrived[node],))
    for node, end in zip(placeholders, inputs, strict=True):
        if isinstance(end, ScalarEnd):
            values[node] = _number(graph, end.value, [arrived.get(p) for p in placeholders])
    for node in module.graph.nodes:
        if node.op == "placeholder" or node.target is same_size:  # the manifest has the sizes' limits
            continue
        if node.op == "output":
            given = map_arg(node.args[0], values.__getitem__)
            graph.output(
                tuple(v for v, end in zip(given, outputs, strict=True) if isinstance(end, TensorEnd))
            )
            break
        copied = graph.create_node(
            node.op,
            node.target,
            map_arg(node.args, values.__getitem__),
            map_arg(node.kwargs, values.__getitem__),
            name=node.name,
        )
        copied.meta = {k: v for k, v in node.meta.items() if k in ("module", "location")}
        values[node] = copied
    graph.lint()
    return Exportable(module, graph, stage)


def _number(graph: fx.Graph, value: Any, nodes: Sequence[fx.Node | None]) -> Any:
    """A number that crosses stages, as this stage gets it."""
    if not isinstance(value, SizeOf):
        return value
    number, *others = [graph.call_method("size", (nodes[i], d)) for i, d in value.sizes]
    for other in others:
        number = graph.call_function(operator.mul, (number, other))
    for function, operand, nothing in (
        (operator.mul, value.times, 1),
        (operator.floordiv, value.over, 1),
        (operator.add, value.plus, 0),
    ):
        if operand != nothing:
            number = graph.call_function(function, (number, operand))
    return number


def export_program(
    module: Exportable, inputs: Sequence[End], study: Study, *, traced: bool = False
) -> ExportedProgram:
    """The stage through ``torch.export``; ``traced``: its nodes know which nodes they come from.

    Raises
    ------
    NotDynamic
        It needs the example's sizes.
    ExportError
        It cannot be exported at all: names the node, its module and line, and the stage.
    """
    tensors = [end for end in inputs if isinstance(end, TensorEnd)]
    examples = tuple(torch.zeros(end.example, dtype=end.dtype, device=end.device) for end in tensors)
    problem = ""
    for shapes in _dynamic_shapes(tensors, study) if study.axes else [None]:
        try:
            with _quiet(traced):
                program = torch.export.export(module, examples, dynamic_shapes=shapes, strict=False)
        except Exception as e:
            problem = problem or (
                str(e) if isinstance(e, NodeFailed) else f"stage {module.stage}: {first_line(e)}"
            )
            if not study.axes:
                raise explain(e, module.graph, module.stage, "torch.export") from e
            continue
        if fixed := _specialised(program, tensors):
            problem = problem or f"stage {module.stage} needs {fixed}"
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


def _check_writes(program: ExportedProgram | None, module: Exportable) -> None:
    if program is None:
        return
    if written := sorted(set(program.graph_signature.buffers_to_mutate.values())):
        raise ExportError(
            f"stage {module.stage} writes to {', '.join(map(repr, written))} in eval mode; stages in ONNX "
            f"keep no state between calls. Make it an input and an output of the model, or write to it only "
            f"in train mode"
        )


def convert(module: Exportable, inputs: Sequence[End], study: Study, opset: int | None) -> Any:
    """The stage as a ``torch.onnx.ONNXProgram``.

    Raises
    ------
    NotDynamic
        It needs the example's sizes.
    ExportError
        An operator has no counterpart in ONNX, or ``opset`` cannot be had.
    """

    def attempt(traced: bool) -> Any:
        program = export_program(module, inputs, study, traced=traced)
        with _quiet(traced):
            return torch.onnx.export(program, (), dynamo=True, opset_version=opset, verbose=False)

    failure: Exception | None = None
    try:
        converted = attempt(traced=False)
    except (NotDynamic, ExportError):
        raise
    except Exception as e:
        if study.axes and not lacks_operator(e):
            raise NotDynamic(f"stage {module.stage}: {first_line(root_cause(e))}") from e
        failure = e
    if failure is not None:
        # Again, to tell which node it is. Not at first: torch refuses some graphs whose nodes know it.
        try:
            attempt(traced=True)
        except Exception as e:
            failure = e if lacks_operator(e) == lacks_operator(failure) else failure
        raise explain(failure, module.graph, module.stage, "torch's ONNX exporter") from failure
    _check_writes(converted.exported_program, module)
    got = converted.model.opset_imports.get("")
    if opset is not None and got != opset:
        raise ExportError(
            f"stage {module.stage} cannot be written with opset {opset}: torch's exporter gives opset {got}, "
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
