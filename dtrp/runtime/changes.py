"""What the script changes on the model between two batches: noticed, so that the stages follow.

Values go to the stages as they are, once nothing is in flight. Modes, hooks, ``requires_grad`` and what else
a graph depends on make other stages, which go on with the state of the optimizers.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import nn

from . import interrupts
from .program import hooks_of
from .run_state import RunState

if TYPE_CHECKING:
    from .run import Run

_WRITTEN = (
    "%r was changed by the script while batches were in flight: they are trained first, which empties the "
    "pipeline. What changes with every batch travels better with it, as an input of the model"
)
_LOST = (
    "the parameter %r was changed by the script while batches were being trained: call trainer.flush() "
    "before such a change, so that it is made to the newest weights"
)
log = logging.getLogger("dtrp")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Settings:
    """Modes, hooks and ``requires_grad`` of a model, as the stages have them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found = self._look()

    def changed(self) -> bool:
        """Whether any is another now."""
        return self._look() != self._found

    def _look(self) -> list[object]:
        found: list[object] = []
        for p in self._model.parameters():
            before, after = hooks_of(p)
            found.append((p.requires_grad, *map(id, before), *map(id, after)))
        for module in self._model.modules():
            own = vars(module)
            found.append(module.training)
            found += [(id(module), name, *own[name]) for name in _HOOKS if own[name]]
        return found


class Changes:
    """Brings a run's stages what the script changes on the model."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._settings: Settings | None = None
        self._told = False
        self._shelved: dict[str, Any] = {}  # the optimizer's state of parameters that are frozen meanwhile

    def begin(self) -> None:
        """Stages are about to be made of the model as it is."""
        self._settings = Settings(self._run.compiled.model)
        self._run.owner.begin()

    def note(self) -> None:
        """Model and stages have the same values now, as far as they ever have during training."""
        kind = self._run.world.executor
        if kind != "torchrun":
            self._run.owner.agreed.note(content=kind == "workers" and not self._run.stale)

    def in_step(self) -> None:
        """Stages in this process have written the model's tensors."""
        if self._run.world.executor == "inline":
            self.note()

    def follow(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """To be called before a batch. (A model that is in eval mode as a whole is being looked at; that
        changes nothing here.)"""
        assert self._settings is not None
        compiled = self._run.compiled
        if self._run.world.executor == "torchrun":  # each rank trains its part of the model itself
            if compiled.training and self._settings.changed():
                raise RuntimeError(
                    "modes, hooks or requires_grad were changed after training began, which ranks cannot "
                    "follow; leave this trainer and go on with a new one, pipe.trainer(...)"
                )
            return
        self.hand_in()
        if compiled.training and (self._settings.changed() or compiled.changed()):
            self._restage(args, kwargs)

    def hand_in(self, *, leaving: bool = False) -> None:
        """Values that the script wrote into the model's tensors and attributes, to the stages.

        Raises
        ------
        RuntimeError
            Weights were written that are not the newest; ``leaving``: a warning instead.
        """
        run, executor = self._run, self._run.alive
        if executor is None or run.world.executor == "torchrun":
            return
        owner, shared = run.owner, run.world.executor == "inline"  # the stages' tensors are the model's
        written, assigned = owner.agreed.written(look=not run.stale), owner.agreed.assigned()
        if not written and not assigned:
            return
        trained = next((name for name in written if name in owner.trained), None)
        if trained is not None and (run.in_flight if shared else run.stale):
            self.note()
            if not leaving:
                raise RuntimeError(_LOST % trained)
            log.warning(_LOST, trained)
            return
        if run.stale and (assigned or not shared):
            if not self._told:
                log.warning(_WRITTEN, written[0] if written else next(iter(next(iter(assigned.values())))))
            self._told = True
            with owner.keeping(() if shared else written, assigned):
                run.drain()
        with interrupts.held(), run.rescued():
            executor.call("load_state", owner.values(written), owner.attributes() if assigned else {})
        self.note()

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
        self._shelved |= {k: v for k, v in state["optimizer"].items() if k.startswith("state.")}
        state["optimizer"] = self._shelved | state["optimizer"]
        self.begin()
        with interrupts.held(), run.rescued():
            run.replace(programs, RunState(state))
