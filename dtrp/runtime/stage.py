"""One stage's life: first forward, stash, recompute, backward, step.

Every executor runs this and nothing else; they differ in links only. What a tick does (schedule.py says for
which batch):

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

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..wiring import CALLER, Constant, Source
from .config import TrainConfig
from .events import Event
from .links import Channel, Links, Message
from .program import StageProgram, no_trace
from .random import pass_seed, seeded
from .schedule import (
    backward_horizon,
    backward_slot,
    forward_horizon,
    forward_slot,
    in_updates,
    weight_version,
)
from .tied import TiedGradients
from .weights import Leaves, Weights

Arrivals = dict[Source, Any]
Measure = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Feed:
    """One batch as the caller hands it to one stage."""

    batch: int
    inputs: tuple[Any, ...]  # the model inputs that this stage asks the caller for
    target: Any = None  # the last stage's


@dataclass
class InFlight:
    """What a stage keeps of a batch between its first forward and its backward."""

    batch: int
    arrivals: Arrivals
    outputs: tuple[Any, ...] | None = None  # with their graph, where the stage keeps it
    leaves: Leaves = field(default_factory=dict)  # the weights that graph was built on


@dataclass
class Report:
    """What the last stage says of a batch."""

    batch: int
    loss: Tensor  # in host memory; on its way there where it comes from a CUDA device
    skipped: bool = False
    may_be_nonfinite: bool = True
    arrival: torch.cuda.Event | None = None

    @classmethod
    def of(cls, batch: int, loss: Tensor, *, skipped: bool, may_be_nonfinite: bool) -> Report:
        """Starts the loss on its way to the host without waiting for the device."""
        if not loss.is_cuda:
            report = cls(batch, loss, skipped, may_be_nonfinite)
            report.value()  # before anything is trained with it
            return report
        arrived = torch.cuda.Event()
        host = torch.empty_like(loss, device="cpu", pin_memory=True).copy_(loss, non_blocking=True)
        arrived.record()
        return cls(batch, host, skipped, may_be_nonfinite, arrived)

    def ready(self) -> bool:
        """Whether the loss can be read without waiting."""
        return self.arrival is None or self.arrival.query()

    def value(self) -> float:
        """The loss; waits for it.

        Raises
        ------
        FloatingPointError
            It is NaN or infinite, and the run does not skip such batches.
        """
        if self.arrival is not None:
            self.arrival.synchronize()
        value = float(self.loss)
        if not (self.may_be_nonfinite or math.isfinite(value)):
            raise FloatingPointError(
                f"the loss of batch {self.batch} is {value}; look at the batch and the learning rate, or pass "
                f"on_nonfinite='skip' to leave such batches out"
            )
        return value


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
        self.events: list[Event] | None = [] if record else None
        self.stage, self.n_stages = program.stage, program.n_stages
        self.module: nn.Module = program.module
        self.module.to(program.device)
        self.recomputes = config.recompute(program.recompute) and not program.is_last
        owner_of = {
            name: tie.owner
            for tie in program.ties
            if (name := tie.name_in(self.stage)) is not None and tie.owner != self.stage
        }
        shrink = [config.lr_shrink ** (self.n_stages - 1 - k) for k in range(self.n_stages)]
        self.weights = Weights(self.module, owner_of, config, shrink, self.stage)
        self.tied = TiedGradients(program, self.weights, links)
        self.tick = 0
        self.feeds: dict[int, Feed] = {}
        self.in_flight: dict[int, InFlight] = {}
        self.phase = "idle"
        self.measure: Measure | None = None
        self._flags: list[tuple[nn.Module, bool]] = []
        self.stepping = False  # the tick that runs has brought a gradient
        self.graphs = 0  # live autograd graphs
        self.most_stashed = self.most_graphs = 0
        self.busy_seconds = 0.0
        self._call = self._functional_call
        if config.compile_stages:
            self._call = torch.compile(self._functional_call)

    # ---- a tick, in two halves: the gradient norm over all stages lies between them --------------------

    def begin(self, feed: Feed | None) -> float:
        """The backward part (the last stage: forward and backward).

        Returns the squared norm of this stage's gradients, 0 where it does not step or nobody asks.
        """
        if feed is not None:
            self.feeds[self.tick] = feed
        self.tied.collect(self.tick)
        if self.program.is_last:
            slot = forward_slot(self.stage, self.tick)
            self.stepping = slot in self.feeds and self._last_stage(slot)
        else:
            slot = backward_slot(self.stage, self.tick, self.n_stages)
            self.stepping = slot in self.in_flight and self._backward(slot)
        return self._squared_norm() if self.stepping and self.config.max_grad_norm else 0.0

    def finish(self, squared_norm: float = 0.0) -> None:
        """The step, then the first forward of all stages but the last."""
        slot = backward_slot(self.stage, self.tick, self.n_stages)
        if self.stepping:
            self._step(slot, squared_norm)
        if not self.program.is_last and forward_slot(self.stage, self.tick) in self.feeds:
            self._first_forward(forward_slot(self.stage, self.tick))
        self.stepping = False
        self.tick += 1
        self.phase = "idle"

    def settle(self) -> None:
        """After the last tick of a drain: take in the sums of tied gradients that are still on their way."""
        self.tied.collect(None)

    # ---- the passes ----------------------------------------------------------------------------------

    def _first_forward(self, slot: int) -> None:
        feed = self.feeds.pop(slot)
        arrivals = self._arrivals(slot, feed, "forward")
        keeps = self.program.train.gradients
        takes_part = any(i == self.stage for i, _ in keeps)  # someone will send a gradient
        leaves = self._ahead(forward_horizon(self.stage, self.n_stages, self.config.horizon), first=True)
        flight = InFlight(feed.batch, arrivals)
        if self.recomputes or not takes_part:
            tracks = no_trace(self.module) if takes_part else nullcontext()
            with torch.no_grad(), tracks, self._timed("forward", feed.batch, slot):
                outputs = self._run(arrivals, leaves, feed.batch)
        else:
            if not self.config.one_batch_at_a_time:
                leaves = self.weights.stash(leaves)
            flight.arrivals = self._differentiable(arrivals)
            with torch.enable_grad(), self._timed("forward", feed.batch, slot):
                outputs = self._run(flight.arrivals, leaves, feed.batch)
            flight.outputs, flight.leaves = outputs, leaves
            self._count_graphs(+1)
        if takes_part:
            self.in_flight[slot] = flight
            self.most_stashed = max(self.most_stashed, len(self.in_flight))
        self._send_forward(slot, outputs)

    def _backward(self, slot: int) -> bool:
        """Recompute (or take the kept graph) and backward; whether there is a gradient to step with."""
        gradients, skip = self._output_gradients(slot)
        flight = self.in_flight.pop(slot)
        if skip:
            if flight.outputs is not None:
                self._count_graphs(-1)
            self._send_gradients(slot, flight.arrivals, skip=True)
            self.tied.give_up(slot)
            return False
        if flight.outputs is None:
            leaves = self._ahead(backward_horizon(self.stage, self.n_stages, self.config.horizon))
            arrivals = self._differentiable(flight.arrivals)
            self._count_graphs(+1)
            with torch.enable_grad(), self._timed("recompute", flight.batch, slot):
                outputs = self._run(arrivals, leaves, flight.batch)
        else:
            arrivals, leaves, outputs = flight.arrivals, flight.leaves, flight.outputs
        shrink = self.config.grad_shrink
        with self._timed("backward", flight.batch, slot):
            pairs = [
                (outputs[n], g if shrink == 1.0 else g * shrink)
                for n, g in gradients.items()
                if outputs[n].requires_grad
            ]
            del flight, outputs
            self.tied.before_backward()
            if pairs:
                torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
            del pairs
            self.weights.absorb(leaves)
        self._count_graphs(-1)
        self._send_gradients(slot, arrivals)
        self.tied.after_backward(slot)
        return True

    def _last_stage(self, slot: int) -> bool:
        """Forward with a graph, loss, backward; whether there is a gradient to step with."""
        feed = self.feeds.pop(slot)
        arrivals = self._differentiable(self._arrivals(slot, feed, "forward"))
        leaves = self._ahead(forward_horizon(self.stage, self.n_stages, self.config.horizon))
        self._count_graphs(+1)
        skips = self.config.on_nonfinite == "skip"
        undo = _Undo(self.module) if skips else None
        with torch.enable_grad(), self._timed("forward", feed.batch, slot):
            loss = self._loss(arrivals, leaves, feed)
        if undo is not None and not bool(torch.isfinite(loss.detach())):
            undo()
            self._count_graphs(-1)
            self._send_gradients(slot, arrivals, skip=True)
            self.tied.give_up(slot)
            self.report(Report.of(feed.batch, loss.detach(), skipped=True, may_be_nonfinite=True))
            return False
        self.report(Report.of(feed.batch, loss.detach(), skipped=False, may_be_nonfinite=skips))
        with self._timed("backward", feed.batch, slot):
            self.tied.before_backward()
            if loss.requires_grad:
                (loss if self.config.accumulate == 1 else loss / self.config.accumulate).backward()
            del loss
            self.weights.absorb(leaves)
        self._count_graphs(-1)
        self._send_gradients(slot, arrivals)
        self.tied.after_backward(slot)
        return True

    def _loss(self, arrivals: Arrivals, leaves: Leaves, feed: Feed) -> Tensor:
        with self._context(feed.batch), self._autocast():
            output = self._result(arrivals, self._call(self._inputs(arrivals), leaves), training=True)
            return scalar_loss(self.config.loss_fn, output, feed.target)

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
        arrivals = self._arrivals(slot, feed, "evaluate")
        wires = self.program.evaluate.stages[self.stage]
        with torch.no_grad(), self._context(feed.batch), self._autocast():
            outputs = self._functional_call([arrivals[s] for s in wires.inputs], {})
            if self.program.is_last:
                output = self._result(arrivals, outputs, training=False)
                return self.measure(output, feed.target) if self.measure is not None else output
        for (i, j), sent in self.program.evaluate.sends.items():
            if i == self.stage:
                message = Message(slot, tuple(outputs[n] for n in sent))
                self.links.send(Channel("evaluate", i, j), message)
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

    def schedule(self, *metrics: float) -> None:
        """One step of every learning-rate scheduler (where it steps per epoch)."""
        for parameters in self.weights.sets:
            parameters.schedule(*metrics)

    def take_events(self) -> list[Event]:
        """What was noted since the last call."""
        taken, self.events = self.events or [], [] if self.events is not None else None
        return taken

    # ---- what passes are made of -----------------------------------------------------------------------

    def _run(self, arrivals: Arrivals, leaves: Leaves, batch: int) -> tuple[Any, ...]:
        with self._context(batch), self._autocast():
            return self._call(self._inputs(arrivals), leaves)

    def _functional_call(self, inputs: Sequence[Any], leaves: Leaves) -> tuple[Any, ...]:
        if self.program.writes_inputs:
            inputs = [x.clone() if isinstance(x, Tensor) and not x.requires_grad else x for x in inputs]
        if not leaves:
            return self.module(*inputs)  # type: ignore[no-any-return]
        return torch.func.functional_call(self.module, leaves, tuple(inputs))  # type: ignore[no-any-return]

    def _inputs(self, arrivals: Arrivals) -> list[Any]:
        return [arrivals[s] for s in self.program.train.stages[self.stage].inputs]

    def _context(self, batch: int) -> Any:
        seed = None if self.seed is None else pass_seed(self.seed, batch, self.stage)
        return seeded(seed, self.program.device)

    def _autocast(self) -> Any:
        if self.config.autocast is None:
            return nullcontext()
        return torch.autocast(self.program.device.type, dtype=self.config.autocast)

    def _ahead(self, batches: int, *, first: bool = False) -> Leaves:
        """Leaves ``batches`` batches ahead. A guest's update becomes visible one tick after its owner's step,
        so that a first forward, which comes after the stage's own step, still misses one of them."""
        if not self.config.predicts:
            return {}
        own = self._horizon(batches)
        return self.weights.ahead(own, self._horizon(batches + 1) if first else own)

    def _horizon(self, batches: int) -> float:
        return self.config.horizon_scale * float(in_updates(batches, self.config.accumulate))

    def _arrivals(self, slot: int, feed: Feed, kind: Any) -> Arrivals:
        """All values that reach this stage for a batch, on its device."""
        wiring = self.program.wiring(kind == "forward")
        device = self.program.device
        indices = wiring.caller_inputs(self.stage)
        found: Arrivals = {Source(CALLER, i): v for i, v in zip(indices, feed.inputs, strict=True)}
        for (i, j), sent in wiring.sends.items():
            if j == self.stage:
                with self._waiting(kind, i):
                    message = self.links.receive(Channel(kind, i, j), slot)
                found |= {Source(i, n): v for n, v in zip(sent, message.values, strict=True)}
        return {
            s: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for s, v in found.items()
        }

    def _differentiable(self, arrivals: Arrivals) -> Arrivals:
        """The same values, those that carry gradient as fresh leaves of a graph."""
        wanted = {
            Source(i, n) for (i, j), sent in self.program.train.gradients.items() if j == self.stage for n in sent
        }
        return {s: v.detach().requires_grad_() if s in wanted else v for s, v in arrivals.items()}

    def _send_forward(self, slot: int, outputs: tuple[Any, ...]) -> None:
        for (i, j), sent in self.program.train.sends.items():
            if i == self.stage:
                self.links.send(Channel("forward", i, j), Message(slot, tuple(outputs[n] for n in sent)))

    def _output_gradients(self, slot: int) -> tuple[dict[int, Tensor], bool]:
        """Sum of the gradients of each output, the last stage's first (autograd's own order)."""
        total: dict[int, Tensor] = {}
        skip = False
        for (i, j), sent in sorted(self.program.train.gradients.items(), key=lambda item: -item[0][1]):
            if i == self.stage:
                with self._waiting("backward", j):
                    message = self.links.receive(Channel("backward", j, i), slot)
                skip |= message.skip
                for n, g in zip(sent, message.values, strict=True):
                    if g is not None:
                        g = g.to(self.program.device, non_blocking=True)
                        total[n] = g if n not in total else total[n] + g
        return total, skip

    def _send_gradients(self, slot: int, arrivals: Arrivals, *, skip: bool = False) -> None:
        for (i, j), sent in self.program.train.gradients.items():
            if j == self.stage:
                values = tuple(None if skip else arrivals[Source(i, n)].grad for n in sent)
                self.links.send(Channel("backward", j, i), Message(slot, values, skip))

    def _result(self, arrivals: Arrivals, outputs: Sequence[Any], training: bool) -> Any:
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

    # ---- the step --------------------------------------------------------------------------------------

    def _squared_norm(self) -> float:
        own = self.weights.own
        if own is None or own.waiting + 1 < self.config.accumulate:
            return 0.0
        norms = [p.grad.norm().double() for p in own.names.values() if p.grad is not None]
        return float(torch.stack(norms).square().sum()) if norms else 0.0

    def _step(self, slot: int, squared_norm: float) -> None:
        own = self.weights.own
        with self._timed("step", -1, slot):
            if own is not None:
                own.waiting += 1
                if own.waiting >= self.config.accumulate:
                    if self.config.max_grad_norm is not None:
                        self._clip(own.names.values(), squared_norm**0.5, self.config.max_grad_norm)
                    self.tied.share(slot, stepped=True)
                    own.step()
                    if self.config.scheduler_step == "update":
                        own.schedule()
                else:
                    self.tied.share(slot, stepped=False)

    def _clip(self, parameters: Collection[nn.Parameter], norm: float, limit: float) -> None:
        """Scale gradients by ``min(1, limit / (norm + 1e-6))``; ``norm`` is the one over all stages."""
        if self.n_stages == 1:  # to the bit what the plain loop does
            torch.nn.utils.clip_grad_norm_(parameters, limit)
            return
        factor = min(1.0, limit / (norm + 1e-6))
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(factor)

    # ---- seeing it run ---------------------------------------------------------------------------------

    def _count_graphs(self, change: int) -> None:
        self.graphs += change
        self.most_graphs = max(self.most_graphs, self.graphs)

    @contextmanager
    def _timed(self, kind: str, batch: int, slot: int) -> Iterator[None]:
        self.phase = kind
        start = time.perf_counter()
        yield
        end = time.perf_counter()
        self.busy_seconds += end - start
        if self.events is not None:
            version = weight_version(self.stage, self.tick)
            if kind != "forward" or self.program.is_last:
                version -= 1
            self.events.append(
                Event(self.stage, self.tick, kind, batch, version, start, end, len(self.in_flight), self.graphs)
            )

    @contextmanager
    def _waiting(self, kind: str, other: int) -> Iterator[None]:
        self.phase = f"waiting for stage {other} ({kind})"
        start = time.perf_counter()
        yield
        if self.events is not None:
            self.events.append(
                Event(self.stage, self.tick, "wait", -1, 0, start, time.perf_counter(), len(self.in_flight), 0)
            )


