"""What values are called in the files: the model's own names, and the same name wherever a value goes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...wiring import CALLER, Source, Wiring

if TYPE_CHECKING:
    from .study import End, Size, TensorEnd

Shape = tuple[int | str, ...]


def identifier(text: str) -> str:
    """``text`` as ONNX wants names: letters, digits and underscores, no digit first."""
    name = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")
    return name if name and not name[0].isdigit() else f"value_{name}"


class Names:
    """Distinct names of the chain's inputs and of all values that cross stages."""

    def __init__(self, arguments: Sequence[str], wiring: Wiring) -> None:
        self._taken: set[str] = set()
        self._names: dict[Source, str] = {}
        for i, argument in enumerate(arguments):
            self._names[Source(CALLER, i)] = self._free(argument)
        for k, wires in enumerate(wiring.stages):
            for i, output in enumerate(wires.outputs):
                self._names[Source(k, i)] = self._free(output)

    def __getitem__(self, source: Source) -> str:
        return self._names[source]

    def _free(self, wanted: str) -> str:
        base = name = identifier(wanted)
        n = 1
        while name in self._taken:
            n += 1
            name = f"{base}_{n}"
        self._taken.add(name)
        return name


def shape_text(name: str, shape: Sequence[Size]) -> Shape:
    """A shape as the manifest and the files write it."""
    return tuple(
        s if isinstance(s, int) else str(s) if s else f"{name}_size_{d}" for d, s in enumerate(shape)
    )


def name_ends(
    model: Any, inputs: Mapping[str, TensorEnd], outputs: Mapping[str, TensorEnd], title: str
) -> None:
    """Call a converted stage's inputs and outputs as given, in order, and state their shapes.

    An output that is also an input, a weight or another output gets a node of its own: one value cannot have
    two names.
    """
    import onnx_ir as ir

    graph = model.graph
    if len(graph.inputs) != len(inputs) or len(graph.outputs) != len(outputs):
        raise ValueError(
            f"{title} has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs in ONNX, expected "
            f"{len(inputs)} and {len(outputs)}"
        )
    occupied = {id(v) for v in graph.inputs} | {id(v) for v in graph.initializers.values()}
    for i, value in enumerate(graph.outputs):
        if id(value) in occupied or value.producer() is None:
            copy = ir.node("Identity", [value])
            graph.append(copy)
            copy.outputs[0].type = value.type
            graph.outputs[i] = copy.outputs[0]
        occupied.add(id(graph.outputs[i]))
    ends = [
        *zip(graph.inputs, inputs.items(), strict=True),
        *zip(graph.outputs, outputs.items(), strict=True),
    ]
    _make_room(graph, {name for _, (name, _) in ends}, {id(value) for value, _ in ends})
    known = _symbols(zip(graph.inputs, inputs.values(), strict=True))
    for value in _values(graph):
        _rename_symbols(ir, value, known)
    for value, (name, end) in ends:
        value.name = name
        value.shape = ir.Shape(shape_text(name, end.shape))
    if not outputs:
        _give_nothing(ir, graph, f"{title}_nothing")
    graph.name = title
    model.producer_name, model.producer_version = "dtrp", None
    for node in model.graph.all_nodes():
        # torch leaves the source lines of the machine that exported.
        for key in [k for k in node.metadata_props if k != "namespace"]:
            del node.metadata_props[key]


def _give_nothing(ir: Any, graph: Any, name: str) -> None:
    """An empty output: a stage may give numbers only, which do not travel, but onnxruntime wants a value."""
    node = ir.node("Constant", [], {"value_ints": ir.AttrInt64s("value_ints", [])})
    graph.append(node)
    (value,) = node.outputs
    value.name, value.shape, value.type = name, ir.Shape([0]), ir.TensorType(ir.DataType.INT64)
    graph.outputs.append(value)


def _values(graph: Any) -> Iterable[Any]:
    for node in graph.all_nodes():
        yield from node.outputs


def _make_room(graph: Any, wanted: set[str], ends: set[int]) -> None:
    """Rename inner values that are called like an end."""
    inner = [v for v in (*_values(graph), *graph.initializers.values()) if id(v) not in ends]
    taken = wanted | {v.name for v in inner}
    for value in inner:
        if value.name in wanted:
            n = 1
            while f"{value.name}_{n}" in taken:
                n += 1
            taken.add(f"{value.name}_{n}")
            value.name = f"{value.name}_{n}"
    for value in [*graph.inputs, *graph.outputs]:
        value.name = f"__end_{id(value)}"  # ends may be called like each other before they are renamed


def _symbols(inputs: Iterable[tuple[Any, TensorEnd]]) -> dict[str, str]:
    """torch's symbols that are axes: ``{"s31": "batch"}``."""
    return {
        str(dim.value): str(size)
        for value, end in inputs
        for dim, size in zip(value.shape or (), end.shape, strict=False)
        if not isinstance(size, int) and size is not None and str(size) == size.axis and hasattr(dim, "value")
    }


def _rename_symbols(ir: Any, value: Any, known: Mapping[str, str]) -> None:
    if value.shape is None or not known:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, known)) + r")\b")
    dims = [
        pattern.sub(lambda m: known[m[0]], str(d.value)) if hasattr(d, "value") and d.value else d
        for d in value.shape
    ]
    if dims != list(value.shape):
        value.shape = ir.Shape(dims)


def tensors(ends: Sequence[End], names: Sequence[str]) -> dict[str, TensorEnd]:
    """The ends that are tensors, by name."""
    from .study import TensorEnd

    return {name: end for name, end in zip(names, ends, strict=True) if isinstance(end, TensorEnd)}
