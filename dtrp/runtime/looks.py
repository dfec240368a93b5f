"""Whoever looks at a model that worker processes train sees the present weights (ours).

The model's own tensors are as old as the last flush there. A script that asks it for them between two steps
(an average of weights, torch's ``AveragedModel``, a norm to log), copies or calls it, gets them brought
first, without waiting for the batches in flight. Torch tells nobody of such questions, so while workers
train, the methods of `nn.Module` that answer them are ours. What asks no method (``model.head.weight``) is
not seen. Under a launcher one rank's question cannot bring what others have: it is told instead. Calls of the
model are not seen there: stages run in the same process, and torch.compile gives up where a hook is on all.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

if TYPE_CHECKING:
    from .run import Run

_ANSWERS = ("named_parameters", "named_buffers", "state_dict", "__reduce_ex__")  # the last one: copies, files
_CALLS_THE_SCRIPT = ("dtrp.runtime.fitting", "dtrp.integrations.")  # loaders, callbacks
_RUNS: weakref.WeakValueDictionary[int, Run] = weakref.WeakValueDictionary()
"""Which run trained a model last, by the identities of the model and its parts."""
_apart: weakref.WeakKeyDictionary[Run, int] = weakref.WeakKeyDictionary()
"""Runs whose stages have weights of their own, and the threads that they are stepped from."""
_hooks: list[Any] = []
_before: dict[str, Any] = {}  # what `nn.Module` has by itself, None: from its base
_unseen: list[int] = []  # threads that are inside `unseen`


def begin(run: Run, model: nn.Module) -> Run | None:
    """A run is about to train the model; the one that has not been left yet, if there is one."""
    other = _RUNS.get(id(model))
    _RUNS.update({id(part): run for part in model.modules()})
    return other if other is not None and other.alive else None


def follow(run: Run, *, calls: bool) -> None:
    """From now on the run's stages may have newer weights than the model; ``calls`` of it are looks, too."""
    if not _before:
        for name in _ANSWERS:
            _before[name] = vars(nn.Module).get(name)
            setattr(nn.Module, name, _asked(getattr(nn.Module, name)))
    if calls and not _hooks:
        _hooks.append(register_module_forward_pre_hook(lambda module, args: _look(module)))
    _apart[run] = threading.get_ident()


def end(run: Run) -> None:
    """The model has the present weights for good."""
    _apart.pop(run, None)
    if _before and not _apart:
        for name, before in _before.items():
            setattr(nn.Module, name, before) if before is not None else delattr(nn.Module, name)
        _before.clear()
        while _hooks:
            _hooks.pop().remove()


@contextmanager
def unseen() -> Iterator[None]:
    """Inside, this thread asks for what a model has, not for what its weights are."""
    _unseen.append(threading.get_ident())
    try:
        yield
    finally:
        _unseen.remove(threading.get_ident())


def show(model: nn.Module) -> None:
    """Before somebody looks at the weights of a model that may be in training."""
    if (run := _RUNS.get(id(model))) is not None:
        run.show()


def _asked(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def asked(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _look(module)
        return plain(module, *args, **kwargs)

    return asked


def _look(module: nn.Module) -> None:
    run, thread = _RUNS.get(id(module)), threading.get_ident()
    if run is None or not run.behind or thread in _unseen:
        return
    if _apart.get(run) == thread and not _is_ours():
        run.show()


def _is_ours() -> bool:
    """Whether dtrp runs the code that asks, to see what it does: it must see what is there."""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith("dtrp.") and name != __name__:
            return not name.startswith(_CALLS_THE_SCRIPT)
        frame = frame.f_back
    return False
