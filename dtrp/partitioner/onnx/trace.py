"""Running a stage's graph node by node, so that a failure can name the node and the user's line."""

from __future__ import annotations

from typing import Any

from torch import fx

from ...errors import ExportError


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


class FollowingInterpreter(fx.Interpreter):
    """An interpreter whose failures are `NodeFailed`."""

    def __init__(self, module: Any, stage: int, graph: fx.Graph | None = None) -> None:
        super().__init__(module, graph=graph)
        self.stage = stage
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except NodeFailed:
            raise
        except Exception as e:
            raise NodeFailed(describe(n, self.stage), first_line(e)) from e
