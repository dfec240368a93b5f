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
    made = [(spots, _blank(_held(spots[0]))) for spots in places.values()]
    with torch.no_grad():
        if callable(init):
            for spots, real in made:
                init(spots[0][2], real)
        else:
            _fill(Path(init), [([name for *_, name in spots], real) for spots, real in made])
    for spots, real in made:
        old = _held(spots[0])
        new = nn.Parameter(real, old.requires_grad) if isinstance(old, nn.Parameter) else real
        for kept, key, _ in spots:
            kept[key] = new


def _blank(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", requires_grad=False)


def _held(spot: tuple[dict[str, Any], str, str]) -> Tensor:
    kept, key, _ = spot
    tensor: Tensor = kept[key]
    return tensor


def _fill(folder: Path, blank: Collection[tuple[list[str], Tensor]]) -> None:
    """Read tensors from a folder, each by any of its names."""
    files = sorted(folder.glob("*.safetensors"))
    read = _safetensors(files) if files else _saved(folder, {n: t for names, t in blank for n in names})
    for names, tensor in blank:
        found = next((value for n in names if (value := read(n)) is not None), None)
        if found is None:
            raise CheckpointError(
                f"{folder} has no values for {names[0]!r}; a buffer that is no part of files must be made "
                f"real when the model is built: put only parameters on the meta device, or give init a "
                f"function"
            )
        if found.shape != tensor.shape:
            raise CheckpointError(
                f"{folder} belongs to another model: {names[0]!r} has shape {tuple(found.shape)} there, "
                f"{tuple(tensor.shape)} here"
            )
        if found is not tensor:
            tensor.copy_(found)


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


def _saved(folder: Path, blank: Mapping[str, Tensor]) -> Callable[[str], Tensor | None]:
    """Of `Trainer.save`, read straight into their places: the folder's tensors are needed nowhere else."""
    if not existing(folder).is_dir():
        raise CheckpointError(
            f"{os.fspath(folder)!r} is no folder, from which alone a model on the meta device can be made "
            f"real stage by stage: of *.safetensors, or of trainer.save('run/')"
        )
    into = {f"{section}.{name}": t for name, t in blank.items() for section in ("model", "extra")}
    content = read_checkpoint(folder, lambda entry: into.get(entry, False))
    found: Mapping[str, Any] = {**content["extra"], **content["model"]}
    return found.get
