"""Last way: torch.export without its strict mode, which sees through Python by running aten operators.

It gives no layers but single operators, fixed to one mode; each mode gets its graph. The batch is kept
dynamic where export allows it.
"""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import nn
from torch.export import Dim, export
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from .fakes import FakeWorld, fake_inputs
from .graph import Signature
from .location import frames_in_text
from .modes import BothModes
from .propagate import propagate
from .sizes import batch_of
from .snapshot import foreign_randomness, untouched
from .structure import flatten_output
from .task import Task
from .traced import Traced
from .writer import CannotRecord

_ROOT = "model"
# Checks that export adds; the sizes that they check are known to be right, or fail in the operators.
_CHECKS = ("_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size")


class _Found:
    """Takes a value out of an exported forward: export undoes assignments to the module itself."""

    out_spec: pytree.TreeSpec | None = None
    counted: str = ""  # what forward does to a number that the model keeps; export would forget it


class _Flat(nn.Module):
    """The model from flat tensors to flat leaves."""

    def __init__(self, model: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._signature = signature
        self.found = _Found()

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        """Run the model."""
        args, kwargs = self._signature.unflatten(tensors)
        before = dict(_numbers(self.model))
        leaves, self.found.out_spec = flatten_output(self.model(*args, **kwargs))
        for name, value in _numbers(self.model):
            if before.get(name, value) != value:
                self.found.counted = f"changes {name!r} from {before[name]!r} to {value!r} while it runs"
        return tuple(leaves)


def _numbers(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Plain numbers among the attributes of a model's modules."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if type(value) in (int, float):
                yield f"{path}.{name}".removeprefix("."), value


def export_model(task: Task) -> BothModes:
    """Export the model in both modes."""
    return BothModes.of(task.model, lambda: _export(task.model, task.signature, task.tensors))


def _export(model: nn.Module, signature: Signature, tensors: Sequence[torch.Tensor]) -> Traced:
    size, batch = batch_of(tensors)
    flat = _Flat(model, signature)
    states = foreign_randomness()
    # Where it fails, export prints the whole graph so far.
    with (
        untouched(model),
        warnings.catch_warnings(),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            program = _dynamic(flat, tensors, batch, size)
        except Exception:
            if not batch:
                raise
            program = export(flat, tuple(tensors), strict=False)
        drew = foreign_randomness() != states
    if drew:
        raise CannotRecord("draws random numbers from Python's or numpy's generator")
    if flat.found.counted:
        raise CannotRecord(flat.found.counted)
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    assert flat.found.out_spec is not None
    traced = _translate(model, module, flat.found.out_spec)
    world = FakeWorld()
    propagate(model, traced.graph, world, fake_inputs(world, tensors), traced.constants)
    try:
        world = FakeWorld()
        inputs = fake_inputs(world, tensors, batch, size + 1)
        propagate(model, traced.graph, world, inputs, traced.constants, keep=False)
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        note = f"the batch size {size} of the example is fixed in the graph ({line})"
        return dataclasses.replace(traced, notes=(*traced.notes, note), batch_fixed=True)
    return traced


def _dynamic(flat: _Flat, tensors: Sequence[torch.Tensor], batch: tuple[int, ...], size: int) -> Any:
    """The exported program with a batch dimension of any size."""
    if size == 1:  # export takes a size of one for a constant
        tensors = [torch.cat([t, t]) if i in batch else t for i, t in enumerate(tensors)]
    shapes = tuple({0: Dim.AUTO} if i in batch else None for i in range(len(tensors)))
    return export(flat, tuple(tensors), dynamic_shapes=(shapes,), strict=False)


def _translate(model: nn.Module, module: GraphModule, out_spec: pytree.TreeSpec) -> Traced:
    """Export's graph in the form of ours: original names, a module and a line on each node."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    constants: dict[str, Any] = {}
    for node in module.graph.nodes:
        if getattr(node.target, "__name__", "").split(".")[0] in _CHECKS:
            continue
        if node.op == "output":
            leaves = pytree.tree_leaves(torch.fx.map_arg(node.args[0], lambda n: copies[n]))
            copy = graph.output(tuple(leaves))
        else:
            copy = graph.node_copy(node, lambda n: copies[n])
        if node.op == "get_attr":
            copy.target = _original_name(model, module, str(node.target), constants)
        copy.meta = {"module": _module_of(node), "location": next(_lines_of(node), "")}
        copies[node] = copy
    graph.eliminate_dead_code()
    return Traced(graph, out_spec, notes=tuple(_regions(module)), constants=constants)


def _regions(module: GraphModule) -> Iterator[str]:
    """A note for each node that holds a graph of its own."""
    for node in module.graph.nodes:
        held = [getattr(module, str(n.target), None) for n in node.all_input_nodes if n.op == "get_attr"]
        inner = [n for graph in held if isinstance(graph, GraphModule) for n in graph.graph.nodes]
        if inner:
            place = next((line for n in inner for line in _lines_of(n)), "")
            yield f"one node holds a whole region ({node.target}{place and ' from ' + place}): it is not cut"


def _original_name(model: nn.Module, module: GraphModule, name: str, constants: dict[str, Any]) -> str:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    original = name.removeprefix(_ROOT + ".")
    try:
        found: Any = model
        for part in original.split("."):
            found = getattr(found, part)
    except AttributeError:
        found = None
    if isinstance(found, torch.Tensor) and found.shape == value.shape:
        return original
    constant = f"_constant_{len(constants)}"
    constants[constant] = value
    return constant


def _module_of(node: Node) -> str:
    stack = node.meta.get("nn_module_stack")
    path = str(list(stack.values())[-1][0]) if stack else ""
    return path.removeprefix(_ROOT).removeprefix(".")


def _lines_of(node: Node) -> Iterator[str]:
    return frames_in_text(node.meta.get("stack_trace") or "")
