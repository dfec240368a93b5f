"""Buffers that ``forward`` replaces by other tensors: in the graph, copies in place at its end.

What it has read of such a buffer before, a backward pass may still want: it reads a copy.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import Node

from dtrp.memory import storage_of

from .structure import tensors_in
from .writer import CannotRecord, GraphWriter


class Assigned:
    """The buffers that were assigned to while a model was recorded, and what they are then."""

    def __init__(self, model: nn.Module, writer: GraphWriter) -> None:
        self._model, self._writer = model, writer
        self._values: dict[str, torch.Tensor] = {}
        self._versions = {name: writer.attribute(name)._version for name in dict(model.named_buffers())}

    def note(self, name: str, value: torch.Tensor) -> None:
        """``name``, a buffer's, is about to stand for ``value``."""
        twin = self._writer.attribute(name)
        if twin.shape != value.shape or twin.dtype != value.dtype or value.requires_grad:
            raise CannotRecord(f"replaces the buffer {name!r} by another kind of tensor")
        self._values[name] = value

    def mark(self) -> dict[str, torch.Tensor]:
        """The present point."""
        return dict(self._values)

    def back_to(self, mark: dict[str, torch.Tensor]) -> None:
        """Forget what was assigned after a point; the model has the tensors of that point again."""
        for name in self._values:
            owner, _, own = name.rpartition(".")
            self._model.get_submodule(owner)._buffers[own] = mark.get(name, self._writer.attribute(name))
        self._values = mark

    def write(self) -> None:
        """Their updates, as nodes."""
        for name, value in self._values.items():
            if self._writer.attribute(name)._version == self._versions[name]:  # not filled, too
                self._copy_before(name)
            buffer = self._writer.node("get_attr", name, (), {}, self._writer.attribute(name))
            node = self._writer.node(
                "call_method", "copy_", (buffer, self._writer.argument(value)), {}, value
            )
            node.meta["update"] = name

    def _copy_before(self, name: str) -> None:
        graph = self._writer.graph
        for node in list(graph.find_nodes(op="get_attr", target=name)):
            if not _is_wanted(node, storage_of(self._writer.attribute(name))):
                continue
            with graph.inserting_after(node):
                copy = graph.call_method("clone", (node,))
            node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
            copy.meta = {**node.meta, "copy": name}


def _is_wanted(node: Node, storage: int) -> bool:
    """Whether a backward pass may want what is in this memory, of which the node's value is a view."""
    for user in node.users:
        made = [t for _, t in tensors_in(user.meta["val"])]
        if any(t.requires_grad for t in made):
            return True
        if any(storage_of(t) == storage for t in made) and _is_wanted(user, storage):
            return True
    return False
