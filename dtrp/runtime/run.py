"""One training run: the stages, wherever they run, how far they are, and the way of their weights back.

batches ─► joined ─► cut into parts ─► the stages ─► losses, counted (history.py)
                                         │  ▲
                   the model's tensors ◄─┘  └── a saved run (run_state.py), new cuts (rebalance.py)
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import WorkerError
from . import interrupts, looks
from .arguments import (
    feeds,
    follow_batch,
    n_samples,
    refuse_autocast,
    split_batch,
    take_target,
    what_step_takes,
)
from .batch import Loss, Skip
from .changes import Changes
from .compensation import Joiner, Mini
from .config import Launch, TrainConfig
from .handback import Owner, loss_with_tensors
from .history import History
from .inline import Inline
from .loggers import Loggers
from .loss import held_loss
from .optim import JOINT, UNREAD, OptimizerKind, unread_options
from .program import StageProgram, trained
from .rebalance import Move
from .routed import Seats
from .run_state import RunState, check_builds, model_groups
from .world import join

if TYPE_CHECKING:
    from ..planning import Planning
    from .fitting import Loop
    from .ranks import Ranks
    from .workers import Workers

    Executor = Inline | Workers | Ranks

_LEFT = (
    "a trainer was let go of without trainer.close(): batches in flight are lost, with worker processes all "
    "since the last flush; use `with pipe.trainer(...) as trainer:`"
)
_MIXED = (
    "the model was asked for its weights between two steps (or copied, or the pipeline called): rank %d has "
    "present ones of its own stage, and older ones of the others; call trainer.sync() before, on every rank"
)
_IN_EVAL = (
    "%s was in eval mode and is trained in train mode, which its %s acts on: call model.train() first, then "
    "eval() on the parts that are to stay as they are, such as a frozen backbone"
)
_BY_MODE = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
_ORDER = ("order", "micro_batches", "least_part")  # settings that are chosen for the first batch
log = logging.getLogger("dtrp")


class Run:
    """What a trainer trains, and how far it is.

    Attributes
    ----------
    executor : Inline, Workers, Ranks or None
        Who runs the stages; ``None`` before the first batch.
    config : TrainConfig
        The user's settings; once the first batch has been seen, with all of them decided.
    loop : Loop or None
        Of the `fit` that runs.
    """

    def __init__(self, compiled: Planning, config: TrainConfig, launch: Launch) -> None:
        self.compiled, self.config, self.launch = compiled, config, launch
        self.joiner = Joiner(launch.batch_compensation, launch.compensation_warmup)
        self.records = launch.record or launch.timeline is not None
        self.owner = Owner(compiled.model, loss_with_tensors(config.loss_fn))
        optimizer = check_builds(self.owner, config)
        self.history = History(lr=optimizer.param_groups[0].get("lr"))
        self._kind = OptimizerKind.of(optimizer)
        if self._kind.joint and compiled.n_stages > 1:
            log.warning(JOINT, type(optimizer).__name__)
        if unread := unread_options(optimizer):
            log.warning(UNREAD, type(optimizer).__name__, ", ".join(unread))
        self.expected = compiled.expect(config, self._kind)
        seats = Seats(config.replicas or (1,) * compiled.n_stages)
        self.world = join(launch.executor, seats, float(launch.watchdog))
        first = self.world.rank == 0  # who shows and writes
        self.loggers = Loggers(launch.logger, launch.tensorboard) if first else Loggers(None)
        self.closed = False
        self.executor: Executor | None = None
        self.loop: Loop | None = None
        self.resume: RunState | None = None  # loaded, to be handed to the stages when they start
        self._seed: int | None = None
        self.in_flight = False
        self.stale = False  # the stages have newer weights than the model
        self.asked = False  # a prediction or evaluation is going on
        self._told_mixed = False
        self._shown = -1  # batches that had been fed when the model last had the present weights
        self.changes = Changes(self)
        self.along: list[bool] = []  # which model inputs have a row for each sample
        self.form: int | None = None  # of the batches that the stages are for
        self._trained: set[str] = set()  # parameters that they train
        self._shelved: dict[str, Any] = {}  # the optimizer's state of others
        self._exact = False  # the exact order is followed for now
        self.exact_updates: float = config.exact_start

    @property
    def alive(self) -> Executor | None:
        """Who runs the stages, unless one of them has failed."""
        return self.executor if self.executor is not None and self.executor.failure is None else None

    def not_asked(self) -> None:
        """Refuse what would meet stages in eval mode."""
        if self.asked:
            raise RuntimeError(
                "a prediction or evaluation of this trainer is still going on: go through predict(...) to "
                "its end first, as list(trainer.predict(loader)) does, or close() it"
            )

    @property
    def loss_fn(self) -> Any:
        """As the stages have it: a loss with tensors is a module of the last one."""
        return self.config.loss_fn if self.owner.loss is None else held_loss

    def close(self) -> None:
        """The stages end, and everything that was opened for them."""
        self.closed = True
        self.loggers.close()
        looks.end(self)
        if self.executor is not None:
            self._reminder.detach()
            self.executor.close()
            self.executor = None
        self.world.leave(None)

    # ---- batches -------------------------------------------------------------------------------------------

    def ready(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, follow: bool = True, targets: bool = True
    ) -> tuple[Executor, list[Tensor], Any]:
        """The running stages, a batch's tensors and its target; what can be refused is refused first.

        ``follow``: what the script has changed on the model, and other forms of batches; ``targets``: whether
        a batch has one, where there is a loss.
        """
        if self.closed:
            raise RuntimeError("this trainer is closed; make a new one with pipe.trainer(...)")
        refuse_autocast(self.config.autocast)
        compiled, has_target = self.compiled, targets and self.config.loss_fn is not None
        inputs, named, target = take_target(compiled.model, args, kwargs, has_target=has_target)
        if self.executor is not None:
            if follow:
                self.changes.follow(inputs, named)
        elif not compiled.training:
            if acting := [type(m).__name__ for m in compiled.model.modules() if isinstance(m, _BY_MODE)]:
                log.warning(_IN_EVAL, type(compiled.model).__name__, acting[0])
            compiled.model.train()
        try:
            if self.executor is None:
                self.world.prepare(compiled, inputs, named)
            tensors = self.changes.bind(inputs, named, follow=follow)
        except TypeError as e:
            hint = what_step_takes(args, has_target, targets)
            raise TypeError(str(e) if hint in str(e) else f"{e}; {hint}") from None
        return self.executor or self._start(tensors, target), tensors, target

    def add(self, executor: Executor, tensors: Sequence[Tensor], target: Any) -> None:
        """A batch of the user's goes in; what is finished is counted."""
        mini = self.joiner.add(tensors, target)
        self.history.fed += 1
        self.history.samples += n_samples(tensors)
        if mini is not None:
            self._enter(executor, mini)
        self._collect(executor)
        self.changes.in_step()

    def drain(self, *, close_group: bool | str = False) -> None:
        """Until nothing is in flight; the model has the newest weights then."""
        if self.executor is None:
            return
        self.changes.hand_in(last=True)
        with interrupts.held(), self.rescued():
            mini = self.joiner.rest()
            if mini is not None:
                self._enter(self.executor, mini)
            closes = self.config.accumulate > 1 and close_group  # stages know whether any gradients wait
            if self.in_flight or closes:
                self.executor.drain(close_group=closes)
                self.in_flight = False
            if closes:
                self.history.close_group()
            self._collect(self.executor, wait=True)
            self.sync()

    def _enter(self, executor: Executor, mini: Mini) -> None:
        """A mini-batch goes into the pipeline."""
        parts, weight = list(self._parts(mini)), self.world.weight(mini, self.config)
        for i, (tensors, target, share) in enumerate(parts):
            slot = feeds(self.wiring, self.history.entered, tensors, target, mini.update)
            if len(parts) > 1 or weight != 1.0:
                slot = [feed._replace(part=i, parts=len(parts), share=share * weight) for feed in slot]
            executor.feed(slot)
        self.history.enter(mini.update.batches, self.config.accumulate)
        self.in_flight = self.stale = True
        if self.config.exact or self._exact:
            executor.drain()
            self.in_flight = False
        if self._exact and self.history.updates >= self.exact_updates:
            self._follow(executor, exact=False)
        executor.throttle()

    def _parts(self, mini: Mini) -> Iterator[tuple[Sequence[Tensor], Any, float]]:
        config = self.config
        return split_batch(
            mini.tensors,
            mini.target,
            config.parts,
            least=config.least_part,
            ignored=config.ignored,
            along=self.along,
        )

    def _collect(self, executor: Executor, *, wait: bool = False) -> None:
        self.count(executor.news(wait=wait))
        if self.loggers.due() and (stats := executor.glance()):
            self.loggers.stages(len(self.history.losses), stats)

    @property
    def heard(self) -> History:
        """The history, with what stages have said since the last batch."""
        if (executor := self.alive) is not None:
            with interrupts.held(), self.rescued():
                self.count(executor.news())
        return self.history

    def count(self, news: Iterable[Loss | Skip]) -> None:
        """What the stages say of finished batches."""
        self.loggers.losses(self.history.settle(news))

    def _follow(self, executor: Executor, *, exact: bool) -> None:
        executor.call("follow", exact)
        self._exact = exact

    # ---- weights -------------------------------------------------------------------------------------------

    def sync(self, *, news: bool = False) -> None:
        """Bring the present weights, buffers and attributes into the model; batches in flight stay there.
        ``news``: and count what is finished."""
        if self.executor is None or not self.stale:
            return
        if news:
            self._collect(self.executor, wait=True)
        for state in self.executor.states():
            self.owner.take(state)
        self.stale = self.in_flight
        self._shown = self.history.fed
        self.changes.note()

    @property
    def behind(self) -> bool:
        """Whether the model's weights are older than those of other processes."""
        executor = self.alive
        apart = executor is not None and not executor.shares
        return apart and self.stale and self._shown != self.history.fed

    def show(self) -> None:
        """The present weights into the model, before somebody looks at them."""
        if self.behind and self.world.executor != "torchrun":
            self.changes.hand_in(last=True)
            self.sync()
        elif self.behind and self.compiled.n_stages > 1 and not self._told_mixed:
            log.warning(_MIXED, self.world.rank)
            self._told_mixed = True

    @contextmanager
    def rescued(self) -> Iterator[None]:
        """Around what stages do: what was trained is in the model also when one of them has failed."""
        try:
            yield
        except WorkerError:
            if self.executor is not None:
                news, states = self.executor.rescued()
                for state in states:
                    self.owner.take(state)
                entered = self.history.entered  # without the batch in which it failed
                self.count(item for item in news if item.batch < entered)
            raise

    # ---- starting ------------------------------------------------------------------------------------------

    def _start(self, tensors: Sequence[Tensor], target: Any) -> Executor:
        """Start the stages, for batches like this first one."""
        refuse_inference()
        ignored = self.compiled.check_loss(self.config, tensors, target)
        self.config = replace(self.config, ignored=ignored)
        self._choose_order(tensors, target)
        self.world.same_weights(self.owner)
        programs = self.compiled.programs(self.owner.loss)
        init = self.resume.origin if self.resume is not None and self.resume.partial else self.launch.init
        if init is not None and self.world.materialise(self.owner, programs, init):
            programs = self.compiled.programs(self.owner.loss)
        self.changes.begin()
        if looks.begin(self, self.compiled.model) is not None:
            log.warning(
                "another trainer of this %s has not been left yet, and both change its weights: leave its "
                "`with`, or call its close(), first",
                type(self.compiled.model).__name__,
            )
        resume, self.resume = self.resume, None
        self._seed = self._base_seed(len(programs), resume)
        executor = self._launch(programs)
        try:
            if resume is not None:
                self._hand_over(executor, resume)
            if 0 < self.exact_updates < 1:
                raise ValueError(
                    f"exact_start={self.config.exact_start!r} is a share of the run, which only fit knows; "
                    f"give a number of updates"
                )
            if self.history.updates < self.exact_updates and not self.config.exact:
                self._follow(executor, exact=True)
        except BaseException:
            executor.close()
            raise
        self.executor = executor
        self.changes.note()
        if not executor.shares:
            looks.follow(self, calls=self.world.executor != "torchrun")
        self._reminder = weakref.finalize(self, log.warning, _LEFT)
        return executor

    def _choose_order(self, tensors: Sequence[Tensor], target: Any) -> None:
        """A resumed run goes on in the order that it was saved with, unless another was asked for."""
        self.along = follow_batch(tensors)
        saved = {} if self.resume is None else self.resume.counters.get("order", {})
        config = self.config.decided(**saved) if saved else self.config
        config = self.compiled.choose_order(config, tensors, target)
        mine = {name: getattr(config, name) for name in (*_ORDER, "ignored")}
        decided = self.world.first("choosing the order", lambda: mine)
        if decided != mine:
            config = replace(config, **decided)
        if config is not self.config:
            self.expected = self.compiled.expect(config, self._kind)
        self.config = config

    def _launch(self, programs: list[StageProgram]) -> Executor:
        """Stages for these programs."""
        self.wiring, self.eval_wiring = programs[0].train, programs[0].evaluate
        self.form = self.compiled.form
        self._trained = trained(programs, self.owner.first_names())
        groups = model_groups(self.owner, self.config)
        config = replace(self.config, groups=groups, loss_fn=self.loss_fn)
        return self.world.start(programs, config, seed=self._seed, record=self.records, there=self.executor)

    def recut(self, move: Move) -> None:
        """Other stages go on from here, as if this run had been saved and loaded."""
        state = RunState(self.content())
        programs, self.expected = self.compiled.recut(move, self.owner.loss)
        self.replace(programs, state)

    def replace(self, programs: list[StageProgram], state: RunState) -> None:
        """Other stages go on in that state."""
        old = self.executor
        executor = self.executor = self._launch(programs)
        if old is not None and old is not executor:
            old.close()
        self._hand_over(executor, state)
        self.changes.note()
        if self._exact:
            self._follow(executor, exact=True)

    def _base_seed(self, n_stages: int, resume: RunState | None) -> int | None:
        """The passes' base seed; one stage draws from the ambient generators, as the plain loop does."""
        seed = self.config.seed
        if n_stages > 1 or self.config.replicas:
            if resume is not None and resume.counters["seed"] is not None:
                return int(resume.counters["seed"])  # and nothing is drawn that was drawn before
            drawn = int(torch.randint(2**62, ())) if seed is None else seed  # by all, lest generators differ
            return int(self.world.first("the seed", lambda: drawn))
        if seed is not None and resume is None:
            torch.manual_seed(seed)
        return None

    @property
    def _draws_here(self) -> bool:
        """Whether a lone stage draws from this process's generators, as the plain loop does."""
        one = self.compiled.n_stages == 1 and not self.config.replicas
        return one and self.world.executor != "workers"

    # ---- saved runs ----------------------------------------------------------------------------------------

    def content(self) -> dict[str, Any]:
        """All that this run is (run_state.py), with nothing in flight."""
        self.drain()
        names = self.owner.first_names()
        stages = [] if self.executor is None else self.executor.call("training_state", names)
        return (self.resume or self.gather(stages)).to_write(self.owner)

    def gather(self, stages: Sequence[Any]) -> RunState:
        """From what the stages gave (`Answers.training_state`)."""
        return RunState.gather(self.owner, self.config, stages, self._counters(), self._shelved)

    def _counters(self) -> dict[str, Any]:
        order = {} if self.config.is_open else {name: getattr(self.config, name) for name in _ORDER}
        done = {"updates": self.joiner.updates, "seed": self._seed, "order": order}
        loop = {} if self.loop is None else {"loop": self.loop.export()}
        return {**self.history.export(), **done, **loop}

    def load(self, path: str | os.PathLike[str]) -> Mapping[str, Any]:
        """Go on from what is saved there; how far that run was."""
        if self.closed:
            raise RuntimeError("this trainer is closed; make a new one with pipe.trainer(...)")
        state = RunState.read(self.world.read(path, self.owner), os.fspath(path))
        self.adopt(state)
        return state.counters

    def adopt(self, state: RunState) -> None:
        """Go on from this state; what is in flight is finished first."""
        state.check(self.owner, self.config)
        self.drain()
        with interrupts.held(), self.rescued():
            state.restore(self.owner, draws_here=self._draws_here)
            self.history.restore(state.counters)
            self.history.gathered = max(state.content["waiting"].values(), default=0)
            self.joiner.updates = state.counters["updates"]
            self._shown = self.history.fed  # batches are counted anew; the model has what was loaded
            if self.executor is None:
                self.resume = state
            else:
                self._hand_over(self.executor, state)
                self.changes.note()

    def _hand_over(self, executor: Executor, state: RunState) -> None:
        """Bring the stages to a loaded state."""
        if self._seed is not None and state.counters["seed"] is not None:
            self._seed = state.counters["seed"]
        state = self.world.complete(state, self.owner)
        executor.call("load_state", *state.modules(self.owner))
        self._shelved = state.of_others(self._trained)
        executor.call("load_training_state", *state.training(self.owner, draws_here=self._draws_here))


def refuse_inference() -> None:
    """What is made there can have no gradient."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("nothing can be trained inside torch.inference_mode(): leave it first")
