"""What a stage answers between its rounds, whoever asks: its state, its measurements, its losses.

Executors pass each question on by its name (`Inline.call`), so that it is the same wherever a stage runs.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .batch import Feed, Loss, Skip
from .clipping import squared
from .evaluation import Measure
from .events import Event
from .loss import check_finite, held_loss
from .random import random_state, set_random_state
from .stats import StageStats
from .training_state import export_set, import_set
from .twins import attributes_of, own_modules, set_attributes

if TYPE_CHECKING:
    from .stage import Stage


class Answers:
    """Of one stage."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._measure: Measure | None = None
        self._modes: list[tuple[nn.Module, bool]] = []

    def follow(self, exact: bool) -> None:
        """From the next segment on, follow the exact order, or the run's own again."""
        stage = self.stage
        stage.schedule = stage.norms.schedule = stage.config.schedule(stage.n_stages, exact=exact)

    # ---- evaluation ----------------------------------------------------------------------------------------

    def begin_evaluation(self, measure: Measure | None) -> None:
        """Go to eval mode; the last stage will answer each batch with what ``measure`` makes of it."""
        program, module = self.stage.program, self.stage.module
        if isinstance(measure, Measure) and self.stage.config.loss_fn is held_loss and program.is_last:
            measure = measure.with_loss(module.get_submodule("loss"))
        self._measure = measure.begin(program.device) if measure and program.is_last else measure
        self._modes = [(m, m.training) for m in module.modules()]
        module.eval()

    def evaluate(self, feed: Feed) -> Generator[None, None, Any]:
        """One batch of it."""
        return self.stage.passes.evaluate(feed, self._measure)

    def totals(self) -> Any:
        """The last stage: what metrics say that have seen all batches."""
        return self._measure.totals() if self._measure and self.stage.program.is_last else None

    def end_evaluation(self) -> None:
        """Every submodule's own mode is as before `begin_evaluation`."""
        for m, training in self._modes:
            m.training = training
        self._modes = []

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
        while self.stage.reports and (wait or self.stage.reports[0].ready()):
            loss = self.stage.reports.popleft().value()
            if not self.stage.config.gives_up:
                check_finite(loss.value, f"the loss of batch {loss.batch}")
            found.append(loss._replace(lr=next(iter(self.learning_rates()), None)))
        if self.stage.speaks:
            found += self.stage.updates.skips
        self.stage.updates.skips = []
        return found

    def state(self) -> dict[str, Any]:
        """Parameters that this stage owns and its buffers, by name, in host memory; and what modules of the
        user's keep in plain attributes, by module."""
        guests = {name for parameters in self.stage.weights.guests.values() for name in parameters.names}
        named = [*self.stage.module.named_parameters(), *self.stage.module.named_buffers()]
        tensors = {name: t.detach().cpu() for name, t in named if name not in guests}
        return {"tensors": tensors, "attributes": attributes_of(own_modules(self.stage.module))}

    def load_state(self, tensors: Mapping[str, Tensor], attributes: Mapping[str, Mapping[str, Any]]) -> None:
        """Overwrite parameters, buffers and plain attributes; names of other stages are passed over."""
        with torch.no_grad():
            for name, tensor in [*self.stage.module.named_parameters(), *self.stage.module.named_buffers()]:
                if name in tensors:
                    tensor.copy_(tensors[name])
        modules = own_modules(self.stage.module)
        set_attributes(modules, attributes)
        self.stage.weights.forget()

    def take_loss(self, loss_fn: Any) -> None:
        """The loss as the script has it now; of one that is a module of the stage, only its code."""
        passes = self.stage.passes
        if self.stage.program.is_last and passes.config.loss_fn is not held_loss:
            passes.config = replace(passes.config, loss_fn=loss_fn)

    def training_state(self, names: Mapping[str, str]) -> dict[str, Any]:
        """What besides weights and buffers the next batch's training depends on, by parameter name;
        ``names``: names here -> names to save under."""
        own = self.stage.weights.own
        return {
            "parameters": export_set(own, names) if own is not None else None,
            "takes_part": self.stage.takes_part,
            "random": random_state() if self.stage.passes.seed is None else None,
            "scale": vars(self.stage.scaling) if self.stage.scaling is not None else None,
        }

    def load_training_state(
        self, saved: Mapping[str, Any], seed: int | None, random: Any, names: Mapping[str, str]
    ) -> None:
        """Take over what `training_state` gave, in whatever stages; ``names``: names here -> saved ones."""
        for parameters in self.stage.weights.sets:
            import_set(parameters, saved, names, gradients=parameters is self.stage.weights.own)
        if self.stage.replicas is not None:
            self.stage.replicas.keep_first(self.stage.waiting)
        self.stage.weights.forget()
        if self.stage.scaling is not None:
            self.stage.scaling.resume(saved["training"].get("scale"), hears=self.stage.program.is_last)
        if self.stage.passes.seed is not None and seed is not None:
            self.stage.passes.seed = seed
        if self.stage.passes.seed is None and random is not None:
            set_random_state(random)

    def schedulers(self, *metrics: float) -> None:
        """One step of every learning-rate scheduler (where it steps per epoch)."""
        for parameters in self.stage.weights.sets:
            parameters.schedule(*metrics)

    def scheduler_aims_at(self) -> str | None:
        """What the learning-rate scheduler wants of the metric that it steps on ("min", "max"), if of one."""
        return next((s.aims_at for s in self.stage.weights.sets if s.aims_at), None)

    def learning_rates(self) -> list[float]:
        """Of the own parameters' groups, as the scheduler has them."""
        own = self.stage.weights.own
        rates = [] if own is None else [group.get("lr") for group in own.groups]
        return [float(rate) for rate in rates if rate is not None]  # some optimizers find their own

    def last_squared_norm(self) -> float:
        """Of the gradients that were stepped with last, before clipping."""
        return squared(self.stage.updates.last_norms)

    def stats(self) -> StageStats:
        """What this stage has measured of itself."""
        return self.stage.meter.stats()

    def take_events(self) -> list[Event]:
        """What was noted since the last call."""
        return self.stage.meter.take_events()
