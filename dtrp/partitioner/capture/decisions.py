"""Checks of values in the root module's code: passed by the example, and guarded for other batches.

A submodule that decides by values is kept whole. The root cannot be, and a branch of its own is refused. But
a mere check of the inputs (``assert``, or an ``if`` that ends in ``raise``) stands for one way through the
code. It is computed for the example, from the part of the graph that leads to it, and the graph gets a
guard: a batch that does not pass is an error that names the line, as it is in the model. Only checks that
need no layer with parameters are made this way.
"""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx import Node, map_arg
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from .custom import guard
from .fakes import FakeWorld
from .location import user_frame
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
        frame = user_frame()
        if frame is None or not is_check(frame.f_code.co_filename, frame.f_lineno):
            raise Undecided("it is a branch, not a check")
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


class Answers(TorchFunctionMode):
    """Gives decisions that were made once more, in their order, where they are asked for (``here()``)."""

    def __init__(self, made: Sequence[bool], here: Callable[[], bool]) -> None:
        super().__init__()
        self._left = list(made)
        self._here = here

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if getattr(func, "__name__", "") != "__bool__" or not self._left or not self._here():
                raise
            return self._left.pop(0)


def is_check(file: str, line: int) -> bool:
    """Whether the statement whose condition stands at a line only refuses: assert, or if ... raise."""
    for statement in _conditional_statements(file):
        test = statement.test
        if test.lineno <= line <= (test.end_lineno or test.lineno):
            if isinstance(statement, ast.Assert):
                return True
            return not statement.orelse and _refuses(statement.body[-1])
    return False


@functools.lru_cache(maxsize=32)
def _conditional_statements(file: str) -> tuple[ast.If | ast.Assert, ...]:
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return ()
    return tuple(n for n in ast.walk(tree) if isinstance(n, (ast.If, ast.Assert)))


def _refuses(statement: ast.stmt) -> bool:
    """Whether a statement raises: ``raise``, or a call of ``torch._assert`` on False."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        function = statement.value.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        first = statement.value.args[0] if statement.value.args else None
        return name == "_assert" and isinstance(first, ast.Constant) and first.value is False
    return isinstance(statement, ast.Raise)


def _ancestors(node: Node) -> set[Node]:
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting.extend(current.all_input_nodes)
    return found
