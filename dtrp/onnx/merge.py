"""`merge_chain`: the exported stages as one ONNX model again."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import ExportError
from .chain import stage_path
from .manifest import Origin, Value, read_manifest


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

    helper = onnx.helper

    def same(source: str, name: str) -> Any:
        return helper.make_node("Identity", [source], [name])

    ends: dict[Origin, Value] = {Origin(None, v.name): v for v in manifest.inputs}
    opsets: dict[Any, Any] = {}
    nodes, weights, infos, functions = [], [], [], []
    for k, (stage, path) in enumerate(zip(manifest.stages, paths, strict=True)):
        ends |= {Origin(k, v.name): v for v in stage.outputs}
        model = compose.add_prefix(onnx.load(path), f"stage_{k}/", inplace=True)
        nodes += [
            helper.make_node("Identity", [_name(v.origin)], [f"stage_{k}/{v.name}"]) for v in stage.inputs
        ]
        nodes += model.graph.node
        weights += model.graph.initializer
        infos += model.graph.value_info
        functions += model.functions
        opsets |= {(o.domain, o.version): o for o in model.opset_import}
    leaves = [leaf for leaf in manifest.outputs if isinstance(leaf, Origin)]
    nodes += [same(_name(leaf), f"output_{i}") for i, leaf in enumerate(leaves)]
    graph = helper.make_graph(
        nodes,
        manifest.model,
        [_info(helper, v.name, v) for v in manifest.inputs],
        [_info(helper, f"output_{i}", ends[leaf]) for i, leaf in enumerate(leaves)],
        weights,
        value_info=infos,
    )
    merged = helper.make_model(
        graph, ir_version=model.ir_version, functions=functions, opset_imports=list(opsets.values())
    )
    onnx.checker.check_model(merged)
    return merged


def _name(origin: Origin) -> str:
    """What a value is called in the merged model."""
    return origin.name if origin.stage is None else f"stage_{origin.stage}/{origin.name}"


def _info(helper: Any, name: str, value: Value) -> Any:
    kind = _ONNX_TYPES.get(value.dtype, value.dtype.upper())
    element = getattr(import_module("onnx").TensorProto, kind)
    return helper.make_tensor_value_info(name, element, value.shape)


_ONNX_TYPES = {"float32": "FLOAT", "float64": "DOUBLE"}
