"""A training run on disk: written whole or not at all, read without executing anything, checked first.

A file is torch's own zip format and holds plain data only, so ``torch.load(path, weights_only=True)`` reads
it. ``["model"]`` is the model's ``state_dict``, original names, for ``model.load_state_dict(...,
strict=True)``. A folder (folder.py) has the same content. A digest over everything (SHA-256) tells what is
truncated or altered; it is no signature: who can write a file can also write a fitting digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..memory import parts_of
from .folder import (
    Wanted,
    check_replaceable,
    entries_of,
    existing,
    load_plain,
    read_folder,
    replace_folder,
    sync,
    without_entries,
    write_folder,
)

if TYPE_CHECKING:
    from .mesh import Mesh

FORMAT = "dtrp checkpoint"
VERSION = 2


def as_folder(path: str | os.PathLike[str], format: str | None) -> bool:
    """Whether a run is to be written as a folder.

    Raises
    ------
    ValueError
        ``format`` is unknown.
    """
    if format not in (None, "file", "dcp"):
        raise ValueError(f"format={format!r}: expected 'file', 'dcp' (a folder), or None")
    return format == "dcp" or (format is None and os.fspath(path).endswith(("/", os.sep)))


def write_checkpoint(
    path: str | os.PathLike[str],
    content: Mapping[str, Any],
    *,
    folder: bool = False,
    mesh: Mesh | None = None,
) -> None:
    """Write ``content`` aside, then put it in ``path``'s place.

    With ``mesh`` a folder is written by all ranks of the first pipeline at once: each writes the tensors that
    it has, those of others are on the meta device. Then it is to be called on every rank.

    Raises
    ------
    CheckpointError
        It cannot be written, or holds what cannot be read back safely; on every rank. What was there is as it
        was.
    """
    target = Path(path)

    def begin() -> str:
        with _explained(target, folder=folder):
            if folder:
                check_replaceable(target)
            elif target.is_dir():
                raise IsADirectoryError(f"{target} is a folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            made = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
            if folder:
                made.mkdir()
            return str(made)

    aside = Path(begin() if mesh is None else mesh.first("saving", begin))
    error: BaseException | None = None
    if mesh is None or mesh.replica == 0:
        try:
            data = {"format": FORMAT, "version": VERSION, **{k: _compact(v, k) for k, v in content.items()}}
            with _explained(target, folder=folder):
                _write_folder(aside, data, mesh) if folder else _write_file(aside, data)
        except BaseException as e:
            error = e
            if mesh is not None and not isinstance(e, CheckpointError):
                raise

    def end() -> None:
        try:
            if error is not None:
                raise error
            with _explained(target, folder=folder):
                replace_folder(aside, target) if folder else os.replace(aside, target)
                sync(target.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                shutil.rmtree(aside) if folder else aside.unlink()
            raise

    end() if mesh is None else mesh.first("saving", end)


def _write_folder(aside: Path, data: dict[str, Any], mesh: Mesh | None) -> None:
    entries = entries_of(data)
    sums = {name: digest(tensor) for name, tensor in entries.items() if not tensor.is_meta}
    given = [(sums, True)] if mesh is None else mesh.gather("saving", (sums, aside.is_dir()))
    for stage, (theirs, there) in enumerate(given):
        sums |= theirs
        if not there:
            raise OSError(f"stage {stage} does not see {aside}, where all ranks have to write")
    lost = sorted(entries.keys() - sums.keys())
    if lost:
        raise OSError(f"no rank has {lost[:3]}")
    write_folder(aside, entries, _summed(data, sums), mesh)


def _summed(data: Mapping[str, Any], sums: Mapping[str, str]) -> dict[str, Any]:
    """What a folder has beside its entries: with a digest of each, and one of all."""
    plain = {**without_entries(data), "digests": dict(sorted(sums.items()))}
    return {**plain, "digest": digest(plain)}


@contextlib.contextmanager
def _explained(target: Path, *, folder: bool) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as e:
        raise CheckpointError(
            f"{target} could not be written: {e}. A previous {'folder' if folder else 'file'} of that name "
            f"is as it was; see that the place exists, is writable and has space, then save again"
        ) from e


def _write_file(path: Path, data: dict[str, Any]) -> None:
    data["digest"] = digest(data)
    with open(path, "wb") as file:
        torch.save(data, file)
        file.flush()
        os.fsync(file.fileno())


def read_checkpoint(path: str | os.PathLike[str], wanted: Wanted = lambda name: True) -> dict[str, Any]:
    """What `write_checkpoint` was given; of a folder, the tensors wanted (``section.name``; `read_folder`),
    others on meta.

    Raises
    ------
    CheckpointError
        There is no such file or folder, or it is truncated, foreign or altered.
    """
    content = read_content(path, wanted)
    if "format" not in content:
        raise CheckpointError(
            f"{Path(path)} is no file of `trainer.save`; dtrp.load_weights reads a state_dict"
        )
    return {k: v for k, v in content.items() if k not in ("format", "version")}


def read_content(path: str | os.PathLike[str], wanted: Wanted = lambda name: True) -> dict[str, Any]:
    """As `read_checkpoint`, of any file of plain data; ours has a ``"format"``, and is as it was written.

    Raises
    ------
    CheckpointError
        There is nothing that can be read, or it is ours and damaged.
    """
    source = existing(Path(path))
    try:
        data = read_folder(source, wanted) if source.is_dir() else load_plain(source)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {source}") from None
    except Exception as e:
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise CheckpointError(
            f"{source} cannot be read as a checkpoint; it is truncated, or holds other things than tensors "
            f"and plain data: {first}"
        ) from e
    if not isinstance(data, dict):
        raise CheckpointError(f"{source} is no file of `trainer.save`, and holds no state_dict")
    if data.get("format") != FORMAT:
        return {k: v for k, v in data.items() if k != "format"}
    if data.get("version") not in (1, VERSION):
        raise CheckpointError(
            f"{source} has version {data.get('version')!r} of the format, this dtrp reads 1 and {VERSION}; "
            f"use the dtrp that wrote it"
        )
    stated, sums = data.pop("digest", None), data.pop("digests", None)
    if sums is None:
        fits = stated == digest(data)
    else:
        there = {name: t for name, t in entries_of(data).items() if not t.is_meta}
        fits = stated == _summed(data, sums)["digest"]
        fits &= all(digest(tensor) == sums.get(name) for name, tensor in there.items())
    if not fits:
        raise CheckpointError(f"{source} is damaged: its content does not fit its digest")
    return data


def is_savable(value: Any) -> bool:
    """Whether a file can hold it."""
    try:
        _compact(value, "")
    except CheckpointError:
        return False
    return True


def digest(value: Any) -> str:
    """SHA-256 over a tree of plain data and tensors."""
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        sha.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        for part in parts_of(value.detach()):
            flat = part.contiguous().reshape(-1)
            if not flat.numel():
                continue
            sha.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, dict):
        sha.update(b"dict" + struct.pack("<q", len(value)))
        for k, v in value.items():
            _feed(sha, k)
            _feed(sha, v)
    elif isinstance(value, set):
        _feed(sha, sorted(value, key=repr))
    elif isinstance(value, (list, tuple)):
        sha.update(type(value).__name__.encode() + struct.pack("<q", len(value)))
        for v in value:
            _feed(sha, v)
    else:
        text = f"{type(value).__name__} {value!r}".encode()
        sha.update(struct.pack("<q", len(text)) + text)


_PLAIN = (str, int, float, bool, complex, bytes, type(None), torch.dtype, torch.device, torch.Size)


def _compact(value: Any, where: str) -> Any:
    """The same tree of what can be read back safely: tensors in host memory, no larger than they are.

    Raises
    ------
    CheckpointError
        Something else is in it.
    """
    if isinstance(value, Tensor):
        if value.is_meta:
            return value  # another rank's
        value = value.detach().cpu()
        if value.layout is torch.strided:
            whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
            return value if whole else value.clone()
        return value
    if type(value) in (dict, OrderedDict, Counter):
        made = type(value)({k: _compact(v, f"{where}.{k}") for k, v in value.items()})
        if hasattr(value, "_metadata"):  # versions of the modules in a model's state_dict
            made._metadata = value._metadata
        return made
    if type(value) in (list, tuple):
        return type(value)(_compact(v, f"{where}[{i}]") for i, v in enumerate(value))
    if type(value) in _PLAIN or (type(value) is set and all(type(v) in _PLAIN for v in value)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    raise CheckpointError(
        f"{where} holds a {type(value).__module__}.{type(value).__qualname__}, which cannot be saved so that "
        f"reading it executes no code; only tensors, numbers, text, lists, tuples and dicts can"
    )
