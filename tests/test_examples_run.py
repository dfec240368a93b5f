"""The examples that people copy, each in a small form: they run, and what is trained gets better."""

import importlib.util
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
