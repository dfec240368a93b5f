"""The examples that people copy, each in a small form: they run, and what is trained gets better."""

import importlib.util
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def no_bars(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


def main(name, *arguments):
    """What a script's main gives."""
    spec = importlib.util.spec_from_file_location(f"run_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([*arguments, "--executor", "inline"])


def script(name, *arguments, launcher=()):
    """A script as users start it, on worker processes or ranks."""
    command = [sys.executable, *launcher, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def said(process):
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out[-3000:]
    return out


def test_diffusion():
    losses = main("diffusion", "--steps", "40", "--width", "8")
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]


@pytest.mark.slow
def test_an_lstm_on_packed_sequences():
    assert main("lstm_packed", "--epochs", "2", "--width", "16")["accuracy"] > 0.75


@pytest.mark.slow
def test_gpt2_on_texts_of_different_lengths():
    pytest.importorskip("transformers")
    losses = main("gpt2_lengths", "--steps", "30", "--width", "16", "--depth", "2")
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_a_timm_model_with_a_frozen_backbone():
    """Only the head is trained, and BatchNorm's statistics stay."""
    timm = pytest.importorskip("timm")
    model = main("finetune_timm", "--model", "resnet10t", "--size", "32", "--epochs", "1")
    torch.manual_seed(0)
    before = timm.create_model("resnet10t", num_classes=10).state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"fc.weight", "fc.bias"}


@pytest.mark.slow
def test_two_launchers_make_one_pipeline(tmp_path):
    """Two hosts' launchers, here on one. Started again, the script goes on from what is saved: to its end."""
    found = []
    for _ in range(2):
        with socket.socket() as sock:
            sock.bind(("localhost", 0))
            port = sock.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--master-addr", "localhost"]
        launcher += ["--master-port", str(port), "--node-rank"]
        arguments = ["--epochs", "3", "--width", "64", "--save", tmp_path / "digits.ckpt"]
        hosts = [script("two_hosts", *arguments, launcher=[*launcher, str(k)]) for k in range(2)]
        first, second = map(said, hosts)
        assert "test accuracy" not in second
        found += re.findall(r"test accuracy (\S+)%", first)
    assert found[0] == found[1]
    assert float(found[0]) > 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "shown"),
    [
        ("quickstart", ["--epochs", 1, "--width", 8], "The pipeline is"),
        ("custom_architecture", ["--steps", 6, "--size", 16, "--batch-size", 4, "--stages", 2], "IoU"),
        ("language_model", ["--steps", 6, "--width", 16, "--depth", 2], "validation"),
        ("custom_predictor", ["--epochs", 1, "--n-gpus", 2], "loss"),
    ],
)
def test_scripts_on_worker_processes(name, arguments, shown):
    assert shown in said(script(name, *arguments))


@pytest.mark.slow
def test_cifar10_resumes(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        for kind in ("bird", "cat"):
            (tmp_path / part / kind).mkdir(parents=True)
            for i in range(8):
                pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
                image_module.fromarray(pixels).save(tmp_path / part / kind / f"{i}.png")
    usual = ["--data", tmp_path, "--batch-size", 4, "--executor", "inline", "--checkpoint", tmp_path / "c"]
    for epochs in (1, 2):
        said(script("cifar10", *usual, "--epochs", epochs, "--csv", tmp_path / "runs.csv"))
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 3
