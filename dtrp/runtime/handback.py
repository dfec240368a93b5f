"""The model and the loss that a run trains: the way of trained tensors back into them, and of saved ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..memory import same_place
from .checkpoint import is_savable, read_content
from .twins import attributes_of, own_modules, set_attributes

LOSS = "loss"
"""The name under which the last stage has a loss with tensors of its own."""


class Owner:
    """Whose tensors a run trains.

    Parameters
    ----------
    model : nn.Module
    loss : nn.Module or None
        The loss, where it has tensors of its own; the stages know them as ``loss.*``.
    """

    def __init__(self, model: nn.Module, loss: nn.Module | None) -> None:
        self.model, self.loss = model, loss
        self.tensors: dict[str, Tensor] = {}  # by all their names

    def named_parameters(self, *, all_names: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's and the loss's, each once, or under every name that it has."""
        yield from self.model.named_parameters(remove_duplicate=not all_names)
        if self.loss is not None:
            for name, p in self.loss.named_parameters(remove_duplicate=not all_names):
                yield f"{LOSS}.{name}", p

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The model's and the loss's, under every name that they have."""
        yield from self.model.named_buffers(remove_duplicate=False)
        if self.loss is not None:
            for name, b in self.loss.named_buffers(remove_duplicate=False):
                yield f"{LOSS}.{name}", b

    @property
    def on_meta(self) -> bool:
        """Whether some of it has no values here: other ranks' stages hold them."""
        return any(t.is_meta for _, t in chain(self.named_parameters(), self.named_buffers()))

    def first_names(self) -> dict[str, str]:
        """Every name of every parameter -> the first one that it has."""
        first: dict[int, str] = {}
        return {n: first.setdefault(id(p), n) for n, p in self.named_parameters(all_names=True)}

    def begin(self) -> None:
        """A run begins with the tensors that are here now, and will give them back to these."""
        self.tensors = dict(self.named_parameters(all_names=True))
        self.tensors |= dict(self.named_buffers())

    def replaced(self) -> str:
        """A parameter that is not the one that the run began with, or is new or gone; ``""``: none."""
        now = dict(self.named_parameters(all_names=True))
        before = {n: t for n, t in self.tensors.items() if isinstance(t, nn.Parameter)}
        return next((n for n in {**before, **now} if now.get(n) is not before.get(n)), "")

    def overwrite(self, values: Mapping[str, Tensor], assigned: Mapping[str, Mapping[str, Any]]) -> None:
        """Give these tensors and attributes these values; all others keep theirs."""
        with torch.no_grad():
            for name, value in values.items():
                self.tensors[name].copy_(value)
        present = self.attributes()
        self.set_attributes({name: {**present.get(name, {}), **new} for name, new in assigned.items()})

    def take(self, state: Mapping[str, Any]) -> None:
        """Copy what a stage gave (`Answers.state`) into the tensors of the same names; constants of the graph
        are passed over."""
        with torch.no_grad():
            for name, value in state["tensors"].items():
                tensor = self.tensors.get(name)
                if isinstance(tensor, Tensor) and not same_place(tensor, value):
                    if tensor.shape != value.shape:  # a buffer that grows
                        tensor.resize_(value.shape)
                    tensor.copy_(value)
        self.set_attributes(state["attributes"])

    def modules(self) -> dict[str, nn.Module]:
        """Those of the user's, which may keep plain attributes, by name."""
        found = own_modules(self.model)
        if self.loss is not None:
            found |= {f"{LOSS}.{name}".rstrip("."): m for name, m in own_modules(self.loss).items()}
        return found

    def attributes(self) -> dict[str, dict[str, Any]]:
        """What they keep in them."""
        return attributes_of(self.modules())

    def set_attributes(self, attributes: Mapping[str, Mapping[str, Any]]) -> None:
        """Give modules what `attributes`, or a stage, says."""
        set_attributes(self.modules(), attributes)

    # ---- as a file has them --------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The sections of a saved run that are the modules'."""
        loss = None if self.loss is None else self.loss.state_dict()
        state: dict[str, Any] = {"model": self.model.state_dict(), "extra": {}, "loss": loss}
        known = by_name(state)
        state["extra"] = {name: b for name, b in self.named_buffers() if name not in known}
        state["attributes"] = {
            name: {k: v for k, v in values.items() if is_savable(v)}
            for name, values in self.attributes().items()
        }
        return state

    def check(self, saved: Mapping[str, Any], origin: str, *, dtypes: bool = True) -> None:
        """Whether saved tensors fit these modules.

        Raises
        ------
        CheckpointError
            They do not; says which.
        """
        mine = self.state()
        here, there = by_name({**mine, "extra": {}}), by_name({**saved, "extra": {}})
        lacks, has = sorted(here.keys() - there.keys()), sorted(there.keys() - here.keys())
        other = f"{origin} belongs to another model:"
        if lacks or has:
            parts = [f"lacks {lacks[:3]}"] * bool(lacks)
            parts += [f"has {has[:3]} that {type(self.model).__name__} has not"] * bool(has)
            raise CheckpointError(f"{other} it {', and '.join(parts)}")
        here = by_name(mine)
        for name, value in by_name(saved).items():
            tensor = here.get(name)
            if not isinstance(tensor, Tensor) and not isinstance(value, Tensor):
                continue
            if not isinstance(tensor, Tensor) or not isinstance(value, Tensor):
                raise CheckpointError(f"{other} {name!r} is no tensor in one of them")
            if tensor.shape != value.shape or (dtypes and tensor.dtype != value.dtype):
                raise CheckpointError(
                    f"{other} {name!r} has shape {tuple(value.shape)} and {value.dtype} there, "
                    f"{tuple(tensor.shape)} and {tensor.dtype} here"
                )

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Overwrite tensors and plain attributes with saved ones that `check` has passed; attributes that
        were not saved stay."""
        self.model.load_state_dict(saved["model"], strict=True)
        buffers = dict(self.named_buffers())
        with torch.no_grad():
            for name, value in saved["extra"].items():
                buffers[name].copy_(value)
        if self.loss is not None:
            self.loss.load_state_dict(saved["loss"], strict=True)
        present = self.attributes()
        self.set_attributes({name: present.get(name, {}) | v for name, v in saved["attributes"].items()})


def by_name(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The sections' tensors under the names that the stages have for them."""
    loss = {f"{LOSS}.{name}": value for name, value in (saved["loss"] or {}).items()}
    return {**saved["model"], **saved["extra"], **loss}


