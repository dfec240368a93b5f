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
import time
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .batch import Arrivals, Feed, InFlight, Loss, Skip, Update
from .clipping import Norms, clip, squared_norm
from .config import TrainConfig
from .evaluation import Measure
from .events import Event
from .handback import completed
from .links import Links
from .loss import Report, check_finite, held_loss, scalar_loss
from .meter import Meter
from .ports import Ports
from .program import StageProgram
from .random import pass_seed, random_state, seed_all, set_random_state
from .scaling import LossScale, unscale
from .schedule import in_updates
from .stats import StageStats
from .tied import TiedGradients
from .training_state import export_set, import_set
from .twins import Snapshot, Twin, attributes_of, set_attributes
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
        The same stage in other pipelines.
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
    ) -> None:
        self.replicas = replicas
        self.program, self.config, self.links, self.seed = program, config, links, seed
        self.stage, self.n_stages = program.stage, program.n_stages
        self.schedule = config.schedule(self.n_stages)
        self.module: nn.Module = program.module
        self.module.to(program.device)
        holds = sum(t.nbytes for t in (*self.module.parameters(), *self.module.buffers()))
        self.meter = Meter(self.stage, self.n_stages, program.device, record=record, holds=holds)
        self.ports = Ports(program, links, self.meter, config.grad_shrink)
        self.trained = program.train.trained
        self.recomputes = config.recompute(program.recompute) and not program.is_last
        shrink = [config.lr_shrink ** (self.n_stages - 1 - k) for k in range(self.n_stages)]
        self.weights = Weights(self.module, program.guests, config, shrink, self.stage)
        per_update = config.scheduler_step == "update"
        self.tied = TiedGradients(program, self.weights, links, self.meter, scheduled=per_update)
        self.norms = Norms(
            self.schedule, self.stage, self.trained, links, self.meter, lag=config.max_grad_norm_lag
        )
        self.scaling = LossScale() if config.scales else None
        self.in_flight: dict[int, InFlight] = {}
        self.reports: deque[Report] = deque()
        self.skips: list[Skip] = []
        self.squared_norm = 0.0  # of the gradients that were stepped with last
        # Of this segment: its first slot, how many have come since, rounds begun, mini-batches come and done.
        self._slot = self._fed = self._round = self._minis_fed = self._minis_stepped = 0
        self._total: Any = None  # the mini-batch's loss so far
        self._bad = False  # the mini-batch is given up
        self._aside: list[
            tuple[nn.Parameter, Tensor | None]
        ] = []  # gradients of earlier mini-batches, while this one may be bad
        self._known_horizons: dict[tuple[str, str], tuple[float, float]] = {}
        self._measure: Measure | None = None
        self._modes: list[tuple[nn.Module, bool]] = []
        if config.compile_stages:
            program.module.compile_training()

    @property
    def takes_part(self) -> bool:
        """Whether gradients come to this stage."""
        return self.stage in self.trained

    # ---- rounds --------------------------------------------------------------------------------------------

    def follow(self, exact: bool) -> None:
        """From the next segment on, follow the exact order, or the run's own again."""
        self.schedule = self.norms.schedule = self.config.schedule(self.n_stages, exact=exact)

    def run(self, feed: Feed | None) -> Steps:
        """The next round; ``feed`` is the slot that comes in with it, ``None`` while the pipeline drains."""
        self.meter.begin_round(self.links.waiting())
        number, self._round = self._round, self._round + 1
        if feed is not None:
            self._fed = number + 1
            self._minis_fed += feed.closes
        for owner in self.tied.due:
            lag = self.schedule.depth(self.stage) + self.schedule.tied_lag(owner, self.stage)
            yield from self.tied.collect(owner, self._slot + number - lag)
        for kind, offset in self.schedule.pattern(self.stage):
            slot = self._slot + number + offset
            if kind == "forward":
                if feed is not None:
                    yield from (
                        self._last_forward(slot, feed) if self.program.is_last else self._forward(slot, feed)
                    )
            elif slot in self.in_flight:
                if kind == "recompute":
                    yield from self._recompute(slot)
                elif kind == "backward":
                    yield from self._backward(slot)
                else:
                    yield from self._step(slot)
        self.meter.end_round()

    def drain(self, *, close_group: bool = False) -> Steps:
        """After the last slot of a segment: until nothing is in flight here, nor on its way here.

        ``close_group``: an incomplete group of accumulated mini-batches is stepped with, as its own mean.
        """
        for _ in range(self.schedule.depth(self.stage)):
            yield from self.run(None)
        if self.config.max_grad_norm is not None and self.takes_part:
            yield from self.norms.settle(self._minis_fed)
        if close_group and self.takes_part:
            yield from self._close_group()
        for owner in self.tied.due:
            yield from self.tied.collect(owner, None)
        self._begin_segment()

    def _begin_segment(self) -> None:
        self._slot += self._fed
        self._round = self._fed = 0
        self._minis_fed = self._minis_stepped = 0

    # ---- actions -------------------------------------------------------------------------------------------

    def _forward(self, slot: int, feed: Feed) -> Steps:
        """The first forward of any stage but the last."""
        arrivals = yield from self.ports.arrivals(slot, feed)
        horizons = self._horizons("forward")
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
            outputs = self._pass(twin, arrivals, feed)
        self.meter.stop(mark, "forward", feed.batch)
        if graph:
            flight.outputs, flight.twin = outputs, twin
            self.meter.graph(+1)
        if self.takes_part:
            self.in_flight[slot] = flight
            self.meter.stash(len(self.in_flight))
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
        horizons = self._horizons("forward")
        twin = self.weights.ahead(horizons, feed.update.lr_scale)
        before = Snapshot(self.module) if self.config.gives_up else None
        self.meter.graph(+1)
        mark = self.meter.start("forward")
        with torch.enable_grad():
            (loss,) = self._pass(twin, arrivals, feed)
        self.meter.stop(mark, "forward", feed.batch)
        flight = InFlight(feed, arrivals, (loss,), twin, gradients={})
        value = loss.detach()
        if before is not None and not bool(torch.isfinite(value)):
            before.restore()
            flight.skip = True
        elif before is None and not value.is_cuda:  # before anything is trained with it
            check_finite(float(value), f"the loss of batch {feed.batch}")
        self.in_flight[slot] = flight
        self.tied.forwarded(slot, feed.update)
        part = value if feed.share == 1.0 else value * feed.share
        total = part if feed.part == 0 else self._total + part
        if feed.closes:
            joint = total if self.replicas is None else self.replicas.sum(total)
            self.reports.append(Report.of(feed.batch, joint))
        self._total = total

    def _recompute(self, slot: int) -> Steps:
        """The forward again, with a graph."""
        flight = self.in_flight[slot]
        if flight.outputs is not None:
            return
        if self.config.gives_up:  # a slot that is given up must not change module state
            yield from self._gradients(slot, flight)
            if flight.skip:
                return
        horizons = self._horizons("recompute")
        flight.twin = self.weights.ahead(horizons, flight.feed.update.lr_scale)
        flight.arrivals = self.ports.differentiable(flight.arrivals)
        self.meter.graph(+1)
        mark = self.meter.start("recompute")
        with torch.enable_grad():
            flight.outputs = self._pass(flight.twin, flight.arrivals, flight.feed)
        self.meter.stop(mark, "recompute", flight.feed.batch)

    def _gradients(self, slot: int, flight: InFlight) -> Steps:
        if flight.gradients is None:
            flight.gradients, flight.skip, flight.scale = yield from self.ports.output_gradients(slot)

    def _backward(self, slot: int) -> Steps:
        flight = self.in_flight[slot]
        yield from self._gradients(slot, flight)
        feed, twin = flight.feed, flight.twin
        if self.program.is_last and self.scaling is not None:
            flight.scale = self.scaling.scale
        if feed.part == 0 and self.config.gives_up:
            self._set_aside()
        if not flight.skip:
            mark = self.meter.start("backward")
            self.tied.before_backward()
            self._differentiate(flight)
            if twin is not None:
                self.weights.absorb(twin)
            self.meter.stop(mark, "backward", feed.batch)
            flight.skip = self.config.gives_up and not self._finite(flight.arrivals)
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
        self._bad |= flight.skip
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
        """The end of a slot; after the last one of a mini-batch, the update."""
        flight = self.in_flight.pop(slot)
        self.meter.stash(len(self.in_flight))
        steps = False
        if flight.feed.closes:
            steps = yield from self._decide(flight.feed, flight.scale)
        if not flight.skip:
            self.tied.share(slot, stepped=steps)
        if steps:
            mark = self.meter.start("step")
            self._update(flight.feed.update)
            self.meter.stop(mark, "step", -1)

    def _decide(self, feed: Feed, scale: float) -> Generator[None, None, bool]:
        """Whether a complete mini-batch brings an update; its gradients are then ready for it."""
        config, own, limit = self.config, self.weights.own, self.config.max_grad_norm
        mini, self._minis_stepped = self._minis_stepped, self._minis_stepped + 1
        bad, self._bad = self._bad, False
        if self.replicas is not None and config.gives_up:
            bad = self.replicas.any(bad)
        gathered = 0 if own is None else own.waiting + 1
        steps = own is not None and not bad and gathered >= config.accumulate
        skips = config.gives_up
        if skips and not bad:
            if scale:
                unscale(self.weights.own_parameters, scale)
            self._gather()
        if self.replicas is not None and steps and own is not None:
            self.replicas.add_gradients(own.names.values())
        looks = self.ports.on_host or limit is not None or skips  # else a device would be waited for
        squared = squared_norm(own.names.values()) if own is not None and steps and looks else 0.0
        if steps and not skips:
            check_finite(squared, f"the norm of the gradients of batch {feed.batch} in stage {self.stage}")
        # Exact orders skip a batch in all stages or in none: each one hears of all others before it steps.
        together = self.schedule.exact and skips
        if limit is not None or together:
            total = yield from self.norms.total(
                mini, self._minis_fed, math.nan if bad and together else squared
            )
            if together and not math.isfinite(total):
                bad, steps = True, False
            elif steps and limit is not None and own is not None:
                clip(own.names.values(), math.sqrt(total), limit, alone=self.n_stages == 1)
        if own is None:  # nothing here is trained, whatever has a gradient
            for p in self.weights.own_parameters:
                p.grad = None
        if bad:
            self._put_back()
            if self.scaling is not None:
                self.scaling.heard(scale)
            if self.stage == min(self.trained):  # what is given up anywhere is given up here, too
                self.skips.append(Skip(feed.batch, feed.update.batches))
        elif own is not None:
            own.waiting = gathered
        if self.scaling is not None and self.program.is_last:
            self.scaling.finished(overflowed=bad)
        if steps:
            self.squared_norm = squared
        return steps

    def _update(self, update: Update) -> None:
        own = self.weights.own
        assert own is not None
        own.step(update.lr_scale)
        if self.config.scheduler_step == "update":
            for _ in range(update.batches):
                own.schedule()

    def _close_group(self) -> Steps:
        """Step with an incomplete group of accumulated mini-batches, as a mean of its own (ours)."""
        own, limit = self.weights.own, self.config.max_grad_norm
        steps = own is not None and own.waiting > 0
        squared = 0.0
        if own is not None and steps:
            gradients = [p.grad for p in own.names.values() if p.grad is not None]
            torch._foreach_mul_(gradients, self.config.accumulate / own.waiting)
            if self.replicas is not None:
                self.replicas.add_gradients(own.names.values())
            squared = squared_norm(own.names.values())
        if limit is not None:
            total = yield from self.norms.everyone(squared)
            if own is not None and steps:
                clip(own.names.values(), math.sqrt(total), limit, alone=self.n_stages == 1)
        slot = self._slot + self._fed
        self._fed += 1  # the sums' slot
        self.tied.share(slot, stepped=steps)
        self.tied.forwarded(slot, Update())
        if steps:
            self.squared_norm = squared
            self._update(Update())

    # ---- gradients that are not finite -------------------------------------------------------------------

    def _set_aside(self) -> None:
        """What earlier mini-batches left, so that this one can be given up."""
        self._aside = [(p, p.grad) for p in self.weights.own_parameters]
        for p, _ in self._aside:
            p.grad = None

    def _gather(self) -> None:
        """The mini-batch is good: its gradients join the earlier ones'."""
        for p, earlier in self._aside:
            if earlier is not None:
                p.grad = earlier if p.grad is None else earlier + p.grad

    def _put_back(self) -> None:
        for p, earlier in self._aside:
            p.grad = earlier

    def _finite(self, arrivals: Arrivals) -> bool:
        """Whether the gradients of this slot are, in this stage and on their way to others."""
        gradients = [p.grad for p in self.weights.trainable.values() if p.grad is not None]
        gradients += [arrivals[s].grad for s in self.ports.carrying if arrivals[s].grad is not None]
        if not gradients:
            return True
        return bool(torch.stack(torch._foreach_norm([g.detach() for g in gradients])).isfinite().all())

    # ---- what passes are made of ---------------------------------------------------------------------------

    def _pass(self, twin: Twin | None, arrivals: Arrivals, feed: Feed) -> tuple[Any, ...]:
        """Run the stage's module, or its twin; the last stage's gives the loss (a tuple of one)."""
        module = self.module if twin is None else twin.begin()
        inputs = self.ports.inputs(arrivals)
        if self.program.writes_inputs:
            inputs = [x.clone() if isinstance(x, Tensor) and not x.requires_grad else x for x in inputs]
        if self.program.draws and self.seed is not None:
            seed_all(pass_seed(self.seed, feed.batch, self.stage, feed.part), self.program.device)
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

    def _horizons(self, kind: Literal["forward", "recompute"]) -> tuple[float, float]:
        """In updates, of own parameters and of guests. A guest's update becomes visible one round after its
        owner's step, so that a first forward, which comes after the stage's own step, still misses one."""
        config, schedule = self.config, self.schedule
        known = self._known_horizons.get((kind, schedule.order))
        if known is None:
            of = schedule.forward_horizon if kind == "forward" else schedule.backward_horizon
            slots, late = of(self.stage, config.horizon), kind == "forward" and not self.program.is_last
            per_update = config.accumulate * schedule.parts
            scale = config.horizon_scale if config.predicts else 0.0
            known = (
                scale * float(in_updates(slots, per_update)),
                scale * float(in_updates(slots + late, per_update)),
            )
            self._known_horizons[kind, schedule.order] = known
        return known

    # ---- evaluation ----------------------------------------------------------------------------------------

    def begin_evaluation(self, measure: Measure | None) -> None:
        """Go to eval mode; the last stage will answer each batch with ``measure(output, target)``."""
        if isinstance(measure, Measure) and self.config.loss_fn is held_loss and self.program.is_last:
            measure = measure.with_loss(self.module.get_submodule("loss"))
        self._measure = measure.begin(self.program.device) if measure and self.program.is_last else measure
        self._modes = [(m, m.training) for m in self.module.modules()]
        self.module.eval()

    def totals(self) -> Any:
        """The last stage: what metrics say that have seen all batches."""
        return self._measure.totals() if self._measure is not None and self.program.is_last else None

    def end_evaluation(self) -> None:
        """Every submodule's own mode is as before `begin_evaluation`."""
        for m, training in self._modes:
            m.training = training
        self._modes = []

    def evaluate(self, feed: Feed) -> Generator[None, None, Any]:
        """A forward pass in eval mode on the true weights; the last stage measures (or gives the output)."""
        arrivals = yield from self.ports.arrivals(feed.batch, feed, training=False)
        if self.program.draws and self.seed is not None:
            seed_all(pass_seed(self.seed, feed.batch, self.stage), self.program.device)
        with torch.no_grad(), self._formats():
            inputs = self.ports.inputs(arrivals, training=False)
            if self.program.writes_inputs:
                inputs = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
            outputs = self.module(*inputs)
            if self.program.is_last:
                output = self.ports.result(arrivals, outputs, training=False)
                target = self._on_device(feed.target)
                if self._measure is not None:
                    return self._measure(output, target)
                return pytree.tree_map_only(Tensor, torch.Tensor.cpu, output)
        self.ports.send(feed.batch, outputs, training=False)
        return None

    # ---- its state -----------------------------------------------------------------------------------------

    def news(self, *, wait: bool = False) -> list[Loss | Skip]:
        """Losses of finished mini-batches, and those given up, since the last call.

        A loss that a device has not computed yet is left for later, unless ``wait``.

        Raises
        ------
        FloatingPointError
            A loss is not finite, and the run does not skip such batches.
        """
        found: list[Loss | Skip] = []
        while self.reports and (wait or self.reports[0].ready()):
            loss = self.reports.popleft().value()
            if not self.config.gives_up:
                check_finite(loss.value, f"the loss of batch {loss.batch}")
            found.append(loss._replace(lr=next(iter(self.learning_rates()), None)))
        found += self.skips
        self.skips = []
        return found

    def state(self) -> dict[str, Any]:
        """Parameters that this stage owns and its buffers, by name, in host memory; and what modules of the
        user's keep in plain attributes, by module."""
        guests = {name for parameters in self.weights.guests.values() for name in parameters.names}
        named = [*self.module.named_parameters(), *self.module.named_buffers()]
        tensors = {name: t.detach().cpu() for name, t in named if name not in guests}
        return {"tensors": tensors, "attributes": attributes_of(self.module)}

    def load_state(self, tensors: Mapping[str, Tensor], attributes: Mapping[str, Mapping[str, Any]]) -> None:
        """Overwrite parameters, buffers and plain attributes; names of other stages are passed over."""
        with torch.no_grad():
            for name, tensor in [*self.module.named_parameters(), *self.module.named_buffers()]:
                if name in tensors:
                    tensor.copy_(tensors[name])
        set_attributes(self.module, completed(attributes, attributes_of(self.module)))
        self.weights.loaded()

    def training_state(self, names: Mapping[str, str]) -> dict[str, Any]:
        """What besides weights and buffers the next batch's training depends on, by parameter name;
        ``names``: names here -> names to save under."""
        own = self.weights.own
        return {
            "parameters": export_set(own, names) if own is not None else None,
            "takes_part": self.takes_part,
            "random": random_state() if self.seed is None else None,
            "scale": vars(self.scaling) if self.scaling is not None else None,
        }

    def load_training_state(
        self, saved: Mapping[str, Any], seed: int | None, random: Any, names: Mapping[str, str]
    ) -> None:
        """Take over what `training_state` gave, in whatever stages; ``names``: names here -> saved ones."""
        for parameters in self.weights.sets:
            import_set(parameters, saved, names, gradients=parameters is self.weights.own)
        self.weights.loaded()
        if self.scaling is not None:
            self.scaling.resume(saved["training"].get("scale"), hears=self.program.is_last)
        if self.seed is not None and seed is not None:
            self.seed = seed
        if self.seed is None and random is not None:
            set_random_state(random)

    def schedulers(self, *metrics: float) -> None:
        """One step of every learning-rate scheduler (where it steps per epoch)."""
        for parameters in self.weights.sets:
            parameters.schedule(*metrics)

    def learning_rates(self) -> list[float]:
        """Of the own parameters' groups, as the scheduler has them."""
        own = self.weights.own
        return [] if own is None else [float(group["lr"]) for group in own.groups]

    def last_squared_norm(self) -> float:
        """Of the gradients that were stepped with last, before clipping."""
        return self.squared_norm

    def stats(self) -> StageStats:
        """What this stage has measured of itself."""
        return self.meter.stats()

    def take_events(self) -> list[Event]:
        """What was noted since the last call."""
        return self.meter.take_events()
