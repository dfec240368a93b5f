"""The parameters of one stage: their optimizers, their predicted values, their gradients.

A stage owns most of its parameters. Of a parameter that several stages hold (`Tie`) only the lowest holder
is the owner; elsewhere it is a *guest*, with an optimizer of its own per owner, because its update comes
when the owner's sum arrives and not when the stage itself steps.

A pass runs on the stage's own module, or on a twin of it (twins.py) whose parameters hold predicted values.
True weights are never overwritten by predicted ones, so there is nothing to restore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .optim import ParameterSet
from .twins import Twin

Watch = Callable[[Iterable[tuple[nn.Parameter, Tensor]]], None]


class Weights:
    """All trainable parameters of a stage, and the modules that passes run on.

    Parameters
    ----------
    module : nn.Module
        The stage's own.
    owner_of : mapping of str to int
        Owners of the parameters that this stage holds as a guest.
    lr_factors : sequence of float
        Of each stage.
    """

    def __init__(
        self,
        module: nn.Module,
        owner_of: Mapping[str, int],
        config: TrainConfig,
        lr_factors: Sequence[float],
        stage: int,
    ) -> None:
        self.module = module
        self.trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
        own = {n: p for n, p in self.trainable.items() if n not in owner_of}
        self.own = ParameterSet.of(own, config, lr_factors[stage])
        self.guests: dict[int, ParameterSet] = {}
        for owner in sorted(set(owner_of.values())):
            names = {n: self.trainable[n] for n, o in owner_of.items() if o == owner and n in self.trainable}
            guests = ParameterSet.of(names, config, lr_factors[owner])
            if guests is not None:
                self.guests[owner] = guests
        self.sets = [*([self.own] if self.own else []), *self.guests.values()]
        self.own_parameters = list(own.values())
        self.predicts = config.predicts
        self._targets: dict[Twin, list[list[nn.Parameter]]] = {}  # their parameters, as `sets` have them
        self._ahead: Twin | None = None
        self._first: Twin | None = None
        self._watch: Watch | None = None
        self._versions: dict[Twin, int] = {}  # with parameters of their own; how many graphs are on each
        self._written: dict[Twin, object] = {}  # of what they hold the values

    def watch(self, watch: Watch) -> None:
        """``watch`` is to know on which tensors gradients appear: pairs of a parameter and such a tensor."""
        self._watch = watch
        watch((p, p) for p in self.own_parameters)

    def forget(self) -> None:
        """What was predicted is not used again: weights or optimizers were overwritten, or a saved run would
        go on here, which would predict with all of the gradient that there is by now.
        """
        self._written.clear()

    # ---- modules to run passes on ------------------------------------------------------------------------

    def first(self, horizons: tuple[float, float], lr_scale: float) -> Twin:
        """For a pass that leaves no trace, ``horizons`` updates ahead (own parameters', guests')."""
        if self._first is None:
            base = self._twin_ahead().module if self.predicts else self.module
            pairs = zip(self.module.parameters(), base.parameters(), strict=True)
            self._first = Twin(self.module, pairs, traceless=True)
        if self.predicts:
            self._write(self._twin_ahead(), horizons, lr_scale)
        return self._first

    def ahead(self, horizons: tuple[float, float], lr_scale: float) -> Twin | None:
        """For a pass whose state counts, on predicted weights; ``None``: the stage's own module will do."""
        if not self.predicts or not any(horizons):
            return None
        twin = self._twin_ahead()
        self._write(twin, horizons, lr_scale)
        return twin

    def version(self, horizons: tuple[float, float], lr_scale: float) -> Twin:
        """For a graph that is kept while updates go on: predicted (or true) weights that stay as they are
        until they are handed to `release`. Micro-batches between two updates share one."""
        made_of = self._made_of(horizons, lr_scale)
        held = [twin for twin in self._versions if self._written.get(twin) == made_of]
        free = [twin for twin, graphs in self._versions.items() if graphs == 0]
        twin = next(iter(held or free), None) or self._twin()
        self._write(twin, horizons, lr_scale)
        self._versions[twin] = self._versions.get(twin, 0) + 1
        return twin

    def release(self, twin: Twin) -> None:
        """The graph on these weights is gone."""
        self._versions[twin] -= 1

    def absorb(self, twin: Twin) -> None:
        """Move the gradients that a pass left on a twin's parameters to the stage's own."""
        earlier: list[Tensor] = []
        more: list[Tensor] = []
        for parameters, targets in zip(self.sets, self._targets[twin], strict=True):
            for mine, theirs in zip(parameters.parameters, targets, strict=True):
                if (gradient := theirs.grad) is None:
                    continue
                theirs.grad = None
                if (before := mine.grad) is None:
                    mine.grad = gradient
                elif before.layout is torch.strided and gradient.layout is torch.strided:
                    earlier.append(before)
                    more.append(gradient)
                else:
                    mine.grad = before + gradient
        if earlier:
            torch._foreach_add_(earlier, more)

    def _twin_ahead(self) -> Twin:
        if self._ahead is None:
            self._ahead = self._twin()
        return self._ahead

    def _twin(self) -> Twin:
        """With trainable parameters of its own, in the own module's state."""
        tensors: list[Tensor] = [*self.module.parameters(), *self.module.buffers()]
        twin = Twin(self.module, [(t, t) for t in tensors if not t.requires_grad], traceless=False)
        into: dict[Tensor, nn.Parameter] = {}
        into.update(zip(self.module.parameters(), twin.module.parameters(), strict=True))
        self._targets[twin] = [[into[p] for p in parameters.parameters] for parameters in self.sets]
        if self._watch is not None:
            self._watch((p, into[p]) for p in self.own_parameters if p.requires_grad)
        return twin

    def _made_of(self, horizons: tuple[float, float], lr_scale: float) -> object:
        """What a twin's values depend on."""
        return horizons, lr_scale, *(parameters.moment for parameters in self.sets)

    def _write(self, twin: Twin, horizons: tuple[float, float], lr_scale: float) -> None:
        """Write the weights so many updates ahead into a twin's parameters, unless they are there: between
        two updates, every micro-batch wants the same."""
        made_of = self._made_of(horizons, lr_scale)
        if self._written.get(twin) == made_of:
            return
        self._written[twin] = made_of
        with torch.no_grad():
            for parameters, targets in zip(self.sets, self._targets[twin], strict=True):
                s = horizons[0] if parameters is self.own else horizons[1]
                parameters.write_ahead(targets, s if self.predicts else 0.0, lr_scale)
