"""The model and the loss that a run trains, and the way of trained tensors back into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .twins import attributes_of, set_attributes

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
        self._tensors: dict[str, Tensor] = {}

    def named_parameters(self, *, all_names: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's and the loss's, each once, or under every name that it has."""
        yield from self.model.named_parameters(remove_duplicate=not all_names)
        if self.loss is not None:
            for name, p in self.loss.named_parameters(remove_duplicate=not all_names):
                yield f"{LOSS}.{name}", p

    def first_names(self) -> dict[str, str]:
        """Every name of every parameter -> the first one that it has."""
        first: dict[int, str] = {}
        return {n: first.setdefault(id(p), n) for n, p in self.named_parameters(all_names=True)}

    def begin(self) -> None:
        """A run begins with the tensors that are here now, and will give them back to these."""
        self._tensors = dict(self.named_parameters(all_names=True))
        self._tensors |= dict(self.model.named_buffers(remove_duplicate=False))
        if self.loss is not None:
            self._tensors |= {f"{LOSS}.{n}": b for n, b in self.loss.named_buffers()}

    def take(self, state: Mapping[str, Any]) -> None:
        """Copy what a stage gave (`Stage.state`) into the tensors of the same names; constants of the graph
        are passed over."""
        with torch.no_grad():
            for name, value in state["tensors"].items():
                tensor = self._tensors.get(name)
                if isinstance(tensor, Tensor) and tensor.data_ptr() != value.data_ptr():
                    if tensor.shape != value.shape:  # a buffer that grows
                        tensor.resize_(value.shape)
                    tensor.copy_(value)
        self.set_attributes(state["attributes"])

    def attributes(self) -> dict[str, dict[str, Any]]:
        """What modules of the user's keep in plain attributes, by module."""
        found = attributes_of(self.model)
        if self.loss is not None:
            found |= {f"{LOSS}.{n}".rstrip("."): v for n, v in attributes_of(self.loss).items()}
        return found

    def set_attributes(self, attributes: Mapping[str, Mapping[str, Any]]) -> None:
        """Give modules what `attributes`, or a stage, says."""
        set_attributes(self.model, attributes)
        if self.loss is not None:
            names = [n for n in attributes if n == LOSS or n.startswith(f"{LOSS}.")]
            set_attributes(self.loss, {n.removeprefix(LOSS).removeprefix("."): attributes[n] for n in names})


def loss_with_tensors(loss: Any) -> nn.Module | None:
    """A loss that has parameters or buffers: they are trained, saved and handed back with the last stage."""
    if isinstance(loss, nn.Module) and any(True for _ in chain(loss.parameters(), loss.buffers())):
        return loss
    return None
