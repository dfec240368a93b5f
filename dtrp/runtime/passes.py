"""One pass over a stage's module: its inputs, the random numbers it draws, its formats, the loss at its end.

Training and evaluation go through the same code, on the stage's own module or on a twin of it (twins.py).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .batch import Arrivals, Feed
from .config import TrainConfig
from .evaluation import Measure
from .loss import held_loss, scalar_loss
from .meter import Meter
from .ports import Ports
from .program import StageProgram
from .random import pass_seed, seed_all
from .twins import Twin


class Passes:
    """The passes of one stage.

    Parameters
    ----------
    program, config
        What to run and how.
    ports, meter
        The stage's.
    seed : int or None
        Base seed of the passes' random numbers; ``None``: the ambient generators (one stage only).
    """

    def __init__(
        self, program: StageProgram, config: TrainConfig, ports: Ports, meter: Meter, seed: int | None
    ) -> None:
        self.program, self.config, self.ports, self.meter, self.seed = program, config, ports, meter, seed
        self.module: nn.Module = program.module

    def run(self, twin: Twin | None, arrivals: Arrivals, feed: Feed) -> tuple[Any, ...]:
        """Run the stage's module, or its twin; the last stage's gives the loss (a tuple of one)."""
        module = self.module if twin is None else twin.begin()
        inputs = self.ports.inputs(arrivals)
        if self.program.writes_inputs:
            inputs = [x.clone() if isinstance(x, Tensor) and not x.requires_grad else x for x in inputs]
        self._seed(feed)
        with self._formats():
            outputs: tuple[Any, ...] = module(*inputs)
            if self.program.is_last:
                output = self.ports.result(arrivals, outputs)
                begun = time.perf_counter()
                outputs = (self._loss(module, output, self._on_device(feed.target)),)
                self.meter.loss(begun)
        if twin is not None:
            twin.end()
        return outputs

    def evaluate(self, feed: Feed, measure: Measure | None) -> Generator[None, None, Any]:
        """A forward pass in eval mode on the true weights; the last stage measures (or gives the output)."""
        arrivals = yield from self.ports.arrivals(feed.batch, feed, training=False)
        self._seed(feed)
        with torch.no_grad(), self._formats():
            inputs: Sequence[Any] = self.ports.inputs(arrivals, training=False)
            if self.program.writes_inputs:
                inputs = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
            outputs = self.module(*inputs)
            if self.program.is_last:
                output = self.ports.result(arrivals, outputs, training=False)
                target = self._on_device(feed.target)
                if measure is not None:
                    return measure(output, target, feed.share)
                return pytree.tree_map_only(Tensor, torch.Tensor.cpu, output)
        self.ports.send(feed.batch, outputs, training=False)
        return None

    def _seed(self, feed: Feed) -> None:
        if self.program.draws and self.seed is not None:
            seed_all(pass_seed(self.seed, feed.batch, self.program.stage, feed.part), self.program.device)

    def _loss(self, module: nn.Module, output: Any, target: Any) -> Tensor:
        loss_fn = self.config.loss_fn
        return scalar_loss(module.get_submodule("loss") if loss_fn is held_loss else loss_fn, output, target)

    def _formats(self) -> Any:
        if self.config.autocast is None:
            return nullcontext()
        return torch.autocast(self.program.device.type, dtype=self.config.autocast)

    def _on_device(self, target: Any) -> Any:
        if self.program.device.type == "cpu":
            return target
        device = self.program.device
        return pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), target)
