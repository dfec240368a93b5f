"""Gradient norms: over one stage, over all stages, and clipping by them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Generator, Iterable, Sequence

import torch
from torch import Tensor, nn

from .. import accelerators
from ..schedule import Schedule
from .links import Channel, Links, Message
from .meter import Meter
from .ports import receive


def norms(parameters: Collection[nn.Parameter]) -> Sequence[Tensor]:
    """Of one stage's gradients, wherever these are: nobody waits for a device."""
    return of_each(p.grad for p in parameters if p.grad is not None)


def of_each(gradients: Iterable[Tensor]) -> Sequence[Tensor]:
    """Each one's norm. (torch 2.11 has none of sparse ones.)"""
    dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    return torch._foreach_norm(dense) if dense else ()


def squared(norms: Sequence[Tensor]) -> float:
    """Their sum of squares; the stages' values add up to the square of the norm over the whole model."""
    return math.fsum(n**2 for n in accelerators.read(norms))


def clip(parameters: Collection[nn.Parameter], norm: float, limit: float, *, alone: bool) -> float:
    """Scale gradients by ``min(1, limit / (norm + 1e-6))``, as `torch.nn.utils.clip_grad_norm_` does.

    Parameters
    ----------
    parameters : collection of nn.Parameter
        One stage's.
    norm : float
        The norm over all stages.
    limit : float
        What it is not to exceed.
    alone : bool
        Whether these are all parameters there are: then to the bit what the plain loop does.

    Returns
    -------
    float
        What they were multiplied with.
    """
    factor = min(1.0, limit / (norm + 1e-6))
    if alone:
        torch.nn.utils.clip_grad_norm_(parameters, limit)
        return factor
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)
    return factor


class Norms:
    """One stage's part in finding the norm over all stages.

    Exactly (``lag=False``): each stage waits for all others' gradients of the batches that the schedule puts
    beside its own (`Schedule.norm_offset`). With a lag: by the norm of the newest batch that every stage has
    surely finished, k + 1 mini-batches ago in stage k, so that nobody waits; before there is one, by the
    stage's own norm. That is inexact, and the same whatever the timing.

    Mini-batches count from 0 in each segment.
    """

    def __init__(
        self,
        schedule: Schedule,
        stage: int,
        trained: Collection[int],
        links: Links,
        meter: Meter,
        *,
        lag: bool,
    ) -> None:
        self.schedule, self.stage, self.links, self.meter, self.lag = schedule, stage, links, meter, lag
        self.others = sorted(j for j in trained if j != stage)
        self.taken = 0  # lagging: so many mini-batches' norms have been taken in
        self.own: dict[int, float] = defaultdict(float)
        self.last: float | None = None

    @property
    def lags(self) -> bool:
        """Whether an earlier norm is clipped by."""
        return self.lag and not self.schedule.exact

    def total(self, mini: int, fed: int, squared: float) -> Generator[None, None, float]:
        """The squared norm to clip by in mini-batch ``mini`` of ``fed`` so far; ``squared``: this stage's,
        not a number where it does not step."""
        if self.lags:
            return (yield from self._lagging(mini, squared))
        together: dict[int, float] = {self.stage: squared}
        beside = {j: mini + self.schedule.norm_offset(self.stage, j) for j in self.others}
        for j, theirs in beside.items():
            if 0 <= theirs < fed:
                self._tell(j, mini, squared)
        for j, theirs in beside.items():
            if 0 <= theirs < fed:
                together[j] = yield from self._ask(j, theirs)
        return sum(together[j] for j in sorted(together))  # in stage order, everywhere

    def _lagging(self, mini: int, squared: float) -> Generator[None, None, float]:
        for j in self.others:
            self._tell(j, mini, squared)
        self.own[mini] = squared
        yield from self._take_up_to(mini - self.stage)
        return squared if self.last is None else self.last

    def everyone(self, squared: float) -> Generator[None, None, float]:
        """The sum over all stages, once, between two segments."""
        norms = {self.stage: squared}
        for j in self.others:
            self._tell(j, -1, squared)
        for j in self.others:
            norms[j] = yield from self._ask(j, -1)
        return sum(norms[j] for j in sorted(norms))

    def settle(self, fed: int) -> Generator[None, None, None]:
        """The end of a segment: nothing stays on its way."""
        if self.lags:
            yield from self._take_up_to(fed)
            self.taken = 0

    def _take_up_to(self, end: int) -> Generator[None, None, None]:
        while self.taken < end:
            norms = {self.stage: self.own.pop(self.taken, 0.0)}
            for j in self.others:
                norms[j] = yield from self._ask(j, self.taken)
            stepped = [norms[j] for j in sorted(norms) if not math.isnan(norms[j])]
            self.last = sum(stepped) if stepped else self.last
            self.taken += 1

    def _tell(self, stage: int, mini: int, squared: float) -> None:
        self.links.send(Channel("norm", self.stage, stage), Message(mini, [squared]))

    def _ask(self, stage: int, mini: int) -> Generator[None, None, float]:
        message = yield from receive(self.links, self.meter, Channel("norm", stage, self.stage), mini)
        return float(message.values[0])
