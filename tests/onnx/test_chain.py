"""`dtrp.onnx`: loading, running and merging chains; what does not fit is refused with the remedy."""

import json
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

import dtrp
from dtrp.onnx import load_chain, merge_chain, read_manifest

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from .chains import write_chain  # noqa: E402  (needs onnx)

X = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
W = np.array([[1], [2]], np.int64)


@pytest.fixture
def folder(tmp_path):
    write_chain(tmp_path / "chain")
    return tmp_path / "chain"


@pytest.fixture
def chain(folder):
    return load_chain(folder)


def edit(folder, change):
    """Change the manifest's JSON in place."""
    raw = json.loads((folder / "manifest.json").read_text())
    change(raw)
    (folder / "manifest.json").write_text(json.dumps(raw))


class TestRunning:
    def test_gives_the_structure_with_arrays(self, chain):
        out = chain(X, W)
        np.testing.assert_allclose(out["out"], (2 * X + W) * 2 * X)
        np.testing.assert_allclose(out["parts"][0], 2 * X)
        assert out["parts"][1] == 7

    def test_by_name_of_value_or_argument(self, chain):
        for named in ({"x": X, "w": W}, {"x": X, "extra['w']": W}):
            np.testing.assert_allclose(chain(**named)["parts"][0], 2 * X)
        np.testing.assert_allclose(chain(X, w=W)["parts"][0], 2 * X)

    def test_takes_any_batch_size_and_memory_order(self, chain):
        x = np.asfortranarray(np.random.rand(5, 2).astype(np.float32))
        assert chain(x, np.zeros((5, 1), np.int64))["out"].shape == (5, 2)

    def test_repr_says_what_goes_in(self, chain):
        assert repr(chain) == ("Chain(Hand, 3 stages, inputs 'x': float32[batch, 2], 'w': int64[batch, 1])")

    def test_lets_go_of_what_no_later_stage_needs(self, folder):
        edit(folder, lambda raw: raw["outputs"].__setitem__(1, {"stage": 2, "output": "out"}))
        edit(folder, lambda raw: raw["stages"][2]["inputs"][1].update({"from": {"stage": 1, "output": "z"}}))
        chain = load_chain(folder)
        made, alive = [], []
        real = chain.run_stage

        def run_stage(k, inputs):
            alive.append([r() is not None for r in made])
            outputs = real(k, inputs)
            made.extend(weakref.ref(array) for array in outputs)
            return outputs

        chain.run_stage = run_stage
        chain(X, W)
        # y is needed by stage 1 only: it lives while that one runs, and not while stage 2 does.
        assert alive == [[], [True], [False, True]]

    def test_needs_no_torch(self, folder):
        code = f"""
import sys
sys.modules["torch"] = None  # as if it were not installed
import numpy as np
from dtrp.onnx import load_chain
chain = load_chain({str(folder)!r})
print(chain(np.ones((3, 2), np.float32), np.ones((3, 1), np.int64))["out"].sum())
assert not [m for m in sys.modules if m == "torch" and sys.modules[m] or m == "onnx"]
"""
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            env={"PYTHONPATH": str(Path(dtrp.__file__).parent.parent)},
        )
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) == 36.0


class TestProviders:
    def test_for_all_stages_or_one_list_each(self, folder):
        cpu = "CPUExecutionProvider"
        for providers in ([cpu], [(cpu, {})], [[cpu]] * 3, [[cpu], [(cpu, {})], [cpu]]):
            chain = load_chain(folder, providers=providers)
            assert [s.get_providers() for s in chain.sessions] == [[cpu]] * 3

    def test_that_do_not_fit(self, folder):
        cpu = "CPUExecutionProvider"
        with pytest.raises(ValueError, match="providers has 2 lists, the chain has 3 stages"):
            load_chain(folder, providers=[[cpu], [cpu]])
        with pytest.raises(
            ValueError, match=r"'TPU' is not in this onnxruntime; it has .*CPUExecutionProvider"
        ):
            load_chain(folder, providers=["TPU"])
        with pytest.raises(TypeError, match="expected a list"):
            load_chain(folder, providers=cpu)

    def test_session_options_are_used(self, folder):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        chain = load_chain(folder, session_options=options)
        assert chain.sessions[0].get_session_options().intra_op_num_threads == 1


