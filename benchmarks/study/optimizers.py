"""Optimizers of the study that torch does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, NAdam, Optimizer


class MuonAndAdamW(Optimizer):
    """Muon for matrices, AdamW for what has another shape: Muon takes matrices alone.

    Both do their own groups, over one state.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], weight_decay: float):
        # adjust_lr_fn: Muon's updates as large as AdamW's, so that one rate fits both (Liu et al. 2025)
        matrices: dict[str, Any] = {"muon": True, "adjust_lr_fn": "match_rms_adamw"}
        kinds: dict[bool, list[Tensor]] = {True: [], False: []}
        for p in params:
            kinds[p.ndim == 2].append(p)
        nothing = [nn.Parameter(torch.zeros(1, 1))]
        self.inner = {
            True: Muon(nothing, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            False: AdamW(nothing, lr=lr, betas=betas, weight_decay=weight_decay),
        }
        groups = [
            {**self.inner[kind].defaults, **(matrices if kind else {"muon": False}), "params": found}
            for kind, found in kinds.items()
        ]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for kind, inner in self.inner.items():
            inner.param_groups = [g for g in self.param_groups if g["muon"] is kind and g["params"]]
            inner.state = self.state
            inner.step()


class WithErrorFeedback(SGD):
    """``w <- w - (2 u_t - u_(t-1))``, u being SGD's update: makes up for what a delay of one left out.

    Ours, after a reading of Zmushko et al. 2026.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        stepped = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [p.clone() for p in stepped]
        super().step()
        for p, old in zip(stepped, before, strict=True):
            update = old - p
            last = self.state[p].get("update")
            self.state[p]["update"] = update
            p.copy_(old - 2 * update + (update if last is None else last))


BY_NAME: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
    "sgd with error feedback": partial(WithErrorFeedback, lr=0.1, momentum=0.9, weight_decay=5e-4),
    "adamw": partial(AdamW, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01),
    # betas: Ajanthan et al. 2025, for stale gradients
    "nadam": partial(NAdam, lr=1e-3, betas=(0.99, 0.999), weight_decay=0.01, decoupled_weight_decay=True),
    "muon": partial(MuonAndAdamW, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01),
}
"""As the literature has them for these models."""
