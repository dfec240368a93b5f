"""A model and what was compiled of it: planned once, laid over for its other modes, again if it was changed.

This is the seam between the two halves: all that a trainer asks of the model that was compiled.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .errors import DtrpError
from .exclusive import EXCLUSIVE
from .layout import as_one, share_out
from .loss_check import check_loss
from .loss_reads import LossReads
from .orders import choose_order, least_parts
from .partitioner.capture import capture
from .partitioner.capture.fits import Fits
from .partitioner.capture.graph import Signature
from .partitioner.capture.modes import Flags, any_training, flags_of, set_flags, training_flags
from .partitioner.capture.unread import unread
from .partitioner.capture.watch import Watch
from .partitioner.compiler import Compiled, Request, adapt, compile_model, reprice
from .partitioner.example import keep_example
from .partitioner.plan import Plan
from .partitioner.report import shared
from .partitioner.training import Training
from .programs import make_programs
from .rebalancing import better_cut, recut_model
from .runtime import launched
from .runtime.config import TrainConfig
from .runtime.joint_norm import alone
from .runtime.optim import OptimizerKind
from .runtime.program import StageProgram
from .runtime.rebalance import Move
from .runtime.stats import StageStats
from .training_report import TrainingReport
from .trial import tried

log = logging.getLogger("dtrp")

_FORMS = 8
"""Forms of call that get stages of their own; more are refused: something changes that should be a tensor."""


class Planning:
    """Of one model."""

    def __init__(self, model: nn.Module, request: Request) -> None:
        self.model, self.request = model, request
        self._compiled: Compiled | None = None  # the latest that was used
        self._variants: dict[Any, Compiled] = {}  # by form, flags, and whether gradients are enabled
        self._forms: dict[int, Signature] = {}  # of calls; the first is the one that was planned for
        self.form, self._n_forms = 0, 0  # of the latest call; how many were made
        self._watch: Watch | None = None
        self._unread: dict[int, frozenset[str]] = {}  # names of strings that the code never looks at, by form
        self._read: set[str] = set()  # those that it does look at
        self._call: tuple[Sequence[Any], Mapping[str, Any]] = ((), {})  # the latest
        self._planned_for: tuple[Sequence[Any], Mapping[str, Any]] | None = None  # of other sizes, perhaps
        self._fits: dict[int, Fits] = {}
        self.example: list[Tensor | None] = []  # of the call that was planned for, to verify exports with

    def __getstate__(self) -> dict[str, Any]:
        plan = None if self._compiled is None else self.planned()
        call = self._planned_for or self._call
        return {"model": self.model, "request": self.request, "call": call, "plan": plan}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy captures its own model, and follows the plan that was made."""
        Planning.__init__(self, state["model"], state["request"])
        if state["plan"] is not None:
            self.adopt(state["plan"])
            self.prepare(*state["call"])
            self.request = replace(self.request, plan=state["request"].plan)  # it may plan anew, too

    @property
    def n_stages(self) -> int:
        return len(self.request.devices)

    @property
    def made(self) -> Compiled:
        if self._compiled is None:
            raise DtrpError(
                "the pipeline has not been planned yet: pass example_inputs to dtrp.compile, or call the "
                "pipeline (or train a batch) first"
            )
        return self._compiled

    @property
    def _first(self) -> Compiled:
        """The variant that was planned, and whose nodes the costs are of; others are laid over it."""
        return next(iter(self._variants.values()))

    @property
    def training(self) -> bool:
        """Whether any part of the model is in train mode; if none is, it is being looked at."""
        return any_training(self.model)

    def changed(self) -> str:
        """What of the model is not as it was when it was compiled; ``""`` if all is."""
        with EXCLUSIVE:
            return "" if self._watch is None else self._watch.changed()

    def prepare(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Plan for a call with these arguments, unless planned already; again if the model was changed.

        Raises
        ------
        CaptureError, PlanMismatchError
            The model was changed since, and could not be captured again or does not fit its plan any more.
        """
        with EXCLUSIVE:
            changed = self.changed()
            if changed:
                self._planned_for = None
                self._forget()
            before = self._call, self.form
            self._call, self.form = (args, kwargs), self.form_of(args, kwargs)
            try:
                self._compiled = self._variant(flags_of(self.model), torch.is_grad_enabled())
            except DtrpError as error:
                if changed:
                    raise type(error)(
                        f"{changed} is not as it was when the pipeline was compiled, and the model could not "
                        f"be compiled again: {error}"
                    ) from error
                if not self._compiled or self.form == before[1]:
                    raise
                log.info("there is no graph for calls of another form: %s", error)
                del self._forms[self.form]
                self._call, self.form = before  # whose graph says what does not fit
            else:
                if self.form != before[1]:
                    self.example = keep_example(self.bind(args, kwargs))

    def _forget(self) -> None:
        self._compiled, self._watch, self._variants, self._fits = None, None, {}, {}
        self._forms, self.form = {}, 0
        self._unread, self._read = {}, set()

    def form_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        """Which form of call this is: arguments that may be left out, flags and the like make others, each
        with a graph of its own. What is no call of the model, or brings other numbers, is of the latest form,
        which does not fit.
        """
        if not self._forms:
            return 0
        present = self._forms[self.form]
        for number, form in ((self.form, present), *self._forms.items()):
            if form.fits(args, kwargs, self._unread.get(number, ())):
                return number
        try:
            made = Signature.of(self.model, args, kwargs)
        except TypeError:
            return self.form
        if not all(isinstance(v, (bool, str, type(None))) for v in made.new_values(present).values()):
            return self.form
        for number, form in self._forms.items():
            alike = (form.in_spec, form.tensors) == (made.in_spec, made.tensors)
            if alike and self._looks_away(number, made, (args, kwargs)):
                return number
        return self.form if len(self._forms) == _FORMS else self._new_form(made)

    def _looks_away(self, number: int, made: Signature, call: Any) -> bool:
        """Whether calls differ from those of this form in strings that the model's code never looks at."""
        form, known = self._forms[number], self._unread.get(number, frozenset())
        values = made.new_values(form).items()
        new = {name: v for name, v in values if not (isinstance(v, str) and name in known)}
        made_of = [(c.captured, grad) for (of, _, grad), c in self._variants.items() if of == number]
        if not made_of or not all(isinstance(v, str) for v in new.values()):
            return False
        if asked := new.keys() - self._read:
            found = unread(self.model, *made_of[0], form, made.flatten(*call), asked)
            self._unread[number] = known | found
            self._read |= asked - found
            new = {name: v for name, v in new.items() if name not in found}
        return not new

    def _new_form(self, signature: Signature) -> int:
        self._n_forms += 1
        self._forms[self._n_forms] = signature
        return self._n_forms

    def _variant(self, flags: Flags, grad: bool) -> Compiled:
        """The stages for these modes: those that are there, or others laid over them."""
        base = next(iter(self._variants.values()), None)
        if base is None:
            args, kwargs = self._planned_for or self._call
            for value in (*args, *kwargs.values()):
                if type(value).__module__ == "numpy" or isinstance(value, DataLoader):
                    raise TypeError(
                        f"the model is to be called with a {type(value).__name__}: give tensors, "
                        "as by torch.as_tensor"
                    )
            found = training_flags(self.model)  # it may leave others behind
            with alone():
                try:
                    base = compile_model(self.model, self.request, args, kwargs)
                except ValueError:  # of a small model there are no stages for all
                    if not self.request.spread:
                        raise
                    base = compile_model(self.model, as_one(self.request), args, kwargs)
            self.request = self.request.in_order(base.plan.placement)
            on_host = all(device.type == "cpu" for device in self.request.devices)
            given = self.request.speed or self.request.groups or self.request.spread
            measured = self.request.costs == "measured" and not given
            by_itself = launched.world_size() == 1  # ranks would all try at once, each with all stages
            tensors = base.captured.signature.flatten(args, kwargs)
            if measured and on_host and by_itself:
                base = tried(base, self.request, self.model, tensors)
            if self.request.spread:
                base, self.request = share_out(base, self.request, tensors)
            self.form = self._new_form(base.captured.signature)
            self._variants.update({(self.form, f, True): base for f in (found, base.captured.flags)})
            whole = {kept.module for kept in base.captured.kept_whole}
            called = {
                str(node.target)
                for mode in (base.captured.train, base.captured.eval)
                for node in mode.module.graph.find_nodes(op="call_module")
            }
            self._watch = Watch(self.model, whole, base.captured.tensor_attributes, called)
            self._planned_for = args, kwargs
        grad = grad or not base.captured.asks_grad
        if not any(flags):
            flags = base.captured.flags  # its eval graph
        key = self.form, flags, grad
        if key not in self._variants:
            of = base.captured
            captured = capture(
                self.model, *self._call, opened=of.opened, divided=of.divided, flags=flags, grad=grad
            )
            self._variants[key] = adapt(base, captured, self.request)
        return self._variants[key]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any], form: int | None = None) -> list[Tensor]:
        """The tensors of one call, in the order of the wiring's model inputs; ``form``: that it must have
        (default: the latest call's).

        Raises
        ------
        TypeError, ValueError
            They do not fit the example that was compiled for.
        """
        captured = self.made.captured
        if form is not None and form != self.form:
            made = [c.captured for (other, *_), c in self._variants.items() if other == form]
            if not made:
                raise TypeError("the model was compiled again since")
            captured = made[0]
        any_text = self._unread.get(self.form if form is None else form, ())
        tensors = captured.signature.flatten(args, kwargs, any_text)
        with EXCLUSIVE:  # a call of another shape may be traced
            fits = self._fits.get(id(captured))
            if fits is None:
                fits = self._fits[id(captured)] = Fits(captured)
            fits.check(tensors, self.training)
        return tensors

    @property
    def plan(self) -> Plan:
        """What was planned; calls of other forms, and other modes, are laid over it."""
        return next(iter(self._variants.values()), self.made).plan

    def planned(self) -> str:
        """The plan as text, for `adopt`."""
        return json.dumps(self.plan.to_dict())

    def adopt(self, text: str) -> None:
        """Follow the plan that another process made for the same model."""
        if self._compiled is not None and self.planned() == text:
            return
        self.request = replace(self.request, plan=Plan.of_dict(json.loads(text)))
        planned_for = self._planned_for
        self._forget()
        if planned_for is not None:  # what the plan is of; the call at hand may have another form
            self.prepare(*planned_for)

    def newest(self, call: tuple[Sequence[Any], Mapping[str, Any]] | None = None) -> Compiled:
        """What was made, for such a call (default: as the latest); anew if the model was changed since."""
        self.made  # noqa: B018  says what to do where nothing is planned
        self.prepare(*(self._call if call is None else call))
        return self.made

    # ---- for a trainer -----------------------------------------------------------------------------------

    def expect(self, config: TrainConfig, optimizer: OptimizerKind) -> Training:
        """How training will go: what is planned from now on is planned for that, and the report says it.

        What is still to be chosen counts as the paper's order and whole batches, which take most memory.
        """
        schedule = config.decided(micro_batches=least_parts(self.request.replicas)).schedule(self.n_stages)
        training = Training(
            optimizer_bytes=optimizer.state_bytes,
            adaptive=optimizer.adaptive,
            predicts=config.predicts,
            horizon=config.horizon,
            order=schedule.order,
            micro_batches=schedule.parts,
            recompute=config.recompute(True),
            known=True,
            replicas=self.request.replicas,
        )
        self.request = replace(self.request, training=training)
        if self._compiled is not None:
            with EXCLUSIVE:
                report = reprice(self._first, self.request)
                self._compiled = replace(self._compiled, report=report)
                self._variants = {key: replace(c, report=report) for key, c in self._variants.items()}
        return training

    def report_on(
        self,
        config: TrainConfig,
        training: Training,
        stats: Sequence[StageStats],
        executor: str,
        moves: Sequence[Move] = (),
    ) -> TrainingReport:
        """What was predicted of a run beside what it measured."""
        made, request = self.made, self.request
        report = (
            made.report
            if training == request.training
            else reprice(self._first, replace(request, training=training))
        )
        cores = shared(made.graph.graph["specs"] * self.n_stages, request.replicas)
        parts = training.micro_batches
        return TrainingReport.of(report, stats, config, parts, executor, cores, moves)

    def better_cut(self, training: Training, stats: Sequence[StageStats]) -> Move | None:
        """Other stages that would be faster, as far as these measurements tell."""
        if training is not self.request.training:  # another trainer was made since: its stages are these
            return None
        with EXCLUSIVE:
            return better_cut(next(iter(self._variants.values())), self.request, stats)

    def recut(self, move: Move, loss: nn.Module | None) -> tuple[list[StageProgram], Training]:
        """As `programs`, of the stages that a move makes; nothing has changed if that fails."""
        with EXCLUSIVE:
            before = self._compiled, self._variants, self.request
            key, base = next(iter(self._variants.items()))
            made, self.request = recut_model(base, self.request, move)
            self._compiled, self._variants = made, {key: made}
            try:
                return self.programs(loss), self.request.training
            except BaseException:
                self._compiled, self._variants, self.request = before
                raise

    def check_loss(self, config: TrainConfig, inputs: Sequence[Tensor], target: Any) -> int:
        """Refuse a loss that surely cannot be trained with, before any worker starts; the class target that
        it leaves out of its mean."""
        with EXCLUSIVE:
            written = self.made.captured.train.walk.written if self.n_stages > 1 else frozenset()
            for name, p in self.model.named_parameters():
                if name in written and p.requires_grad and not config.exact:
                    raise ValueError(
                        f"the model's forward writes to the parameter {name!r}, which is trained: a "
                        f"decoupled pass would write to weights of another batch; train with method='bp', "
                        f"'1f1b' or 'gpipe', or write to it between batches"
                    )
            cut = self.n_stages > 1 or bool(config.replicas)
            return check_loss(self.made.captured, config, inputs, target, cut=cut)

    def loss_reads(self, loss_fn: Any, *, trained: bool) -> LossReads:
        """What the loss reads of the script, to be looked at during a run."""
        return LossReads(loss_fn, trained=trained)

    def choose_order(self, config: TrainConfig, inputs: Sequence[Tensor], target: Any) -> TrainConfig:
        """The settings with order and micro-batches decided, where the user leaves them open."""
        with EXCLUSIVE:
            return choose_order(self.made, self.request.training, config, inputs, target)

    def programs(self, loss: nn.Module | None = None) -> list[StageProgram]:
        """What each stage runs, with the model's present parameters and their ``requires_grad``."""
        with EXCLUSIVE:
            compiled = self._compiled = self._variant(training_flags(self.model), True)
            set_flags(self.model, compiled.captured.flags)  # as its own code does, where it switches modes
            evaluate = self._variant(compiled.captured.flags, False)  # which is done without gradients
            programs = make_programs(compiled, evaluate, self.model, self.request.devices, loss)
            groups = self.request.groups or [()] * self.n_stages
            return [replace(p, devices=group) for p, group in zip(programs, groups, strict=True)]
