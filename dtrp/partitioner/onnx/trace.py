"""Running a stage's graph node by node, so that a failure can name the node and the user's line."""

from __future__ import annotations

from typing import Any

from torch import fx

from ...errors import ExportError
from ..capture.custom import same_size


class NodeFailed(ExportError):
    """A node of a stage failed; ``where`` names it, its module and line, and its stage."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}")
        self.where = where
        self.why = why


def describe(node: fx.Node, stage: int) -> str:
    """``node 'relu_1' (module 'layer1.0.relu', resnet.py:103) of stage 2``."""
    module = node.meta.get("module", "")
    parts = [f"module {module!r}" if module else "the model's own forward"]
    if node.meta.get("location"):
        parts.append(node.meta["location"])
    return f"node {node.name!r} ({', '.join(parts)}) of stage {stage}"


def first_line(error: BaseException) -> str:
    """An error's kind and the first line of its text."""
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text.strip()}" if text else type(error).__name__


def _behind_guards(graph: fx.Graph) -> set[fx.Node]:
    """The sizes, and what is computed with them, that lead to checks of sizes."""
    found: set[fx.Node] = set()
    waiting = [a for g in graph.find_nodes(op="call_function", target=same_size) for a in g.all_input_nodes]
    while waiting:
        node = waiting.pop()
        if node not in found and isinstance(node.meta.get("val"), (bool, int, float)):
            found.add(node)
            waiting += node.all_input_nodes
    return found


class FollowingInterpreter(fx.Interpreter):
    """An interpreter whose failures are `NodeFailed`."""

    def __init__(
        self, module: Any, stage: int, graph: fx.Graph | None = None, *, guarded: bool = True
    ) -> None:
        super().__init__(module, graph=graph)
        self.stage, self.guarded = stage, guarded
        self.extra_traceback = False
        self._watched = _behind_guards(self.graph)
        self.looks: list[Any] = []  # the numbers that guards are about

    def run_node(self, n: fx.Node) -> Any:
        if n.target is same_size and not self.guarded:
            return None
        try:
            value = super().run_node(n)
            if n in self._watched:
                self.looks.append(value)
            return value
        except NodeFailed:
            raise
        except Exception as e:
            raise NodeFailed(describe(n, self.stage), first_line(e)) from e
