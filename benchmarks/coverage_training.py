"""A training step through a two-stage pipeline, compared with the same step of the plain model."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import dtrp
from dtrp.partitioner.capture.structure import flatten_output

_LR = 0.1
_STEP_TOLERANCE = 1e-3  # relative to a tensor's largest update
_ROUNDING = 1e-6  # relative to a tensor's largest weight: what adding an update to it rounds off


def training_step(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What is wrong after one SGD step of a two-stage pipeline, ``""`` if nothing is.

    The loss is the model's own where it gives one (``labels=``), else the mean square of its outputs. All
    dropout is switched off first, as the stages draw other masks than the plain model: the updated weights
    must then be the plain loop's. (The first batch is trained without staleness.)
    """
    without_dropout(model)
    model.train()
    own = "labels" in kwargs or kwargs.get("return_loss", False)
    twin = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    output = twin(*args, **kwargs)
    loss = _own_loss(output) if own else mean_square(output, None)
    optimizer = torch.optim.SGD(twin.parameters(), lr=_LR)
    loss.backward()
    optimizer.step()

    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2)
    with pipe.trainer(
        loss_fn=None if own else mean_square,
        optimizer=partial(torch.optim.SGD, lr=_LR),
        executor="inline",
        seed=0,
    ) as trainer:
        trainer.step(*args, *([] if own else [torch.zeros(1)]), **kwargs)
    (found,) = trainer.losses
    if not abs(found - float(loss)) <= 1e-4 * max(1.0, abs(float(loss))):
        return f"the loss of a training step is {found:.6g} instead of {float(loss):.6g}"
    return _wrong_update(before, twin.state_dict(), model.state_dict())


def without_dropout(model: nn.Module) -> None:
    """Set every probability of dropping something to 0."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if hasattr(holder, "__dict__") else ():
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)


def mean_square(output: Any, target: Any) -> torch.Tensor:
    """A loss on whatever a model gives."""
    leaves = [x for x in flatten_output(output)[0] if isinstance(x, torch.Tensor) and x.requires_grad]
    return torch.stack([x.float().pow(2).mean() for x in leaves]).sum()


def _own_loss(output: Any) -> torch.Tensor:
    loss = output["loss"] if isinstance(output, dict) else pytree.tree_leaves(output)[0]
    assert isinstance(loss, torch.Tensor)
    return loss


def _wrong_update(before: dict[str, Any], plain: dict[str, Any], ours: dict[str, Any]) -> str:
    moved = False
    for name, start in before.items():
        if not isinstance(start, torch.Tensor) or not start.is_floating_point():
            continue
        update = (plain[name] - start).abs().max() if start.numel() else torch.zeros(())
        moved = moved or bool(update > 0)
        error = (plain[name] - ours[name]).abs().max() if start.numel() else torch.zeros(())
        allowed = _STEP_TOLERANCE * update + _ROUNDING * start.abs().max() if start.numel() else 0.0
        if not error <= allowed:
            return f"a training step updates {name} otherwise: by up to {update:.1e}, off by {error:.1e}"
    return "" if moved else "a training step changes nothing"