class TestInputsThatDoNotFit:
    @pytest.mark.parametrize(
        ("args", "kwargs", "kind", "text"),
        [
            ((X,), {}, TypeError, r"missing input\(s\) 'w'; expected 'x': float32\[batch, 2\], 'w': int64"),
            ((X, W, X), {}, TypeError, r"3 inputs were passed; expected"),
            ((X,), {"y": W}, TypeError, r"unknown input 'y'; expected"),
            ((X, W), {"w": W}, TypeError, r"input 'w' was passed twice"),
            ((X.tolist(), W), {}, TypeError, r"input 'x' is a builtins.list; expected a numpy.ndarray"),
            (
                (X.astype(np.float64), W),
                {},
                TypeError,
                r"'x' has dtype float64, expected float32: .*astype\('float32'\)",
            ),
            ((X[0], W), {}, ValueError, r"'x' has shape \[2\], expected \[batch, 2\]"),
            ((X[:, :1], W), {}, ValueError, r"'x' has shape \[2, 1\], expected \[batch, 2\]"),
            ((X, W[:1]), {}, ValueError, r"'w' has 1 along 'batch', input 'x' has 2: they must agree"),
        ],
    )
    def test_are_refused(self, chain, args, kwargs, kind, text):
        with pytest.raises(kind, match=text):
            chain(*args, **kwargs)

    def test_torch_tensor_names_the_way_out(self, chain):
        torch = pytest.importorskip("torch")
        with pytest.raises(TypeError, match=r"is a torch.Tensor; .*tensor.numpy\(\)"):
            chain(torch.zeros(2, 2), W)

    def test_fixed_batch(self, folder):
        def fix(raw):
            raw["batch"].update(dynamic=False, reason="a view needs it")
            raw["inputs"][0]["shape"] = [2, 2]

        edit(folder, fix)
        with pytest.raises(
            ValueError, match=r"expected \[2, 2\]; it was exported for 2 sample\(s\) only \(a view"
        ):
            load_chain(folder)(X[:1], W[:1])

    def test_failure_inside_names_the_stage(self, chain):
        with pytest.raises(
            dtrp.ExportError, match=r"stage 1 \(stage_1.onnx\) failed in onnxruntime on y: float32"
        ):
            chain.run_stage(1, [X, W.astype(np.float32)])


