"""Tied weights: one parameter, several stages, one sequence of updates (ours).

    stage j (guest)                               stage i < j (owner)
    backward of batch b leaves a gradient
      [1] "tied-gradient" of b  ---------------->   [2] its own backward of b, j - i ticks later:
                                                        gradient of b = guests' (last stage first) + own
      [4] the same sum, the same  <--------------   [3] "tied-sum"; steps with it
          optimizer step, at the start
          of the next tick

The gradient of a batch is the sum of all uses in that batch, as in back-propagation. Owner and guests feed
the same sums to equal optimizers in the same order, so the copies stay bit-identical; a guest sees an
update one tick after its owner.
"""

from __future__ import annotations

from collections import defaultdict, deque

from torch import Tensor

from .batch import Update
from .links import Channel, Links, Message
from .program import StageProgram, Tie
from .schedule import backward_tick
from .weights import Weights


class TiedGradients:
    """One stage's part in the exchange; does nothing where no parameter is tied.

    ``scheduled``: whether learning-rate schedulers step with every update. ``together``: all stages step in
    the tick in which the first one backwards the batch, not each in its own.
    """

    def __init__(
        self,
        program: StageProgram,
        weights: Weights,
        links: Links,
        *,
        scheduled: bool = True,
        together: bool = False,
    ) -> None:
        self.scheduled, self.together = scheduled, together
        self.stage, self.n_stages = program.stage, program.n_stages
        self.weights, self.links = weights, links
        self.owned: dict[int, list[str]] = defaultdict(list)  # guest stage -> my names, in channel order
        self.held: dict[int, list[str]] = defaultdict(list)  # owner stage -> my names
        for tie in program.ties:
            self._enrol(tie)
        self.earlier: dict[str, Tensor | None] = {}  # gradients gathered before this batch's
        self.sums: list[tuple[Channel, list[Tensor | None]]] = []
        # Sums awaited: slot, and how to update with its sum.
        self.due: dict[int, deque[tuple[int, Update]]] = {owner: deque() for owner in self.held}

    def _enrol(self, tie: Tie) -> None:
        mine = tie.name_in(self.stage)
        if mine is None:
            return
        if tie.owner != self.stage:
            self.held[tie.owner].append(mine)
            return
        for guest, _ in tie.holders[1:]:
            self.owned[guest].append(mine)

    @property
    def _owned_names(self) -> list[str]:
        return list(dict.fromkeys(name for names in self.owned.values() for name in names))

    def before_backward(self) -> None:
        """Set aside what earlier batches left, so that this batch's own gradient can be told apart."""
        for name in self._owned_names:
            parameter = self.weights.trainable[name]
            self.earlier[name], parameter.grad = parameter.grad, None

    def after_backward(self, slot: int, update: Update) -> None:
        """Guest: send this batch's gradient to the owner [1]. Owner: add the guests' to it [2]."""
        for owner, names in self.held.items():
            gradients = []
            for name in names:
                parameter = self.weights.trainable[name]
                gradients.append(parameter.grad)
                parameter.grad = None
            self.links.send(Channel("tied-gradient", self.stage, owner), Message(slot, tuple(gradients)))
            self.due[owner].append((slot, update))
        self._sum(slot)

    def give_up(self, slot: int) -> None:
        """The batch is skipped: tell the owner; take in and drop what guests say of it."""
        for owner in self.held:
            channel = Channel("tied-gradient", self.stage, owner)
            self.links.send(channel, Message(slot, (), skip=True))
        for guest in sorted(self.owned, reverse=True):
            self.links.receive(Channel("tied-gradient", guest, self.stage), slot)

    def _sum(self, slot: int) -> None:
        total: dict[str, Tensor | None] = dict.fromkeys(self._owned_names)
        for guest in sorted(self.owned, reverse=True):
            message = self.links.receive(Channel("tied-gradient", guest, self.stage), slot)
            for name, gradient in zip(self.owned[guest], message.values, strict=True):
                total[name] = _add(total[name], gradient)
        self.batch_sum: dict[str, Tensor | None] = {}
        for name in total:
            parameter = self.weights.trainable[name]
            self.batch_sum[name] = _add(total[name], parameter.grad)
            parameter.grad = _add(self.earlier.pop(name), self.batch_sum[name])

    def share(self, slot: int, *, stepped: bool) -> None:
        """Owner, just before its step: hand the gradients to the guests [3].

        Only a step is worth a message: with accumulation, gradients gather at the owner until then.
        """
        for guest, names in self.owned.items():
            values = tuple(self.weights.trainable[n].grad if stepped else None for n in names)
            self.links.send(Channel("tied-sum", self.stage, guest), Message(slot, values, skip=not stepped))

    def collect(self, tick: int | None) -> None:
        """Guest: take in the sums of all ticks before ``tick`` and step with them [4] (``None``: all)."""
        for owner, slots in self.due.items():
            pace = 0 if self.together else owner  # the stage whose backward sets the owner's step
            while slots and (tick is None or backward_tick(pace, slots[0][0], self.n_stages) < tick):
                slot, update = slots.popleft()
                message = self.links.receive(Channel("tied-sum", owner, self.stage), slot)
                if message.skip:
                    continue
                parameters = self.weights.guests[owner]
                for name, gradient in zip(self.held[owner], message.values, strict=True):
                    self.weights.trainable[name].grad = (
                        None if gradient is None else gradient.to(self.weights.trainable[name].device)
                    )
                parameters.step(update.lr_scale)
                for _ in range(update.batches if self.scheduled else 0):
                    parameters.schedule()


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
