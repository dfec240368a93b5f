"""What a user sees of one stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline.

    Attributes
    ----------
    index : int
        From 0.
    device : torch.device
    inputs, outputs : tuple of str
        Names of the values that come in and go out, as in ``module.graph``.
    submodules : tuple of str
        The original model's modules that this stage runs, in order of use.
    """

    index: int
    device: torch.device
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    submodules: tuple[str, ...]
    _modules: tuple[fx.GraphModule, fx.GraphModule]  # eval, train
    _model: nn.Module

    @property
    def module(self) -> fx.GraphModule:
        """The stage's graph, of the mode that the model is in; it shares the model's parameters."""
        return self._modules[any(m.training for m in self._model.modules())]

    def __repr__(self) -> str:
        return f"Stage({self.index}, {self.device}, submodules={list(self.submodules)})"


def submodules_of(module: fx.GraphModule) -> tuple[str, ...]:
    """Modules that a stage's graph calls or whose tensors it reads, in order of use."""
    names = []
    for node in module.graph.nodes:
        target = str(node.target)
        if node.op == "call_module":
            names.append(target)
        elif node.op == "get_attr" and "." in target:
            names.append(target.rpartition(".")[0])
    return tuple(dict.fromkeys(names))
