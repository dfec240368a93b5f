"""``manifest.json``: which files form a chain, and how their values travel.

Written by the exporter, read by whoever runs the chain. Nothing here needs torch, numpy or onnx.

A value's shape lists a number, or the name of an axis that may vary: ``"batch"``, ``"tokens_1"`` (the second
dimension of the input ``tokens``), or a text such as ``"64*batch"`` where the size follows an axis. File
names are plain names of files beside the manifest; a manifest that says otherwise is refused, so that a
foreign one cannot make its reader open other files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ExportError

NAME = "manifest.json"
FORMAT = "dtrp-onnx-chain"
VERSION = 1

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Value:
    """A tensor that enters or leaves a stage."""

    name: str
    dtype: str  # numpy's name, or "bfloat16"
    shape: Shape

    def __str__(self) -> str:
        return f"{self.name!r}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class ModelInput(Value):
    """An input of the whole chain; ``argument`` is what it is called in the model's ``forward``."""

    argument: str


@dataclass(frozen=True)
class Origin:
    """Where a value comes from: output ``name`` of ``stage``, or the chain's input ``name`` (stage None)."""

    stage: int | None
    name: str


@dataclass(frozen=True)
class Constant:
    """A leaf of the model's output that is no tensor and never changes."""

    value: Any


@dataclass(frozen=True)
class StageInput(Value):
    """An input of a stage."""

    origin: Origin


@dataclass(frozen=True)
class StageFile:
    """One stage: its file, that file's hash, and its ends.

    ``data`` holds name and hash of the files with weights that are too large for the ONNX file.
    """

    file: str
    sha256: str
    inputs: tuple[StageInput, ...]
    outputs: tuple[Value, ...]
    data: tuple[tuple[str, str], ...] = ()
    submodules: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[tuple[str, str], ...]:
        """Name and hash of each file of the stage."""
        return ((self.file, self.sha256), *self.data)


@dataclass(frozen=True)
class Batch:
    """Whether the chain takes any batch size, from ``smallest`` on; otherwise only ``size``, and why."""

    dynamic: bool
    size: int
    smallest: int = 1
    reason: str = ""


@dataclass(frozen=True)
class OpenAxis:
    """A size other than the batch that may vary, in steps of ``multiple`` from the example's ``size``."""

    name: str
    size: int
    smallest: int
    largest: int | None
    multiple: int = 1

    def allows(self, size: int) -> bool:
        """Whether the chain gives the model's result for this size."""
        inside = self.smallest <= size and (self.largest is None or size <= self.largest)
        return inside and (size - self.size) % self.multiple == 0

    def __str__(self) -> str:
        upper = "on" if self.largest is None else f"to {self.largest}"
        return f"from {self.smallest} {upper}" + f", in steps of {self.multiple}" * (self.multiple > 1)


