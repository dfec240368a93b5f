"""All that a training run is: what `Trainer.save` writes and `Trainer.load` takes over.

Two levels of plain data, section -> name -> value, free of stages:

    model, extra, loss, attributes      modules: state_dict, buffers that it leaves out, plain attributes
    optimizer                           flat, by parameter name (training_state.py)
    gradients, previous, waiting        by parameter name
    training                            which optimizer, how many groups, scheduler's state, loss's scale
    counters, random, ambient           batches, losses, seed; the caller's generators, a lone worker's
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import CheckpointError
from .config import TrainConfig
from .groups import Group, groups_of
from .handback import Owner, by_name
from .optim import ParameterSet, build_optimizer, check_steps
from .random import random_state, set_random_state
from .scaling import gathered
from .training_state import SECTIONS, check_set, complete, export_set
from .version_1 import upgraded

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
    """One moment of a run, between two batches.

    Attributes
    ----------
    content : mapping
        The sections; those of the modules are missing in a state that was just gathered.
    origin : str
        The file it was read from.
    """

    content: Mapping[str, Any]
    origin: str = ""

    @classmethod
    def gather(
        cls,
        owner: Owner,
        config: TrainConfig,
        stages: Sequence[Mapping[str, Any]],
        counters: Mapping[str, Any],
        shelved: Mapping[str, Any],
    ) -> Self:
        """From what the stages gave (`Answers.training_state`), none before the first batch; ``shelved``: the
        optimizer's state of what none of them uses."""
        # A stage without gradients steps no scheduler: its state counts last.
        ordered = sorted(stages, key=lambda stage: not stage["takes_part"])
        sets = [stage["parameters"] for stage in ordered if stage["parameters"] is not None]
        fresh = _all_parameters(owner, config)
        sets = sets or [export_set(fresh, {})]
        content: dict[str, Any] = {key: {} for key in SECTIONS}
        for one in sets:
            for key in SECTIONS:
                content[key] = one[key] | content[key]
        content["optimizer"] = {**shelved, **content["optimizer"]}
        complete(content, fresh, sets[0])
        ambient = stages[0]["random"] if len(stages) == 1 else None
        content["training"] = {**sets[0]["training"], "scale": gathered([s["scale"] for s in stages])}
        content |= {"counters": dict(counters), "random": random_state(), "ambient": ambient}
        return cls(content)

    @classmethod
    def read(cls, content: Mapping[str, Any], origin: str) -> Self:
        """From a file's content.

        Raises
        ------
        CheckpointError
            Something is missing in it.
        """
        try:
            if "sets" in content:
                content = upgraded(content, origin)
            for key in ("model", "extra", "loss", "attributes", *SECTIONS, "training", "random", "ambient"):
                _ = content[key]
            for key, kind in _COUNTERS.items():
                if not isinstance(content["counters"][key], kind):  # type: ignore[arg-type]
                    raise TypeError(f"{key} is a {type(content['counters'][key]).__name__}")
        except (KeyError, TypeError) as e:
            raise CheckpointError(f"{origin} is not a checkpoint of a training run: {e}") from None
        return cls(content, origin)

    @property
    def counters(self) -> Mapping[str, Any]:
        counters: Mapping[str, Any] = self.content["counters"]
        return counters

    @property
    def partial(self) -> bool:
        """Whether only some of its tensors were read; others are on the meta device."""
        named = chain(by_name(self.content).items(), *(self.content[key].items() for key in SECTIONS))
        return any(isinstance(value, Tensor) and value.is_meta for _, value in named)

    def of_others(self, names: Collection[str]) -> dict[str, Any]:
        """The optimizer's state of parameters that are not among these."""
        kept = {f"state.{name}" for name in names}
        return {
            key: value
            for key, value in self.content["optimizer"].items()
            if key.startswith("state.")
            and key.rpartition(".")[0] not in kept
            and not key.startswith("state..")
        }

    def to_write(self, owner: Owner) -> dict[str, Any]:
        """All sections, with the modules' present state."""
        return {**self.content, **owner.state()}

    def check(self, owner: Owner, config: TrainConfig) -> None:
        """Whether all of it fits.

        Raises
        ------
        CheckpointError
            It does not; says what.
        """
        owner.check(self.content, self.origin)
        try:
            check_set(_all_parameters(owner, config), self.content)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{self.origin} does not fit this trainer: {e}") from e

    def restore(self, owner: Owner, *, draws_here: bool) -> None:
        """Overwrite the modules' tensors and attributes, and set the caller's generators; to what those of a
        lone stage were, where it draws from the caller's."""
        owner.restore(self.content)
        set_random_state((draws_here and self.content["ambient"]) or self.content["random"])

    def modules(self, owner: Owner) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        """Arguments of `Answers.load_state`, once `restore` has been called."""
        tensors = {n: t for n, t in by_name(self.content).items() if isinstance(t, Tensor)}
        return tensors, owner.attributes()

    def training(self, owner: Owner, *, draws_here: bool) -> tuple[Any, ...]:
        """Arguments of `Answers.load_training_state`. The caller's generators are set, if a stage draws
        from them, and may have gone on: a loader draws before the first batch."""
        saved = {key: self.content[key] for key in (*SECTIONS, "training")}
        ambient = None if draws_here else self.content["ambient"]
        return saved, self.counters["seed"], ambient, owner.first_names()


def concerns(entry: str, names: Collection[str], *, training: bool) -> bool:
    """Whether an entry of a saved folder is needed where parameters and buffers of these names are;
    ``training``: with what the optimizer keeps of them."""
    section, _, name = entry.partition(".")
    if section in SECTIONS:
        kind, _, rest = name.partition(".")
        if section == "optimizer" and kind != "state":
            return True  # options are compared
        name = rest.rpartition(".")[0] if section == "optimizer" else name
        return training and (not name or name in names)  # without a name: the optimizer's as a whole
    return section not in ("model", "extra", "loss") or (entry if section == "loss" else name) in names


def check_builds(owner: Owner, config: TrainConfig) -> Optimizer:
    """Make optimizer and scheduler once, to complain now rather than in a worker; the optimizer.

    Raises
    ------
    TypeError, ValueError
        The user's callables do not give what they should.
    """
    optimizer = _all_parameters(owner, config).optimizer
    check_steps(optimizer)
    return optimizer


def model_groups(owner: Owner, config: TrainConfig) -> tuple[Group, ...]:
    """The groups that the user's optimizer has over the whole model."""
    names = _trainable(owner)
    return groups_of(build_optimizer(names, _by_own(owner, config)), names, owner.first_names())


def _all_parameters(owner: Owner, config: TrainConfig) -> ParameterSet:
    """All trainable parameters, as one stage would hold them; fresh."""
    return ParameterSet.build(_trainable(owner), _by_own(owner, config), 1.0)


def _by_own(owner: Owner, config: TrainConfig) -> TrainConfig:
    """``param_groups`` may know the model's parameters by identity, so it is shown these; stages follow."""
    given, own = config.param_groups, dict(owner.named_parameters())
    return config if given is None else replace(config, param_groups=lambda name, _: given(name, own[name]))


def _trainable(owner: Owner) -> dict[str, nn.Parameter]:
    """An optimizer over others is noticed: these are the same tensors, but not the same objects."""
    return {n: nn.Parameter(p.detach()) for n, p in owner.named_parameters() if p.requires_grad}
