"""All that a training run is: what `Trainer.save` writes and `Trainer.load` takes over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .config import TrainConfig
from .random import random_state, set_random_state
from .training_state import check_set, export_set, renamed
from .weights import ParameterSet

_COUNTERS = {
    "batches": int,
    "entered": int,
    "updates": int,
    "joined": int,
    "tunes": bool,
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
    sets: tuple[Mapping[str, Any], ...]
    counters: Mapping[str, Any]
    random: Mapping[str, Any]
    ambient: Mapping[str, Any] | None
    origin: str = ""

    @classmethod
    def gather(
        cls,
        model: nn.Module,
        config: TrainConfig,
        stages: Sequence[Mapping[str, Any]],
        counters: Mapping[str, Any],
    ) -> Self:
        """From what the stages gave (`StageRunner.training_state`); none before the first batch."""
        names = first_names(model)
        sets = [renamed(s["parameters"], names) for s in stages if s["parameters"] is not None]
        if not stages:
            sets = [renamed(export_set(_all_parameters(model, config)), names)]
        ambient = stages[0]["random"] if len(stages) == 1 else None
        return cls({}, {}, tuple(sets), counters, random_state(), ambient)

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
                tuple(content["sets"]),
                counters,
                content["random"],
                content["ambient"],
                origin,
            )
        except (KeyError, TypeError) as e:
            raise CheckpointError(f"{origin} is not a checkpoint of a training run: {e}") from None

    def content(self, model: nn.Module) -> dict[str, Any]:
        """What is to be written."""
        state = model.state_dict()
        kept = {name: b for name, b in model.named_buffers() if name not in state}
        return {
            "model": state,
            "extra": kept,
            "sets": list(self.sets),
            "counters": dict(self.counters),
            "random": dict(self.random),
            "ambient": None if self.ambient is None else dict(self.ambient),
        }

    def check(self, model: nn.Module, config: TrainConfig) -> None:
        """Whether all of it fits.

        Raises
        ------
        CheckpointError
            It does not; says what.
        """
        here = model.state_dict()
        lacks, has = sorted(here.keys() - self.model.keys()), sorted(self.model.keys() - here.keys())
        if lacks or has:
            raise CheckpointError(
                f"{self.origin} belongs to another model: it lacks {lacks[:3]}, and has {has[:3]} that "
                f"{type(model).__name__} has not"
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
            check_set(_all_parameters(model, config), self.sets, {})
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{self.origin} does not fit this trainer: {e}") from e

    def restore_model(self, model: nn.Module) -> None:
        """Overwrite the model's weights and buffers."""
        model.load_state_dict(self.model, strict=True)
        buffers = dict(model.named_buffers())
        with torch.no_grad():
            for name, value in self.extra.items():
                buffers[name].copy_(value)

    def restore_random(self) -> None:
        """Set the caller's generators."""
        set_random_state(self.random)

    def tensors(self, names: frozenset[str]) -> dict[str, Tensor]:
        """Weights and buffers of these names."""
        everything = {**self.model, **self.extra}
        return {n: everything[n] for n in names if isinstance(everything.get(n), Tensor)}

    def training(self, model: nn.Module) -> tuple[Any, ...]:
        """Arguments of `StageRunner.load_training_state`."""
        return self.sets, self.counters["seed"], self.ambient, first_names(model)


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter -> the first name that the model has for it."""
    first: dict[int, str] = {}
    return {n: first.setdefault(id(p), n) for n, p in model.named_parameters(remove_duplicate=False)}


def check_builds(model: nn.Module, config: TrainConfig) -> None:
    """Make optimizer and scheduler once, to complain now rather than in a worker.

    Raises
    ------
    TypeError, ValueError
        The user's callables do not give what they should.
    """
    _all_parameters(model, config)


def _all_parameters(model: nn.Module, config: TrainConfig) -> ParameterSet:
    """All trainable parameters, as one stage would hold them; fresh."""
    return ParameterSet.build({n: p for n, p in model.named_parameters() if p.requires_grad}, config, 1.0)
