"""``dtrp export``: the files, what is printed, weights from files, and the exit status."""

import numpy as np
import pytest
import torch
from torch import nn

from dtrp import load_weights
from dtrp.cli import main
from dtrp.errors import CheckpointError
from dtrp.runtime.checkpoint import write_checkpoint

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

HERE = "tests.test_cli_export:"


class Net(nn.Module):
    """A table, two layers, and a buffer that no state_dict holds."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.table = nn.Embedding(5, width)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))
        self.register_buffer("scale", torch.ones(2), persistent=False)

    def forward(self, x, index):
        return self.layers(x + self.table(index)) * self.scale


@pytest.fixture
def trained():
    torch.manual_seed(1)
    model = Net()
    model.scale.mul_(3)
    return model


def export(*more):
    inputs = ["--input", "3x4", "--input", "index=3:int64"]
    return main(["export", HERE + "Net", *inputs, "--n-gpus", "2", *map(str, more)])


class TestExport:
    def test_writes_a_chain_of_the_checkpoint(self, tmp_path, trained, capsys):
        from dtrp.onnx import load_chain

        write_checkpoint(
            tmp_path / "run.ckpt", {"model": trained.state_dict(), "extra": {"scale": trained.scale}}
        )
        out = tmp_path / "stages"
        assert export("--out", out, "--checkpoint", tmp_path / "run.ckpt") == 0
        printed = capsys.readouterr()
        names = ["stage_0.onnx", "stage_1.onnx", "manifest.json"]
        assert printed.out.splitlines() == [str(out / name) for name in names]
        assert "2 stages for any batch size" in printed.err
        assert "stage 1 differs from the model by" in printed.err
        x, index = torch.randn(2, 4), torch.tensor([1, 4])
        expected = trained(x, index).detach().numpy()
        np.testing.assert_allclose(load_chain(out)(x.numpy(), index.numpy()), expected, rtol=1e-4, atol=1e-6)
        # An existing export is refused, and replaced where that is asked for.
        assert export("--out", out) == 1
        assert "pass overwrite=True (`--overwrite`)" in capsys.readouterr().err
        assert export("--out", out, "--overwrite", "--fixed-batch", "--no-verify", "--opset", 18) == 0
        assert "2 stages for batches of 3 only, opset 18" in capsys.readouterr().err

    def test_wrong_usage(self, tmp_path, capsys):
        assert export("--out", tmp_path / "out", "--opset", 0) == 2
        assert "opset=0: expected" in capsys.readouterr().err
        assert export("--out", tmp_path / "out", "--checkpoint", tmp_path / "none") == 1
        assert "there is no file" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            export()
        assert "--out" in capsys.readouterr().err


class TestWeights:
    @pytest.mark.parametrize("wrap", [dict, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 3}])
    def test_of_a_state_dict(self, tmp_path, trained, wrap):
        torch.save(wrap(trained.state_dict()), tmp_path / "w.pt")
        model = Net()
        load_weights(model, tmp_path / "w.pt")
        assert torch.equal(model.table.weight, trained.table.weight)

    def test_of_another_model(self, tmp_path, trained):
        torch.save(trained.state_dict(), tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match=r"w.pt belongs to another model: '[a-z.]+' has shape"):
            load_weights(Net(8), tmp_path / "w.pt")

    def test_that_are_none(self, tmp_path):
        torch.save([1, 2], tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match="holds no state_dict"):
            load_weights(Net(), tmp_path / "w.pt")

    def test_that_run_code(self, tmp_path):
        torch.save(Net(), tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match="holds other things than tensors and plain data"):
            load_weights(Net(), tmp_path / "w.pt")

    def test_that_were_altered(self, tmp_path, trained):
        write_checkpoint(tmp_path / "run.ckpt", {"model": trained.state_dict(), "extra": {}})
        content = torch.load(tmp_path / "run.ckpt", weights_only=True)
        content["model"]["table.weight"] += 1
        torch.save(content, tmp_path / "run.ckpt")
        with pytest.raises(CheckpointError, match="does not fit its digest"):
            load_weights(Net(), tmp_path / "run.ckpt")
