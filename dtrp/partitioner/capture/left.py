"""What modules that are kept whole leave in their attributes, for code of others that reads it in this call.

As in ``y = self.moe(x); return y, self.moe.aux_loss``. The module really runs, and a node behind it reads:

    moe = call_module moe(x)
    aux_loss = Left("aux_loss")(get_attr moe, moe)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph

from .state import REGISTRIES
from .structure import tensors_in
from .writer import GraphWriter

Attribute = tuple[str, str]
"""The qualified name of a module, and the attribute's."""


@dataclass(frozen=True)
class Left:
    """Gives what a module that has just run, to give ``result``, left in one of its attributes."""

    name: str

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, module: nn.Module, result: Any) -> Any:
        """Read it."""
        return getattr(module, self.name)


def attributes_of(module: nn.Module, names: Mapping[nn.Module, str]) -> dict[Attribute, Any]:
    """Those of a module and its parts, unless its code is torch's; ``names``: the model's modules'."""
    if type(module).__module__.startswith("torch."):
        return {}
    pairs = ((m, k) for m in module.modules() if m in names for k in vars(m) if k not in REGISTRIES)
    return {(names[m], k): vars(m)[k] for m, k in pairs}


def take(writer: GraphWriter, name: str, assigned: Mapping[Attribute, Any]) -> list[Attribute]:
    """Know the tensors in what the module ``name`` assigned when it was just called; where they are."""
    calls = list(writer.graph.find_nodes(op="call_module", target=name))
    taken: list[Attribute] = []
    for (path, attribute), value in assigned.items() if calls else ():
        tensors = [(steps, t) for steps, t in tensors_in(value) if writer.is_new(t)]
        if not tensors:
            continue
        taken.append((path, attribute))
        part = writer.node("get_attr", path, (), {}, None)
        node = writer.node("call_function", Left(attribute), (part, calls[-1]), {}, value)
        for steps, tensor in tensors:
            if torch.is_grad_enabled():
                writer.learn(tensor, node, steps)
            else:
                source = writer.reach(node, steps)
                writer.learn(tensor, writer.node("call_method", "detach", (source,), {}, tensor))
    return taken


def forget_unread(graph: Graph) -> None:
    """Erase the nodes that nobody uses."""
    for node in [n for n in graph.nodes if isinstance(n.target, Left) and not n.users]:
        part = node.all_input_nodes[0]
        graph.erase_node(node)
        graph.erase_node(part)
