"""Strings that come with a batch (names of files, texts to be logged), which the model never looks at."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from torch import Tensor, nn

from ...errors import DtrpError
from .facade import capture
from .graph import Captured, Signature
from .traced import Traced, same_graph


class _Unread:
    """In a string's place: whoever looks at it gets an error."""

    def _looked_at(self, *_: object) -> NoReturn:
        raise TypeError("a string of the batch is looked at")

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, name) if name.startswith("__") else _Unread._looked_at(self)

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _looked_at
    __bool__ = __str__ = __repr__ = __format__ = __len__ = __iter__ = __contains__ = _looked_at
    __add__ = __radd__ = __mul__ = __mod__ = __getitem__ = _looked_at


class _UnreadText(_Unread, str):
    """One for code that asks whether it has a string."""


def unread(
    model: nn.Module,
    captured: Captured,
    grad: bool,
    signature: Signature,
    tensors: Sequence[Tensor],
    changed: Collection[str],
) -> frozenset[str]:
    """Which of the strings that ``changed`` since the call that was ``captured``, and of their neighbours in
    lists, the code never looks at: with things in their place that cannot be looked at, it does the same.

    ``signature``: of that call; ``tensors``: of one like it.
    """
    found: set[int] = set()
    for one in sorted({_list_of(name) for name in changed}):
        names = enumerate(signature.names)
        hidden = {i for i, n in names if _list_of(n) == one and isinstance(signature.constants.get(i), str)}
        if all(_same_with(text, hidden, model, captured, grad, signature, tensors) for text in _STAND_INS):
            found |= hidden
    return frozenset(signature.names[i] for i in found)


_STAND_INS = (_Unread(), _UnreadText())


def _same_with(
    text: Any,
    hidden: Collection[int],
    model: nn.Module,
    captured: Captured,
    grad: bool,
    signature: Signature,
    tensors: Sequence[Tensor],
) -> bool:
    constants = {i: text if i in hidden else v for i, v in signature.constants.items()}
    args, kwargs = replace(signature, constants=constants).unflatten(tensors)
    opened, divided = captured.opened, captured.divided
    try:
        now = capture(model, args, kwargs, opened=opened, divided=divided, flags=captured.flags, grad=grad)
    except (DtrpError, TypeError):
        return False
    pairs = ((now.train, captured.train), (now.eval, captured.eval))
    return all(same_graph(*(Traced(g.module.graph, g.out_spec) for g in pair)) for pair in pairs)


def _list_of(name: str) -> str:
    return re.sub(r"\[\d+\]$", "", name)
