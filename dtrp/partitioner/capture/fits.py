"""Calls of other shapes than the example's: right with the graph, or refused.

A graph that fx traced keeps all sizes open. One that was recorded or exported follows the batch size alone;
other sizes stand in it as the numbers that the model's code made of them, if it made any. Whether it did is
found by capturing the model for the new shapes too: the graphs must be equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from dtrp.errors import CaptureError

from .ambient import quiet
from .custom import OtherSizes, same_size
from .facade import capture
from .fakes import FakeWorld, fake_inputs
from .graph import Captured, ModeGraph
from .modes import in_mode
from .propagate import propagate
from .sizes import batch_of
from .traced import Traced, same_graph


class Fits:
    """Checks calls of one captured model, and remembers which shapes are right."""

    def __init__(self, captured: Captured) -> None:
        self._captured = captured
        placeholders = captured.train.module.graph.find_nodes(op="placeholder")
        self._example: list[torch.Tensor] = [node.meta["val"] for node in placeholders]
        self._right: set[tuple[Any, ...]] = set()

    def check(
        self,
        tensors: Sequence[torch.Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        training: bool,
        *,
        run: bool = False,
    ) -> None:
        """Refuse a call that the mode's graph is not for; ``run``: also one that would only fail on the way.

        Raises
        ------
        ValueError
            Names the argument, its shape now and in the example, and what to do.
        """
        graph = self._captured.graph(training)
        if self._captured.method == "fx" and all(map(_alike, tensors, self._example)):
            self._pass_guards(graph, tensors, training, run)
            return
        size, batch = batch_of(self._example)
        key = (training, *((tuple(t.shape), t.dtype) for t in tensors))
        if key in self._right:
            return
        if batch and graph.batch_fixed and tensors[batch[0]].shape[:1] != (size,):
            raise ValueError(
                f"{self._told(batch[0], tensors)}: the graph is for that batch size alone (the report's "
                "notes say why). Give batches of this size, or compile again with an example of the other."
            )
        sizes = {tensors[i].shape[:1] for i in batch}
        other = [i for i, t in enumerate(tensors) if not self._like_example(i, t, i in batch)]
        # Code often treats an empty tensor in a way of its own; some of it cannot be captured for one.
        empty = [] if other else [i for i in batch if tensors[i].shape[0] == 0 < size]
        if empty:
            other = empty
        elif not other and len(sizes) > 1 and graph.follows_batch:
            other = list(batch)  # their sizes were equal, perhaps by chance
        if other:
            reason = self._differs(args, kwargs, if_it_fails="allow" if empty else "refuse")
            if reason:
                free = "" if graph.batch_fixed or not batch else " (and any batch size)"
                now, then = tensors[other[0]].dtype, self._example[other[0]].dtype
                remedy = "Pad to these shapes" if now == then else f"Give it as {then}"
                raise ValueError(
                    f"{self._told(other[0], tensors)}: the graph is for the shapes of the example{free}, "
                    f"as {reason.rstrip('.')}. {remedy}, or compile again with an example of the new ones."
                )
            run = run or any(not _casts(tensors[i], self._example[i]) for i in other)
            self._pass_guards(graph, tensors, training, run)
        self._right.add(key)

    def _pass_guards(
        self, graph: ModeGraph, tensors: Sequence[torch.Tensor], training: bool, run: bool
    ) -> None:
        """Run the graph on fake tensors of the call's sizes if it has guards; nothing is computed."""
        key = (training, *((tuple(t.shape), t.dtype) for t in tensors))
        guards = graph.module.graph.find_nodes(op="call_function", target=same_size)
        if key in self._right or not (guards or run):
            return
        pairs = enumerate(zip(tensors, self._example, strict=True))
        i = next((i for i, (a, b) in pairs if not _same_kind(a, b)), None)
        if i is not None:
            world = FakeWorld()
            world.compares = False
            model = self._captured.model
            try:
                with quiet(), in_mode(model, self._captured.flags if training else None):
                    inputs = fake_inputs(world, [t.detach() for t in tensors])
                    found = propagate(graph.module, graph.module.graph, world, inputs)
                # Products of unlike dtypes pass on fake tensors, and fail on real ones.
                wrong = set(_dtypes(found)) - set(_dtypes(graph.module.graph.output_node().args))
                if wrong and tensors[i].dtype in wrong:
                    raise TypeError("so would its output be")
            except OtherSizes as error:
                raise ValueError(
                    f"{self._told(i, tensors)}: {error}, so the graph is not for these sizes. Pad to sizes "
                    "that take the same course, or compile again with an example of the new ones."
                ) from None
            except Exception as error:
                line = (str(error).strip().splitlines() or [type(error).__name__])[0]
                way = "these sizes"
                if tensors[i].dtype != (wanted := self._example[i].dtype):
                    way, line = "this dtype", f"{line}; give it as {wanted}"
                raise ValueError(f"{self._told(i, tensors)}, and fails with {way}: {line}") from None
        self._right.add(key)

    def _like_example(self, i: int, tensor: torch.Tensor, is_batch: bool) -> bool:
        expected, found = list(self._example[i].shape), list(tensor.shape)
        if is_batch and found:
            expected[0] = found[0]
        return expected == found and tensor.dtype == self._example[i].dtype

    def _told(self, i: int, tensors: Sequence[torch.Tensor]) -> str:
        now, then = tensors[i], self._example[i]
        return (
            f"argument {self._captured.signature.tensor_names[i]!r} is {_kind(now)} now and was "
            f"{_kind(then)} when the model was compiled"
        )

    def _differs(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], if_it_fails: Literal["allow", "refuse"]
    ) -> str:
        """Why the graphs for these arguments are not the present ones; ``""`` if they are."""
        mine = self._captured
        try:
            new = capture(mine.model, args, kwargs, opened=mine.opened, ways=[mine.method], run=False)
        except CaptureError as error:
            if if_it_fails == "allow":
                return ""
            return f"capturing it for the new ones fails: {(str(error).splitlines() or [''])[0]}"
        if not (_same(mine.train, new.train) and _same(mine.eval, new.eval)):
            return "the model's code computes with sizes, or takes another course with the new ones"
        return ""


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.dim() == b.dim()


def _same_kind(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape


def _casts(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether autocast, which is not on here, may make up for another dtype than the example's."""
    return a.dtype == b.dtype or a.dtype in (torch.float16, torch.bfloat16)


def _dtypes(values: Any) -> list[torch.dtype]:
    leaves = (v.meta.get("val") if isinstance(v, fx.Node) else v for v in pytree.tree_leaves(values))
    return [v.dtype for v in leaves if isinstance(v, torch.Tensor)]


def _same(a: ModeGraph, b: ModeGraph) -> bool:
    if not same_graph(Traced(a.module.graph, a.out_spec), Traced(b.module.graph, b.out_spec)):
        return False
    return all(
        _equal(_attribute(a.module, str(n.target)), _attribute(b.module, str(n.target)))
        for n in a.module.graph.find_nodes(op="get_attr")
    )


def _attribute(module: nn.Module, name: str) -> Any:
    owner, _, last = name.rpartition(".")
    return getattr(module.get_submodule(owner), last)


def _equal(a: Any, b: Any) -> bool:
    if a is b or not isinstance(a, torch.Tensor):
        return True
    return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
