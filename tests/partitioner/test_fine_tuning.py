"""Fine-tuning as people do it: frozen BatchNorm in eval mode; LoRA, before and after `dtrp.compile`."""

import copy
import functools

import pytest
import torch
from torch import nn

import dtrp

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


class LoRA(nn.Module):
    """A frozen linear layer (also transformers' Conv1D) and a low-rank correction."""

    def __init__(self, layer, d_in, d_out, rank=2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, d_in) * 0.1)
        self.up = nn.Parameter(torch.randn(d_out, rank) * 0.1)

    def forward(self, x):
        return self.layer(x) + x @ self.down.T @ self.up.T


def with_lora(model, names):
    torch.manual_seed(1)
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if path.rpartition(".")[2] in names:
            owner, _, name = path.rpartition(".")
            d_in, d_out = module.weight.shape if isinstance(module, nn.Linear) else module.weight.T.shape
            setattr(model.get_submodule(owner), name, LoRA(module, d_out, d_in))
    return model


def resnet():
    model = pytest.importorskip("timm").create_model("resnet10t", num_classes=4)
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def vit():
    library = pytest.importorskip("timm").models.vision_transformer
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 4}
    return library.VisionTransformer(**options)


def gpt2():
    library = pytest.importorskip("transformers")
    options = {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 2}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return library.GPT2LMHeadModel(library.GPT2Config(use_cache=False, **options, **dropout))


def images():
    return {"x": torch.randn(4, 3, 32, 32)}, torch.randint(0, 4, (4,))


def tokens():
    ids = torch.randint(0, 50, (3, 9))
    return {"input_ids": ids}, ids


def loss(output, target):
    logits = output if isinstance(output, torch.Tensor) else output["logits"]
    return nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten())


SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def assert_trained_alike(model, plain, change, batch):
    """``change`` is made to both, to ``model`` after it was compiled."""
    batches = [batch() for _ in range(20)]
    pipe = dtrp.compile(model, devices=["cpu"] * 2, example_inputs=batches[0][0])
    change(model)
    change(plain)
    optimizer = SGD([p for p in plain.parameters() if p.requires_grad])
    losses = []
    for inputs, target in batches:
        optimizer.zero_grad()
        value = loss(plain(**inputs), target)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    with pipe.trainer(loss, SGD, method="bp", executor="inline") as trainer:
        for inputs, target in batches:
            trainer.step(target, **inputs)
        trainer.flush()
        assert trainer.losses == pytest.approx(losses, rel=1e-5)
    assert list(model.state_dict()) == list(plain.state_dict())
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-5, atol=1e-5, msg=key)


def test_frozen_batchnorm():
    torch.manual_seed(0)
    model = resnet()
    assert_trained_alike(model, copy.deepcopy(model), lambda m: None, images)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("make", "names", "batch"),
    [(vit, ("qkv", "fc1"), images), (gpt2, ("c_attn", "c_proj"), tokens)],
    ids=["timm", "transformers"],
)
def test_lora(make, names, batch, when):
    torch.manual_seed(0)
    model = make().train()
    change = functools.partial(with_lora, names=names)
    if when == "before":
        change(model)
        change = bool
    assert_trained_alike(model, copy.deepcopy(model), change, batch)
