"""Tied weights: one parameter, several stages, one sequence of updates (ours).

    stage j (guest)                               stage i < j (owner)
    backward of slot b leaves a gradient
      [1] "tied-gradient" of b  ---------------->   [2] its own backward of b, later:
                                                        gradient of b = guests' (last stage first) + own
      [4] the same sum, the same  <--------------   [3] "tied-sum"; steps with it
          optimizer step, at the start
          of a later round

The gradient of a batch is the sum of all uses in that batch, as in back-propagation. Owner and guests feed
the same sums to equal optimizers in the same order, so the copies stay bit-identical. In which round a guest
must have seen an update is the schedule's to say (`Schedule.tied_lag`), not the clock's.

A holder that takes no part in the backward pass (it uses the parameter behind ``no_grad``) is a guest that
sends nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator

import torch
from torch import Tensor

from .batch import Update
from .links import Channel, Links, Message
from .meter import Meter
from .ports import receive
from .program import StageProgram
from .weights import Weights


class TiedGradients:
    """One stage's part in the exchange; does nothing where no parameter is tied."""

    def __init__(
        self, program: StageProgram, weights: Weights, links: Links, meter: Meter, *, scheduled: bool
    ) -> None:
        self.stage, self.weights, self.links, self.meter = program.stage, weights, links, meter
        self.device = program.device
        self.scheduled = scheduled  # other learning-rate schedulers step with every update
        self.takes_part = program.stage in program.train.trained
        self.owned: dict[int, list[str]] = {}  # guest stage -> my names, in the order in which they travel
        self.held: dict[int, list[str]] = {}  # owner stage -> my names
        for tie in program.ties:
            mine = tie.name_in(self.stage)
            if mine is None:
                continue
            if tie.owner != self.stage:
                self.held.setdefault(tie.owner, []).append(mine)
                continue
            for guest, _ in tie.holders[1:]:
                self.owned.setdefault(guest, []).append(mine)
        self.senders = sorted((g for g in self.owned if g in program.train.trained), reverse=True)
        self.names = list(dict.fromkeys(name for names in self.owned.values() for name in names))
        self.earlier: dict[str, Tensor | None] = {}  # gradients gathered before this slot's
        self.due: dict[int, deque[tuple[int, Update]]] = {owner: deque() for owner in self.held}

    def forwarded(self, slot: int, update: Update) -> None:
        """A mini-batch's last slot goes in: its sum will come."""
        for due in self.due.values():
            due.append((slot, update))

    def before_backward(self) -> None:
        """Set aside what earlier slots left, so that this slot's own gradient can be told apart."""
        for name in self.names:
            parameter = self.weights.trainable[name]
            self.earlier[name], parameter.grad = parameter.grad, None

    def after_backward(self, slot: int) -> Generator[None, None, None]:
        """Guest: send this slot's gradient to the owner [1]. Owner: add the guests' to it [2]."""
        for owner, names in self.held.items():
            parameters = [self.weights.trainable[name] for name in names]
            channel = Channel("tied-gradient", self.stage, owner)
            self.links.send(channel, Message(slot, [p.grad for p in parameters]))
            for p in parameters:
                p.grad = None
        total: dict[str, Tensor | None] = dict.fromkeys(self.names)
        for guest in self.senders:
            channel = Channel("tied-gradient", guest, self.stage)
            message = yield from receive(self.links, self.meter, channel, slot)
            for name, gradient in zip(self.owned[guest], message.values, strict=True):
                total[name] = _add(total[name], self._here(gradient))
            del message
        for name in self.names:
            parameter = self.weights.trainable[name]
            parameter.grad = _add(self.earlier.pop(name), _add(total.pop(name), parameter.grad))

    def give_up(self, slot: int) -> Generator[None, None, None]:
        """The slot is skipped: tell the owner; take in and drop what guests say of it."""
        for owner, names in self.held.items():
            self.links.send(Channel("tied-gradient", self.stage, owner), Message(slot, [], skip=True))
            for name in names:
                self.weights.trainable[name].grad = None
        for guest in self.senders:
            channel = Channel("tied-gradient", guest, self.stage)
            yield from receive(self.links, self.meter, channel, slot)

    def share(self, slot: int, *, stepped: bool) -> None:
        """Owner, at the end of a mini-batch, before a step: hand the gradients to the guests [3].

        Only a step is worth a message with values: until then gradients gather at the owner. Copies, since
        optimizers may write into gradients (Rprop does), here and there, before these have left.
        """
        for guest, names in self.owned.items():
            gradients = [self.weights.trainable[n].grad for n in names] if stepped else []
            values = [None if g is None else g.clone() for g in gradients]
            self.links.send(Channel("tied-sum", self.stage, guest), Message(slot, values, skip=not stepped))

    def collect(self, owner: int, upto: int | None) -> Generator[None, None, None]:
        """Guest: take in the sums of all slots up to this one (``None``: all) and step with them [4]."""
        due = self.due[owner]
        while due and (upto is None or due[0][0] <= upto):
            slot, update = due[0]
            channel = Channel("tied-sum", owner, self.stage)
            message = yield from receive(self.links, self.meter, channel, slot)
            due.popleft()
            if message.skip:
                continue
            parameters = self.weights.guests.get(owner)
            if parameters is None:
                continue
            for name, gradient in zip(self.held[owner], message.values, strict=True):
                parameter = self.weights.trainable[name]
                parameter.grad = self._here(gradient)
            parameters.step(update.lr_scale)
            for _ in range(update.batches if self.scheduled else 0):
                parameters.schedule()

    def _here(self, gradient: Tensor | None) -> Tensor | None:
        """On this stage's device; links between processes may bring it by way of the host."""
        return None if gradient is None else gradient.to(self.device)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum, in the second one's memory: a tied embedding is large."""
    if a is None or b is None:
        return b if a is None else a
    return b.add_(a) if b.layout is torch.strided else a + b
