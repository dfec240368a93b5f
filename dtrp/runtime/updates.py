"""The end of a mini-batch in one stage: whether it brings an update, and by which gradients.

every part's backward      a mini-batch that may yet be given up gathers apart (`begin`)
the last part's            scale, replicas, norm, clipping, and what other stages say of theirs (`decide`)
then                       the update, or its gradients wait for more, or it is forgotten
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .batch import Feed, Skip, Update
from .clipping import Norms, clip, norms, of_each, squared
from .config import TrainConfig
from .loss import check_finite
from .program import StageProgram
from .scaling import LossScale, unscale
from .weights import Weights

if TYPE_CHECKING:
    from .replicas import Replicas


class Updates:
    """Decides on one stage's updates, and makes them.

    Parameters
    ----------
    program, config
        Of the stage.
    weights : Weights
        Its parameters.
    norms : Norms
        To find norms over all stages.
    scaling : LossScale, optional
    replicas : Replicas, optional
        The same stage elsewhere.
    """

    def __init__(
        self,
        program: StageProgram,
        config: TrainConfig,
        weights: Weights,
        norms: Norms,
        scaling: LossScale | None,
        replicas: Replicas | None,
    ) -> None:
        self.config, self.weights, self.norms = config, weights, norms
        self.scaling, self.replicas = scaling, replicas
        self.stage, self.is_last, self.alone = program.stage, program.is_last, program.n_stages == 1
        self.on_host = program.device.type == "cpu"
        self.tells = self.stage == min(program.train.trained, default=-1)
        self.last_norms: Sequence[Tensor] = ()  # of the gradients that were stepped with last
        self.skips: list[Skip] = []
        self.come = self.stepped = 0  # mini-batches of this segment, as far as forward and backward are
        self.bad = False  # the mini-batch is given up
        # Gradients of earlier mini-batches, while this one may be bad.
        self._aside: list[tuple[nn.Parameter, Tensor | None]] = []

    def begin_segment(self) -> None:
        """Mini-batches count from 0 again; nothing that a saved run does not know is left."""
        self.come = self.stepped = 0
        if self.weights.own is not None:
            self.weights.own.clipped = 1.0

    def expect(self, feed: Feed) -> None:
        """A slot's backward pass begins: where an update surely follows, replicas' sums may begin in it."""
        own, config = self.weights.own, self.config
        if self.replicas is None or own is None or not feed.closes or config.gives_up:
            return
        if own.waiting + 1 >= config.accumulate:
            self.replicas.begin(own.names.values())

    def decide(self, feed: Feed, scale: float) -> Generator[None, None, bool]:
        """Whether a complete mini-batch brings an update; its gradients are then ready for it."""
        config, own = self.config, self.weights.own
        mini, self.stepped = self.stepped, self.stepped + 1
        bad, self.bad = self.bad, False
        if self.replicas is not None and config.gives_up:
            bad = self.replicas.any(bad)
        gathered = 0 if own is None else own.waiting + 1
        steps = own is not None and not bad and gathered >= config.accumulate
        if config.gives_up and not bad:
            if scale:
                unscale(self.weights.own_parameters, scale)
            self._gather()
        if self.replicas is not None and steps and own is not None:
            self.replicas.add_gradients(own.names.values())
        found = norms(own.names.values()) if steps and own is not None else ()
        size = self._looked_at(found, feed) if steps else 0.0
        # Exact orders skip a batch in all stages or in none: each one hears of all others before it steps.
        together = self.norms.schedule.exact and config.gives_up
        if config.max_grad_norm is not None or together:
            silent = not steps if self.norms.lags else bad and together
            total = yield from self.norms.total(mini, self.come, math.nan if silent else size)
            if together and not math.isfinite(total):
                bad, steps = True, False
            elif steps:
                self._clip(total)
        if own is None:  # nothing here is trained, whatever has a gradient
            for p in self.weights.own_parameters:
                p.grad = None
        if bad:
            self._give_up(feed, scale)
        elif own is not None:
            own.waiting = gathered
        if self.scaling is not None and self.is_last:
            self.scaling.finished(overflowed=bad)
        if steps:
            self.last_norms = found
        return steps

    def _looked_at(self, found: Sequence[Tensor], feed: Feed) -> float:
        """The squared norm of this stage's gradients, where no device would be waited for just to see it."""
        config = self.config
        if not (self.on_host or config.max_grad_norm is not None or config.gives_up):
            return 0.0
        size = squared(found)
        if not config.gives_up:
            check_finite(size, f"the norm of the gradients of batch {feed.batch} in stage {self.stage}")
        return size

    def _clip(self, total: float) -> None:
        limit, own = self.config.max_grad_norm, self.weights.own
        if limit is not None and own is not None:
            own.clipped = clip(own.names.values(), math.sqrt(total), limit, alone=self.alone)

    def update(self, update: Update) -> None:
        """Step optimizer and scheduler."""
        own = self.weights.own
        assert own is not None
        own.step(update.lr_scale)
        if self.config.scheduler_step == "update":
            for _ in range(update.batches):
                own.schedule()

    def close_group(self, how: bool | str) -> Generator[None, None, bool]:
        """Whether an incomplete group of accumulated mini-batches brings an update, with a mean of its own
        (ours); ``how="share"``: with its share of a whole group's."""
        own = self.weights.own
        steps = own is not None and own.waiting > 0
        found: Sequence[Tensor] = ()
        if own is not None and steps:
            gradients = [p.grad for p in own.names.values() if p.grad is not None]
            if gradients and how != "share":
                torch._foreach_mul_(gradients, self.config.accumulate / own.waiting)
            if self.replicas is not None:
                self.replicas.add_gradients(own.names.values())
            found = norms(own.names.values())
        if self.config.max_grad_norm is not None:
            total = yield from self.norms.everyone(squared(found))
            if steps:
                self._clip(total)
        if steps:
            self.last_norms = found
        return steps

    # ---- mini-batches that are given up --------------------------------------------------------------------

    def begin(self) -> None:
        """A mini-batch's first backward pass begins: only gradients that wait for an update stay, not those
        that the script left on the model. They are set aside where this mini-batch may be given up."""
        if self.weights.own is None or self.weights.own.waiting == 0:
            for p in self.weights.own_parameters:
                p.grad = None
        if not self.config.gives_up:
            return
        self._aside = [(p, p.grad) for p in self.weights.own_parameters]
        for p, _ in self._aside:
            p.grad = None

    def finite(self, sent: Iterable[Tensor | None]) -> bool:
        """Whether a slot's gradients are, in this stage and (``sent``) on their way to others. Their norm may
        be more than float16 can hold where they are not."""
        gradients = [p.grad for p in self.weights.trainable.values()]
        found = (g.detach() for g in (*gradients, *sent) if g is not None)
        sizes = of_each(g.float() if g.dtype is torch.float16 else g for g in found)
        return not sizes or bool(torch.stack(list(sizes)).isfinite().all())

    def _gather(self) -> None:
        """The mini-batch is good: its gradients join the earlier ones'."""
        for p, earlier in self._aside:
            if earlier is not None:
                p.grad = earlier if p.grad is None else earlier + p.grad

    def _give_up(self, feed: Feed, scale: float) -> None:
        for p, earlier in self._aside:
            p.grad = earlier
        if self.scaling is not None:
            self.scaling.heard(scale)
        if self.tells:  # what is given up anywhere is given up in the lowest stage that is trained, too
            self.skips.append(Skip(feed.batch, feed.update.batches))
