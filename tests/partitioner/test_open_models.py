"""Models of the libraries: trained with another size in every batch, and exported with these sizes open."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import dtrp

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def transformers(kind, config, **options):
    library = pytest.importorskip("transformers")
    return getattr(library, kind)(getattr(library, config)(**options))


def ids(n, t, **more):
    return {"input_ids": torch.randint(0, 50, (n, t)), "attention_mask": torch.ones(n, t).long(), **more}


def gpt2():
    options = {"vocab_size": 50, "n_positions": 64, "n_embd": 16, "n_layer": 3, "n_head": 2}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return transformers("GPT2LMHeadModel", "GPT2Config", use_cache=False, **options, **dropout)


def bert():
    options = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    return transformers("BertForMaskedLM", "BertConfig", intermediate_size=32, **options, **dropout)


def llama():
    options = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    return transformers("LlamaForCausalLM", "LlamaConfig", intermediate_size=32, use_cache=False, **options)


def wav2vec2():
    options = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    conv = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    names = ("hidden_dropout", "attention_dropout", "feat_proj_dropout", "layerdrop", "activation_dropout")
    return transformers(
        "Wav2Vec2Model", "Wav2Vec2Config", num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0, **options, **conv, **dict.fromkeys(names, 0.0),
    )  # fmt: skip


def vit():
    """At its own size, 32, timm's code takes another course: that is no part of the graph for the others."""
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
    return timm.models.vision_transformer.VisionTransformer(dynamic_img_size=True, **options)


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 4), (4, 8), (8, 8)))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in ((8, 8), (8, 4)))
        self.mix = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ((16, 8), (8, 2)))

    def forward(self, x):
        a = torch.relu(self.down[0](x))
        b = torch.relu(self.down[1](nn.functional.max_pool2d(a, 2)))
        c = torch.relu(self.down[2](nn.functional.max_pool2d(b, 2)))
        b = torch.relu(self.mix[0](torch.cat([self.up[0](c), b], 1)))
        return self.mix[1](torch.cat([self.up[1](b), a], 1))


class GraphConvolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.edge = nn.Linear(2, 6)

    def forward(self, x, edges, features):
        for layer in self.layers:
            sent = layer(x)[edges[0]] * self.edge(features)
            x = torch.tanh(x + torch.zeros_like(x).index_add(0, edges[1], sent))
        return x


def graph(n, e):
    return {"x": torch.randn(n, 6), "edges": torch.randint(0, n, (2, e)), "features": torch.randn(e, 2)}


MODELS = {
    "GPT-2": (gpt2, lambda k: ids(2 + k % 2, 5 + k)),
    "BERT": (bert, lambda k: ids(2 + k % 2, 5 + k)),
    "Llama": (llama, lambda k: ids(2 + k % 2, 5 + k)),
    "Wav2Vec2": (wav2vec2, lambda k: {"input_values": torch.randn(2 + k % 2, 400 + 37 * k)}),
    "ViT": (vit, lambda k: {"x": torch.randn(2 + k % 2, 3, 40 + 8 * (k % 3), 40 + 8 * (k % 2))}),
    "U-Net": (UNet, lambda k: {"x": torch.randn(2 + k % 2, 3, 16 + 4 * (k % 4), 16 + 8 * (k % 3))}),
    "GNN": (GraphConvolutions, lambda k: graph(7 + k, 20 + 3 * k)),
}


def first(output):
    return next(t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor))


def loss(output, target):
    return (first(output) * target).square().mean()


@pytest.mark.parametrize("n_stages", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_trained_with_another_size_in_every_batch(name, n_stages):
    make, call = MODELS[name]
    torch.manual_seed(0)
    model = make().train()
    plain = copy.deepcopy(model)
    batches = [(call(k), torch.tensor(1.0 + k % 3)) for k in range(20)]
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    losses = []
    for inputs, target in batches:
        optimizer.zero_grad()
        value = loss(plain(**inputs), target)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    pipe = dtrp.compile(model, devices=["cpu"] * n_stages, example_inputs=batches[0][0])
    with pipe.trainer(loss, lambda p: torch.optim.SGD(p, lr=0.05), method="bp", executor="inline") as trainer:
        for inputs, target in batches:
            trainer.step(target, **inputs)
        trainer.flush()
        assert trainer.losses == pytest.approx(losses, rel=1e-5)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_exported_with_these_sizes_open(name, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    make, call = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    pipe = dtrp.compile(model, devices=["cpu"] * 2, example_inputs=call(2))
    pipe.export_onnx(tmp_path / "chain")
    chain = dtrp.onnx.load_chain(tmp_path / "chain")
    assert chain.manifest.axes
    for k in (2, 5, 8):
        inputs = call(k)
        with torch.no_grad():
            expected = model(**inputs)
        ours = chain(*[t.numpy() for t in pipe.bind((), inputs)])
        np.testing.assert_allclose(
            next(iter(pytree.tree_leaves(ours))), first(expected).numpy(), rtol=1e-3, atol=1e-4
        )
