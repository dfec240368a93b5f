"""Runs a graph node by node on fake tensors, perhaps of other sizes. Nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Interpreter, Node

from .custom import guard, same_size
from .fakes import FakeWorld
from .methods import KeptCall
from .structure import mutable


class Runner(Interpreter):
    """Runs a graph of a model that its world inhabits."""

    def __init__(
        self, model: nn.Module, graph: Graph, world: FakeWorld, held: Mapping[str, Any] | None = None
    ) -> None:
        """``held``: what nodes call or get by names that are none of the model's."""
        super().__init__(model, garbage_collect_values=True, graph=graph)
        self.extra_traceback = False
        self.world, self._held = world, held or {}
        self.node: Node | None = None  # that is running, or failed

    def run_node(self, n: Node) -> Any:
        self.node = n
        return super().run_node(n)

    @property
    def fails_alone(self) -> bool:
        """Whether what failed is a function of torch that really ran, on values and sizes that were made up
        and need not belong together (ctc_loss), and nothing behind it is decided by sizes."""
        node = self.node
        if (
            node is None
            or node.op != "call_module"
            or not isinstance(self.fetch_attr(str(node.target)), KeptCall)
        ):
            return False
        while node.op != "output" and node.target not in (guard, same_size):
            node = node.next
        return node.op == "output"

    def fetch_attr(self, target: str) -> Any:
        return self._held[target] if target in self._held else super().fetch_attr(target)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = self.fetch_attr(target)
        return self.world.twin(value) if isinstance(value, torch.Tensor) else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        # The graph's own code hands on dicts and lists that modules may change.
        return self.whole(target, self.fetch_attr(target), *mutable((args, kwargs)))

    def whole(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A module, on fake tensors if it can, else it really runs."""
        try:
            return module(*args, **kwargs)
        except Exception as error:
            try:
                return self.world.really_run(module, args, kwargs)
            except Exception:
                raise error from None
