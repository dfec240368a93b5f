"""Freeing a recorded graph of the example's batch size.

The model is recorded with the example's batch and with another. The recordings must be the same calls;
where a number in them changed with the batch, it is a size (or was computed from sizes), and is replaced by
nodes that compute it:

    recorded with 4 and 5 samples:   view(x, 32, -1)   view(x, 40, -1)
    becomes:                         size(x, 0) * 8    -> view(x, ., -1)

The tensor that is asked for its size is one of the same call if possible, else the latest that has the size,
so that few sizes travel from stage to stage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.fx import Graph, Node

from .fakes import FakeWorld, fake_inputs
from .propagate import propagate
from .task import Task
from .traced import Traced


class Run(Protocol):
    """Records the model again."""

    def __call__(self, batch: tuple[int, ...], size: int) -> Traced:
        """With ``size`` samples in the tensors at the indices in ``batch``."""

    def apart(self, batch: tuple[int, ...], sizes: tuple[int, ...]) -> Traced:
        """With a size for each of them; nothing is kept whole that was not."""


_Numbers = tuple[int, ...]  # one number of the graph, as it was in each recording
_NEAR = 64  # how many earlier nodes are searched for a tensor that has the size


def free_the_batch(example: Traced, run: Run, task: Task, training: bool) -> Traced:
    """Replace numbers in a recording that follow the batch size, found by recording again with another.

    The result is checked by running it, on fake tensors, with a third batch size. Where the model takes no
    other batch size, or takes another course with it, the example's is kept and a note says so.
    """
    tensors = task.tensors
    size, batch = batch_of(tensors)
    if not batch:
        return example
    problem = ""
    for second, third in ((size + 1, size + 3), (2 * size, 3 * size)):
        try:
            other = run(batch, second)
        except Exception as error:
            problem = f"with {second} samples instead of {size} it fails: {_first_line(error)}"
            continue
        original = example.copy()
        try:
            follows = unify([example, other])
            if follows and len(batch) > 1:
                # Their sizes may be equal by chance: does the model take them apart?
                with contextlib.suppress(Exception):
                    each = run.apart(batch, tuple(second + i for i in range(len(batch))))
                    freed = original.copy()
                    unify([freed, other, each])
                    example, follows = freed, False
            world = FakeWorld()
            world.compares = False
            inputs = fake_inputs(world, tensors, batch, third)
            held = {**example.constants, **example.methods}
            with task.run(training):
                propagate(task.model, example.graph, world, inputs, held)
            return dataclasses.replace(example, follows_batch=follows)
        except Differs as difference:
            problem = str(difference)
        except Exception as error:
            problem = f"with {third} samples instead of {size} its graph fails: {_first_line(error)}"
        example = original
    note = f"the batch size {size} of the example is fixed in the graph ({problem})"
    return dataclasses.replace(example, notes=(*example.notes, note), batch_fixed=True)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def batch_of(tensors: Sequence[torch.Tensor]) -> tuple[int, tuple[int, ...]]:
    """The batch size (the most common first dimension) and the indices of the tensors that have it."""
    sizes = Counter(t.shape[0] for t in tensors if t.dim() > 0)
    if not sizes:
        return 0, ()
    # Among equally common ones, the first tensor's.
    size = max(sizes, key=lambda s: sizes[s])
    return size, tuple(i for i, t in enumerate(tensors) if t.dim() > 0 and t.shape[0] == size)


class Differs(Exception):
    """Two recordings are not the same calls, or a number follows the sizes in no known way."""

    def __init__(self, text: str, node: Node | None = None) -> None:
        self.place = node.meta["location"] if node is not None else ""
        self.module = "" if node is None else _caller(node)
        super().__init__(f"{text}, at {self.place}" if self.place else text)


def _caller(node: Node) -> str:
    """What made the node: a module (of a layer's node, the one that the layer is in), or a method."""
    module = str(node.meta["module"])
    if not module or (node.op == "call_module" and "." not in module):
        return str(node.meta.get("method", ""))
    return module.rpartition(".")[0] if node.op == "call_module" else module


def unify(recordings: Sequence[Traced], by_values: bool = False) -> bool:
    """Replace, in the first recording, the numbers in which the others, of other sizes, differ.

    With ``by_values`` the sizes are those that modules make from values. They stand for no other size that
    happens to be equal: a later call does not take numbers from them.

    Returns
    -------
    bool
        Whether there were any.

    Raises
    ------
    Differs
        The recordings cannot be one graph; the message says why, and at which line.
    """
    graph = recordings[0].graph
    columns = list(zip(*(r.graph.nodes for r in recordings), strict=False))
    if any(r.out_spec != recordings[0].out_spec for r in recordings):
        raise Differs("its output has another structure with another size")
    for column in columns:
        if any(n.op != column[0].op or not _same_target(n.target, column[0].target) for n in column):
            raise Differs("it makes other calls with another size", column[0])
    if len({len(r.graph.nodes) for r in recordings}) > 1:
        raise Differs("it makes more calls with another size", columns[-1][0])
    rank = {n: i for i, column in enumerate(columns) for n in column}
    replacements: list[tuple[Node, Any, Any]] = []
    sizes = _Sizes(graph, columns)
    for i, column in enumerate(columns):
        try:
            args = _merge([n.args for n in column], rank, sizes, i)
            kwargs = _merge([n.kwargs for n in column], rank, sizes, i)
        except Differs as difference:
            raise Differs(str(difference), column[0]) from None
        replacements.append((column[0], args, kwargs))
    for node, args, kwargs in replacements:
        node.args, node.kwargs = sizes.written(node, args), sizes.written(node, kwargs)
    if by_values:
        for i, column in enumerate(columns):
            column[0].meta["sized_by_values"] = {dim for dim, _ in sizes.varying[i]}
    return bool(sizes.written_nodes)


class _Size:
    """A number that is to be computed: ``tensor.size(dim) * times // over + plus``."""

    def __init__(self, source: int, dim: int, times: int = 1, over: int = 1, plus: int = 0) -> None:
        self.source, self.dim, self.times, self.over, self.plus = source, dim, times, over, plus


class _Sizes:
    """Finds tensors of the graph that have a given size."""

    def __init__(self, graph: Graph, columns: Sequence[tuple[Node, ...]]) -> None:
        self._graph = graph
        self._columns = columns
        self.written_nodes: dict[tuple[int, int, int, int, int], Node] = {}
        self.varying = [self._dims(column) for column in columns]

    def _dims(self, column: tuple[Node, ...]) -> list[tuple[int, _Numbers]]:
        """The dimensions of a node's tensor that change with the batch."""
        values = [v for v in (n.meta.get("val") for n in column) if isinstance(v, torch.Tensor)]
        if len(values) < len(column) or len({v.dim() for v in values}) > 1:
            return []
        shapes = zip(*(v.shape for v in values), strict=True)
        taken = column[0].meta.get("sized_by_values", ())
        return [(d, sizes) for d, sizes in enumerate(shapes) if len(set(sizes)) > 1 and d not in taken]

    def find(self, numbers: _Numbers, at: int, near: Sequence[int]) -> _Size:
        """An expression that gives ``numbers``, from tensors before node ``at``, preferring ``near``."""
        candidates = [*near, *self._before(at)]
        for form in (_equal, _multiple, _fraction, _affine):
            for source in candidates:
                for dim, sizes in self.varying[source]:
                    fit = form(numbers, sizes)
                    if fit is not None:
                        return _Size(source, dim, *fit)
        raise Differs(f"it computes {numbers[0]} from sizes in an unknown way (else {numbers[1:]})")

    def _before(self, at: int) -> Iterator[int]:
        seen = 0
        for i in range(at - 1, -1, -1):
            if self.varying[i] and (seen < _NEAR or self._columns[i][0].op == "placeholder"):
                seen += 1
                yield i

    def written(self, node: Node, value: Any) -> Any:
        """``value`` with each `_Size` replaced by nodes that compute it, placed before ``node``."""
        if isinstance(value, _Size):
            return self._nodes(node, value)
        if isinstance(value, (tuple, list)):
            items = [self.written(node, x) for x in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, dict):
            return {k: self.written(node, v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self.written(node, x) for x in (value.start, value.stop, value.step)))
        return value

    def _nodes(self, node: Node, size: _Size) -> Node:
        key = (size.source, size.dim, size.times, size.over, size.plus)
        if key in self.written_nodes:
            return self.written_nodes[key]
        source = self._columns[size.source][0]
        value = int(source.meta["val"].shape[size.dim])
        with self._graph.inserting_before(node):
            result = self._new("call_method", "size", (source, size.dim), value, node)
            for function, operand, neutral in (
                (operator.mul, size.times, 1),
                (operator.floordiv, size.over, 1),
                (operator.add, size.plus, 0),
            ):
                if operand != neutral:
                    value = function(value, operand)
                    result = self._new("call_function", function, (result, operand), value, node)
        self.written_nodes[key] = result
        return result

    def _new(self, op: str, target: Any, args: Any, value: int, user: Node) -> Node:
        node = self._graph.create_node(op, target, args)
        node.meta.update(val=value, module=user.meta["module"], location=user.meta["location"])
        return node


def _equal(numbers: _Numbers, sizes: _Numbers) -> tuple[int, ...] | None:
    return () if numbers == sizes else None


def _multiple(numbers: _Numbers, sizes: _Numbers) -> tuple[int, ...] | None:
    times = numbers[0] // sizes[0] if sizes[0] else 0
    return (times,) if times and all(n == times * s for n, s in zip(numbers, sizes, strict=True)) else None


def _fraction(numbers: _Numbers, sizes: _Numbers) -> tuple[int, ...] | None:
    over = sizes[0] // numbers[0] if numbers[0] else 0
    fits = over > 1 and all(n * over == s for n, s in zip(numbers, sizes, strict=True))
    return (1, over) if fits else None


def _affine(numbers: _Numbers, sizes: _Numbers) -> tuple[int, ...] | None:
    run, rise = sizes[1] - sizes[0], numbers[1] - numbers[0]
    if not run or rise % run:
        return None
    times, plus = rise // run, numbers[0] - rise // run * sizes[0]
    fits = all(n == times * s + plus for n, s in zip(numbers, sizes, strict=True))
    return (times, 1, plus) if fits else None


def _merge(values: Sequence[Any], rank: dict[Node, int], sizes: _Sizes, at: int) -> Any:
    """One value that stands for all of ``values``, with a `_Size` where they differ."""
    near: list[int] = []
    torch.fx.map_arg(values[0], lambda n: near.append(rank[n]))
    return _merge_in(values, rank, sizes, at, near)


def _merge_in(values: Sequence[Any], rank: dict[Node, int], sizes: _Sizes, at: int, near: list[int]) -> Any:
    first = values[0]
    if any(type(v) is not type(first) for v in values):
        raise Differs("it hands other kinds of values on with another size")
    if isinstance(first, Node):
        if len({rank[v] for v in values}) > 1:
            raise Differs("it uses other tensors with another size")
        return first
    if isinstance(first, (tuple, list)):
        if len({len(v) for v in values}) > 1:
            raise Differs("it hands more values on with another size")
        items = [_merge_in(column, rank, sizes, at, near) for column in zip(*values, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    if isinstance(first, dict):
        if any(list(v) != list(first) for v in values):
            raise Differs("it hands other arguments on with another size")
        return {k: _merge_in([v[k] for v in values], rank, sizes, at, near) for k in first}
    if isinstance(first, slice):
        bounds = [(v.start, v.stop, v.step) for v in values]
        return slice(*_merge_in(bounds, rank, sizes, at, near))
    if all(v is first or v == first or v != v for v in values):
        return first
    if type(first) is int:
        return sizes.find(tuple(values), at, near)
    raise Differs(f"the value {first!r} changes with the size")


def _same_target(a: Any, b: Any) -> bool:
    return bool(a is b or a == b)
