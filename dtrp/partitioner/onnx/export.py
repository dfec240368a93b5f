"""`export_chain`: stages to a folder of ONNX files."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import ExportError
from ...onnx.chain import load_chain
from ...onnx.manifest import (
    NAME,
    Batch,
    Manifest,
    ModelInput,
    OpenAxis,
    StageFile,
    StageInput,
    Value,
    file_hash,
)
from ...wiring import CALLER, Source
from ..capture.graph import Captured
from ..capture.snapshot import untouched
from ..split import SplitGraph
from .describe import dtype_name, origin_of, output_leaf, output_structure, package_versions
from .examples import example_call
from .folder import written_aside
from .names import Names, name_ends, shape_text, tensors
from .stage import Exportable, NotDynamic, convert
from .study import Study, TensorEnd, study
from .verify import Differences, compare, full_precision, require, to_numpy, tolerance

log = logging.getLogger("dtrp")

LARGE = 1_900_000_000
"""Bytes of weights from which they get a file of their own; one ONNX file can hold 2 GB."""

_DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def export_chain(
    captured: Captured,
    graph: SplitGraph,
    directory: Path,
    *,
    submodules: Sequence[Sequence[str]],
    example: Sequence[torch.Tensor | None],
    opset: int | None = None,
    dynamic_batch: bool = True,
    verify: bool = True,
    overwrite: bool = False,
) -> list[Path]:
    """Export the stages of the eval graph; see `dtrp.Pipeline.export_onnx`, which is the public form.

    Parameters
    ----------
    captured : Captured
        The model and its signature.
    graph : SplitGraph
        Its stages in eval mode, with the weights to export.
    submodules : sequence of sequence of str
        Of each stage, the modules that it runs: for messages and the manifest.
    example : sequence of Tensor or None
        The model's tensor inputs, to verify with; None: made up.
    """
    _require_packages(["onnx", "onnxscript"] + ["onnxruntime"] * verify)
    if opset is not None and (isinstance(opset, bool) or not isinstance(opset, int)):
        raise TypeError(f"opset={opset!r}: expected an int, the version of ONNX's operators, or None")
    if opset is not None and opset < 1:
        raise ValueError(f"opset={opset!r}: expected a version of ONNX's operators, such as 20")
    model = captured.model
    _require_data(model)
    with written_aside(directory, overwrite) as aside, ExitStack() as stack:
        for module in (model, *graph.modules):
            stack.enter_context(untouched(module))
        for module in (model, *graph.modules):
            module.eval()
        stack.enter_context(torch.no_grad())
        if verify:
            stack.enter_context(full_precision(model))
        manifest = _write_and_verify(
            captured, graph, aside, submodules, opset, dynamic_batch, verify, example
        )
        manifest.write(aside)
    if dynamic_batch and not manifest.batch.dynamic:
        log.warning("exported for %d sample(s) only: %s", manifest.batch.size, manifest.batch.reason)
    return [directory / s.file for s in manifest.stages] + [directory / NAME]


def _write_and_verify(
    captured: Captured,
    graph: SplitGraph,
    aside: Path,
    submodules: Sequence[Sequence[str]],
    opset: int | None,
    dynamic: bool,
    verify: bool,
    example: Sequence[torch.Tensor | None],
) -> Manifest:
    """All stages' files: with all sizes open if that can be, else with the batch's, else with none."""
    placeholders = captured.eval.module.graph.find_nodes(op="placeholder")
    inputs = [node.meta["val"] for node in placeholders]
    levels = [(True, True), (True, False)] if dynamic else []
    reason = ""
    for batch, others in (*levels, (False, False)):
        found = study(
            graph, captured.model, captured.signature, inputs, dynamic=batch, others=others, reason=reason
        )
        if others and all(axis.name == "batch" for axis in found.axes):
            others = False
        try:
            manifest = _write(captured, graph, aside, submodules, opset, found)
        except NotDynamic as e:
            if not batch:
                raise ExportError(str(e)) from e
            reason = str(e)
            continue
        if not verify:
            return manifest
        manifest.write(aside)
        try:
            return _verify(captured, graph, manifest, found, aside, example)
        except ExportError as e:
            if not others:
                raise
            log.info("with %s open it is not right: %s", ", ".join(a.name for a in found.axes), e)
    raise AssertionError("the last level returns or raises")


def _write(
    captured: Captured,
    graph: SplitGraph,
    aside: Path,
    submodules: Sequence[Sequence[str]],
    opset: int | None,
    found: Study,
) -> Manifest:
    wiring = graph.wiring
    names = Names(captured.signature.tensor_names, wiring)
    inputs = [(names[Source(CALLER, i)], end) for i, end in enumerate(found.inputs)]
    _require_dtypes(inputs, "the model's inputs")
    outputs = tuple(output_leaf(leaf, found, names) for leaf in wiring.result)
    structure = output_structure(wiring)
    stages = []
    used_opset = opset or 0
    for k, (module, wires) in enumerate(zip(graph.modules, wiring.stages, strict=True)):
        entering = tensors(found.stage_inputs[k], [names[s] for s in wires.inputs])
        leaving = tensors(found.stage_outputs[k], [names[Source(k, i)] for i in range(len(wires.outputs))])
        _require_dtypes([*entering.items(), *leaving.items()], f"the values of stage {k}")
        ready = Exportable(module, k, found.stage_inputs[k], found.stage_outputs[k])
        program = convert(ready, found, opset)
        used_opset = program.model.opset_imports[""]
        name_ends(program.model, entering, leaving, f"stage_{k}")
        file, data = _save(program, aside, k)
        origins = {names[s]: origin_of(s, names) for s in wires.inputs}
        stages.append(
            StageFile(
                file=file,
                sha256=file_hash(aside / file),
                data=tuple((d, file_hash(aside / d)) for d in data),
                inputs=tuple(
                    StageInput(n, dtype_name(end), shape_text(n, end.shape), origins[n])
                    for n, end in entering.items()
                ),
                outputs=tuple(
                    Value(n, dtype_name(end), shape_text(n, end.shape)) for n, end in leaving.items()
                ),
                submodules=tuple(submodules[k]),
            )
        )
        log.info("stage %d of %d is in ONNX", k, len(graph.modules))
    return Manifest(
        model=type(captured.model).__name__,
        opset=used_opset,
        batch=Batch(found.dynamic, found.batch, 1 if found.dynamic else found.batch, found.reason),
        axes=tuple(
            OpenAxis(a.name, a.size, a.smallest, a.largest, a.step) for a in found.axes if a.name != "batch"
        ),
        inputs=tuple(
            ModelInput(name, dtype_name(end), shape_text(name, end.shape), argument)
            for (name, end), argument in zip(inputs, captured.signature.tensor_names, strict=True)
        ),
        stages=tuple(stages),
        outputs=outputs,
        structure=structure,
        versions=package_versions(("dtrp", "torch", "onnx", "onnxscript")),
    )


def _save(program: Any, aside: Path, stage: int) -> tuple[str, list[str]]:
    """Write a stage's file, and its weights beside it if they are too many; gives the files' names."""
    import onnx

    path = aside / f"stage_{stage}.onnx"
    weights = sum(v.const_value.nbytes for v in program.model.graph.initializers.values() if v.const_value)
    program.save(path, external_data=weights > LARGE)
    try:
        onnx.checker.check_model(path)  # by path: a model over 2 GB cannot be checked in memory
    except onnx.checker.ValidationError as e:
        raise ExportError(f"stage {stage} is no valid ONNX model: {e}") from e
    return path.name, sorted(p.name for p in aside.glob(f"{path.name}.*"))


def _verify(
    captured: Captured,
    graph: SplitGraph,
    manifest: Manifest,
    found: Study,
    aside: Path,
    example: Sequence[torch.Tensor | None],
) -> Manifest:
    """The manifest with what verifying found; raises `ExportError` where the chain is not the model."""
    allowed = tolerance(captured.model, found)
    try:
        chain = load_chain(aside, check_hashes=False, session_options=_silent())
    except ExportError as e:
        raise ExportError(f"{e}. verify=False exports without running the result") from e

    def differences(sizes: Mapping[str, int], rows: int | None = None) -> Differences:
        call = example_call(found, example, sizes)
        if rows is not None:
            call = [t if t.is_floating_point() or t.is_complex() else (t % rows).to(t.dtype) for t in call]
        return compare(
            chain, graph, captured.model, captured.signature, call, sizes, sizes.get("batch", found.batch)
        )

    def runs(sizes: Mapping[str, int]) -> bool:
        try:
            chain(*map(to_numpy, example_call(found, example, sizes)))
        except ExportError:
            return False
        return True

    base = {axis.name: axis.size for axis in found.axes}
    larger = {axis.name: axis.size + axis.step for axis in found.axes}
    # Where a table ends (of positions, say) tensors without data do not see. The files are asked first: on
    # CUDA, torch could do nothing more after such a lookup.
    ended = {name: base[name] for name in larger if not runs({**base, name: larger[name]})}
    results = []
    for sizes in [base] + [larger | ended] * (larger | ended != base):
        results.append(differences(sizes))
        require(results[-1], allowed, [s.submodules for s in manifest.stages])
    smallest = {axis.name: axis.size for axis in found.axes}
    for axis in found.axes:
        # One sample is what is asked for most after deployment, and what code such as x.squeeze() treats in
        # its own way: where the chain then gives something else, it promises the sizes from the example's on.
        least = 1 if axis.name == "batch" else axis.smallest
        if least == axis.size:
            continue
        sizes = {**base, axis.name: least}
        try:
            try:
                single = differences(sizes)
            except Exception:  # an index of the example's may lie behind rows so few
                single = differences(sizes, least)
        except Exception as e:
            text = "the chain is not meant for %s=%d, and refuses less than the example's %d: %s"
            log.warning(text, axis.name, least, axis.size, e)
        else:
            if single.within(allowed):
                results.append(single)
                smallest[axis.name] = least
            else:
                what = "a single sample" if axis.name == "batch" else f"{axis.name}={least}"
                text = "%s takes another course through the model than larger sizes do: %d is the smallest"
                log.warning(text, what, axis.size)
    for r in results:
        log.info(
            "verified with %s: largest difference %s; whole model %.1e",
            r.told,
            ", ".join(f"stage {k}: {d:.1e}" for k, d in enumerate(r.alone)),
            r.output,
        )
    return replace(
        manifest,
        batch=replace(manifest.batch, smallest=smallest.get("batch", found.batch)),
        axes=tuple(
            replace(axis, smallest=smallest[axis.name], largest=ended.get(axis.name, axis.largest))
            for axis in manifest.axes
        ),
        verification={
            "tolerance": allowed,
            "onnxruntime": version("onnxruntime"),
            "batch_sizes": [r.batch for r in results],
            "sizes": [dict(r.sizes) for r in results],
            "largest_difference_per_stage": [
                max(r.alone[k] for r in results) for k in range(len(graph.modules))
            ],
            "largest_difference_up_to_stage": [
                max(r.chain[k] for r in results) for k in range(len(graph.modules))
            ],
            "largest_difference_of_output": max(r.output for r in results),
        },
    )


def _silent() -> Any:
    """What fails is told by us, where it does not just say how large a size may be."""
    options = import_module("onnxruntime").SessionOptions()
    options.log_severity_level = 4
    return options


# ---- what is refused first -------------------------------------------------------------------------------


def _require_packages(packages: Sequence[str]) -> None:
    if missing := [p for p in packages if find_spec(p) is None]:
        raise ExportError(
            f"exporting to ONNX needs the package(s) {', '.join(missing)}, which are not installed: "
            f"pip install 'dtrp[onnx]'"
            + (
                ", or pass verify=False to export without running the result"
                if missing == ["onnxruntime"]
                else ""
            )
        )


def _require_data(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ExportError(
                f"{name!r} is on the meta device: it has no values to export. Load the weights first "
                f"(model.to_empty(device='cpu'), then load_state_dict)"
            )


def _require_dtypes(values: Iterable[tuple[str, TensorEnd]], where: str) -> None:
    for name, end in values:
        if dtype_name(end) not in _DTYPES:
            raise ExportError(
                f"{name!r} among {where} has dtype {end.dtype}, which cannot travel between ONNX models: "
                f"allowed are {', '.join(_DTYPES)}. Convert it where it is made (torch.view_as_real for "
                f"complex numbers), or use fewer stages"
            )
