"""Loss scaling for float16, over all stages (the rule is `torch.amp.GradScaler`'s).

The last stage multiplies the loss by a scale, which travels upstream with the gradients; each stage divides
its parameters' gradients by it before they count. A stage whose gradients overflow gives the mini-batch up,
and says so downstream with the next values that it sends: the last stage then halves the scale, once for all
who say so of the same scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000


class LossScale:
    """One stage's part. The last stage's has the scale, which others only hear of."""

    def __init__(self) -> None:
        self.scale = 65536.0
        self.good = 0  # mini-batches since the scale changed
        self.overflowed = 0.0  # the smallest scale that was seen to overflow since this was last passed on

    def heard(self, scale: float) -> None:
        """Gradients overflowed with this scale, here or in a stage before (0: none did)."""
        if scale:
            self.overflowed = min(self.overflowed or scale, scale)

    def pass_on(self) -> float:
        """What is to be said downstream."""
        said, self.overflowed = self.overflowed, 0.0
        return said

    def finished(self, *, overflowed: bool) -> None:
        """A mini-batch is through the last stage."""
        if overflowed:
            self.heard(self.scale)
        if self.overflowed and self.scale >= self.overflowed:  # else it was halved for that already
            self.scale *= BACKOFF
            self.good = 0
        elif not overflowed:
            self.good += 1
            if self.good == INTERVAL:
                self.scale *= GROWTH
                self.good = 0
        self.overflowed = 0.0

    def resume(self, saved: Mapping[str, Any] | None, *, hears: bool) -> None:
        """Go on from what `gathered` gave; ``hears``: here is where an overflow is heard of in the end."""
        if saved is not None:
            self.scale, self.good = saved["scale"], saved["good"]
            self.overflowed = saved["overflowed"] if hears else 0.0


def gathered(states: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """One state of all stages' attributes: the last one's, with what others have not yet passed on."""
    if not states or states[-1] is None:
        return None
    overflows = [state["overflowed"] for state in states if state is not None and state["overflowed"]]
    return {**states[-1], "overflowed": min(overflows, default=0.0)}


def unscale(parameters: Sequence[torch.nn.Parameter], scale: float) -> None:
    """Divide the gradients of a mini-batch by the scale of its loss."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, 1.0 / scale)
