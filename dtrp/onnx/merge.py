"""`merge_chain`: the exported stages as one ONNX model again, through ``onnx.compose``."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import ExportError
from .chain import stage_path
from .manifest import Manifest, Origin, origins, read_manifest


def merge_chain(directory: str | os.PathLike[str]) -> Any:
    """Join exported stages into one ONNX model.

    Its inputs are the chain's; its outputs ``output_0``, ``output_1``, ... are the tensor leaves of the
    model's output, in order. Everything else is called as in its stage, with ``stage_0/`` and so on before
    it. A weight that several stages hold stays in it several times.

    Parameters
    ----------
    directory : path
        What `dtrp.Pipeline.export_onnx` wrote.

    Returns
    -------
    onnx.ModelProto
        With all weights inside, hence for chains below 2 GB (what one protobuf message can hold).

    Raises
    ------
    ExportError
        No chain lies there, the package onnx is missing, or the chain is too large.
    """
    manifest = read_manifest(directory)
    try:
        onnx, compose = import_module("onnx"), import_module("onnx.compose")
    except ImportError as e:
        raise ExportError(
            "merging stages needs the package onnx, which is not installed: pip install 'dtrp[onnx]'"
        ) from e
    folder = Path(directory)
    paths = [stage_path(folder, stage, check_hashes=False) for stage in manifest.stages]
    size = sum((folder / name).stat().st_size for s in manifest.stages for name, _ in s.files)
    if size >= 2**31:
        raise ExportError(
            f"the chain has {size / 1e9:.1f} GB, one ONNX model can hold 2 GB: run it as a chain"
        )
    for stage in manifest.stages:
        stage_path(folder, stage, check_hashes=True)

    last = {
        origin: k for k, stage in enumerate(manifest.stages) for origin in (v.origin for v in stage.inputs)
    }
    last |= {leaf: len(paths) for leaf in manifest.outputs if isinstance(leaf, Origin)}
    models = [onnx.load(path) for path in paths]
    merged = _caller(onnx.helper, manifest, models[0])
    for k, (stage, model) in enumerate(zip(manifest.stages, models, strict=True)):
        # compose only joins neighbours: it drops outputs that it has joined, also those that a later stage
        # needs too. They are put back.
        outputs = {value.name: value for value in merged.graph.output}
        joined = [(_name(v.origin), f"stage_{k}/{v.name}") for v in stage.inputs]
        compose.add_prefix(model, f"stage_{k}/", inplace=True)
        merged = compose.merge_models(merged, model, joined)
        used = {name for name, _ in joined}
        still = [outputs[_name(o)] for o in last if _name(o) in used and last[o] > k]
        merged.graph.output.extend(still)
    return _finished(onnx, merged, manifest)


def _name(origin: Origin) -> str:
    """What a value that crosses stages is called in the merged model."""
    return f"caller/{origin.name}" if origin.stage is None else f"stage_{origin.stage}/{origin.name}"


def _caller(helper: Any, manifest: Manifest, like: Any) -> Any:
    """A model that stands for the caller: it hands out the chain's inputs to any number of stages."""
    used = {o.name for o in origins(manifest) if o.stage is None}
    graph = helper.make_graph(
        [
            helper.make_node("Identity", [v.name], [f"caller/{v.name}"])
            for v in manifest.inputs
            if v.name in used
        ],
        manifest.model,
        [_info(helper, v.name, v.dtype, v.shape) for v in manifest.inputs],
        [_info(helper, f"caller/{v.name}", v.dtype, v.shape) for v in manifest.inputs if v.name in used],
    )
    return helper.make_model(graph, opset_imports=like.opset_import, ir_version=like.ir_version)


def _info(helper: Any, name: str, dtype: str, shape: tuple[int | str, ...]) -> Any:
    element = getattr(import_module("onnx").TensorProto, _ONNX_TYPES.get(dtype, dtype.upper()))
    return helper.make_tensor_value_info(name, element, shape)


_ONNX_TYPES = {"float32": "FLOAT", "float64": "DOUBLE"}


def _finished(onnx: Any, merged: Any, manifest: Manifest) -> Any:
    """The model with the output's leaves, and only those, as its outputs."""
    values = {value.name: value for value in merged.graph.output}
    del merged.graph.output[:]
    leaves = [leaf for leaf in manifest.outputs if isinstance(leaf, Origin)]
    for i, leaf in enumerate(leaves):
        output = onnx.ValueInfoProto()
        output.CopyFrom(values[_name(leaf)])
        output.name = f"output_{i}"
        merged.graph.node.append(onnx.helper.make_node("Identity", [_name(leaf)], [output.name]))
        merged.graph.output.append(output)
    merged.graph.name = manifest.model
    onnx.checker.check_model(merged)
    return merged
