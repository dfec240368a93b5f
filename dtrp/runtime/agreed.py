"""Whether a model's tensors and attributes are what they were when its stages had the same.

A tensor's version tells of most changes, at no cost; what is written through ``tensor.data`` only its content
tells.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_SCALAR = (bool, int, float, complex, str, type(None))
Attributes = Mapping[str, Mapping[str, Any]]


class Agreed:
    """The values of a model's tensors, and of its plain attributes, at the moment when the stages had the
    same ones.

    Parameters
    ----------
    tensors : mapping of str to Tensor
    attributes : callable
        Gives the plain attributes by module.
    """

    def __init__(self, tensors: Mapping[str, Tensor], attributes: Callable[[], Attributes]) -> None:
        self._attributes = attributes
        self._tensors = {n: t for n, t in tensors.items() if not t.is_meta and not t.is_inference()}
        self._content: dict[str, int] | None = None
        self.note(content=False)

    def note(self, *, content: bool) -> None:
        """They have the same ones now; ``content``: remember more than versions."""
        self._scalars = _scalars(self._attributes())
        self._versions = [t._version for t in self._tensors.values()]
        self._content = {n: _digest(t) for n, t in self._tensors.items()} if content else None

    def assigned(self) -> dict[str, dict[str, Any]]:
        """Numbers, flags and texts that were given to modules since."""
        found: dict[str, dict[str, Any]] = {}
        for (module, name), value in _scalars(self._attributes()).items():
            if value != self._scalars.get((module, name), self):
                found.setdefault(module, {})[name] = value
        return found

    def holds(self, name: str) -> bool:
        """Whether a tensor's content is what it was then."""
        return self._content is not None and _digest(self._tensors[name]) == self._content[name]

    def written(self, *, look: bool) -> list[str]:
        """Tensors that were written since; ``look``: also at their content, if it was noted."""
        pairs = zip(self._tensors.items(), self._versions, strict=True)
        found = {name for (name, t), version in pairs if t._version != version}
        if look and self._content is not None:
            found |= {n for n, t in self._tensors.items() if _digest(t) != self._content[n]}
        return [name for name in self._tensors if name in found]


def _scalars(attributes: Attributes) -> dict[tuple[str, str], Any]:
    return {
        (module, name): value
        for module, values in attributes.items()
        for name, value in values.items()
        if isinstance(value, _SCALAR)
    }


def _digest(tensor: Tensor) -> int:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return 0
    return zlib.crc32(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
