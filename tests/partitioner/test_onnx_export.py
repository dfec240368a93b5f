"""Exported stages give the model's output; what cannot be exported is refused with the reason."""

import json
import re
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import dtrp
from dtrp.onnx import load_chain, merge_chain, read_manifest
from dtrp.partitioner.onnx import export as export_module
from tests.sweeps import sweep

from .onnx_models import CASES

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# torch's exporter reads the source code of all its operators at each call: seconds that tests need not wait.
api = pytest.importorskip("onnxscript._framework_apis.torch_2_5")


@pytest.fixture(autouse=True, scope="module")
def operators_read_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "get_torchlib_ops", cache(api.get_torchlib_ops))
        yield


def compiled(model, call, n_stages):
    """A pipeline on the CPU, planned for a call."""
    pipe = dtrp.compile(model, n_stages, devices=["cpu"] * n_stages)
    pipe.prepare(*call)
    return pipe


def plain(model, args, kwargs):
    """The model's tensor outputs in eval mode, as arrays."""
    model.eval()
    with torch.no_grad():
        return [t.numpy() for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, torch.Tensor)]


def arrays(tree):
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, np.ndarray)]


class Exported:
    """One case, exported once for all tests that look at it."""

    def __init__(self, name, folder):
        self.case = CASES[name]
        self.model = self.case.make()
        self.pipe = compiled(self.model, self.case.call(3), self.case.stages)
        self.folder = folder / "chain"
        self.modes = [m.training for m in self.model.modules()]
        self.state = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.random_state = torch.get_rng_state()
        self.paths = self.pipe.export_onnx(self.folder)
        self.random_state_after = torch.get_rng_state()
        self.modes_after = [m.training for m in self.model.modules()]
        self.chain = load_chain(self.folder)
        self.manifest = self.chain.manifest


@pytest.fixture(scope="module")
def export_case(tmp_path_factory):
    """``export_case(name)``: a case's export, made once."""
    return cache(lambda name: Exported(name, tmp_path_factory.mktemp("onnx")))


@pytest.fixture(scope="module", params=sweep(CASES, 3))
def exported(request, export_case):
    return export_case(request.param)


@pytest.fixture(scope="module")
def ends(export_case):
    return export_case("many ends")


