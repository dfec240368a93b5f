"""Regions under ``torch.utils.checkpoint``: once in the graph, as stages recompute by themselves.

One thing that checkpointing does is seen from outside: running a region again in the backward pass updates
its buffers a second time (the running statistics of BatchNorm). The layers in question are called once more
at the end of the graph, in the order in which a backward pass would come to the regions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.fx import Node, map_arg
from torch.nn.modules.batchnorm import _NormBase

from .writer import CannotRecord, GraphWriter


def updates_buffers(module: nn.Module, before: dict[str, int]) -> bool:
    """Whether a layer that was called changes its buffers; ``before``: their versions."""
    if isinstance(module, _NormBase):
        return module.training and module.track_running_stats
    return versions(module) != before


def versions(module: nn.Module) -> dict[str, int]:
    """How often each buffer was written to."""
    return {name: b._version for name, b in module.named_buffers() if not b.is_inference()}


class Checkpointed:
    """The layers that update buffers inside such regions."""

    def __init__(self) -> None:
        self._open: list[list[Node]] = []
        self._left: list[list[Node]] = []

    @property
    def inside(self) -> bool:
        """Whether a region is running."""
        return bool(self._open)

    @property
    def nested(self) -> bool:
        """Whether one is running in another: how often it will run again depends on what follows."""
        return len(self._open) > 1

    @contextmanager
    def region(self) -> Iterator[None]:
        """A region that will run again."""
        outer, layers = len(self._open), list[Node]()
        self._open.append(layers)
        try:
            yield
        finally:
            if any(layers is region for region in self._open):
                self.back_to(outer)
                self._left.append(layers)

    def mark(self) -> int:
        """The present point."""
        return len(self._open)

    def back_to(self, mark: int) -> None:
        """What was begun after a point is over: torch 2.11 leaves regions open in which something fails."""
        del self._open[mark:]

    def updates(self, node: Node) -> None:
        """A layer's node that changes its buffers: it runs again with the region that it is in."""
        self._open[-1].append(node)

    def refuse(self, name: str, kind: type[CannotRecord] = CannotRecord) -> None:
        """Refuse that a buffer is changed, if a region is running."""
        if self.inside:
            raise kind(
                f"changes the buffer {name!r} under torch.utils.checkpoint, which does so again in the "
                "backward pass"
            )

    def write(self, writer: GraphWriter) -> bool:
        """Call the layers again, in the order of a backward pass; those that the graph still holds.

        Whether there are any: a graph for passes without gradients is another.
        """
        held = set(writer.graph.nodes)
        layers = [node for region in reversed(self._left) for node in region if node in held]
        for layer in layers:

            def cut(node: Node) -> Node:
                return writer.node("call_method", "detach", (node,), {}, node.meta["val"].detach())

            args, kwargs = map_arg((layer.args, layer.kwargs), cut)
            node = writer.node("call_module", layer.target, args, kwargs, layer.meta["val"])
            node.meta.update(again=True, module=layer.meta["module"], location=layer.meta["location"])
        return bool(layers)
