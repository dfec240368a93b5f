"""A saved run as a folder of torch.distributed.checkpoint, which other tools read, too.

Each tensor of a section is an entry ``section.name``, as ``dcp.load({"model": model.state_dict()}, ...)``
expects it. All that is no tensor is one entry more: a file of plain data, its bytes as a tensor.

Where several ranks of a launcher write together, each writes the tensors that it has, and gives those of
others as ones on the meta device: nobody has to hold the whole. Each tensor has a digest of its own, so that
a part can be read, and checked, without the rest.

A folder cannot be replaced in one step. It is written aside; the previous one steps back under a name of its
own, where reading looks for it should a crash come just then; the new one takes its place.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .mesh import Mesh

_PLAIN = "plain"


def load_plain(source: Any) -> Any:
    """What `torch.save` wrote, tensors in host memory; executes no code."""
    with warnings.catch_warnings():
        # Sparse tensors of whatever was read before, whole or not, are still told of.
        warnings.filterwarnings("ignore", message="Validating sparse tensor invariants")
        return torch.load(source, map_location="cpu", weights_only=True)


def entries_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that are entries of their own, by their names in a folder."""
    return {
        f"{section}.{name}": value
        for section, values in content.items()
        for name, value in (values.items() if isinstance(values, dict) else ())
        if isinstance(value, Tensor) and value.layout is torch.strided
    }


def without_entries(content: Mapping[str, Any]) -> dict[str, Any]:
    """All else, with ``None`` in their places."""
    plain = {section: copy.copy(values) for section, values in content.items()}
    for full in entries_of(content):
        section, _, name = full.partition(".")
        plain[section][name] = None
    return plain


def write_folder(
    folder: Path, entries: Mapping[str, Tensor], plain: Mapping[str, Any], mesh: Mesh | None = None
) -> None:
    """Write what `entries_of` and `without_entries` gave to a new folder; with ``mesh``, together."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    mine = {name: tensor for name, tensor in entries.items() if not tensor.is_meta}
    if mesh is None or mesh.rank == 0:
        buffer = io.BytesIO()
        torch.save(plain, buffer)
        mine[_PLAIN] = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    group = None if mesh is None else mesh.pipeline
    with _quiet():
        save(mine, storage_writer=FileSystemWriter(folder), no_dist=mesh is None, process_group=group)
    if mesh is None or mesh.rank == 0:
        sync(folder)


Wanted = Callable[[str], "bool | Tensor"]


def read_folder(folder: Path, wanted: Wanted = lambda name: True) -> dict[str, Any]:
    """What was written, with tensors on the meta device in the places of those not wanted; ``wanted`` may
    give the tensor that one is to be read into. Executes no code from it."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            with open(folder / ".metadata", "rb") as file:
                metadata: Metadata = _Harmless(file).load()
            return metadata

    reader = Reader(folder)
    entries: dict[str, Any] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            into = name == _PLAIN or wanted(name)
            dtype, device = entry.properties.dtype, "meta" if into is False else "cpu"
            fits = isinstance(into, Tensor) and (into.shape, into.dtype) == (entry.size, dtype)
            entries[name] = into if fits else torch.empty(entry.size, dtype=dtype, device=device)
    if _PLAIN not in entries:
        raise ValueError("it is no folder of `trainer.save`")
    with _quiet():
        load(
            {name: entry for name, entry in entries.items() if not entry.is_meta},
            storage_reader=reader,
            planner=DefaultLoadPlanner(flatten_state_dict=False),
            no_dist=True,
        )
    plain = io.BytesIO(entries.pop(_PLAIN).numpy().tobytes())
    content: dict[str, Any] = load_plain(plain)
    for section, values in content.items():
        for name in values if isinstance(values, dict) else ():
            values[name] = entries.get(f"{section}.{name}", values[name])
    return content


def check_replaceable(folder: Path) -> None:
    """Refuse to write a folder in the place of what is not one of this kind.

    Raises
    ------
    OSError
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file")
    there = folder.iterdir() if folder.is_dir() else ()
    others = sorted(f.name for f in there if f.name != ".metadata" and f.suffix != ".distcp")
    if others:
        raise OSError(f"{folder} holds other things than a checkpoint: {', '.join(others[:3])}")


def replace_folder(aside: Path, target: Path) -> None:
    """Put ``aside`` in the place of ``target``, which may be there."""
    previous = _previous(target)
    if target.is_dir():
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(target, previous)
    try:
        os.rename(aside, target)
    except BaseException:
        if previous.is_dir():
            os.rename(previous, target)
        raise
    sync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def existing(path: Path) -> Path:
    """``path``, or what it was before a crash in the middle of `replace_folder`."""
    return _previous(path) if not path.exists() and _previous(path).is_dir() else path


def sync(folder: Path) -> None:
    """Have the names in ``folder`` on disk, too."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning where it saves in a single process, which is meant; with an error's cause."""
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except CheckpointException as e:  # which is no Exception
            raise OSError(str(next(iter(e.failures.values()))[0])) from e


_DESCRIPTIONS = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {
        "Size",
        *(str(d).removeprefix("torch.") for d in vars(torch).values() if type(d) is torch.dtype),
    },
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # their name on Python 3.13 alone
}


class _Harmless(pickle.Unpickler):
    """Builds the descriptions that ``.metadata`` consists of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _DESCRIPTIONS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")
