"""A model on the meta device, of which each rank makes real what its stage holds, and nothing else.

Values come from a function of the user's that fills a tensor, or by name from a folder: of safetensors files,
whose tensors are read one by one, or of `Trainer.save`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .checkpoint import read_checkpoint
from .folder import existing

Fill = Callable[[str, Tensor], Any]


def materialise(model: nn.Module, held: Collection[Tensor], init: Fill | str | os.PathLike[str]) -> None:
    """Put real tensors in the places of those of ``held`` (by identity) that are on the meta device.

    Raises
    ------
    CheckpointError
        The folder has no values for one of them, or of another shape.
    """
    wanted = {id(t) for t in held if t.is_meta}
    places: dict[int, list[tuple[dict[str, Any], str, str]]] = {}
    for path, module in model.named_modules():
        for kept in (module._parameters, module._buffers):
            for key, t in kept.items():
                if t is not None and id(t) in wanted:
                    places.setdefault(id(t), []).append((kept, key, f"{path}.{key}".lstrip(".")))
    names = [[name for *_, name in spots] for spots in places.values()]
    fill = init if callable(init) else reader(Path(init), names)
    for spots in places.values():
        old = spots[0][0][spots[0][1]]
        real = torch.empty_like(old, device="cpu", requires_grad=False)
        with torch.no_grad():
            fill(spots[0][2], real)
        made = nn.Parameter(real, old.requires_grad) if isinstance(old, nn.Parameter) else real
        for kept, key, _ in spots:
            kept[key] = made


def reader(folder: Path, names: Collection[list[str]]) -> Fill:
    """Fills tensors from a folder; ``names``: all that each of them has."""
    aliases = {first: (first, *others) for first, *others in names}
    files = sorted(folder.glob("*.safetensors"))
    read = _safetensors(files) if files else _saved(folder, {n for several in names for n in several})

    def fill(name: str, tensor: Tensor) -> None:
        found = next((value for n in aliases[name] if (value := read(n)) is not None), None)
        if found is None:
            raise CheckpointError(
                f"{folder} has no values for {name!r}; a buffer that is no part of files must be made real "
                f"when the model is built: put only parameters on the meta device, or give init a function"
            )
        if found.shape != tensor.shape:
            raise CheckpointError(
                f"{folder} belongs to another model: {name!r} has shape {tuple(found.shape)} there, "
                f"{tuple(tensor.shape)} here"
            )
        tensor.copy_(found)

    return fill


def _safetensors(files: Collection[Path]) -> Callable[[str], Tensor | None]:
    try:
        from safetensors import safe_open
    except ImportError as e:
        raise ImportError(
            "reading *.safetensors needs the package safetensors: pip install safetensors"
        ) from e
    where: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            where |= dict.fromkeys(opened.keys(), file)

    def read(name: str) -> Tensor | None:
        """Opened for one tensor at a time: what was read of a mapped file counts as memory."""
        if name not in where:
            return None
        with safe_open(where[name], framework="pt") as opened:
            value: Tensor = opened.get_tensor(name)
            return value

    return read


def _saved(folder: Path, names: Collection[str]) -> Callable[[str], Tensor | None]:
    if not existing(folder).is_dir():
        raise CheckpointError(f"init={os.fspath(folder)!r}: there is no such folder")
    wanted = {f"{section}.{name}" for name in names for section in ("model", "extra")}
    content = read_checkpoint(folder, lambda entry: entry in wanted)
    found: Mapping[str, Any] = {**content["extra"], **content["model"]}
    return found.get
