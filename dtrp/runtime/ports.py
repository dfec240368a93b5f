"""A stage's ends: how the values of a batch arrive, and where its outputs and gradients leave to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..wiring import CALLER, Constant, Source
from .batch import Arrivals, Feed
from .links import Channel, Links, Message
from .meter import Meter
from .program import StageProgram


class Ports:
    """What one stage receives and sends, by the wiring of its program."""

    def __init__(self, program: StageProgram, links: Links, meter: Meter) -> None:
        self.program, self.links, self.meter = program, links, meter
        self.stage = program.stage
        self.carrying = {  # arrivals that a gradient goes back for
            Source(i, n) for (i, j), sent in program.train.gradients.items() if j == self.stage for n in sent
        }
        self.takes_part = any(i == self.stage for i, _ in program.train.gradients)
        """Whether someone will send a gradient."""

    # ---- values ----------------------------------------------------------------------------------------

    def arrivals(self, slot: int, feed: Feed, kind: Any) -> Arrivals:
        """All values that reach this stage for a batch, on its device."""
        wiring = self.program.wiring(kind == "forward")
        device = self.program.device
        indices = wiring.caller_inputs(self.stage)
        found: Arrivals = {Source(CALLER, i): v for i, v in zip(indices, feed.inputs, strict=True)}
        for (i, j), sent in wiring.sends.items():
            if j == self.stage:
                with self.meter.waiting(kind, i):
                    message = self.links.receive(Channel(kind, i, j), slot)
                found |= {Source(i, n): v for n, v in zip(sent, message.values, strict=True)}
        return {s: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for s, v in found.items()}

    def differentiable(self, arrivals: Arrivals) -> Arrivals:
        """The same values, those that carry gradient as fresh leaves of a graph."""
        return {s: v.detach().requires_grad_() if s in self.carrying else v for s, v in arrivals.items()}

    def inputs(self, arrivals: Arrivals, *, training: bool = True) -> list[Any]:
        """The arguments of the stage's module."""
        return [arrivals[s] for s in self.program.wiring(training).stages[self.stage].inputs]

    def send(self, kind: Any, slot: int, batch: int, outputs: Sequence[Any]) -> None:
        """Outputs go downstream, to every stage that needs them."""
        for (i, j), sent in self.program.wiring(kind == "forward").sends.items():
            if i == self.stage:
                with self.meter.timed("send", batch):
                    self.links.send(Channel(kind, i, j), Message(slot, tuple(outputs[n] for n in sent)))

    def result(self, arrivals: Arrivals, outputs: Sequence[Any], training: bool) -> Any:
        """The model's output in its own structure, on the last stage."""
        wiring = self.program.wiring(training)
        leaves = [
            leaf.value
            if isinstance(leaf, Constant)
            else outputs[leaf.index]
            if leaf.stage == self.stage
            else arrivals[leaf]
            for leaf in wiring.result
        ]
        return wiring.unflatten(leaves)

    # ---- gradients -------------------------------------------------------------------------------------

    def output_gradients(self, slot: int, shrink: float = 1.0) -> tuple[dict[int, Tensor], bool]:
        """Sum of the gradients of each output, the last stage's first (autograd's own order); whether the
        batch was given up.

        ``shrink`` multiplies a gradient once per stage that it climbs, also where it was sent straight past
        some: it compounds to ``shrink ** (K - k)`` whichever way the gradient went.
        """
        total: dict[int, Tensor] = {}
        skip = False
        for (i, j), sent in sorted(self.program.train.gradients.items(), key=lambda item: -item[0][1]):
            if i == self.stage:
                with self.meter.waiting("backward", j):
                    message = self.links.receive(Channel("backward", j, i), slot)
                skip |= message.skip
                for n, g in zip(sent, message.values, strict=True):
                    if g is not None:
                        g = g.to(self.program.device, non_blocking=True)
                        g = g if shrink == 1.0 else g * shrink ** (j - i)
                        total[n] = g if n not in total else total[n] + g
        return total, skip

    def send_gradients(self, slot: int, batch: int, arrivals: Arrivals, *, skip: bool = False) -> None:
        """The gradients of what arrived go back to where it came from."""
        for (i, j), sent in self.program.train.gradients.items():
            if j == self.stage:
                values = tuple(None if skip else arrivals[Source(i, n)].grad for n in sent)
                with self.meter.timed("send", batch):
                    self.links.send(Channel("backward", j, i), Message(slot, values, skip))