@dataclass(frozen=True)
class Manifest:
    """All that is known about an exported chain."""

    model: str
    opset: int
    batch: Batch
    inputs: tuple[ModelInput, ...]
    stages: tuple[StageFile, ...]
    outputs: tuple[Origin | Constant, ...]  # the leaves of the model's output
    structure: Any  # how the leaves form the output: see `build`
    axes: tuple[OpenAxis, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    verification: Mapping[str, Any] | None = None

    def write(self, directory: Path) -> Path:
        """Write ``manifest.json`` into ``directory``."""
        path = directory / NAME
        path.write_text(json.dumps(_to_json(self), indent=2) + "\n", encoding="utf-8")
        return path


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of an exported chain, and check that it makes sense.

    Parameters
    ----------
    directory : path
        A folder that `dtrp.Pipeline.export_onnx` wrote.

    Returns
    -------
    Manifest

    Raises
    ------
    ExportError
        The folder holds no manifest, one of another format or version, or one that contradicts itself or
        names files outside of its folder.
    """
    path = Path(directory) / NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(
            f"{path} does not exist: expected a folder that Pipeline.export_onnx or `dtrp export` wrote"
        ) from None
    except (OSError, ValueError) as e:
        raise ExportError(f"{path} cannot be read: {e}; export again") from e
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ExportError(f"{path} is no manifest of an exported chain: its format is not {FORMAT!r}")
    if raw.get("version") != VERSION:
        raise ExportError(
            f"{path} has version {raw.get('version')!r}, this dtrp reads version {VERSION}: "
            f"export again, or use the dtrp that wrote it ({raw.get('versions', {}).get('dtrp', 'unknown')})"
        )
    try:
        manifest = _from_json(raw)
        _check(manifest)
    except ExportError as e:
        raise ExportError(f"{path}: {e}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ExportError(f"{path} is damaged: {type(e).__name__}: {e}; export again") from e
    return manifest


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def build(structure: Any, leaf: Callable[[int], Any]) -> Any:
    """The model's output: ``structure`` with leaf ``i`` replaced by ``leaf(i)``.

    ``{"leaf": i}``, ``{"tuple": [...]}``, ``{"list": [...]}`` and ``{"dict": [[key, ...], ...]}``, nested.
    """
    ((kind, inner),) = structure.items()
    if kind == "leaf":
        return leaf(inner)
    if kind == "tuple":
        return tuple(build(s, leaf) for s in inner)
    if kind == "list":
        return [build(s, leaf) for s in inner]
    if kind == "dict":
        return {key: build(s, leaf) for key, s in inner}
    raise ValueError(f"unknown structure {kind!r}")


# ---- JSON ------------------------------------------------------------------------------------------------


def _to_json(m: Manifest) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": m.model,
        "opset": m.opset,
        "versions": dict(m.versions),
        "batch": {
            "dynamic": m.batch.dynamic,
            "size": m.batch.size,
            "smallest": m.batch.smallest,
            "reason": m.batch.reason,
        },
        "axes": [asdict(axis) for axis in m.axes],
        "inputs": [{**_value(v), "argument": v.argument} for v in m.inputs],
        "stages": [
            {
                "file": s.file,
                "sha256": s.sha256,
                "data": [{"file": name, "sha256": digest} for name, digest in s.data],
                "inputs": [{**_value(v), "from": _origin(v.origin)} for v in s.inputs],
                "outputs": [_value(v) for v in s.outputs],
                "submodules": list(s.submodules),
            }
            for s in m.stages
        ],
        "outputs": [
            {"constant": leaf.value} if isinstance(leaf, Constant) else _origin(leaf) for leaf in m.outputs
        ],
        "structure": m.structure,
        "verification": m.verification,
    }


def _value(v: Value) -> dict[str, Any]:
    return {"name": v.name, "dtype": v.dtype, "shape": list(v.shape)}


def _origin(o: Origin) -> dict[str, Any]:
    return {"input": o.name} if o.stage is None else {"stage": o.stage, "output": o.name}


def _from_json(raw: Mapping[str, Any]) -> Manifest:
    return Manifest(
        model=str(raw["model"]),
        opset=int(raw["opset"]),
        versions=dict(raw["versions"]),
        batch=Batch(**raw["batch"]),
        axes=tuple(OpenAxis(**axis) for axis in raw.get("axes", ())),
        inputs=tuple(ModelInput(**_read_value(v), argument=str(v["argument"])) for v in raw["inputs"]),
        stages=tuple(
            StageFile(
                file=str(s["file"]),
                sha256=str(s["sha256"]),
                data=tuple((str(d["file"]), str(d["sha256"])) for d in s["data"]),
                inputs=tuple(
                    StageInput(**_read_value(v), origin=_read_origin(v["from"])) for v in s["inputs"]
                ),
                outputs=tuple(Value(**_read_value(v)) for v in s["outputs"]),
                submodules=tuple(map(str, s["submodules"])),
            )
            for s in raw["stages"]
        ),
        outputs=tuple(
            Constant(leaf["constant"]) if "constant" in leaf else _read_origin(leaf)
            for leaf in raw["outputs"]
        ),
        structure=raw["structure"],
        verification=raw["verification"],
    )


def _read_value(raw: Mapping[str, Any]) -> dict[str, Any]:
    shape = tuple(raw["shape"])
    if not all(isinstance(d, str) or (type(d) is int and d >= 0) for d in shape):
        raise ValueError(f"shape {raw['shape']!r} of {raw['name']!r}: expected numbers and names of axes")
    return {"name": str(raw["name"]), "dtype": str(raw["dtype"]), "shape": shape}


def _read_origin(raw: Mapping[str, Any]) -> Origin:
    return (
        Origin(None, str(raw["input"])) if "input" in raw else Origin(int(raw["stage"]), str(raw["output"]))
    )


# ---- checks ----------------------------------------------------------------------------------------------


def _check(m: Manifest) -> None:
    files = [name for s in m.stages for name, _ in s.files]
    for name in files:
        if name in ("", ".", "..") or name != os.path.basename(name) or "\\" in name or ":" in name:
            raise ExportError(
                f"it names the file {name!r}; only plain names of files beside the manifest are allowed"
            )
    _no_repeats("file", files)
    _no_repeats("input", [v.name for v in m.inputs])
    given: dict[int | None, set[str]] = {None: {v.name for v in m.inputs}}
    for k, s in enumerate(m.stages):
        _no_repeats(f"input of stage {k}", [v.name for v in s.inputs])
        _no_repeats(f"output of stage {k}", [v.name for v in s.outputs])
        for v in s.inputs:
            _known(v.origin, given, f"input {v.name!r} of stage {k}")
        given[k] = {v.name for v in s.outputs}
    for i, leaf in enumerate(m.outputs):
        if isinstance(leaf, Origin):
            _known(leaf, given, f"output {i} of the model")
    seen: list[int] = []
    build(m.structure, seen.append)
    if sorted(seen) != list(range(len(m.outputs))):
        raise ExportError(f"the structure of the output uses leaves {sorted(seen)} of {len(m.outputs)}")


def _known(origin: Origin, given: Mapping[int | None, set[str]], what: str) -> None:
    if origin.name not in given.get(origin.stage, set()):
        where = "the chain's inputs" if origin.stage is None else f"the outputs of stage {origin.stage}"
        raise ExportError(f"{what} comes from {origin.name!r}, which is not among {where} before it")


def _no_repeats(what: str, names: Sequence[str]) -> None:
    for name, n in Counter(names).items():
        if n > 1:
            raise ExportError(f"{what} {name!r} appears {n} times")
