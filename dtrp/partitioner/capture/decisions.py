"""Branches of the root module that depend on values: taken as the example takes them, and guarded.

A submodule that decides by values is kept whole. The root cannot be; but what it decides is most often a
check of its inputs ("are all boxes valid?"). Such a decision is computed for the example, from the part of
the graph that leads to it, and the graph gets a guard: a batch that would decide otherwise is an error that
names the line, never a wrong result. Only decisions that need no layer with parameters are made this way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Node, map_arg
from torch.utils._python_dispatch import _disable_current_modes

from .custom import guard
from .fakes import FakeWorld
from .snapshot import preserved_randomness


class Undecided(Exception):
    """A decision that cannot be made from the example."""


class Decisions:
    """Makes decisions, or repeats those of an earlier recording (of another batch size) in their order."""

    def __init__(
        self,
        model: nn.Module,
        world: FakeWorld,
        example: Sequence[torch.Tensor],
        earlier: Decisions | None = None,
    ) -> None:
        self._model, self._world, self._example = model, world, example
        self._repeated = None if earlier is None else list(earlier.made)
        self.made: list[bool] = []
        self.places: list[str] = []

    def decide(self, condition: Node, place: str) -> tuple[bool, Any]:
        """The answer to ``if condition:`` and the function of the guard."""
        if self._repeated is not None:
            if len(self.made) == len(self._repeated):
                raise Undecided("with another batch size it decides more often")
            answer = self._repeated[len(self.made)]
        else:
            answer = self._evaluate(condition)
        self.made.append(answer)
        self.places.append(place)
        return answer, guard

    def _evaluate(self, condition: Node) -> bool:
        """The truth of a node's real value, computed with its ancestors from the example."""
        if any(t.is_meta for t in self._example):
            raise Undecided("what the example decides is unknown on the meta device")
        needed = _ancestors(condition)
        values: dict[Node, Any] = {}
        placeholders = iter(self._example)
        with _disable_current_modes(), preserved_randomness(), torch.no_grad():
            for node in condition.graph.nodes:
                if node.op == "placeholder":
                    values[node] = next(placeholders).detach().clone()
                elif node in needed:
                    values[node] = self._run(node, values)
            return bool(values[condition])

    def _run(self, node: Node, values: dict[Node, Any]) -> Any:
        args = map_arg(node.args, values.__getitem__)
        kwargs = map_arg(node.kwargs, values.__getitem__)
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            fake = getattr(self._model.get_submodule(owner), name, None)
            if fake is None:
                raise Undecided("it depends on a tensor that is no part of the model")
            return self._world.originals.get(id(fake), fake)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_module":
            module = self._model.get_submodule(str(node.target))
            if next(module.parameters(), None) is not None:
                raise Undecided(f"it depends on what the layer {node.target!r} computes")
            with self._world.left_by(module):
                return module(*args, **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _ancestors(node: Node) -> set[Node]:
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting.extend(current.all_input_nodes)
    return found
