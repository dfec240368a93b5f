"""A model's modes: how each module's ``training`` flag stands, in training and in evaluation.

Training is as the model was found: ``backbone.eval()`` inside ``model.train()`` stays. In evaluation all
flags are as ``model.eval()`` sets them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from .snapshot import untouched
from .traced import Traced, same_graph

Flags = tuple[bool, ...]
"""Each module's ``training``, in the order of ``model.modules()``."""


def flags_of(model: nn.Module) -> Flags:
    """As they stand."""
    return tuple(m.training for m in model.modules())


def any_training(model: nn.Module) -> bool:
    """Whether any of them says training; if none does, the model is being looked at."""
    return any(m.training for m in model.modules())


def set_flags(model: nn.Module, flags: Flags) -> None:
    """Make them stand so."""
    for module, flag in zip(model.modules(), flags, strict=True):
        module.training = flag


def training_flags(model: nn.Module) -> Flags:
    """As they stand, unless the model is in eval mode altogether: then as its ``train()`` sets them."""
    found = flags_of(model)
    if any(found):
        return found
    with untouched(model):
        model.train()
        return flags_of(model)


def evaluation_flags(model: nn.Module) -> Flags:
    """As ``eval()`` sets them."""
    with untouched(model):
        model.eval()
        return flags_of(model)


@contextmanager
def in_mode(model: nn.Module, flags: Flags | None) -> Iterator[None]:
    """Inside, the flags are these (None: as ``model.eval()`` sets them); afterwards they are as before."""
    with untouched(model):
        if flags is None:
            model.eval()
        else:
            set_flags(model, flags)
        yield


@dataclass(frozen=True)
class BothModes:
    """The traces of the two modes; one object where they are equal node by node."""

    train: Traced
    eval: Traced
    alike: bool = False  # nothing that runs in them asks for the mode

    @classmethod
    def of(cls, trace: Callable[[bool], Traced]) -> BothModes:
        """Trace in both modes by ``trace(training)``; in one if layers alone ask for the mode, or nothing."""
        train = trace(True)
        if train.asks_mode != "code" and not train.kept_whole:  # which may have run before
            return cls(train, train, not train.asks_mode)
        evaluate = trace(False)
        return cls(train, train if same_graph(train, evaluate) else evaluate)

    def each(self) -> Iterator[tuple[bool, Traced]]:
        """The distinct traces, each with a mode (as ``training``) that it serves."""
        yield True, self.train
        if self.eval is not self.train:
            yield False, self.eval
