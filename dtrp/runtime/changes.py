"""What the script changes on the model between two batches: noticed, so that the stages follow.

Values go to the stages as they are, once nothing is in flight. Modes, hooks, ``requires_grad`` and what else
a graph depends on make other stages, which go on with the state of the optimizers.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import interrupts
from .arguments import follow_batch
from .program import hooks_of, trained
from .run_state import RunState
from .twins import scalars_of

if TYPE_CHECKING:
    from ..loss_reads import LossReads
    from .run import Run

_WRITTEN = (
    "%r was changed by the script while batches were in flight: they are trained first, which empties the "
    "pipeline. What changes with every batch travels better with it, as an input of the model"
)
_LOST = (
    "the parameter %r was changed by the script while batches were being trained: call trainer.flush() "
    "before such a change, so that it is made to the newest weights"
)
_FORM = (
    "a batch has other arguments than those before (one that may be left out, a flag): the pipeline is "
    "emptied and goes on with stages for these, whenever they change; batches of one form (a mask of ones, "
    "say) are faster"
)
_WAITING = (
    "batches of one update (accumulate=%d) must have the same arguments: %r got a gradient from one of them, "
    "and is not used by this one"
)
_READ = (
    "what the loss reads of the script was changed while batches were in flight: they are trained first, "
    "which empties the pipeline. What changes with every batch travels better with it: "
    "step(x, y, extra={...})"
)
_BEHIND = (
    "the parameter %r was changed by the script while worker processes had newer weights than the model: if "
    "it is made of the model's weights (an average of them), call trainer.sync() before"
)
log = logging.getLogger("dtrp")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Settings:
    """Modes, hooks and ``requires_grad`` of a model, as the stages have them."""

    def __init__(self, model: nn.Module) -> None:
        self._modules, self._parameters = list(model.modules()), list(model.parameters())
        self._found = self._look()

    def changed(self) -> bool:
        """Whether any is another now."""
        return self._look() != self._found

    def _look(self) -> list[object]:
        found: list[object] = []
        for p in self._parameters:
            found.append(p.requires_grad)
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                hooks = [id(hook) for side in hooks_of(p) for hook in side]  # without those of replicas
                found += [id(p), *hooks] if hooks else []
        for module in self._modules:
            own = vars(module)
            found.append(module.training)
            found += [(id(module), name, *own[name]) for name in _HOOKS if own[name]]
        return found


class Values:
    """What a model's tensors, and plain attributes of the user's modules, were when the stages had the same.

    A tensor's version tells of most changes, at no cost; what is written through ``tensor.data`` only its
    content tells.
    """

    def __init__(self, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._tensors = {n: t for n, t in tensors.items() if not t.is_meta and not t.is_inference()}
        self.content: dict[str, int] = {}
        self.note(content=False)

    def note(self, *, content: bool) -> None:
        """They have the same ones now; ``content``: remember more than versions."""
        self._scalars = self._look()
        self._versions = [t._version for t in self._tensors.values()]
        self._asked = 0
        self.content = {n: _digest(t) for n, t in self._tensors.items()} if content else {}

    def _look(self) -> dict[str, dict[str, Any]]:
        return {name: scalars_of(module) for name, module in self._modules.items()}

    def assigned(self) -> dict[str, dict[str, Any]]:
        """Numbers, flags and texts that were given to modules since."""
        now = self._look()
        if now == self._scalars:
            return {}
        new = {
            name: {k: v for k, v in values.items() if v != self._scalars[name].get(k, self)}
            for name, values in now.items()
        }
        return {name: values for name, values in new.items() if values}

    def written(self, *, look: bool) -> list[str]:
        """Tensors that were written since; ``look``: also at their content, if it was noted. Without it the
        content is looked at ever more rarely: a script that writes to it does so again."""
        self._asked += 1
        look = look or self._asked & (self._asked - 1) == 0
        pairs = zip(self._tensors.items(), self._versions, strict=True)
        found = {name for (name, t), version in pairs if t._version != version}
        if look:
            found |= {name for name, before in self.content.items() if _digest(self._tensors[name]) != before}
        return [name for name in self._tensors if name in found] if found else []


def _digest(tensor: Tensor) -> int:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return 0
    return zlib.crc32(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)


class Changes:
    """Brings a run's stages what the script changes on the model."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._settings = Settings(nn.Module())
        self._values = Values({}, {})
        self._reads: LossReads | None = None  # what worker processes' copy of the loss had of the script
        self._told: set[str] = set()
        self._formed = False

    def begin(self) -> None:
        """Stages are about to be made of the model as it is."""
        owner = self._run.owner
        self._settings = Settings(owner.model)
        owner.begin()
        self._values = Values(owner.tensors, owner.modules())
        if self._run.world.executor == "workers":
            loss_fn, has_tensors = self._run.config.loss_fn, owner.loss is not None
            self._reads = self._run.compiled.loss_reads(loss_fn, trained=has_tensors)

    @property
    def _shared(self) -> bool:
        """Whether the stages' tensors are the model's."""
        return self._run.executor is not None and self._run.executor.shares

    def note(self) -> None:
        """Model and stages have the same values now, as far as they ever have during training."""
        if self._run.world.executor != "torchrun":
            self._values.note(content=not self._shared)

    def in_step(self) -> None:
        """Stages in this process have written the model's tensors."""
        if self._shared:
            self.note()

    def follow(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """To be called before a batch. (A model that is in eval mode as a whole is being looked at; that
        changes nothing here.)"""
        compiled = self._run.compiled
        if self._run.world.executor == "torchrun":  # each rank trains its part of the model itself
            if compiled.training and self._settings.changed():
                raise RuntimeError(
                    "modes, hooks or requires_grad were changed after training began, which ranks cannot "
                    "follow; leave this trainer and go on with a new one, pipe.trainer(...)"
                )
            return
        self.hand_in()
        if self._reads is not None and self._run.alive is not None and self._reads.changed():
            self._tell(_READ)
            self._run.drain()
            with interrupts.held(), self._run.rescued():
                self._run.alive.call("take_loss", self._run.config.loss_fn)
            self._reads.note()
        if compiled.training and (self._settings.changed() or compiled.changed()):
            self._restage(args, kwargs)

    def hand_in(self, *, last: bool = False, leaving: bool = False) -> None:
        """Values that the script wrote into the model's tensors and attributes, to the stages.

        ``last``: before the stages' values overwrite them.

        Raises
        ------
        RuntimeError
            Weights were written that are not the newest; ``leaving``: a warning instead.
        """
        run, executor = self._run, self._run.alive
        if executor is None or run.world.executor == "torchrun":
            return
        owner, shared = run.owner, self._shared
        written, assigned = self._values.written(look=last or not run.stale), self._values.assigned()
        if not written and not assigned:
            return
        trained = next((name for name in written if owner.tensors[name].requires_grad), None)
        if trained is not None and (run.in_flight if shared else run.stale):
            self.note()
            if not leaving:
                raise RuntimeError(_LOST % trained)
            log.warning(_LOST, trained)
            return
        made = next((name for name in written if isinstance(owner.tensors[name], nn.Parameter)), None)
        if made is not None and run.behind and _BEHIND not in self._told:
            log.warning(_BEHIND, made)
            self._told.add(_BEHIND)
        if run.stale and (assigned or not shared):
            self._tell(_WRITTEN, written[0] if written else next(iter(next(iter(assigned.values())))))
            # What the script has written holds also after the stages have given theirs, except for tensors
            # that the stages have written too.
            kept = {} if shared else {n: owner.tensors[n].detach().clone() for n in written}
            before = self._values.content
            self.note()
            run.drain()
            content = self._values.content
            owner.overwrite({n: v for n, v in kept.items() if before.get(n) == content.get(n, -1)}, assigned)
        with interrupts.held(), run.rescued():
            values = {name: owner.tensors[name].detach() for name in written}
            executor.call("load_state", values, owner.attributes() if assigned else {})
        self.note()

    def _tell(self, text: str, *names: str) -> None:
        """Once, that batches in flight have to be waited for."""
        if self._run.in_flight and text not in self._told:
            log.warning(text, *names)
            self._told.add(text)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, follow: bool) -> list[Tensor]:
        """A batch's tensors. `follow`: where it has another form than those before (a mask that may be left
        out, say), stages of that form go on.
        """
        run = self._run
        try:
            return run.compiled.bind(args, kwargs, run.form)
        except (TypeError, ValueError):
            other = run.compiled.form_of(args, kwargs) != run.form  # else it differs in strings at most
            ranked = run.world.executor == "torchrun"
            if other and (not follow or ranked or run.executor is None):
                raise
        if other:
            self._restage(args, kwargs)
        tensors = run.compiled.bind(args, kwargs, run.form)
        if other:
            run.along = follow_batch(tensors)
            log.log(logging.INFO if self._formed else logging.WARNING, _FORM)
            self._formed = True
        return tensors

    def _restage(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Stages of the model as it is now go on from here."""
        run = self._run
        if name := run.owner.replaced():
            raise RuntimeError(
                f"the parameter {name!r} was replaced, added or removed after training began, and with it "
                f"the optimizer's state; leave this trainer and go on with a new one, pipe.trainer(...)"
            )
        state = run.content()
        run.world.prepare(run.compiled, args, kwargs)
        programs = run.compiled.programs(run.owner.loss)
        if lost := sorted(state["gradients"].keys() - trained(programs, run.owner.first_names())):
            raise ValueError(_WAITING % (run.config.accumulate, lost[0]))
        self.begin()
        with interrupts.held(), run.rescued():
            run.replace(programs, RunState(state))
