"""``torch.autograd.grad`` inside forward: forces of a potential, gradient penalties, inner loops.

It is a node like any other, but what leads from the tensors that it differentiates for to those that it
differentiates must run beside it, in one stage and with gradients, also where a pass as such needs none:

    on = gradients_on()                       before the first of these nodes
    h = wanting_gradient(h)                   for each tensor that it differentiates for
    ...                                       the region: the layers between
    grad(e, h)
    gradients_back(on)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, map_arg
from torch.fx.node import has_side_effect


@has_side_effect
def gradients_on() -> bool:
    """Switch gradients on; whether they were."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(True)
    return before


@has_side_effect
def gradients_back(before: bool) -> None:
    """Undo `gradients_on`."""
    torch._C._set_grad_enabled(before)


def wanting_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or in a pass without gradients the start of a graph of its own."""
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


def is_gradient(node: Node) -> bool:
    """Whether the node is a call of ``torch.autograd.grad``."""
    return node.target is torch.autograd.grad


def region_of(gradient: Node, model: nn.Module) -> list[Node]:
    """The nodes between what is differentiated for and what is differentiated, in order, and itself."""
    outputs, inputs = (_nodes(_argument(gradient, i, name)) for i, name in enumerate(("outputs", "inputs")))
    # Parameters: layers use them by themselves, uses by name are nodes, tied ones have several names.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = [parameters.get(str(n.target)) for n in inputs if n.op == "get_attr"]
    owned = {name for name, p in parameters.items() if any(p is w for w in wanted)}
    before = _ancestors(outputs)
    found = [n for n in inputs if n.op.startswith("call")]
    reached = {*inputs, *(n for n in gradient.graph.find_nodes(op="get_attr") if n.target in owned)}
    for node in gradient.graph.nodes:
        uses = node.op == "call_module" and any(name.startswith(f"{node.target}.") for name in owned)
        if node in before and (uses or any(a in reached for a in node.all_input_nodes)):
            reached.add(node)
            found.append(node)
    found.append(gradient)
    order = {n: i for i, n in enumerate(gradient.graph.nodes)}
    return sorted(dict.fromkeys(found), key=lambda n: order[n])


def regions(graph: Graph) -> Iterator[list[Node]]:
    """All nodes between each pair of `gradients_on` and `gradients_back`, with both."""
    for start in graph.find_nodes(op="call_function", target=gradients_on):
        region, node = [start], start
        while not (node.target is gradients_back and node.args[0] is start):
            node = node.next
            region.append(node)
        yield region


def enclose(graph: Graph, model: nn.Module, describe: Callable[[Node, Any], None]) -> None:
    """Mark the regions of the model's graph as the module's docstring shows; ``describe`` new nodes."""
    gradients = [n for n in graph.nodes if is_gradient(n)]
    order = {n: i for i, n in enumerate(graph.nodes)}
    spans: list[tuple[int, int]] = []
    for region in (region_of(gradient, model) for gradient in gradients):
        first, last = order[region[0]], order[region[-1]]
        while spans and spans[-1][1] >= first:  # one inside the other, such as second derivatives
            first = min(first, spans.pop()[0])
        spans.append((first, last))
    nodes = list(graph.nodes)
    for first, last in spans:
        with graph.inserting_before(nodes[first]):
            on = graph.call_function(gradients_on)
            describe(on, True)
        with graph.inserting_after(nodes[last]):
            describe(graph.call_function(gradients_back, (on,)), None)
    for gradient in gradients:
        _start_anew(gradient, model, describe)


def _start_anew(gradient: Node, model: nn.Module, describe: Callable[[Node, Any], None]) -> None:
    region = region_of(gradient, model)
    for source in _nodes(_argument(gradient, 1, "inputs")):
        if source.op == "get_attr" or not source.meta["val"].requires_grad:
            continue
        after = source if source in region else region[0].prev
        with gradient.graph.inserting_after(after):
            wanting = gradient.graph.call_function(wanting_gradient, (source,))
            describe(wanting, source.meta["val"])
        for node in region:
            if node is not source:
                node.replace_input_with(source, wanting)


def _argument(node: Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs[name]


def _nodes(value: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(value, found.append)
    return found


def _ancestors(nodes: list[Node]) -> set[Node]:
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found
