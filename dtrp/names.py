"""Names that users give: told what was meant where nothing is called that."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def nearest(name: object, known: Iterable[str]) -> str:
    """The end of an error's text: the known name that is nearest, if one is near."""
    close = get_close_matches(given := str(name), list(known))
    # Letters in another order first, then longer names: for difflib "dtpr" is nearer to "dtr" than to "dtrp",
    # and "scheduler" to "schedule" than to "lr_scheduler".
    best = sorted(close, key=lambda found: (sorted(found) != sorted(given), given not in found))
    return f"; did you mean {best[0]!r}?" if best else ""


def one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Refuse what is none of the allowed names."""
    allowed = tuple(allowed)
    if value not in allowed:
        choice = ", ".join(map(repr, allowed))
        raise ValueError(f"{name}={value!r}: expected one of {choice}{nearest(value, allowed)}")


def known_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which tells the argument that was meant, as Python does from 3.13 on."""
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                called = f"{function.__qualname__}() got an unexpected keyword argument {name!r}"
                raise TypeError(called + nearest(name, known))
        return function(*args, **kwargs)

    return told
