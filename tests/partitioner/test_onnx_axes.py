"""Each dimension that the model's code leaves open is a named axis of the exported chain, and right there."""

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import dtrp
from dtrp.onnx import load_chain

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
api = pytest.importorskip("onnxscript._framework_apis.torch_2_5")


@pytest.fixture(autouse=True, scope="module")
def operators_read_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "get_torchlib_ops", cache(api.get_torchlib_ops))
        yield


def exported(model, args, folder, n_stages=2):
    torch.manual_seed(0)
    pipe = dtrp.compile(model, devices=["cpu"] * n_stages, example_inputs=args)
    pipe.export_onnx(folder / "chain")
    return pipe, load_chain(folder / "chain")


def assert_right(pipe, chain, *calls):
    for args in calls:
        with torch.no_grad():
            expected = pipe.model.eval()(*args) if isinstance(args, tuple) else pipe.model.eval()(**args)
        bound = pipe.bind(args, {}) if isinstance(args, tuple) else pipe.bind((), args)
        ours = pytree.tree_leaves(chain(*[t.numpy() for t in bound]))
        theirs = [t for t in pytree.tree_leaves(expected) if isinstance(t, torch.Tensor)]
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b.numpy(), rtol=1e-3, atol=1e-4)


class Transformer(nn.Module):
    def __init__(self, limit=None):
        super().__init__()
        self.embed, self.position = nn.Embedding(20, 8), nn.Embedding(64, 8)
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(8, 24), nn.Linear(8, 8)]) for _ in range(2))
        self.head, self.limit = nn.Linear(8, 20), limit

    def forward(self, ids, mask):
        n, t = ids.shape
        if self.limit is not None and t > self.limit:
            raise ValueError("too long")
        x = self.embed(ids) + self.position(torch.arange(t, device=ids.device))
        for qkv, out in self.layers:
            q, k, v = qkv(x).view(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v, mask.view(n, 1, 1, t))
            x = x + out(attended.transpose(1, 2).reshape(n, t, 8))
        return self.head(x.reshape(n * t, 8)).view(n, t, 20)


def sentence(n, t):
    return torch.randint(0, 20, (n, t)), torch.ones(n, t, dtype=torch.bool)


def test_batch_and_length_of_a_transformer(tmp_path, caplog):
    pipe, chain = exported(Transformer(), sentence(2, 6), tmp_path, 3)
    assert not [r for r in caplog.records if r.levelname == "ERROR"]  # of sizes that were only tried
    assert [v.shape for v in chain.manifest.inputs] == [("batch", "ids_1")] * 2
    assert [(a.size, a.smallest, a.largest) for a in chain.manifest.axes] == [(6, 1, None)]
    assert {s["ids_1"] for s in chain.manifest.verification["sizes"]} == {1, 6, 7}
    assert_right(pipe, chain, sentence(2, 6), sentence(5, 3), sentence(1, 33))
    ids, mask = sentence(2, 4)
    with pytest.raises(ValueError, match=r"input 'mask' has 3 along 'ids_1', input 'ids' has 4: they must"):
        chain(ids.numpy(), mask[:, :3].numpy())


class Messages(nn.Module):
    """Nodes take the sum of what edges bring."""

    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x, edges):
        h = self.inp(x)
        return self.out(h.index_add(0, edges[1], h[edges[0]]))


def graph(nodes, edges):
    return torch.randn(nodes, 4), torch.randint(0, nodes, (2, edges))


def test_a_graph_may_have_fewer_nodes_than_the_example(tmp_path, caplog, capsys):
    """Its edges lead to nodes that a graph of one node lacks: that is the example's, not the model's."""
    torch.manual_seed(1)
    pipe, chain = exported(Messages(), graph(9, 7), tmp_path)
    assert chain.manifest.batch.smallest == 1
    assert_right(pipe, chain, graph(3, 12), graph(1, 2), graph(20, 5))
    assert "not meant for" not in caplog.text
    assert "Traceback" not in capsys.readouterr().err


def test_where_code_decides_by_a_size_the_chain_takes_what_was_tried(tmp_path):
    """A file has no guards: beyond the sizes that were tried it could be silently wrong."""
    pipe, chain = exported(Transformer(limit=40), sentence(2, 6), tmp_path)
    (axis,) = chain.manifest.axes
    assert (axis.smallest, axis.largest) == (1, 27)
    assert_right(pipe, chain, sentence(3, 27))
    with pytest.raises(ValueError, match=r"'ids' has 28 along 'ids_1'; .* result from 1 to 27: pad"):
        chain(*(t.numpy() for t in sentence(2, 28)))


def test_images_of_any_height_and_width(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip
    pipe, chain = exported(model, (torch.randn(2, 3, 8, 8),), tmp_path)
    assert [v.shape for v in chain.manifest.inputs] == [("batch", 3, "input_2", "input_3")]
    assert_right(pipe, chain, (torch.randn(3, 3, 9, 21),), (torch.randn(1, 3, 30, 8),))


def test_sizes_in_steps(tmp_path):
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.a(x.unflatten(1, (-1, 4, 2)).flatten(2))
            return self.b(torch.relu(x))

    pipe, chain = exported(Halves(), (torch.randn(2, 16),), tmp_path)
    (axis,) = chain.manifest.axes
    assert (axis.name, axis.multiple) == ("x_1", 8)
    assert_right(pipe, chain, (torch.randn(3, 40),))
    with pytest.raises(ValueError, match=r"12 along 'x_1'.*in steps of 8"):
        chain(np.zeros((2, 12), np.float32))


def test_nodes_and_edges_of_a_graph(tmp_path):
    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.edge = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(2, 6)

        def forward(self, x, edges, features):
            sent = self.a(x)[edges[0]] * self.edge(features)
            x = torch.zeros(x.shape[0], 6).index_add(0, edges[1], sent)
            return self.b(torch.relu(x))

    def graph(n, e):
        return torch.randn(n, 4), torch.randint(0, n, (2, e)), torch.randn(e, 2)

    pipe, chain = exported(Convolution(), graph(7, 11), tmp_path)
    shapes = [("batch", 4), ("edges_0", "edges_1"), ("edges_1", 2)]  # a third row is never looked at
    assert [v.shape for v in chain.manifest.inputs] == shapes
    assert_right(pipe, chain, graph(9, 5), graph(20, 60), graph(7, 11))


def test_code_that_switches_gradients_leaves_sizes_open(tmp_path):
    class Switches(Transformer):
        def forward(self, ids, mask):
            with torch.no_grad():
                mask = mask & True
            return super().forward(ids, mask)

    pipe, chain = exported(Switches(), sentence(2, 6), tmp_path)
    assert [v.shape for v in chain.manifest.inputs] == [("batch", "ids_1"), ("batch", "ids_1")]
    assert_right(pipe, chain, sentence(4, 6), sentence(3, 9))