class _Undo:
    """Puts module state back to where it was when this was made."""

    def __init__(self, module: nn.Module) -> None:
        self.buffers = [(b, b.detach().clone()) for b in module.buffers()]
        self.kept = [(m, m.__dict__.copy(), m._buffers.copy()) for m in module.modules()]

    def __call__(self) -> None:
        for m, attributes, buffers in self.kept:
            m.__dict__.update(attributes)
            m._buffers.update(buffers)
        for buffer, value in self.buffers:
            buffer.copy_(value)


def scalar_loss(loss_fn: Callable[[Any, Any], Tensor] | None, output: Any, target: Any) -> Tensor:
    """The loss of a batch.

    Raises
    ------
    TypeError
        It is not a scalar tensor.
    """
    if loss_fn is not None:
        loss = loss_fn(output, target)
        origin = f"loss_fn {getattr(loss_fn, '__name__', loss_fn)!r}"
    else:
        loss, origin = own_loss(output), "the model (loss_fn=None)"
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"{origin} gave {got}, expected a scalar tensor; reduce it, for example with .mean()")
    return loss.reshape(())


def own_loss(output: Any) -> Any:
    """The loss that a model gives itself: its output, or the output's ``loss`` entry."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict) and "loss" in output:
        return output["loss"]
    if getattr(output, "loss", None) is not None:
        return output.loss
    return output
