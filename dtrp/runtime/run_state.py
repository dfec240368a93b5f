"""All that a training run is: what `Trainer.save` writes and `Trainer.load` takes over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .config import TrainConfig
from .handback import Owner
from .optim import ParameterSet
from .random import random_state, set_random_state
from .training_state import check_set, export_set, renamed

_COUNTERS = {
    "batches": int,
    "entered": int,
    "updates": int,
    "skipped": int,
    "epochs": int,
    "losses": Tensor,
    "seed": (int, type(None)),
}


@dataclass(frozen=True)
class RunState:
    """One moment of a run, between two batches, free of stages.

    Attributes
    ----------
    model : mapping
        The model's ``state_dict``; empty for a state that was just gathered.
    extra : mapping of str to Tensor
        Buffers that the ``state_dict`` leaves out.
    loss : mapping or None
        The ``state_dict`` of a loss with tensors of its own.
    attributes : mapping
        What modules of the user's keep in plain attributes, by module.
    sets : tuple
        Optimizers and schedulers by parameter name, the parameter's first name in the model.
    counters : mapping
        Batches, updates, losses, seed.
    random : mapping
        The caller's generators.
    ambient : mapping or None
        The generators that a single stage in a worker process draws from.
    """

    model: Mapping[str, Any]
    extra: Mapping[str, Tensor]
    loss: Mapping[str, Any] | None
    attributes: Mapping[str, Mapping[str, Any]]
    sets: tuple[Mapping[str, Any], ...]
    counters: Mapping[str, Any]
    random: Mapping[str, Any]
    ambient: Mapping[str, Any] | None
    origin: str = ""

    @classmethod
    def gather(
        cls,
        owner: Owner,
        config: TrainConfig,
        stages: Sequence[Mapping[str, Any]],
        counters: Mapping[str, Any],
    ) -> Self:
        """From what the stages gave (`Stage.training_state`); none before the first batch."""
        names = owner.first_names()
        sets = [renamed(s["parameters"], names) for s in stages if s["parameters"] is not None]
        if not stages:
            sets = [renamed(export_set(_all_parameters(owner, config)), names)]
        ambient = stages[0]["random"] if len(stages) == 1 else None
        return cls({}, {}, None, {}, tuple(sets), counters, random_state(), ambient)

    @classmethod
    def read(cls, content: Mapping[str, Any], origin: str) -> Self:
        """From a file's content.

        Raises
        ------
        CheckpointError
            Something is missing in it.
        """
        try:
            counters = {key: content["counters"][key] for key in _COUNTERS}
            for key, kind in _COUNTERS.items():
                if not isinstance(counters[key], kind):  # type: ignore[arg-type]
                    raise TypeError(f"{key} is a {type(counters[key]).__name__}")
            return cls(
                content["model"],
                content["extra"],
                content.get("loss"),  # files of 0.1 have neither this nor attributes
                content.get("attributes", {}),
                tuple(content["sets"]),
                counters,
                content["random"],
                content["ambient"],
                origin,
            )
        except (KeyError, TypeError) as e:
            raise CheckpointError(f"{origin} is not a checkpoint of a training run: {e}") from None

    def content(self, owner: Owner) -> dict[str, Any]:
        """What is to be written."""
        state = owner.model.state_dict()
        kept = {name: b for name, b in owner.model.named_buffers() if name not in state}
        return {
            "model": state,
            "extra": kept,
            "loss": None if owner.loss is None else owner.loss.state_dict(),
            "attributes": owner.attributes(),
            "sets": list(self.sets),
            "counters": dict(self.counters),
            "random": dict(self.random),
            "ambient": None if self.ambient is None else dict(self.ambient),
        }

    def check(self, owner: Owner, config: TrainConfig) -> None:
        """Whether all of it fits.

        Raises
        ------
        CheckpointError
            It does not; says what.
        """
        model = owner.model
        here = model.state_dict()
        lacks, has = sorted(here.keys() - self.model.keys()), sorted(self.model.keys() - here.keys())
        if lacks or has:
            raise CheckpointError(
                f"{self.origin} belongs to another model: it lacks {lacks[:3]}, and has {has[:3]} that "
                f"{type(model).__name__} has not"
            )
        theirs, ours = set(self.loss or ()), set(owner.loss.state_dict() if owner.loss is not None else ())
        if theirs != ours:
            raise CheckpointError(
                f"{self.origin} was saved with another loss: its tensors are {sorted(theirs)[:3]}, this "
                f"trainer's are {sorted(ours)[:3]}"
            )
        buffers = dict(model.named_buffers())
        for name, saved in (*self.model.items(), *self.extra.items()):
            value = here.get(name, buffers.get(name))
            if isinstance(value, Tensor) != isinstance(saved, Tensor):
                raise CheckpointError(
                    f"{self.origin} belongs to another model: {name!r} is no tensor in one of them"
                )
            if isinstance(value, Tensor) and (value.shape, value.dtype) != (saved.shape, saved.dtype):
                raise CheckpointError(
                    f"{self.origin} belongs to another model: {name!r} has shape {tuple(saved.shape)} and "
                    f"{saved.dtype} there, {tuple(value.shape)} and {value.dtype} here"
                )
        try:
            check_set(_all_parameters(owner, config), self.sets, {})
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{self.origin} does not fit this trainer: {e}") from e

    def restore_model(self, owner: Owner) -> None:
        """Overwrite the weights, buffers and attributes of model and loss."""
        owner.model.load_state_dict(self.model, strict=True)
        buffers = dict(owner.model.named_buffers())
        with torch.no_grad():
            for name, value in self.extra.items():
                buffers[name].copy_(value)
        if owner.loss is not None and self.loss is not None:
            owner.loss.load_state_dict(self.loss, strict=True)
        owner.set_attributes(self.attributes)

    def restore_random(self) -> None:
        """Set the caller's generators."""
        set_random_state(self.random)

    def module_state(self) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        """Arguments of `Stage.load_state`."""
        named = {**self.model, **self.extra, **{f"loss.{n}": t for n, t in (self.loss or {}).items()}}
        return {n: t for n, t in named.items() if isinstance(t, Tensor)}, self.attributes

    def training(self, owner: Owner) -> tuple[Any, ...]:
        """Arguments of `Stage.load_training_state`."""
        return self.sets, self.counters["seed"], self.ambient, owner.first_names()


def check_builds(owner: Owner, config: TrainConfig) -> float | None:
    """Make optimizer and scheduler once, to complain now rather than in a worker; the first learning rate.

    Raises
    ------
    TypeError, ValueError
        The user's callables do not give what they should.
    """
    groups = _all_parameters(owner, config).optimizer.param_groups
    return float(groups[0]["lr"]) if "lr" in groups[0] else None


def _all_parameters(owner: Owner, config: TrainConfig) -> ParameterSet:
    """All trainable parameters, as one stage would hold them; fresh. An optimizer over others is noticed: the
    parameters are the same tensors here, but not the same objects."""
    trainable = {n: nn.Parameter(p.detach()) for n, p in owner.named_parameters() if p.requires_grad}
    return ParameterSet.build(trainable, config, 1.0)