class TestFolderThatIsBroken:
    def test_no_manifest(self, tmp_path):
        with pytest.raises(
            dtrp.ExportError, match=r"does not exist: expected a folder that Pipeline\.export_onnx"
        ):
            load_chain(tmp_path)

    def test_no_json(self, folder):
        (folder / "manifest.json").write_text("{")
        with pytest.raises(dtrp.ExportError, match=r"manifest.json cannot be read: .*export again"):
            load_chain(folder)

    @pytest.mark.parametrize("raw", ["[]", "{}", '{"format": "other"}'])
    def test_another_format(self, folder, raw):
        (folder / "manifest.json").write_text(raw)
        with pytest.raises(dtrp.ExportError, match="is no manifest of an exported chain"):
            load_chain(folder)

    def test_another_version(self, folder):
        edit(folder, lambda raw: raw.update(version=99))
        with pytest.raises(
            dtrp.ExportError, match=r"has version 99, this dtrp reads version 1: .*wrote it \(0\)"
        ):
            load_chain(folder)

    def test_a_changed_file(self, folder):
        with (folder / "stage_1.onnx").open("ab") as f:
            f.write(b"\0")
        with pytest.raises(
            dtrp.ExportError, match=r"stage_1.onnx is not the file that was exported: its SHA-256"
        ):
            load_chain(folder)

    def test_a_missing_file(self, folder):
        (folder / "stage_2.onnx").unlink()
        with pytest.raises(dtrp.ExportError, match=r"stage_2.onnx is missing, .*copy the whole folder"):
            load_chain(folder)

    def test_a_file_that_is_no_model(self, folder):
        (folder / "stage_0.onnx").write_bytes(b"no model")
        with pytest.raises(dtrp.ExportError, match=r"onnxruntime cannot load stage 0 \(stage_0.onnx\)"):
            load_chain(folder, check_hashes=False)

    @pytest.mark.parametrize(
        "name", ["../stage_0.onnx", "/etc/passwd", "sub/stage_0.onnx", "..", "", "C:x", "a\\b"]
    )
    def test_a_name_outside_of_it(self, folder, name):
        edit(folder, lambda raw: raw["stages"][0].update(file=name))
        with pytest.raises(dtrp.ExportError, match="only plain names of files beside the manifest"):
            load_chain(folder)

    def test_a_data_file_outside_of_it(self, folder):
        edit(folder, lambda raw: raw["stages"][0].update(data=[{"file": "../x", "sha256": ""}]))
        with pytest.raises(dtrp.ExportError, match="only plain names"):
            load_chain(folder)

    def test_a_link_out_of_it(self, folder):
        (folder / "stage_0.onnx").rename(folder.parent / "elsewhere.onnx")
        (folder / "stage_0.onnx").symlink_to(folder.parent / "elsewhere.onnx")
        with pytest.raises(dtrp.ExportError, match=r"stage_0.onnx leads out of its folder"):
            load_chain(folder)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (
                lambda r: r["stages"][1]["inputs"][0].update({"from": {"stage": 2, "output": "out"}}),
                "input 'y' of stage 1 comes from 'out', which is not among the outputs of stage 2 before it",
            ),
            (
                lambda r: r["stages"][0]["inputs"][0].update({"from": {"input": "q"}}),
                "comes from 'q', which is not among the chain's inputs",
            ),
            (
                lambda r: r["outputs"].__setitem__(0, {"stage": 0, "output": "no"}),
                "output 0 of the model comes from 'no'",
            ),
            (lambda r: r["stages"][1].update(file="stage_0.onnx"), "file 'stage_0.onnx' appears 2 times"),
            (lambda r: r.update(structure={"tuple": [{"leaf": 0}]}), r"uses leaves \[0\] of 3"),
            (lambda r: r.update(structure={"set": []}), "damaged: ValueError: unknown structure 'set'"),
            (lambda r: r.pop("stages"), "damaged: KeyError: 'stages'"),
            (lambda r: r["inputs"][0].update(shape=[-1, 2]), "damaged: ValueError: shape"),
            (lambda r: r.update(batch=3), "damaged: TypeError"),
        ],
    )
    def test_a_contradiction(self, folder, change, text):
        edit(folder, change)
        with pytest.raises(dtrp.ExportError, match=text):
            read_manifest(folder)


class TestManifest:
    def test_reads_what_was_written(self, tmp_path):
        assert write_chain(tmp_path / "chain") == read_manifest(tmp_path / "chain")


class TestMerging:
    def test_is_one_valid_model(self, folder, chain):
        merged = merge_chain(folder)
        session = onnxruntime.InferenceSession(merged.SerializeToString(), providers=["CPUExecutionProvider"])
        out, y = session.run(None, {"x": X, "w": W})
        np.testing.assert_allclose(out, chain(X, W)["out"])
        np.testing.assert_allclose(y, 2 * X)
        assert [v.name for v in session.get_inputs()] == ["x", "w"]
        assert [v.name for v in session.get_outputs()] == ["output_0", "output_1"]

    def test_of_too_much_is_refused(self, folder):
        with (folder / "weights").open("wb") as f:
            f.truncate(2**31)  # sparse
        edit(folder, lambda raw: raw["stages"][0].update(data=[{"file": "weights", "sha256": ""}]))
        with pytest.raises(
            dtrp.ExportError, match=r"2.1 GB, one ONNX model can hold 2 GB: run it as a chain"
        ):
            merge_chain(folder)


class TestMissingPackage:
    def test_onnxruntime(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(
            dtrp.ExportError, match=r"needs the package onnxruntime, .*pip install 'dtrp\[onnx\]'"
        ):
            load_chain(folder)

    def test_onnx(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnx", None)
        with pytest.raises(dtrp.ExportError, match=r"needs the package onnx, .*pip install 'dtrp\[onnx\]'"):
            merge_chain(folder)
