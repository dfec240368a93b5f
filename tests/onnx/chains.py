"""A chain built by hand from onnx's own helpers: what `dtrp.onnx` promises does not hang on torch."""

from __future__ import annotations

from pathlib import Path

from onnx import TensorProto, checker, helper, save

from dtrp.onnx.manifest import (
    Batch,
    Constant,
    Manifest,
    ModelInput,
    Origin,
    StageFile,
    StageInput,
    Value,
    file_hash,
)


def write_chain(folder: Path) -> Manifest:
    """Three stages: y = 2x, z = y + w, out = (z * y) with y skipping a stage; w is an int64 count, as float.

    The output is ``{"out": out, "parts": (y, 7)}``.
    """
    folder.mkdir()
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 2])
    w = helper.make_tensor_value_info("w", TensorProto.INT64, ["batch", 1])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 2])
    two = helper.make_tensor("two", TensorProto.FLOAT, [1], [2.0])
    _stage(folder, 0, [helper.make_node("Mul", ["x", "two"], ["y"])], [x], [y], [two])
    cast = helper.make_node("Cast", ["w"], ["inner"], to=TensorProto.FLOAT)
    _stage(folder, 1, [cast, helper.make_node("Add", ["y", "inner"], ["z"])], [y, w], [z], [])
    inner = helper.make_node("Mul", ["z", "y"], ["inner"])
    _stage(folder, 2, [inner, helper.make_node("Identity", ["inner"], ["out"])], [z, y], [out], [])

    two_wide = ("batch", 2)

    def stage(k: int, inputs: list[StageInput], output: str) -> StageFile:
        file = f"stage_{k}.onnx"
        return StageFile(file, file_hash(folder / file), tuple(inputs), (Value(output, "float32", two_wide),))

    y_in = StageInput("y", "float32", two_wide, Origin(0, "y"))
    manifest = Manifest(
        model="Hand",
        opset=17,
        batch=Batch(dynamic=True, size=2),
        inputs=(
            ModelInput("x", "float32", two_wide, "x"),
            ModelInput("w", "int64", ("batch", 1), "extra['w']"),
        ),
        stages=(
            stage(0, [StageInput("x", "float32", two_wide, Origin(None, "x"))], "y"),
            stage(1, [y_in, StageInput("w", "int64", ("batch", 1), Origin(None, "w"))], "z"),
            stage(2, [StageInput("z", "float32", two_wide, Origin(1, "z")), y_in], "out"),
        ),
        outputs=(Origin(2, "out"), Origin(0, "y"), Constant(7)),
        structure={"dict": [["out", {"leaf": 0}], ["parts", {"tuple": [{"leaf": 1}, {"leaf": 2}]}]]},
        versions={"dtrp": "0"},
    )
    manifest.write(folder)
    return manifest


def _stage(folder, k, nodes, inputs, outputs, weights):
    graph = helper.make_graph(nodes, f"stage_{k}", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    save(model, folder / f"stage_{k}.onnx")
