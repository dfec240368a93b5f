"""One stage's life: it follows the list of actions that the schedule gives it (schedule.py).

    forward       any stage but the last: without a graph, stash the inputs, send the outputs downstream
                  the last: with a graph, up to the loss
    recompute     the stashed inputs again, with a graph, on the stage's present weights
    backward      wait for the gradients of the outputs, go backward, send those of the inputs upstream
    step          update the weights, after the last micro-batch of a mini-batch

The invariants (DTRP, PLoS ONE 2023; the second one ours):

- One weight version: a pass may run on predicted weights, but those are another module's (twins.py); the
  gradient is applied to the true ones.
- The first forward leaves no trace: buffers and any other module state are as before it, and are updated
  once, by the recompute pass. Both passes draw the same random numbers (random.py).
- A stage holds as many stashed inputs as it is deep, one more for a moment, and one live graph.

Recompute comes before waiting for the gradient: it needs only weights that are there, and hides the time that
the gradient takes to come. A stage that does not recompute runs its first forward with a graph, on a version
of the weights of its own, and keeps both until the gradient arrives (weight stashing as in PipeDream).

What a stage does is a generator that yields where it would have to wait for another one (ports.py), so that
stages in one process take turns; between processes the links wait, and it never yields.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .. import accelerators
from ..memory import bytes_of
from ..schedule import in_updates
from .answers import Answers
from .batch import Feed, InFlight, Update
from .clipping import Norms
from .config import TrainConfig
from .links import Links
from .loss import Report, check_finite
from .meter import Meter
from .passes import Passes
from .ports import Ports
from .predictors import asks_for
from .program import StageProgram
from .scaling import LossScale
from .tied import TiedGradients
from .twins import Snapshot, Twin
from .updates import Updates
from .weights import Weights

if TYPE_CHECKING:
    from .replicas import Replicas

Steps = Generator[None, None, None]


class Stage:
    """Runs one stage, round by round.

    Parameters
    ----------
    program, config
        What to run and how.
    links : Links
        To the other stages.
    seed : int or None
        Base seed of the passes' random numbers; ``None``: the ambient generators (one stage only).
    record : bool
        Whether to note what was done when (`take_events`).
    replicas : Replicas, optional
        The same stage in other pipelines, or in other processes of this one.
    turn : (int, int)
        ``(i, n)``: of the slots, this process has i, i + n, i + 2 n, ...; others have the rest.
    """

    def __init__(
        self,
        program: StageProgram,
        config: TrainConfig,
        links: Links,
        *,
        seed: int | None,
        record: bool,
        replicas: Replicas | None = None,
        turn: tuple[int, int] = (0, 1),
    ) -> None:
        self.replicas, self.turn = replicas, turn
        self.program, self.config, self.links = program, config, links
        self.stage, self.n_stages = program.stage, program.n_stages
        self.schedule = config.schedule(self.n_stages)
        self.module: nn.Module = program.module
        self.module.to(program.device)
        holds = sum(map(bytes_of, (*self.module.parameters(), *self.module.buffers())))
        self.meter = Meter(self.stage, self.n_stages, program.device, record=record, holds=holds)
        self.pace = accelerators.Pace(program.device)
        self.ports = Ports(program, links, self.meter, config.grad_shrink)
        self.passes = Passes(program, config, self.ports, self.meter, seed)
        self.recomputes = config.recompute(program.recompute) and not program.is_last
        shrink = [config.lr_shrink ** (self.n_stages - 1 - k) for k in range(self.n_stages)]
        self.weights = Weights(self.module, program.guests, config, shrink, self.stage)
        per_update = config.scheduler_step == "update"
        self.tied = TiedGradients(program, self.weights, links, self.meter, scheduled=per_update)
        if replicas is not None:
            tied = [self.weights.trainable[name] for name in self.tied.names]
            self.weights.watch(partial(replicas.watch, without=tied))
        trained, lag = program.train.trained, config.max_grad_norm_lag
        self.takes_part = self.stage in trained  # gradients come to it
        self.norms = Norms(self.schedule, self.stage, trained, links, self.meter, lag=lag)
        self.scaling = LossScale() if config.scales else None
        self.updates = Updates(program, config, self.weights, self.norms, self.scaling, replicas)
        self.speaks = turn[0] == 0  # for all processes of the stage
        self.held: deque[Feed] = deque()  # slots whose rounds are not due yet
        self.in_flight: dict[int, InFlight] = {}
        self.reports: deque[Report] = deque()
        # Of this segment: its first slot, how many have come since, rounds begun.
        self._slot = self._fed = self._round = 0
        self._total: Any = None  # the mini-batch's loss so far
        self.answers = Answers(self)
        self._known_horizons: dict[tuple[str, str], tuple[float, ...]] = {}
        # Whether the next update's gradient is what is passed back here, and nothing else.
        alone = replicas is None and (config.replicas or (1,) * self.n_stages)[self.stage] == 1
        own, alone = self.weights.own, alone and not config.gives_up
        self._foresees = own is not None and alone and asks_for(own.predictor, "takes_gradient")
        if config.compile_stages:
            program.module.compile_training()

    @property
    def phase(self) -> str:
        """What it is doing, in words (`Meter.phase`)."""
        full = self.links.full
        return self.meter.phase if full is None else f"waiting for stage {full} to take what it was sent"

    def places(self, target: int) -> int:
        """Messages that may be on their way to another stage."""
        return self.schedule.places(self.stage, target, tied=target in self.tied.owned)

    # ---- rounds --------------------------------------------------------------------------------------------

    def feed(self, feed: Feed) -> Steps:
        """A slot comes in; the round that is due by that (`Schedule.lag`)."""
        self.held.append(feed)
        if self.is_due:
            yield from self.run(self.held.popleft())

    @property
    def is_due(self) -> bool:
        """Whether the next round may begin."""
        return len(self.held) > self.schedule.lag(self.stage)

    def run(self, feed: Feed | None) -> Steps:
        """The next round; ``feed`` is the slot that comes in with it, ``None`` while the pipeline drains."""
        self.meter.begin_round(self.links.waiting())
        number, self._round = self._round, self._round + 1
        if feed is not None:
            self._fed = number + 1
            self.updates.come += feed.closes
        for owner in self.tied.due:
            lag = self.schedule.depth(self.stage) + self.schedule.tied_lag(owner, self.stage)
            yield from self.tied.collect(owner, self._slot + number - lag)
        for kind, offset in self.schedule.pattern(self.stage):
            slot = self._slot + number + offset
            if kind == "forward":
                if feed is not None and slot % self.turn[1] == self.turn[0]:
                    yield from (
                        self._last_forward(slot, feed) if self.program.is_last else self._forward(slot, feed)
                    )
                elif feed is not None:
                    self._elsewhere(slot, feed)
            elif slot in self.in_flight:
                if kind == "recompute":
                    yield from self._recompute(slot)
                elif kind == "backward":
                    yield from self._backward(slot)
                else:
                    yield from self._step(slot)
        self.pace.end_round()
        self.meter.end_round()

    def drain(self, *, close_group: bool | str = False) -> Steps:
        """After the last slot of a segment: until nothing is in flight here, nor on its way here.

        ``close_group``: an incomplete group of accumulated mini-batches is stepped with, as its own mean;
        ``"share"``: as its share of a whole group's.
        """
        while self.held:
            yield from self.run(self.held.popleft())
        for _ in range(self.schedule.depth(self.stage)):
            yield from self.run(None)
        if self.config.max_grad_norm is not None and self.takes_part:
            yield from self.norms.settle(self.updates.come)
        if close_group:
            yield from self._close_group(close_group)
        for owner in self.tied.due:
            yield from self.tied.collect(owner, None)
        if self.replicas is not None:
            self.replicas.settle(self.module.buffers(), self.waiting)
        self._begin_segment()

    @property
    def waiting(self) -> list[nn.Parameter]:
        """Parameters whose gradients wait for more of them."""
        own = self.weights.own
        return list(own.names.values()) if own is not None and own.waiting else []

    def _close_group(self, how: bool | str) -> Steps:
        """Step with an incomplete group of accumulated mini-batches."""
        steps = (yield from self.updates.close_group(how)) if self.takes_part else False
        slot = self._slot + self._fed
        self._fed += 1  # the sums' slot
        self.tied.share(slot, stepped=steps)
        self.tied.forwarded(slot, Update())
        if steps:
            self.updates.update(Update())

    def _begin_segment(self) -> None:
        self._slot += self._fed
        self._round = self._fed = 0
        self.updates.begin_segment()
        self.weights.forget()

    # ---- actions -------------------------------------------------------------------------------------------

    def _elsewhere(self, slot: int, feed: Feed) -> None:
        """The slot is another process's of this stage: here only the update is made that it may bring."""
        if self.takes_part or self.program.is_last:
            self.in_flight[slot] = InFlight(feed, {}, elsewhere=True)
        if feed.closes:
            self.tied.forwarded(slot, feed.update)
        if self.program.is_last:
            self._add_loss(feed, None)

    def _forward(self, slot: int, feed: Feed) -> Steps:
        """The first forward of any stage but the last."""
        arrivals = yield from self.ports.arrivals(slot, feed)
        horizons = self._horizons("forward", feed)
        flight = InFlight(feed, arrivals)
        twin: Twin | None = None
        graph = self.takes_part and not self.recomputes
        if graph:
            if not self.schedule.exact:
                twin = self.weights.version(horizons, feed.update.lr_scale)
            flight.arrivals = arrivals = self.ports.differentiable(arrivals)
        elif self.takes_part:
            twin = self.weights.first(horizons, feed.update.lr_scale)
        mark = self.meter.start("forward")
        with torch.set_grad_enabled(graph):
            outputs = self.passes.run(twin, arrivals, feed)
        self.meter.stop(mark, "forward", feed.batch)
        if graph:
            flight.outputs, flight.twin = outputs, twin
            self.meter.graph(+1)
        if self.takes_part:
            self.in_flight[slot] = flight
            self.meter.stash(self._stashed)
        if feed.closes:
            self.tied.forwarded(slot, feed.update)
        mark = self.meter.start("send")
        self.ports.send(slot, outputs, overflowed=self._overflowed())
        self.meter.stop(mark, "send", feed.batch)

    def _overflowed(self) -> float:
        """What is to be said downstream of the loss's scale."""
        if self.scaling is None:
            return 0.0
        self.scaling.heard(self.ports.overflowed)
        return self.scaling.pass_on()

    def _last_forward(self, slot: int, feed: Feed) -> Steps:
        """The last stage's forward, with a graph, up to the loss."""
        arrivals = self.ports.differentiable((yield from self.ports.arrivals(slot, feed)))
        if self.scaling is not None:
            self.scaling.heard(self.ports.overflowed)
        horizons = self._horizons("forward", feed)
        twin = self.weights.ahead(horizons, feed.update.lr_scale)
        before = Snapshot(self.module) if self.config.gives_up else None
        self.meter.graph(+1)
        mark = self.meter.start("forward")
        with torch.enable_grad():
            (loss,) = self.passes.run(twin, arrivals, feed)
        self.meter.stop(mark, "forward", feed.batch)
        flight = InFlight(feed, arrivals, (loss,), twin, gradients={})
        value = loss.detach()
        if before is not None and not bool(torch.isfinite(value)):
            before.restore()
            flight.skip = True
        elif before is None and value.device.type == "cpu":  # before anything is trained with it
            check_finite(float(value), f"the loss of batch {feed.batch}")
        self.in_flight[slot] = flight
        if feed.closes:
            self.tied.forwarded(slot, feed.update)
        self._add_loss(feed, value if feed.share == 1.0 else value * feed.share)

    def _add_loss(self, feed: Feed, part: Tensor | None) -> None:
        """To the mini-batch's; ``None``: another process has it."""
        total = None if feed.part == 0 else self._total
        if part is not None:
            total = part if total is None else total + part
        self._total = total
        if feed.closes and self.turn[1] == 1:
            self._report(feed)

    def _report(self, feed: Feed) -> None:
        """The mini-batch's loss. Where processes share the stage, behind its last backward pass: before it,
        one that has the last slot would wait for all that others still have to do."""
        total = self._total
        if self.replicas is not None:
            total = self.replicas.joint_loss(torch.zeros((), device="cpu") if total is None else total)
        if self.speaks:
            self.reports.append(Report.of(feed.batch, total))

    @property
    def _stashed(self) -> int:
        """Slots whose inputs are held here."""
        return sum(not flight.elsewhere for flight in self.in_flight.values())

    def _recompute(self, slot: int) -> Steps:
        """The forward again, with a graph."""
        flight = self.in_flight[slot]
        if flight.outputs is not None or flight.elsewhere:
            return
        if self.config.gives_up:  # a slot that is given up must not change module state
            yield from self._gradients(slot, flight)
            if flight.skip:
                return
        horizons = self._horizons("recompute", flight.feed)
        flight.twin = self.weights.ahead(horizons, flight.feed.update.lr_scale)
        flight.arrivals = self.ports.differentiable(flight.arrivals)
        self.meter.graph(+1)
        mark = self.meter.start("recompute")
        with torch.enable_grad():
            flight.outputs = self.passes.run(flight.twin, flight.arrivals, flight.feed)
        self.meter.stop(mark, "recompute", flight.feed.batch)

    def _gradients(self, slot: int, flight: InFlight) -> Steps:
        if flight.gradients is None:
            flight.gradients, flight.skip, flight.scale = yield from self.ports.output_gradients(slot)

    def _backward(self, slot: int) -> Steps:
        flight = self.in_flight[slot]
        feed, twin = flight.feed, flight.twin
        if not flight.elsewhere:
            yield from self._gradients(slot, flight)
        if feed.part == 0:
            self.updates.begin()
        if flight.elsewhere:
            return
        if self.program.is_last and self.scaling is not None:
            flight.scale = self.scaling.scale
        if not flight.skip:
            mark = self.meter.start("backward")
            self.tied.before_backward()
            self.updates.expect(feed)
            self._differentiate(flight)
            if twin is not None:
                self.weights.absorb(twin)
            if self._foresees and self.weights.own is not None:
                self.weights.own.gathered += feed.share
            self.meter.stop(mark, "backward", feed.batch)
            if self.config.gives_up:
                sent = [flight.arrivals[source].grad for source in self.ports.carrying]
                flight.skip = not self.updates.finite(sent)
            self.meter.graph(-1)
        elif flight.outputs is not None:
            flight.outputs = None
            self.meter.graph(-1)
        if twin is not None and not (self.recomputes or self.program.is_last):
            self.weights.release(twin)
        mark = self.meter.start("send")
        self.ports.send_gradients(slot, flight.arrivals, skip=flight.skip, scale=flight.scale)
        self.meter.stop(mark, "send", feed.batch)
        flight.arrivals = {}
        self.updates.bad |= flight.skip
        yield from self.tied.give_up(slot) if flight.skip else self.tied.after_backward(slot)

    def _differentiate(self, flight: InFlight) -> None:
        outputs, gradients, share = flight.outputs, flight.gradients, flight.feed.share
        assert outputs is not None
        assert gradients is not None
        pairs: list[tuple[Tensor, Tensor | None]] = [(outputs[n], g) for n, g in gradients.items()]
        if self.program.is_last:
            loss = outputs[0] if share == 1.0 else outputs[0] * share
            loss = loss if self.config.accumulate == 1 else loss / self.config.accumulate
            pairs = [(loss if flight.scale == 0.0 else loss * flight.scale, None)]
            del loss
        pairs = [(o, g) for o, g in pairs if o.requires_grad]
        del outputs, gradients
        flight.outputs, flight.gradients = None, {}  # what the graph does not need is gone before it runs
        if pairs:
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])

    def _step(self, slot: int) -> Steps:
        """The end of a slot; after the last one of a mini-batch, the update of all of them."""
        flight = self.in_flight.pop(slot)
        self.meter.stash(self._stashed)
        if not flight.feed.closes:
            return
        steps = yield from self.updates.decide(flight.feed, flight.scale)
        if self.program.is_last and self.turn[1] > 1:
            self._report(flight.feed)
        self.tied.share(slot, stepped=steps)
        if steps:
            mark = self.meter.start("step")
            self.updates.update(flight.feed.update)
            self.meter.stop(mark, "step", -1)

    def _horizons(self, kind: Literal["forward", "recompute"], feed: Feed) -> tuple[float, float]:
        """In updates, of own parameters and of guests. A guest's update becomes visible one round after its
        owner's step, so that a first forward, which comes after the stage's own step, still misses one.

        Where part of the next gradient is known, each part of a batch aims at the whole updates that come
        before its own second pass; else all aim at their mean.
        """
        config, schedule = self.config, self.schedule
        known = self._known_horizons.get((kind, schedule.order))
        if known is None:
            of = schedule.forward_horizon if kind == "forward" else schedule.backward_horizon
            slots, late = of(self.stage, config.horizon), kind == "forward" and not self.program.is_last
            between = schedule.depth(self.stage) - 1 if late and not schedule.exact else 0
            per_update = config.accumulate * schedule.parts
            every = (slots, slots + late, slots - between)
            known = (*(float(in_updates(n, per_update)) for n in every), between)
            self._known_horizons[kind, schedule.order] = known
        own, guests, beyond, to_come = known  # the last one in slots
        if self._foresees and self.weights.own is not None:
            batches = to_come / feed.parts + self.weights.own.gathered  # a small one has fewer parts
            own = beyond + math.floor(batches / config.accumulate + 1e-6)
        scale = config.horizon_scale if config.predicts else 0.0
        return scale * own, scale * guests


def finish(steps: Generator[None, None, Any]) -> Any:
    """Run what cannot have to wait: between processes links wait by themselves."""
    try:
        next(steps)
    except StopIteration as end:
        return end.value
    raise AssertionError("a value is missing that an earlier stage should have sent")
