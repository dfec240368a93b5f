"""What a loss reads of the script beside its arguments: noticed when the script changes it during a run.

A plain loop's loss sees the weight that the script anneals, the other model that is trained meanwhile (a
GAN's discriminator), the entry that a dictionary gets. Worker processes have a copy of the loss, and get
another then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from .partitioner.capture.watch import contents, named_by, names_in

_CODE = (FunctionType, BuiltinFunctionType, type)  # what has no attributes of interest


class LossReads:
    """Variables, attributes and tensors that a loss's code names, as they were when they were `note`d.

    Parameters
    ----------
    loss_fn : callable or None
    trained : bool
        Whether it is a module with tensors of its own: it is trained with the last stage then, and its
        attributes are followed as the model's.
    """

    def __init__(self, loss_fn: Callable[..., Any] | None, *, trained: bool) -> None:
        function = loss_fn.func if isinstance(loss_fn, partial) else loss_fn
        self._given = [loss_fn.args, loss_fn.keywords] if isinstance(loss_fn, partial) else []
        self._owner: Any = function.__self__ if isinstance(function, MethodType) else function
        holder = nn.Module()
        vars(holder)["loss"] = function
        owners: list[Any] = list(function.modules()) if isinstance(function, nn.Module) else [self._owner]
        owners = [one for one in owners if not isinstance(one, (*_CODE, type(None)))]
        self._names = [] if trained or not owners else list(_read_of(self._owner, function))
        self._looks = [look for _, look in named_by([holder, *owners])]
        self.note()

    def note(self) -> None:
        """They are as the stages have them."""
        self._found = self._look()

    def changed(self) -> bool:
        """Whether any is not as it was."""
        return bool(self._look() != self._found)

    def _look(self) -> Any:
        tensors: list[Tensor] = []
        own = [vars(self._owner).get(name) for name in self._names]
        found = [
            contents(value, tensors) for value in (*self._given, *own, *(look() for look in self._looks))
        ]
        return found, [0 if t.is_inference() else t._version for t in tensors]


def _read_of(owner: Any, function: Any) -> Iterator[str]:
    """Attributes of its own that an object's method reads, and the methods that this calls."""
    begin = function if isinstance(function, MethodType) else None
    names = [
        begin.__name__ if begin is not None else "forward" if isinstance(owner, nn.Module) else "__call__"
    ]
    for name in names:
        code = getattr(getattr(type(owner), name, None), "__code__", None)
        if code is not None:
            names += [other for other in names_in(code)[1] if other not in names]
        elif name in vars(owner):
            yield name
