"""Runs a graph on fake tensors of other sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter

from .fakes import FakeWorld
from .structure import mutable


class _Propagator(Interpreter):
    """Runs a graph node by node."""

    def __init__(self, module: GraphModule, world: FakeWorld) -> None:
        super().__init__(module, garbage_collect_values=True)
        self._world = world
        self.extra_traceback = False

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = mutable((args, kwargs))
        try:
            return super().call_module(target, args, kwargs)
        except Exception as error:
            try:
                return self._world.really_run(self.fetch_attr(target), args, kwargs)
            except Exception:
                raise error from None

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._world.twin(value) if isinstance(value, torch.Tensor) else value


def propagate(module: GraphModule, world: FakeWorld, inputs: Sequence[torch.Tensor]) -> Any:
    """Run a graph on fake ``inputs``, and give the flat output.

    Nothing is computed, and the model's parameters and buffers are not touched.
    """
    with world.inhabited_by(module), torch.enable_grad():
        return _Propagator(module, world).run(*inputs)
