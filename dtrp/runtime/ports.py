"""A stage's ends: how the values of a slot arrive, and where its outputs and gradients leave to.

What may have to wait is a generator here: it yields for as long as a message has not come, and returns what
it was for. Links between processes wait by themselves, so that nothing ever yields there.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from torch import Tensor

from ..wiring import CALLER, Constant, Source, Wiring
from .batch import Arrivals, Feed
from .links import Channel, Links, Message
from .meter import Meter
from .program import StageProgram


def receive(links: Links, meter: Meter, channel: Channel, slot: int) -> Generator[None, None, Message]:
    """The next message on ``channel``, which must belong to ``slot``."""
    since = meter.wait(channel)
    while (message := links.take(channel, slot)) is None:
        yield
        since = meter.resumed(since)
    meter.waited(since)
    meter.done += 1
    if message.slot != slot:
        raise RuntimeError(f"{channel} delivered slot {message.slot} where slot {slot} was due")
    return message


class Ports:
    """What one stage receives and sends, by the wiring of its program."""

    def __init__(self, program: StageProgram, links: Links, meter: Meter, shrink: float) -> None:
        self.program, self.links, self.meter, self.shrink = program, links, meter, shrink
        self.stage, self.device = program.stage, program.device
        self.on_host = program.device.type == "cpu"
        self.receives = {True: _ends(program.train, self.stage), False: _ends(program.evaluate, self.stage)}
        self.sources = {True: program.train.stages[self.stage].inputs}
        self.sources[False] = program.evaluate.stages[self.stage].inputs
        self.sends = {
            training: [
                (j, sent) for (i, j), sent in program.wiring(training).sends.items() if i == self.stage
            ]
            for training in (True, False)
        }
        gradients = program.train.gradients
        self.gradients_to = [(i, sent) for (i, j), sent in gradients.items() if j == self.stage]
        # The last stage's first: autograd's own order.
        self.gradients_from = [(j, sent) for (i, j), sent in gradients.items() if i == self.stage][::-1]
        self.overflowed = 0.0  # the loss's scale that stages before have seen to overflow
        self.carrying = frozenset(Source(i, n) for i, sent in self.gradients_to for n in sent)

    # ---- values ----------------------------------------------------------------------------------------

    def arrivals(self, slot: int, feed: Feed, *, training: bool = True) -> Generator[None, None, Arrivals]:
        """All values that reach this stage for a slot, on its device."""
        callers, others = self.receives[training]
        found: Arrivals = dict(zip(callers, feed.inputs, strict=True))
        self.overflowed = 0.0
        for i, sources in others:
            channel = Channel("forward" if training else "evaluate", i, self.stage)
            message = yield from receive(self.links, self.meter, channel, slot)
            found.update(zip(sources, message.values, strict=True))
            self.overflowed = message.scale or self.overflowed
        return found if self.on_host else {s: self._here(v) for s, v in found.items()}

    def _here(self, value: Any) -> Any:
        return value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value

    def differentiable(self, arrivals: Arrivals) -> Arrivals:
        """The same values, those that carry gradient as fresh leaves of a graph."""
        return {s: v.detach().requires_grad_() if s in self.carrying else v for s, v in arrivals.items()}

    def inputs(self, arrivals: Arrivals, *, training: bool = True) -> list[Any]:
        """The arguments of the stage's module."""
        return [arrivals[s] for s in self.sources[training]]

    def send(
        self, slot: int, outputs: Sequence[Any], *, training: bool = True, overflowed: float = 0.0
    ) -> None:
        """Outputs go downstream, to every stage that needs them."""
        for j, sent in self.sends[training]:
            channel = Channel("forward" if training else "evaluate", self.stage, j)
            self.links.send(channel, Message(slot, [outputs[n] for n in sent], scale=overflowed))

    def result(self, arrivals: Arrivals, outputs: Sequence[Any], *, training: bool = True) -> Any:
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

    def output_gradients(self, slot: int) -> Generator[None, None, tuple[dict[int, Tensor], bool, float]]:
        """Sum of the gradients of each output; whether the slot was given up; the loss's scale.

        A gradient is shrunk once per stage that it climbs, also where it was sent straight past some: that
        compounds to ``shrink ** (K - k)`` whichever way it went.
        """
        total: dict[int, Tensor] = {}
        skip, scale = False, 0.0
        for j, sent in self.gradients_from:
            message = yield from receive(self.links, self.meter, Channel("backward", j, self.stage), slot)
            skip |= message.skip
            scale = message.scale
            for n, g in zip(sent, message.values, strict=True):
                if g is not None:
                    g = g if self.on_host else g.to(self.device, non_blocking=True)
                    g = g if self.shrink == 1.0 else g * self.shrink ** (j - self.stage)
                    total[n] = g if n not in total else total[n] + g
        return total, skip, scale

    def send_gradients(self, slot: int, arrivals: Arrivals, *, skip: bool, scale: float) -> None:
        """The gradients of what arrived go back to where it came from."""
        for i, sent in self.gradients_to:
            values = [None if skip else arrivals[Source(i, n)].grad for n in sent]
            self.links.send(Channel("backward", self.stage, i), Message(slot, values, skip, scale))


def _ends(wiring: Wiring, stage: int) -> tuple[list[Source], list[tuple[int, list[Source]]]]:
    """What comes from the caller, and what from which stage, each in the order in which it travels."""
    callers = [Source(CALLER, i) for i in wiring.caller_inputs(stage)]
    others = [(i, [Source(i, n) for n in sent]) for (i, j), sent in wiring.sends.items() if j == stage]
    return callers, others
