"""One stage's life: first forward, stash, recompute, backward, step.

Every executor runs this and nothing else. What a tick does (schedule.py says for which batch):

    any stage but the last                       the last stage
    ----------------------                       --------------
    [1] the gradient of batch b arrives          [1] inputs of batch f arrive
    [2] recompute b from its stashed inputs      [2] forward with a graph; loss
    [3] backward; gradients go upstream          [3] backward; gradients go upstream
    [4] step                                     [4] step
    [5] inputs of batch f arrive
    [6] first forward without a graph;
        stash the inputs; outputs go downstream

The invariants (DTRP, PLoS ONE 2023; the second one ours):

- One weight version: [6] and [2] may run on predicted weights, but those are separate tensors (weights.py);
  the gradient of [3] is applied to the true ones.
- The first forward leaves no trace: buffers and any other module state are as before it, and are updated
  once, by the recompute pass. Both passes draw the same random numbers (random.py).
- A stage holds at most 2(K-k)+1 stashed inputs and one live graph.

A stage that does not recompute runs its first forward with a graph, on weights of its own copy, and keeps
both until the gradient arrives (weight stashing as in PipeDream).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .batch import Arrivals, Feed, InFlight, Report, Update
from .clipping import clip, squared_norm
from .config import TrainConfig
from .events import Event
from .links import Links
from .loss import scalar_loss
from .meter import Meter
from .ports import Ports
from .program import StageProgram, Undo, no_trace
from .random import pass_seed, random_state, seeded, set_random_state
from .schedule import backward_horizon, backward_slot, forward_horizon, forward_slot, in_updates
from .stats import StageStats
from .tied import TiedGradients
from .training_state import export_set, import_set
from .weights import Leaves, Weights

Measure = Callable[[Any, Any], Any]


class StageRunner:
    """Runs one stage, tick by tick.

    Parameters
    ----------
    program, config
        What to run and how.
    links : Links
        To the other stages.
    seed : int or None
        Base seed of the passes' random numbers; ``None``: the ambient generators (one stage only).
    report : callable
        Takes the last stage's `Report` of each batch.
    record : bool
        Whether to note what was done when (`take_events`).
    """

    def __init__(
        self,
        program: StageProgram,
        config: TrainConfig,
        links: Links,
        *,
        seed: int | None,
        report: Callable[[Report], None],
        record: bool = False,
    ) -> None:
        self.program = program
        self.config = config
        self.links = links
        self.seed = seed
        self.report = report
        self.stage, self.n_stages = program.stage, program.n_stages
        self.module: nn.Module = program.module
        self.module.to(program.device)
        self.meter = Meter(self.stage, self.n_stages, program.device, record=record)
        self.ports = Ports(program, links, self.meter)
        self.recomputes = config.recompute(program.recompute) and not program.is_last
        shrink = [config.lr_shrink ** (self.n_stages - 1 - k) for k in range(self.n_stages)]
        self.weights = Weights(self.module, program.guests, config, shrink, self.stage)
        # Back-propagation clips by one batch's gradients: no stage steps before the first one has its own.
        self.together = config.one_batch_at_a_time and config.max_grad_norm is not None
        self.tied = TiedGradients(
            program,
            self.weights,
            links,
            scheduled=config.scheduler_step == "update",
            together=self.together,
        )
        self.tick = 0
        self.feeds: dict[int, Feed] = {}
        self.in_flight: dict[int, InFlight] = {}
        self.measure: Measure | None = None
        self._flags: list[tuple[nn.Module, bool]] = []
        self.update: Update | None = None  # the update that this tick brings, if it does
        self.postponed: Update | None = None  # the update that waits for all stages' gradients
        self.postponed_slot = -1
        if config.compile_stages:
            program.module.compile_training()

    # ---- a tick, in two halves: the gradient norm over all stages lies between them --------------------

    def begin(self, feed: Feed | None) -> float:
        """The backward part (the last stage: forward and backward).

        Returns the squared norm of this stage's gradients, 0 where it does not step or nobody asks.
        """
        self.meter.begin_tick(self.links.depth(self.stage))
        if feed is not None:
            self.feeds[self.tick] = feed
        self.tied.collect(self.tick)
        self.update = None
        if self.program.is_last:
            slot = forward_slot(self.stage, self.tick)
            if slot in self.feeds:
                self.update = self._last_stage(slot)
        else:
            slot = self._backwarded
            if slot in self.in_flight:
                self.update = self._backward(slot)
        if self.together:
            self._postpone()
        return self._squared_norm() if self.update is not None and self.config.max_grad_norm else 0.0

    def _postpone(self) -> None:
        """Hold the update back until the tick in which the first stage backwards the batch."""
        if self.update is not None:
            self.postponed, self.postponed_slot = self.update, self._backwarded
            self.update = None
        if self.postponed is not None and self.postponed_slot == backward_slot(0, self.tick, self.n_stages):
            self.update, self.postponed = self.postponed, None

    @property
    def _backwarded(self) -> int:
        """The slot that this stage backwards in this tick."""
        return backward_slot(self.stage, self.tick, self.n_stages)

    def finish(self, squared_norm_of_all: float = 0.0) -> None:
        """The step, then the first forward of all stages but the last."""
        if self.update is not None:
            slot = self.postponed_slot if self.together else self._backwarded
            self._step(slot, squared_norm_of_all**0.5, self.update)
        if not self.program.is_last and forward_slot(self.stage, self.tick) in self.feeds:
            self._first_forward(forward_slot(self.stage, self.tick))
        self.tick += 1
        self.meter.end_tick()

    def settle(self) -> None:
        """After the last tick of a drain: take in the sums of tied gradients that are still on their way."""
        self.tied.collect(None)

    # ---- the passes ----------------------------------------------------------------------------------

    def _first_forward(self, slot: int) -> None:
        feed = self.feeds.pop(slot)
        arrivals = self.ports.arrivals(slot, feed, "forward")
        takes_part = self.ports.takes_part
        horizon = forward_horizon(self.stage, self.n_stages, self.config.horizon)
        leaves = self._ahead(horizon, feed.update, first=True)
        flight = InFlight(feed.batch, arrivals, feed.update)
        if self.recomputes or not takes_part:
            tracks = no_trace(self.module) if takes_part else nullcontext()
            with torch.no_grad(), tracks, self.meter.timed("forward", feed.batch):
                outputs = self._run(arrivals, leaves, feed.batch)
        else:
            if not self.config.one_batch_at_a_time:
                leaves = self.weights.stash(leaves)
            flight.arrivals = self.ports.differentiable(arrivals)
            with torch.enable_grad(), self.meter.timed("forward", feed.batch):
                outputs = self._run(flight.arrivals, leaves, feed.batch)
            flight.outputs, flight.leaves = outputs, leaves
            self.meter.graph(+1)
        if takes_part:
            self.in_flight[slot] = flight
            self.meter.stash(len(self.in_flight))
        self.ports.send("forward", slot, feed.batch, outputs)

    def _backward(self, slot: int) -> Update | None:
        """Recompute (or take the kept graph) and backward; the update to be made, if there is one."""
        gradients, skip = self.ports.output_gradients(slot, self.config.grad_shrink)
        flight = self.in_flight.pop(slot)
        self.meter.stash(len(self.in_flight))
        batch, update = flight.batch, flight.update
        if skip:
            if flight.outputs is not None:
                self.meter.graph(-1)
            self.ports.send_gradients(slot, batch, flight.arrivals, skip=True)
            self.tied.give_up(slot)
            return None
        if flight.outputs is None:
            horizon = backward_horizon(self.stage, self.n_stages, self.config.horizon)
            leaves = self._ahead(horizon, update)
            arrivals = self.ports.differentiable(flight.arrivals)
            self.meter.graph(+1)
            with torch.enable_grad(), self.meter.timed("recompute", batch):
                outputs = self._run(arrivals, leaves, batch)
        else:
            arrivals, leaves, outputs = flight.arrivals, flight.leaves, flight.outputs
        with self.meter.timed("backward", batch):
            pairs = [(outputs[n], g) for n, g in gradients.items() if outputs[n].requires_grad]
            del flight, outputs
            self.tied.before_backward()
            if pairs:
                torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
            del pairs
            self.weights.absorb(leaves)
        self.meter.graph(-1)
        self.ports.send_gradients(slot, batch, arrivals)
        self.tied.after_backward(slot, update)
        return update

    def _last_stage(self, slot: int) -> Update | None:
        """Forward with a graph, loss, backward; the update to be made, if there is one."""
        feed = self.feeds.pop(slot)
        arrivals = self.ports.differentiable(self.ports.arrivals(slot, feed, "forward"))
        horizon = forward_horizon(self.stage, self.n_stages, self.config.horizon)
        leaves = self._ahead(horizon, feed.update)
        self.meter.graph(+1)
        skips = self.config.on_nonfinite == "skip"
        undo = Undo(self.module) if skips else None
        with torch.enable_grad(), self.meter.timed("forward", feed.batch):
            loss = self._loss(arrivals, leaves, feed)
        if undo is not None and not bool(torch.isfinite(loss.detach())):
            undo()
            self.meter.graph(-1)
            self.ports.send_gradients(slot, feed.batch, arrivals, skip=True)
            self.tied.give_up(slot)
            self.report(Report.of(feed.batch, loss.detach(), skipped=True, may_be_nonfinite=True))
            return None
        self.report(Report.of(feed.batch, loss.detach(), skipped=False, may_be_nonfinite=skips))
        with self.meter.timed("backward", feed.batch):
            self.tied.before_backward()
            if loss.requires_grad:
                scaled = loss if self.config.accumulate == 1 else loss / self.config.accumulate
                torch.autograd.backward([scaled])
                del scaled
            del loss
            self.weights.absorb(leaves)
        self.meter.graph(-1)
        self.ports.send_gradients(slot, feed.batch, arrivals)
        self.tied.after_backward(slot, feed.update)
        return feed.update

    def _loss(self, arrivals: Arrivals, leaves: Leaves, feed: Feed) -> Tensor:
        with self._context(feed.batch):
            outputs = self._functional_call(self.ports.inputs(arrivals), leaves)
            output = self.ports.result(arrivals, outputs, training=True)
            return scalar_loss(self.config.loss_fn, output, self._on_device(feed.target))

    # ---- evaluation ------------------------------------------------------------------------------------

    def begin_evaluation(self, measure: Measure | None) -> None:
        """Go to eval mode; the last stage will answer each batch with ``measure(output, target)``."""
        self.measure = measure
        self._flags = [(m, m.training) for m in self.module.modules()]
        self.module.eval()

    def end_evaluation(self) -> None:
        """Every submodule's own mode is as before `begin_evaluation`."""
        for m, training in self._flags:
            m.training = training
        self._flags = []

    def evaluate(self, slot: int, feed: Feed) -> Any:
        """A forward pass in eval mode on the true weights; the last stage measures (or gives the output)."""
        arrivals = self.ports.arrivals(slot, feed, "evaluate")
        with torch.no_grad(), self._context(feed.batch):
            outputs = self._functional_call(self.ports.inputs(arrivals, training=False), {})
            if self.program.is_last:
                output = self.ports.result(arrivals, outputs, training=False)
                target = self._on_device(feed.target)
                return self.measure(output, target) if self.measure is not None else output
        self.ports.send("evaluate", slot, feed.batch, outputs)
        return None

    # ---- its state -------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Parameters that this stage owns, and its buffers, by name, in host memory."""
        guests = {name for parameters in self.weights.guests.values() for name in parameters.names}
        named = [*self.module.named_parameters(), *self.module.named_buffers()]
        return {name: t.detach().cpu() for name, t in named if name not in guests}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Overwrite parameters and buffers, guests included; names of other stages are passed over."""
        with torch.no_grad():
            for name, tensor in [*self.module.named_parameters(), *self.module.named_buffers()]:
                if name in state:
                    tensor.copy_(state[name])

    def training_state(self) -> dict[str, Any]:
        """What besides weights and buffers the next batch's training depends on, by parameter name."""
        own = self.weights.own
        return {
            "parameters": export_set(own) if own is not None else None,
            "random": random_state() if self.seed is None else None,
        }

    def load_training_state(
        self, sets: Sequence[Mapping[str, Any]], seed: int | None, random: Any, names: Mapping[str, str]
    ) -> None:
        """Take over what `training_state` gave, in whatever stages; ``names``: names here -> saved ones."""
        for parameters in self.weights.sets:
            import_set(parameters, sets, names, gradients=parameters is self.weights.own)
        if self.seed is not None and seed is not None:
            self.seed = seed
        if self.seed is None and random is not None:
            set_random_state(random)

    def schedule(self, *metrics: float) -> None:
        """One step of every learning-rate scheduler (where it steps per epoch)."""
        for parameters in self.weights.sets:
            parameters.schedule(*metrics)

    def stats(self) -> StageStats:
        """What this stage has measured of itself."""
        return self.meter.stats()

    def take_events(self) -> list[Event]:
        """What was noted since the last call."""
        return self.meter.take_events()

    # ---- what passes are made of -----------------------------------------------------------------------

    def _run(self, arrivals: Arrivals, leaves: Leaves, batch: int) -> tuple[Any, ...]:
        with self._context(batch):
            return self._functional_call(self.ports.inputs(arrivals), leaves)

    def _functional_call(self, inputs: Sequence[Any], leaves: Leaves) -> tuple[Any, ...]:
        if self.program.writes_inputs:
            inputs = [x.clone() if isinstance(x, Tensor) and not x.requires_grad else x for x in inputs]
        if not leaves:
            return self.module(*inputs)  # type: ignore[no-any-return]
        return torch.func.functional_call(self.module, leaves, tuple(inputs))  # type: ignore[no-any-return]

    @contextmanager
    def _context(self, batch: int) -> Iterator[None]:
        """A pass's random numbers and number formats."""
        seed = None if self.seed is None else pass_seed(self.seed, batch, self.stage)
        device, dtype = self.program.device, self.config.autocast
        formats = nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
        with seeded(seed, device), formats:
            yield

    def _on_device(self, target: Any) -> Any:
        if self.program.device.type == "cpu":
            return target
        device = self.program.device
        return pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), target)

    def _ahead(self, batches: int, update: Update, *, first: bool = False) -> Leaves:
        """Leaves ``batches`` batches ahead. A guest's update becomes visible one tick after its owner's step,
        so that a first forward, which comes after the stage's own step, still misses one of them."""
        if not self.config.predicts:
            return {}
        scale, every = self.config.horizon_scale, self.config.accumulate
        own, guests = (scale * float(in_updates(n, every)) for n in (batches, batches + first))
        return self.weights.ahead(own, guests, update.lr_scale)

    # ---- the step --------------------------------------------------------------------------------------

    def _squared_norm(self) -> float:
        own = self.weights.own
        if own is None or own.waiting + 1 < self.config.accumulate:
            return 0.0
        return squared_norm(own.names.values())

    def _step(self, slot: int, norm: float, update: Update) -> None:
        own = self.weights.own
        if own is None:
            return
        with self.meter.timed("step", -1):
            own.waiting += 1
            if own.waiting < self.config.accumulate:
                self.tied.share(slot, stepped=False)
                return
            if self.config.max_grad_norm is not None:
                clip(own.names.values(), norm, self.config.max_grad_norm, alone=self.n_stages == 1)
            self.tied.share(slot, stepped=True)
            own.step(update.lr_scale)
            if self.config.scheduler_step == "update":
                for _ in range(update.batches):
                    own.schedule()