class TestChain:
    @pytest.mark.parametrize("samples", [1, 3, 6])
    def test_gives_the_models_output(self, exported, samples):
        args, kwargs = exported.case.call(samples)
        ours = exported.chain(*[t.numpy() for t in exported.pipe.bind(args, kwargs)])
        theirs = plain(exported.model, args, kwargs)
        for a, b in zip(arrays(ours), theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    def test_has_a_file_per_stage_and_the_manifest(self, exported):
        names = [f"stage_{k}.onnx" for k in range(exported.case.stages)] + ["manifest.json"]
        assert [p.name for p in exported.paths] == names
        assert sorted(p.name for p in exported.folder.iterdir()) == sorted(names)
        assert all(isinstance(p, Path) and p.is_file() for p in exported.paths)

    def test_files_are_valid(self, exported):
        for path, stage in zip(exported.paths, exported.manifest.stages, strict=False):
            onnx.checker.check_model(path, full_check=True)
            graph = onnx.load(path).graph
            assert [v.name for v in graph.input] == [v.name for v in stage.inputs]
            outputs = [v.name for v in graph.output if not v.name.endswith("_nothing")]
            assert outputs == [v.name for v in stage.outputs]
            ends = [v.name for v in (*graph.input, *graph.output)]
            assert all(re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) for name in ends)
            # No value that nothing makes, and none that is made twice.
            made = [v.name for v in graph.input] + [v.name for v in graph.initializer]
            for node in graph.node:
                assert set(filter(None, node.input)) <= set(made), node.name
                made += node.output
            assert len(made) == len(set(made))
            assert {v.name for v in graph.output} <= set(made)

    def test_files_hold_no_path_of_the_machine(self, exported):
        for path in exported.paths:
            assert str(Path(__file__).parent).encode() not in path.read_bytes()

    def test_weights_keep_their_names(self, exported):
        names = {t.name for p in exported.paths[:-1] for t in onnx.load(p).graph.initializer}
        wanted = {
            n for n, p in exported.model.named_parameters() if p.dim() == 4 or n.endswith("embedding.weight")
        }
        assert wanted <= names

    def test_values_are_called_alike_in_all_stages(self, exported):
        for stage in exported.manifest.stages:
            for value in stage.inputs:
                assert value.name == value.origin.name

    def test_batch_is_dynamic(self, exported):
        assert exported.manifest.batch.dynamic
        assert exported.manifest.batch.smallest == 1
        axes = {axis for v in exported.manifest.inputs for axis in v.shape if isinstance(axis, str)}
        assert axes == {"batch", *(axis.name for axis in exported.manifest.axes)}

    def test_verification_names_every_stage(self, exported):
        found = exported.manifest.verification
        assert found["batch_sizes"][:3] == [3, 4, 1]
        assert len(found["largest_difference_per_stage"]) == exported.case.stages
        assert 0 < found["largest_difference_of_output"] < 1e-5
        assert found["tolerance"] == 1e-4

    def test_leaves_the_model_as_it_was(self, exported):
        assert exported.modes_after == exported.modes
        assert torch.equal(exported.random_state_after, exported.random_state)
        for name, value in exported.model.state_dict().items():
            assert torch.equal(value, exported.state[name]), name

    def test_merged_by_compose_is_the_model(self, exported):
        merged = merge_chain(exported.folder)
        onnx.checker.check_model(merged, full_check=True)
        session = onnxruntime.InferenceSession(merged.SerializeToString(), providers=["CPUExecutionProvider"])
        assert [v.name for v in session.get_inputs()] == list(exported.chain.inputs)
        args, kwargs = exported.case.call(2)
        inputs = [t.numpy() for t in exported.pipe.bind(args, kwargs)]
        ours = session.run(None, dict(zip(exported.chain.inputs, inputs, strict=True)))
        for a, b in zip(ours, plain(exported.model, args, kwargs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


class TestStructure:
    def test_output_has_the_models_structure(self, ends):
        args, kwargs = ends.case.call(2)
        out = ends.chain(*[t.numpy() for t in ends.pipe.bind(args, kwargs)])
        assert list(out) == ["out", "hidden", "best", "more", "scale"]
        assert isinstance(out["hidden"], tuple)
        assert out["best"].dtype == np.int64
        assert isinstance(out["more"], list)
        assert out["more"][1:] == [3, None]

    def test_inputs_by_name(self, ends):
        args, kwargs = ends.case.call(2)
        left, right, late = (t.numpy() for t in ends.pipe.bind(args, kwargs))
        by_name = ends.chain(batch_right=right, late=late, **{"batch['left side']": left})
        np.testing.assert_array_equal(by_name["out"], ends.chain(left, right, late)["out"])

    def test_an_input_goes_straight_to_where_it_is_used(self, ends):
        users = [k for k, s in enumerate(ends.manifest.stages) if any(v.name == "late" for v in s.inputs)]
        assert users == [ends.case.stages - 1]

    def test_output_that_is_an_input(self, ends):
        assert any(getattr(leaf, "name", "") == "batch_right" for leaf in ends.manifest.outputs)


def test_a_value_skips_over_stages(export_case):
    stages = export_case("skips").manifest.stages
    origins = [(k, v.origin.stage) for k, s in enumerate(stages) for v in s.inputs]
    assert max(k - origin for k, origin in origins if origin is not None) > 1


def test_tied_weight_is_in_both_stages(export_case):
    paths = export_case("tied text").paths[:-1]
    held = [{tuple(t.dims) for t in onnx.load(p).graph.initializer} for p in paths]
    for dims in (held[0], held[-1]):
        assert dims & {(40, 16), (16, 40)}


def test_without_verification_or_other_batch_sizes(tmp_path):
    two_layers().export_onnx(tmp_path, dynamic_batch=False, verify=False)  # into an empty folder
    manifest = read_manifest(tmp_path)
    assert (manifest.batch.dynamic, manifest.batch.size, manifest.verification) == (False, 3, None)
    with pytest.raises(ValueError, match=r"shape \[2, 4\], expected \[3, 4\]; .*for 3 sample\(s\) only"):
        load_chain(tmp_path)(np.zeros((2, 4), np.float32))


class TwoLayers(nn.Module):
    """Two linear layers with something in between."""

    def __init__(self, between=torch.tanh):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def two_layers(between=torch.tanh, model=TwoLayers):
    torch.manual_seed(0)
    made = model(between) if model is TwoLayers else model()
    return compiled(made, ((torch.randn(3, 4),), {}), 2)


class TestWeights:
    def test_present_ones_are_exported(self, tmp_path):
        pipe = two_layers()
        with torch.no_grad():
            pipe.model.first.weight.mul_(2)  # trained in place
        pipe.model.second.bias = nn.Parameter(torch.ones(4))  # replaced
        pipe.export_onnx(tmp_path / "out", dynamic_batch=False)
        x = torch.randn(3, 4)
        (ours,) = [load_chain(tmp_path / "out")(x.numpy())]
        np.testing.assert_allclose(ours, pipe.model.eval()(x).detach().numpy(), rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("verify", [True, False])
    def test_of_a_model_with_another_head(self, tmp_path, verify):
        """Features in place of classes, or adapters merged: the old graph would be exported silently."""
        pipe = two_layers()
        pipe.model.second = nn.Linear(4, 7)
        pipe.export_onnx(tmp_path / "out", verify=verify)
        x = torch.randn(3, 4)
        ours = load_chain(tmp_path / "out")(x.numpy())
        np.testing.assert_allclose(ours, pipe.model.eval()(x).detach().numpy(), rtol=1e-4, atol=1e-6)

    def test_large_ones_get_a_file_of_their_own(self, tmp_path, monkeypatch):
        monkeypatch.setattr(export_module, "LARGE", 10)
        paths = two_layers().export_onnx(tmp_path / "out", dynamic_batch=False)
        assert [p.name for p in paths] == ["stage_0.onnx", "stage_1.onnx", "manifest.json"]
        manifest = read_manifest(tmp_path / "out")
        assert [name for s in manifest.stages for name, _ in s.data] == [
            "stage_0.onnx.data",
            "stage_1.onnx.data",
        ]
        load_chain(tmp_path / "out")
        merge_chain(tmp_path / "out")
        with (tmp_path / "out" / "stage_1.onnx.data").open("r+b") as f:
            f.write(b"\1")
        with pytest.raises(dtrp.ExportError, match=r"stage_1.onnx.data is not the file that was exported"):
            load_chain(tmp_path / "out")

    def test_on_the_meta_device_are_refused(self, tmp_path):
        with torch.device("meta"):
            pipe = compiled(TwoLayers(), ((torch.randn(3, 4),), {}), 2)
        with pytest.raises(dtrp.ExportError, match=r"'first.weight' is on the meta device.*Load the weights"):
            pipe.export_onnx(tmp_path / "out")


class FixedBatch(TwoLayers):
    def forward(self, x):
        return super().forward(x.view(3, 4))


class TestBatch:
    def test_model_that_takes_no_other_is_exported_for_that(self, tmp_path, caplog):
        two_layers(model=FixedBatch).export_onnx(tmp_path / "out")
        batch = read_manifest(tmp_path / "out").batch
        assert (batch.dynamic, batch.size) == (False, 3)
        assert "node 'view'" in batch.reason
        assert "exported for 3 sample(s) only" in caplog.text

    def test_of_one_sample_in_the_example(self, tmp_path):
        pipe = compiled(TwoLayers(), ((torch.randn(1, 4),), {}), 2)
        pipe.export_onnx(tmp_path / "out")
        assert load_chain(tmp_path / "out")(np.zeros((5, 4), np.float32)).shape == (5, 4)

    def test_single_samples_that_take_another_course_are_left_out(self, tmp_path, monkeypatch, caplog):
        real = export_module.compare

        def compare(*args):
            found = real(*args)
            return found if found.batch > 1 else export_module.replace(found, output=1.0)

        monkeypatch.setattr(export_module, "compare", compare)
        two_layers().export_onnx(tmp_path / "out")
        chain = load_chain(tmp_path / "out")
        assert chain.manifest.batch.smallest == 3
        with pytest.raises(ValueError, match=r"'x' has 2 sample\(s\); .* from 3 on: pad the batch"):
            chain(np.zeros((2, 4), np.float32))
        assert (
            "a single sample takes another course through the model than larger sizes do: 3 is" in caplog.text
        )


class TestVerification:
    def test_names_the_bad_stage(self, tmp_path, monkeypatch):
        real = export_module.name_ends

        def spoilt(model, inputs, outputs, title):
            real(model, inputs, outputs, title)
            if title == "stage_1":
                bias = model.graph.initializers["second.bias"]
                array = bias.const_value.numpy() + 1
                bias.const_value = export_module_tensor(array, "second.bias")

        def export_module_tensor(array, name):
            import onnx_ir

            return onnx_ir.tensor(array, name=name)

        monkeypatch.setattr(export_module, "name_ends", spoilt)
        pipe = two_layers()
        with pytest.raises(
            dtrp.ExportError,
            match=r"is not the model: with 3 sample\(s\) stage 1 differs .* at its output 'second'",
        ):
            pipe.export_onnx(tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
        pipe.export_onnx(tmp_path / "out", verify=False)

    def test_with_given_inputs(self, tmp_path):
        pipe = two_layers()
        pipe.export_onnx(tmp_path / "out", inputs=torch.full((3, 4), float("inf")), dynamic_batch=False)
        with pytest.raises(TypeError, match="do not fit"):
            pipe.export_onnx(tmp_path / "other", inputs=(1, 2, 3))

    def test_of_what_onnxruntime_cannot_run(self, tmp_path):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
        pipe = compiled(model, ((torch.randn(3, 4, dtype=torch.bfloat16),), {}), 2)
        with pytest.raises(
            dtrp.ExportError, match=r"cannot load stage 0 \(stage_0.onnx\).*verify=False exports"
        ):
            pipe.export_onnx(tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_of_half_precision_allows_its_rounding(self, tmp_path):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
        pipe = compiled(model, ((torch.randn(3, 4, dtype=torch.float16),), {}), 2)
        pipe.export_onnx(tmp_path / "out", dynamic_batch=False)
        assert read_manifest(tmp_path / "out").verification["tolerance"] == 2e-2


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class LacksOperator(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), Bessel(), nn.Linear(4, 4))

    def forward(self, x):
        return self.body(x)


class KeepsState(TwoLayers):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(4))

    def forward(self, x):
        self.calls.add_(1)
        return super().forward(x) + self.calls


class Spectrum(nn.Module):
    """A complex value from one layer to the next."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.fft.fft(self.second(self.first(x)))


class OddOutput(TwoLayers):
    def forward(self, x):
        return {"y": super().forward(x), "dtype": torch.float32}


class TestRefused:
    def test_operator_that_onnx_lacks(self, tmp_path):
        pipe = two_layers(model=LacksOperator)
        with pytest.raises(
            dtrp.ExportError,
            match=r"node '\w*bessel_j0\w*' \(module 'body.1', .*test_onnx_export.py:\d+\) of stage [01] uses "
            r"the operator .*bessel_j0.*, which ONNX lacks\. Write it with other operators",
        ):
            pipe.export_onnx(tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_state_written_in_eval_mode(self, tmp_path):
        with pytest.raises(
            dtrp.ExportError, match=r"stage [01] writes to 'calls' in eval mode.*keep no state"
        ):
            two_layers(model=KeepsState).export_onnx(tmp_path / "out", dynamic_batch=False)

    def test_dtype_that_cannot_travel(self, tmp_path):
        with pytest.raises(
            dtrp.ExportError, match=r"'fft_fft' among .* has dtype torch.complex64.*view_as_real"
        ):
            two_layers(model=Spectrum).export_onnx(tmp_path / "out", dynamic_batch=False)

    def test_output_that_json_cannot_hold(self, tmp_path):
        with pytest.raises(
            dtrp.ExportError, match=r"a leaf of type dtype, torch.float32: a chain can give tensors"
        ):
            two_layers(model=OddOutput).export_onnx(tmp_path / "out", dynamic_batch=False)

    def test_opset_that_is_too_old(self, tmp_path):
        with pytest.raises(dtrp.ExportError, match=r"stage 0 cannot be .*opset 5|opset 5.*gives opset"):
            two_layers().export_onnx(tmp_path / "out", opset=5, dynamic_batch=False)

    @pytest.mark.parametrize(("opset", "kind"), [("20", TypeError), (True, TypeError), (0, ValueError)])
    def test_opset_that_is_none(self, tmp_path, opset, kind):
        with pytest.raises(kind, match=f"opset={opset!r}: expected"):
            two_layers().export_onnx(tmp_path / "out", opset=opset)

    def test_missing_package(self, tmp_path, monkeypatch):
        pipe = two_layers()
        real = export_module.find_spec
        monkeypatch.setattr(export_module, "find_spec", lambda n: None if n == "onnxscript" else real(n))
        with pytest.raises(
            dtrp.ExportError, match=r"needs the package\(s\) onnxscript,.*pip install 'dtrp\[onnx\]'"
        ):
            pipe.export_onnx(tmp_path / "out")
        monkeypatch.setattr(export_module, "find_spec", lambda n: None if n == "onnxruntime" else real(n))
        with pytest.raises(dtrp.ExportError, match=r"onnxruntime,.*or pass verify=False"):
            pipe.export_onnx(tmp_path / "out")

    def test_before_planning(self, tmp_path):
        with pytest.raises(dtrp.DtrpError, match="has not been planned yet"):
            dtrp.compile(TwoLayers(), 2).export_onnx(tmp_path / "out")


class TestFolder:
    def test_earlier_export_is_replaced_only_where_asked(self, tmp_path):
        pipe = two_layers()
        folder = tmp_path / "a" / "out"  # parents are made
        pipe.export_onnx(folder, verify=False, dynamic_batch=False)
        before = (folder / "stage_0.onnx").read_bytes()
        with pytest.raises(dtrp.ExportError, match=r"out exists and holds an export: .*overwrite=True"):
            pipe.export_onnx(folder)
        with torch.no_grad():
            pipe.model.first.weight.zero_()
        (folder / "stage_7.onnx").write_bytes(b"of an export with more stages")
        pipe.export_onnx(folder, verify=False, dynamic_batch=False, overwrite=True)
        assert (folder / "stage_0.onnx").read_bytes() != before
        assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "stage_0.onnx", "stage_1.onnx"]
        assert [p.name for p in folder.parent.iterdir()] == ["out"]
        assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777

    def test_failed_export_leaves_the_earlier_one(self, tmp_path):
        folder = tmp_path / "out"
        two_layers().export_onnx(folder, verify=False, dynamic_batch=False)
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        with pytest.raises(dtrp.ExportError, match="which ONNX lacks"):
            two_layers(model=LacksOperator).export_onnx(folder, overwrite=True)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_other_files_are_never_replaced(self, tmp_path, overwrite):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(dtrp.ExportError, match=r"holds what is no export \(notes.txt\)"):
            two_layers().export_onnx(tmp_path, overwrite=overwrite)
        with pytest.raises(dtrp.ExportError, match="is a file"):
            two_layers().export_onnx(tmp_path / "notes.txt", overwrite=overwrite)
        assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]

    def test_interrupted_export_leaves_nothing(self, tmp_path, monkeypatch):
        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(export_module, "file_hash", interrupted)
        pipe = two_layers()
        with pytest.raises(KeyboardInterrupt):
            pipe.export_onnx(tmp_path / "out", dynamic_batch=False)
        assert list(tmp_path.iterdir()) == []
        assert pipe.model.training


def test_manifest_says_how_the_stages_chain(ends):
    """Another program than dtrp can run the chain from the JSON alone."""
    raw = json.loads((ends.folder / "manifest.json").read_text())
    args, kwargs = ends.case.call(2)
    values = {
        (None, v["name"]): t.numpy() for v, t in zip(raw["inputs"], ends.pipe.bind(args, kwargs), strict=True)
    }
    for k, stage in enumerate(raw["stages"]):
        session = onnxruntime.InferenceSession(
            ends.folder / stage["file"], providers=["CPUExecutionProvider"]
        )
        feeds = {}
        for v in stage["inputs"]:
            origin = v["from"]
            feeds[v["name"]] = values[origin.get("stage"), origin.get("output", origin.get("input"))]
            assert feeds[v["name"]].dtype.name == v["dtype"]
            assert len(feeds[v["name"]].shape) == len(v["shape"])
        names = [v["name"] for v in stage["outputs"]]
        values |= {(k, n): a for n, a in zip(names, session.run(names, feeds), strict=True)}
    leaves = [
        values[o.get("stage"), o.get("output", o.get("input"))] for o in raw["outputs"] if "constant" not in o
    ]
    for a, b in zip(leaves, plain(ends.model, args, kwargs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_each_module_keeps_its_own_mode(tmp_path):
    """A frozen layer in a model that trains stays frozen."""
    pipe = two_layers()
    pipe.model.second.eval()
    modes = [m.training for m in pipe.model.modules()]
    pipe.export_onnx(tmp_path / "out", dynamic_batch=False, verify=False)
    assert [m.training for m in pipe.model.modules()] == modes
    assert len(set(modes)) == 2


class Placed(nn.Module):
    """Knows so many positions."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(10, 8), nn.Embedding(6, 8)
        self.stage, self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 4)

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.stage(self.tokens(tokens) + self.places(places)))


def test_a_language_model_at_its_full_length(tmp_path):
    """Tensors without data do not say where its table of positions ends. And a part may be called "stage"."""
    pipe = compiled(Placed(), ((torch.zeros(4, 6, dtype=torch.long),), {}), 2)
    pipe.export_onnx(tmp_path / "out")
    (axis,) = read_manifest(tmp_path / "out").axes
    assert (axis.size, axis.largest) == (6, 6)
    chain = load_chain(tmp_path / "out")
    assert chain(np.zeros((2, 3), np.int64)).shape == (2, 3, 4)
    with pytest.raises(ValueError, match="tokens"):
        chain(np.zeros((2, 7), np.int64))


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: torch.Tensor
    kind: str = "answer"


def test_objects_come_as_dicts(tmp_path):
    class Answers(TwoLayers):
        def forward(self, x):
            y = super().forward(x)
            return 1, Answer(y, y + 1)

    pipe = compiled(Answers(), ((torch.randn(3, 4),), {}), 2)
    pipe.export_onnx(tmp_path / "out")
    x = torch.randn(2, 4)
    one, answer = load_chain(tmp_path / "out")(x.numpy())
    _, expected = pipe.model.eval()(x)
    assert (one, answer["kind"]) == (1, "answer")
    np.testing.assert_allclose(answer["hidden"], expected.hidden.detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(answer["logits"], expected.logits.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_sizes_that_are_equal_by_chance_are_open(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 5))
    compiled(model, ((torch.randn(2, 4, 4),), {}), 2).export_onnx(tmp_path / "out")
    assert load_chain(tmp_path / "out")(np.zeros((2, 9, 4), np.float32)).shape == (2, 9, 5)


def test_in_training_the_newest_weights_are_exported(tmp_path):
    """Workers have them; between two steps the model's own are older."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
    pipe = compiled(model, ((x,), {}), 2)
    with pipe.trainer(nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.5), method="bp") as trainer:
        for _ in range(5):
            trainer.step(x, y)
        pipe.export_onnx(tmp_path / "out", verify=False)
    ours = load_chain(tmp_path / "out")(x.numpy())
    np.testing.assert_allclose(ours, model.eval()(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_chain_that_lacks_a_file_is_not_merged(tmp_path):
    two_layers().export_onnx(tmp_path / "out", dynamic_batch=False)
    (tmp_path / "out" / "stage_1.onnx").unlink()
    with pytest.raises(dtrp.ExportError, match=r"stage_1.onnx is missing.*copy the whole folder"):
        merge_chain(tmp_path / "out")
