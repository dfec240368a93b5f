"""Checks of values in a model's code: passed by the example, and guarded for other batches.

A submodule that decides by values is kept whole. The root cannot be, and a branch of its own is refused. But
a mere check (``assert``, or an ``if`` that ends in ``raise``) stands for one way through the code, also where
a library makes it (torch.distributions does, of every parameter). The graph gets a guard: a batch that does
not pass is an error that names the line, as it is in the model.

What the answer is for the example mostly follows from the check itself: ``if not valid.all(): raise`` must
find ``valid.all()`` to be true. Otherwise (``if a and b: raise``) it is computed from the part of the graph
that leads to it, if that needs no layer with parameters.
"""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx import Node, map_arg
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from .custom import guard
from .fakes import FakeWorld
from .location import asking_frame
from .snapshot import preserved_randomness

_TELLING = ["_assert", "warn", "warning", "warning_once", "info", "debug", "error", "log", "print"]


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
        frame = asking_frame()
        check = frame and check_at(frame.f_code.co_filename, frame.f_lineno)
        if check is None:
            raise Undecided("it is a branch, not a check")
        passed = passing_answer(*check)
        if passed is not None:
            answer = passed
        elif self._repeated is not None:
            if len(self.made) == len(self._repeated):
                raise Undecided("with another batch size it decides more often")
            answer = self._repeated[len(self.made)]
        else:
            answer = self._evaluate(condition)
        self.made.append(answer)
        self.places.append(place)
        return answer, guard

    def back_to(self, count: int) -> None:
        """Forget all but the first decisions: the code that made the others is recorded in another way."""
        del self.made[count:], self.places[count:]

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


def check_at(file: str, line: int) -> tuple[ast.expr, bool] | None:
    """The condition that stands at a line and what it must be, if its statement only refuses.

    That is: assert, or if ... raise.
    """
    for statement in _conditional_statements(file):
        test = statement.test
        if test.lineno <= line <= (test.end_lineno or test.lineno):
            if isinstance(statement, ast.Assert):
                return test, True
            return (test, False) if not statement.orelse and _refuses(statement.body[-1]) else None
    return None


def passing_answer(test: ast.expr, wanted: bool) -> bool | None:
    """What each tensor in a condition must be for the condition to be ``wanted``; None if that depends."""
    match test:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return passing_answer(operand, not wanted)
        case ast.BoolOp(op=op, values=values):
            if isinstance(op, ast.And) is not wanted:
                return None  # one of them may be otherwise
            answers = {passing_answer(value, wanted) for value in values}
            return answers.pop() if len(answers) == 1 else None
        case ast.Call(func=ast.Name(id="all" | "any" as name)):
            return wanted if (name == "all") is wanted else None
        case ast.Compare(ops=ops):
            return wanted if wanted or len(ops) == 1 else None
        case ast.Name() | ast.Attribute() | ast.Subscript() | ast.Call() | ast.BinOp():
            return wanted
    return None


def is_told() -> bool:
    """Whether the line that runs now is part of a message: of a check, a warning or a log."""
    frame = asking_frame()
    if frame is None:
        return False
    line = frame.f_lineno
    return any(a <= line <= b for a, b in _messages(frame.f_code.co_filename))


@functools.lru_cache(maxsize=32)
def _messages(file: str) -> tuple[tuple[int, int], ...]:
    calls = (n for n in _nodes(file) if isinstance(n, ast.Call))
    return tuple((n.lineno, n.end_lineno or n.lineno) for n in calls if _name(n) in _TELLING)


@functools.lru_cache(maxsize=32)
def _conditional_statements(file: str) -> tuple[ast.If | ast.Assert, ...]:
    return tuple(n for n in _nodes(file) if isinstance(n, (ast.If, ast.Assert)))


def _nodes(file: str) -> Iterator[ast.AST]:
    try:
        yield from ast.walk(ast.parse("".join(linecache.getlines(file))))
    except SyntaxError:
        return


def _name(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _refuses(statement: ast.stmt) -> bool:
    """Whether a statement raises: ``raise``, or a call of ``torch._assert`` on False."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        first = statement.value.args[0] if statement.value.args else None
        never = isinstance(first, ast.Constant) and first.value is False
        return never and _name(statement.value) == "_assert"
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
