"""Calls of other shapes than the example's: right with the graph, or refused.

A graph keeps all sizes open that the model's code leaves open; where the code decides by one, a guard stands
in the graph. The guards are run with the call's sizes on fake tensors. Other dtypes and numbers of dimensions
have no guards: model and graph are compared on them, operator by operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .ambient import plain_attention, quiet
from .custom import OtherSizes, same_size
from .fakes import FakeWorld, fake_inputs
from .graph import Captured, ModeGraph
from .modes import in_mode
from .propagate import Runner
from .task import Task
from .traced import Traced
from .verify import Unfaithful, verify


class Fits:
    """Checks calls of one captured model, and remembers which shapes are right."""

    def __init__(self, captured: Captured) -> None:
        self._captured = captured
        placeholders = captured.train.module.graph.find_nodes(op="placeholder")
        self._example: list[torch.Tensor] = [node.meta["val"] for node in placeholders]
        self._right: set[tuple[Any, ...]] = set()

    def check(self, tensors: Sequence[torch.Tensor], training: bool, *, run: bool = False) -> None:
        """Refuse a call that the mode's graph is not for; ``run``: also one that would only fail on the way.

        Raises
        ------
        ValueError
            Names the argument, its shape now and in the example, and what to do.
        """
        key = (training, *((t.shape, t.dtype) for t in tensors))
        if key in self._right:
            return
        graph = self._captured.graph(training)
        pairs = list(enumerate(zip(tensors, self._example, strict=True)))
        other = [i for i, (a, b) in pairs if a.dtype != b.dtype or a.dim() != b.dim()]
        if other:
            self._compare(other[0], graph, tensors, training)
            run = run or any(not _casts(tensors[i], self._example[i]) for i in other)
        else:
            other = [i for i, (a, b) in pairs if a.shape != b.shape]
        if other and (run or graph.module.graph.find_nodes(op="call_function", target=same_size)):
            self._pass_guards(other[0], graph, tensors, training)
        self._right.add(key)

    def _compare(self, i: int, graph: ModeGraph, tensors: Sequence[torch.Tensor], training: bool) -> None:
        captured, model = self._captured, self._captured.model
        known = {
            name for name, _ in (*model.named_modules(), *model.named_parameters(), *model.named_buffers())
        }
        own = {
            str(n.target): getattr(graph.module, str(n.target))
            for n in graph.module.graph.nodes
            if n.op in ("call_module", "get_attr") and str(n.target) not in known and "." not in str(n.target)
        }
        traced = Traced(graph.module.graph, graph.out_spec, held=own)
        task = Task(
            model,
            captured.signature,
            tensors,
            captured.opened,
            captured.divided,
            runs=captured.runs,
            flags=captured.flags,
        )
        try:
            with quiet(), plain_attention():
                verify(task, traced, training)
        except Unfaithful as error:
            reason = str(error)
        except Exception as error:
            reason = f"running it on them fails: {_first_line(error)}"
        else:
            return
        finally:
            task.runs.forget()
        wanted = self._example[i].dtype
        remedy = f"Give it as {wanted}" if tensors[i].dtype != wanted else "Give it this form"
        raise ValueError(
            f"{self._told(i, tensors)}: the graph is not for it, as {reason.rstrip('.')}. {remedy}, or "
            "compile again with an example of the new form."
        )

    def _pass_guards(self, i: int, graph: ModeGraph, tensors: Sequence[torch.Tensor], training: bool) -> None:
        """Run the graph on fake tensors of the call's sizes; nothing is computed."""
        world = FakeWorld()
        world.compares = False
        model = self._captured.model
        runner = Runner(graph.module, graph.module.graph, world)
        try:
            with (
                quiet(),
                in_mode(model, self._captured.flags if training else None),
                world.inhabited_by(graph.module),
                torch.enable_grad(),
            ):
                inputs = fake_inputs(world, [t.detach() for t in tensors])
                found = runner.run(*inputs)
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
            if runner.fails_alone:
                return
            way, line = "these sizes", _first_line(error)
            if tensors[i].dtype != (wanted := self._example[i].dtype):
                way, line = "this dtype", f"{line}; give it as {wanted}"
            raise ValueError(f"{self._told(i, tensors)}, and fails with {way}: {line}") from None

    def _told(self, i: int, tensors: Sequence[torch.Tensor]) -> str:
        now, then = tensors[i], self._example[i]
        return (
            f"argument {self._captured.signature.tensor_names[i]!r} is {_kind(now)} now and was "
            f"{_kind(then)} when the model was compiled"
        )


def _casts(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether autocast, which is not on here, may make up for another dtype than the example's."""
    return a.dtype == b.dtype or a.dtype in (torch.float16, torch.bfloat16)


def _dtypes(values: Any) -> list[torch.dtype]:
    leaves = (v.meta.get("val") if isinstance(v, fx.Node) else v for v in pytree.tree_leaves(values))
    return [v.dtype for v in leaves if isinstance(v, torch.Tensor)]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
