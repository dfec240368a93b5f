"""A training run as one file: written whole or not at all, read without executing anything, checked first.

The file is torch's own zip format and holds plain data only, so ``torch.load(path, weights_only=True)``
reads it. ``["model"]`` is the model's ``state_dict``, original names, for
``model.load_state_dict(..., strict=True)``. A digest over everything (SHA-256) tells a truncated or altered
file; it is no signature: who can write the file can also write a fitting digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import struct
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

FORMAT = "dtrp checkpoint"
VERSION = 1


def write_checkpoint(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write ``content`` aside, then put it in ``path``'s place.

    Raises
    ------
    CheckpointError
        It cannot be written, or holds what cannot be read back safely. A previous file is as it was.
    """
    target = Path(path)
    data = {"format": FORMAT, "version": VERSION, **{k: _compact(v, k) for k, v in content.items()}}
    data["digest"] = digest(data)
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "wb") as file:
                torch.save(data, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, target)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise
        _sync_folder(target.parent)
    except (OSError, RuntimeError) as e:
        raise CheckpointError(
            f"{target} could not be written: {e}. A previous file of that name is as it was; see that the "
            f"folder exists, is writable and has space, then save again"
        ) from e


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_checkpoint` was given.

    Raises
    ------
    CheckpointError
        No such file, or it is truncated, foreign or altered.
    """
    source = Path(path)
    try:
        data = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {source}") from None
    except Exception as e:
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise CheckpointError(
            f"{source} cannot be read as a checkpoint; it is truncated, or no file of `trainer.save`: {first}"
        ) from e
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(f"{source} is no file of `trainer.save`")
    if data.get("version") != VERSION:
        raise CheckpointError(
            f"{source} has version {data.get('version')!r} of the format, this dtrp reads {VERSION}; use the "
            f"dtrp that wrote it"
        )
    stated = data.pop("digest", None)
    if stated != digest(data):
        raise CheckpointError(f"{source} is damaged: its content does not fit its digest")
    return {k: v for k, v in data.items() if k not in ("format", "version")}


def digest(value: Any) -> str:
    """SHA-256 over a tree of plain data and tensors."""
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().contiguous().reshape(-1)
        sha.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        if flat.numel():
            sha.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, dict):
        sha.update(b"dict" + struct.pack("<q", len(value)))
        for k, v in value.items():
            _feed(sha, k)
            _feed(sha, v)
    elif isinstance(value, (list, tuple)):
        sha.update(type(value).__name__.encode() + struct.pack("<q", len(value)))
        for v in value:
            _feed(sha, v)
    else:
        text = f"{type(value).__name__} {value!r}".encode()
        sha.update(struct.pack("<q", len(text)) + text)


_PLAIN = (str, int, float, bool, complex, bytes, type(None), torch.dtype, torch.Size)


def _compact(value: Any, where: str) -> Any:
    """The same tree of what can be read back safely: tensors in host memory, no larger than they are.

    Raises
    ------
    CheckpointError
        Something else is in it.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        if value.layout is torch.strided:
            whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
            return value if whole else value.clone()
    elif type(value) in (dict, OrderedDict, Counter):
        made = type(value)({k: _compact(v, f"{where}.{k}") for k, v in value.items()})
        if hasattr(value, "_metadata"):  # versions of the modules in a model's state_dict
            made._metadata = value._metadata
        return made
    elif type(value) in (list, tuple):
        return type(value)(_compact(v, f"{where}[{i}]") for i, v in enumerate(value))
    elif type(value) in _PLAIN:
        return value
    elif hasattr(value, "item") and not isinstance(value, Tensor):  # numpy's numbers
        return value.item()
    raise CheckpointError(
        f"{where} holds a {type(value).__module__}.{type(value).__qualname__}, which cannot be saved so that "
        f"reading it executes no code; only tensors, numbers, text, lists, tuples and dicts can"
    )


def _sync_folder(folder: Path) -> None:
    """The new name is on disk, too."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
