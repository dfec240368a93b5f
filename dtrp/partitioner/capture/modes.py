"""A model in training and in evaluation mode, each as the model's own ``train()`` sets it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from .snapshot import untouched
from .traced import Traced, same_graph


@dataclass(frozen=True)
class BothModes:
    """The traces of the two modes; one object where they are equal node by node."""

    train: Traced
    eval: Traced

    @classmethod
    def of(cls, model: nn.Module, trace: Callable[[], Traced]) -> BothModes:
        """Trace ``model`` in both modes by ``trace()``."""
        with in_mode(model, True):
            train = trace()
        with in_mode(model, False):
            evaluate = trace()
        return cls(train, train if same_graph(train, evaluate) else evaluate)

    def each(self) -> Iterator[tuple[bool, Traced]]:
        """The distinct traces, each with a mode (as ``training``) that it serves."""
        yield True, self.train
        if self.eval is not self.train:
            yield False, self.eval


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Inside, the model is in a mode; afterwards every module's own flag is as it was."""
    with untouched(model):
        model.train(training)
        yield