def only(saved: Mapping[str, Any], wanted: Callable[[str], bool]) -> dict[str, Any]:
    """The modules' sections with those tensors alone that are wanted (by the stages' names); in others'
    places are ones on the meta device."""

    def kept(name: str, value: Any) -> Any:
        return value if not isinstance(value, Tensor) or wanted(name) else value.to("meta")

    loss = saved["loss"]
    return {
        "model": {name: kept(name, value) for name, value in saved["model"].items()},
        "extra": {name: kept(name, value) for name, value in saved["extra"].items()},
        "loss": None if loss is None else {n: kept(f"{LOSS}.{n}", value) for n, value in loss.items()},
    }


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the weights and buffers of a saved run into a plain model.

    Parameters
    ----------
    model : nn.Module
        Of the same architecture; dtypes and devices may be others.
    path : path-like
        A file or a folder of `Trainer.save`, or a file with a ``state_dict``. Reading executes no code from
        it.

    Raises
    ------
    CheckpointError
        It cannot be read, or belongs to another model. The model is as it was.

    Examples
    --------
    >>> dtrp.load_weights(model, "run.ckpt")  # doctest: +SKIP
    """
    content, origin = read_content(path), os.fspath(path)
    if "extra" not in content:
        content = next((content[key] for key in _INSIDE if isinstance(content.get(key), Mapping)), content)
        if not content or not all(isinstance(v, Tensor) for v in content.values()):
            raise CheckpointError(f"{Path(origin)} holds no state_dict: expected names and tensors")
        content = {"model": content, "extra": {}}
    owner = Owner(model, None)
    here = dict(owner.named_buffers())
    extra = {n: b for n, b in content["extra"].items() if n in here or not n.startswith(f"{LOSS}.")}
    saved = {"model": content["model"], "extra": extra, "loss": None, "attributes": {}}
    owner.check(saved, origin, dtypes=False)
    owner.restore(saved)


_INSIDE = ("model", "state_dict", "model_state_dict")
"""Where files hold a state_dict that is not the file itself."""


def loss_with_tensors(loss: Any) -> nn.Module | None:
    """A loss that has parameters or buffers: they are trained, saved and handed back with the last stage."""
    if isinstance(loss, nn.Module) and any(True for _ in chain(loss.parameters(), loss.buffers())):
        return loss
    return None
