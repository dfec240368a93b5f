"""`load_chain`: the exported stages as one callable, numpy in and numpy out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ExportError
from .manifest import Constant, Manifest, Origin, StageFile, build, file_hash, read_manifest

Provider = str | tuple[str, Mapping[str, Any]]


class Chain:
    """Exported stages, run one after the other with onnxruntime. Made by `load_chain`.

    Called with the model's tensor inputs, it gives the model's output in its own structure: tuples, lists
    and dicts (also for what was a dataclass or named tuple) of numpy arrays.

    Attributes
    ----------
    manifest : Manifest
    sessions : tuple of onnxruntime.InferenceSession
        One per stage.
    """

    def __init__(self, manifest: Manifest, sessions: Sequence[Any]) -> None:
        self.manifest = manifest
        self.sessions = tuple(sessions)
        self._last_use = _last_uses(manifest)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in the order in which they are passed."""
        return tuple(v.name for v in self.manifest.inputs)

    def __call__(self, *inputs: np.ndarray, **inputs_by_name: np.ndarray) -> Any:
        """Run the chain.

        Parameters
        ----------
        *inputs, **inputs_by_name : numpy.ndarray
            The model's tensor inputs, in order, or by the name of the argument of the model's ``forward``
            (or by `inputs`). Their dtypes and shapes must be those of the manifest.

        Returns
        -------
        Any
            The model's output, with numpy arrays.

        Raises
        ------
        TypeError
            Too many, missing or unknown inputs; something that is no array; another dtype.
        ValueError
            Another shape.
        """
        values: dict[Origin, np.ndarray] = {
            Origin(None, name): array for name, array in self._bind(inputs, inputs_by_name).items()
        }
        for k, stage in enumerate(self.manifest.stages):
            made = self.run_stage(k, [values[v.origin] for v in stage.inputs])
            for v, array in zip(stage.outputs, made, strict=True):
                values[Origin(k, v.name)] = array
            # What no later stage needs is let go: a chain holds as little as the model would.
            for origin in [o for o in values if self._last_use.get(o, -1) <= k]:
                del values[origin]
        leaves = [
            leaf.value if isinstance(leaf, Constant) else values[leaf] for leaf in self.manifest.outputs
        ]
        return build(self.manifest.structure, leaves.__getitem__)

    def run_stage(self, index: int, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run one stage on its inputs, in the manifest's order; gives its outputs."""
        stage = self.manifest.stages[index]
        if not stage.outputs:
            return []  # it gives numbers only, which later stages have as constants
        names = [v.name for v in stage.inputs]
        try:
            made = self.sessions[index].run(
                [v.name for v in stage.outputs], dict(zip(names, inputs, strict=True))
            )
        except Exception as e:
            shapes = ", ".join(f"{n}: {a.dtype}{list(a.shape)}" for n, a in zip(names, inputs, strict=True))
            raise ExportError(f"stage {index} ({stage.file}) failed in onnxruntime on {shapes}: {e}") from e
        return list(made)

    def __repr__(self) -> str:
        inputs = ", ".join(map(str, self.manifest.inputs))
        return f"Chain({self.manifest.model}, {len(self.sessions)} stages, inputs {inputs})"

    # ---- inputs ------------------------------------------------------------------------------------------

    def _bind(self, inputs: Sequence[np.ndarray], by_name: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays by the chain's input names, checked."""
        wanted = self.manifest.inputs
        expected = "expected " + (", ".join(map(str, wanted)) or "none")
        if len(inputs) > len(wanted):
            raise TypeError(f"{len(inputs)} inputs were passed; {expected}")
        bound = {v.name: array for v, array in zip(wanted, inputs, strict=False)}
        known = {v.argument: v.name for v in wanted} | {v.name: v.name for v in wanted}
        for key, array in by_name.items():
            if key not in known:
                raise TypeError(f"unknown input {key!r}; {expected}")
            if known[key] in bound:
                raise TypeError(f"input {key!r} was passed twice; {expected}")
            bound[known[key]] = array
        if missing := [v.name for v in wanted if v.name not in bound]:
            raise TypeError(f"missing input(s) {', '.join(map(repr, missing))}; {expected}")
        self._check(bound)
        return bound

    def _check(self, bound: Mapping[str, np.ndarray]) -> None:
        sizes: dict[str, tuple[int, str]] = {}  # of the axes that may vary: size, and the input that set it
        for v in self.manifest.inputs:
            array = bound[v.name]
            if not isinstance(array, np.ndarray):
                raise TypeError(
                    f"input {v.name!r} is a {type(array).__module__}.{type(array).__name__}; expected a "
                    f"numpy.ndarray (of a torch tensor: tensor.numpy())"
                )
            if array.dtype.name != v.dtype:
                raise TypeError(
                    f"input {v.name!r} has dtype {array.dtype.name}, expected {v.dtype}: "
                    f"convert it with array.astype({v.dtype!r})"
                )
            fits = len(array.shape) == len(v.shape) and all(
                isinstance(want, str) or got == want for got, want in zip(array.shape, v.shape, strict=True)
            )
            if not fits:
                note = "" if self.manifest.batch.dynamic else f"; {_fixed(self.manifest)}"
                raise ValueError(
                    f"input {v.name!r} has shape {list(array.shape)}, expected "
                    f"[{', '.join(map(str, v.shape))}]{note}"
                )
            for got, axis in zip(array.shape, v.shape, strict=True):
                if not isinstance(axis, str):
                    continue
                size, setter = sizes.setdefault(axis, (got, v.name))
                if got != size:
                    raise ValueError(
                        f"input {v.name!r} has {got} along {axis!r}, input {setter!r} has {size}: "
                        f"they must agree"
                    )
        smallest = self.manifest.batch.smallest
        for size, setter in [sizes["batch"]] if "batch" in sizes else []:
            if size < smallest:
                raise ValueError(
                    f"input {setter!r} has {size} sample(s); this chain gives the model's result from "
                    f"{smallest} on: pad the batch"
                )
        for known in self.manifest.axes:
            size, setter = sizes.get(known.name, (known.size, ""))
            if not known.allows(size):
                raise ValueError(
                    f"input {setter!r} has {size} along {known.name!r}; this chain gives the model's result "
                    f"{known}: pad to such a size"
                )


def load_chain(
    directory: str | os.PathLike[str],
    *,
    providers: Sequence[Provider] | Sequence[Sequence[Provider]] | None = None,
    session_options: Any = None,
    check_hashes: bool = True,
) -> Chain:
    """Load exported stages, to be run with onnxruntime. Needs neither torch nor the model.

    Parameters
    ----------
    directory : path
        What `dtrp.Pipeline.export_onnx` wrote.
    providers : sequence, optional
        onnxruntime's execution providers, best first (a name, or a name and a dict of options): one list
        for all stages, or a list of lists, one per stage. Default: the CPU.
    session_options : onnxruntime.SessionOptions, optional
        For all stages.
    check_hashes : bool
        Compare the files with the hashes in the manifest first.

    Returns
    -------
    Chain

    Raises
    ------
    ExportError
        No chain lies there; a file is missing, was changed, or cannot be loaded; onnxruntime is missing.
    ValueError
        Providers that this onnxruntime does not have, or as many lists as there are no stages.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    try:
        runtime = import_module("onnxruntime")
    except ImportError as e:
        raise ExportError(
            "running exported stages needs the package onnxruntime, which is not installed: "
            "pip install 'dtrp[onnx]' (or onnxruntime-gpu alone)"
        ) from e
    per_stage = _providers(providers, len(manifest.stages), runtime.get_available_providers())
    paths = [stage_path(directory, stage, check_hashes) for stage in manifest.stages]
    if session_options is None:
        session_options = runtime.SessionOptions()
        session_options.log_severity_level = 3  # errors only
    sessions = []
    for k, (path, chosen) in enumerate(zip(paths, per_stage, strict=True)):
        try:
            sessions.append(runtime.InferenceSession(path, session_options, providers=chosen))
        except Exception as e:
            raise ExportError(f"onnxruntime cannot load stage {k} ({path.name}): {e}") from e
    return Chain(manifest, sessions)


def stage_path(directory: Path, stage: StageFile, check_hashes: bool) -> Path:
    """The stage's file, after a look at all its files."""
    for name, digest in stage.files:
        path = directory / name
        if not path.is_file():
            raise ExportError(f"{path} is missing, though the manifest names it: copy the whole folder")
        if path.resolve().parent != directory.resolve():
            raise ExportError(f"{path} leads out of its folder, to {path.resolve()}: refused")
        if check_hashes and (found := file_hash(path)) != digest:
            raise ExportError(
                f"{path} is not the file that was exported: its SHA-256 is {found}, the manifest says "
                f"{digest}. Copy the folder again, or export again"
            )
    return directory / stage.file


def _providers(asked: Sequence[Any] | None, n_stages: int, available: Sequence[str]) -> list[list[Provider]]:
    """A list of providers for each stage."""
    if asked is None:
        return [["CPUExecutionProvider"]] * n_stages
    if isinstance(asked, str):
        raise TypeError(f"providers={asked!r}: expected a list, [{asked!r}]")
    per_stage = [list(p) for p in asked] if any(isinstance(p, list) for p in asked) else None
    if per_stage is None:
        per_stage = [list(asked)] * n_stages
    elif len(per_stage) != n_stages:
        raise ValueError(
            f"providers has {len(per_stage)} lists, the chain has {n_stages} stages: give one each"
        )
    for chosen in per_stage:
        for provider in chosen:
            name = provider if isinstance(provider, str) else provider[0]
            if name not in available:
                raise ValueError(
                    f"provider {name!r} is not in this onnxruntime; it has {', '.join(available)}"
                )
    return per_stage


def _last_uses(manifest: Manifest) -> dict[Origin, int]:
    """The index of the last stage that needs a value; the number of stages where the output does."""
    last = {v.origin: k for k, stage in enumerate(manifest.stages) for v in stage.inputs}
    last |= {leaf: len(manifest.stages) for leaf in manifest.outputs if isinstance(leaf, Origin)}
    return last


def _fixed(manifest: Manifest) -> str:
    reason = f" ({manifest.batch.reason})" if manifest.batch.reason else ""
    return f"it was exported for {manifest.batch.size} sample(s) only{reason}"
