"""Checks of values in a model's code: passed by the example, and guarded for other batches.

A submodule that decides by values is kept whole. The root cannot be, and a branch of its own is refused. But
a mere check (``assert``, or an ``if`` that ends in ``raise``) stands for one way through the code, also where
a library makes it (torch.distributions does, of every parameter). The graph gets a guard: a batch that does
not pass is an error that names the line, as it is in the model.

What the answer is for the example mostly follows from the check itself: ``if not valid.all(): raise`` must
find ``valid.all()`` to be true. Otherwise (``if a and b: raise``) it is computed from the part of the graph
that leads to it, if that needs no layer with parameters (`example_values`).
"""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Callable
from typing import Any

from torch.fx import Node
from torch.utils._python_dispatch import _disable_current_modes

from .location import asking_place

_TELLING = ["_assert", "warn", "warning", "warning_once", "info", "debug", "error", "log", "print"]


def decide(condition: Node, evaluate: Callable[[Node], Any]) -> bool | None:
    """The answer to ``if condition:`` at the line that runs now; None where that is a branch, not a check.

    ``evaluate`` gives a node's real value in the example, None if it cannot be told; so is the answer then.
    """
    asking = asking_place()
    check = asking and check_at(*asking)
    if check is None:
        return None
    answer = passing_answer(*check)
    if answer is None and (value := evaluate(condition)) is not None:
        with _disable_current_modes():
            answer = bool(value)
    return answer


def check_at(file: str, line: int, column: int | None) -> tuple[ast.expr, bool] | None:
    """The condition that stands at a place and what it must be, if its statement only refuses.

    That is: assert, or if ... raise.
    """
    for statement in _statements(file):
        if isinstance(statement, ast.Call):
            continue
        test = statement.test
        # Python 3.11 says the whole statement where later ones say the condition.
        if (statement.lineno, statement.col_offset) == (line, column) or _holds(test, line, column):
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
    """Whether what runs now is part of a message: of a check, a warning or a log."""
    asking = asking_place()
    if asking is None:
        return False
    file, line, column = asking
    calls = (n for n in _statements(file) if isinstance(n, ast.Call))
    return any(_name(n) in _TELLING and _holds(n, line, column) for n in calls)


def _holds(node: ast.expr, line: int, column: int | None) -> bool:
    """Whether a place is within an expression; several may stand in one line."""
    end, after = node.end_lineno or node.lineno, node.end_col_offset or 0
    if column is None or not node.lineno <= line <= end:
        return node.lineno <= line <= end
    return (node.lineno, node.col_offset) <= (line, column) < (end, after)


@functools.lru_cache(maxsize=32)
def _statements(file: str) -> tuple[ast.If | ast.Assert | ast.Call, ...]:
    try:
        nodes = ast.walk(ast.parse("".join(linecache.getlines(file))))
    except SyntaxError:
        return ()
    return tuple(n for n in nodes if isinstance(n, (ast.If, ast.Assert, ast.Call)))


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
