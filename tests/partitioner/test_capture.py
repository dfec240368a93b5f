"""Captured graphs equal the plain model, bit for bit, in both modes, and leave it as it was."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dtrp.errors import CaptureError
from dtrp.partitioner.capture import capture
from dtrp.partitioner.capture.structure import flatten_output


def run(function, tensors, model, seed=0):
    """Output leaves, structure, input-free state afterwards and gradients of one call under a seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    random.seed(seed)
    leaves, spec = flatten_output(function(*tensors))
    total = sum(
        leaf.float().sum() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad
    )
    if isinstance(total, torch.Tensor):
        total.backward()
    gradients = {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.zero_grad(set_to_none=True)
    return leaves, spec, state, gradients


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return a == b or (a is None and b is None)


def assert_faithful(model, args=(), kwargs=None, captured=None, function=None):
    """Outputs, updated buffers and gradients equal the plain model's, in both modes.

    Compared is ``function``, called like the model, or the graphs that capturing gives.
    """
    kwargs = kwargs or {}
    if function is None:
        captured = captured or capture(model, args, kwargs)
        tensors = captured.signature.flatten(args, kwargs)
    reference = copy.deepcopy(model)
    was = {k: m.training for k, m in model.named_modules()}
    for training in (True, False, True):
        model.train(training)
        reference.train(training)
        plain = run(lambda *_: reference(*args, **kwargs), (), reference)
        if function is not None:
            graph = run(lambda *_: function(*args, **kwargs), (), model)
        else:
            graph = run(captured.graph(training), tensors, model)
        assert plain[1] == graph[1]
        for i, (a, b) in enumerate(zip(plain[0], graph[0], strict=True)):
            assert same(a, b), f"output {i}, training={training}"
        for key in plain[2]:
            assert torch.equal(plain[2][key], graph[2][key]), f"{key}, training={training}"
        for key in plain[3]:
            assert same(plain[3][key], graph[3][key]), f"gradient of {key}, training={training}"
    for k, m in model.named_modules():
        m.training = was[k]
    return captured


# Each kind of network, as small as its class allows.
SMALL = {
    "resnet": lambda m: m.resnet.ResNet(m.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5, width_per_group=64),
    "densenet": lambda m: m.DenseNet(4, (2, 2), 8, num_classes=5),
    "vit": lambda m: m.VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=5),
    "swin": lambda m: m.SwinTransformer([2, 2], 8, [2, 2], [1, 2], [2, 2], num_classes=5),
    "convnext": lambda m: m.ConvNeXt(
        [m.convnext.CNBlockConfig(8, 16, 1), m.convnext.CNBlockConfig(16, None, 1)], 0.1, num_classes=5
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_kinds_of_torchvision_models(name):
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    assert_faithful(SMALL[name](models), (torch.randn(2, 3, 16, 16),))


TORCHVISION = [
    ("resnet18", 64, {}),
    ("inception_v3", 299, {"init_weights": False}),
    ("googlenet", 64, {"init_weights": False}),
    ("densenet121", 64, {}),
    ("vit_b_16", 32, {"image_size": 32}),
    ("swin_t", 64, {}),
    ("convnext_tiny", 64, {}),
    ("segmentation.fcn_resnet50", 64, {"weights_backbone": None}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "options"), TORCHVISION, ids=[n for n, _, _ in TORCHVISION])
def test_torchvision(name, size, options):
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    model = models.get_model(name.removeprefix("segmentation."), weights=None, **options)
    assert_faithful(model, (torch.randn(2, 3, size, size),))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        y = self.block(self.bn(self.conv(x)))
        y = F.dropout(y, 0.3, training=self.training)
        return self.head(y.mean((2, 3)))


def test_contract_of_nodes():
    model = Net()
    captured = capture(model, (torch.randn(2, 3, 8, 8),))
    graph = captured.eval.module.graph
    by_target = {str(n.target): n for n in graph.nodes}
    assert by_target["conv"].meta["val"].shape == (2, 4, 8, 8)
    assert by_target["conv"].meta["val"].requires_grad
    assert by_target["conv"].meta["module"] == "conv"
    assert by_target["block.1"].meta["module"] == "block.1"
    assert "test_capture.py:" in by_target["conv"].meta["location"]
    assert captured.eval.module.get_submodule("bn") is model.bn
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    assert [n.meta["val"].shape for n in placeholders] == [(2, 3, 8, 8)]


def test_functional_dropout_gives_a_graph_per_mode():
    captured = assert_faithful(Net(), (torch.randn(2, 3, 8, 8),))
    assert not captured.one_graph


def test_one_graph_where_only_layers_follow_the_mode():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    assert assert_faithful(model, (torch.randn(4, 3),)).one_graph


def test_capture_leaves_no_trace():
    model = Net()
    model.bn.eval()
    model.block[1].eval()
    flags = {k: m.training for k, m in model.named_modules()}
    attributes = {k: dict(m.__dict__) for k, m in model.named_modules()}
    tensors = {k: (v, v.clone()) for k, v in model.state_dict(keep_vars=True).items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    capture(model, (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),))
    assert flags == {k: m.training for k, m in model.named_modules()}
    for k, m in model.named_modules():
        assert m.__dict__.keys() == attributes[k].keys()
        assert all(m.__dict__[name] is value for name, value in attributes[k].items())
    for k, v in model.state_dict(keep_vars=True).items():
        assert v is tensors[k][0]
        assert torch.equal(v, tensors[k][1])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_capture_between_forward_and_backward():
    """The graph of a loss that waits takes the model's statistics for those that it saw."""
    model = Net()
    loss = model(torch.randn(2, 3, 8, 8)).sum()
    capture(model, (torch.randn(2, 3, 8, 8),))
    loss.backward()


def test_model_on_meta_device():
    with torch.device("meta"):
        model = Net()
    captured = capture(model, (torch.empty(2, 3, 8, 8, device="meta"),))
    output = next(n for n in captured.train.module.graph.nodes if n.op == "output")
    assert output.args[0][0].meta["val"].shape == (2, 2)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Linear(3, 2), torch.randn(4, 3)),
        (nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3)),
        (nn.Sequential(nn.ReLU(), nn.Flatten()), torch.randn(4, 3, 2)),
        (nn.Identity(), torch.randn(4, 3)),
    ],
    ids=["a layer", "a sequence of one", "no parameters", "identity"],
)
def test_smallest_models(model, x):
    assert_faithful(model, (x,))


def test_pytrees_in_and_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, batch, scale=2.0, *, mask=None, extra=None):
            y = self.a(batch["x"]) * scale
            if mask is not None:
                y = y.masked_fill(mask, 0.0)
            return {"y": y, "more": (self.b(y), None, 3), "loss": y.sum()}

    x, mask = torch.randn(4, 3), torch.rand(4, 3) > 0.5
    captured = assert_faithful(Model(), ({"x": x},), {"mask": mask, "scale": 3.0})
    assert captured.signature.tensor_names == ("batch['x']", "mask")


@pytest.mark.parametrize("name", ["graph", "code"])
def test_a_part_with_a_name_that_stages_need(name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(name, nn.Linear(3, 2))

        def forward(self, x):
            return getattr(self, name)(x)

    x = torch.randn(4, 3)
    with pytest.raises(CaptureError, match=rf"'{name}', .* another name, or compile a module that holds"):
        capture(Model(), (x,))
    assert_faithful(nn.Sequential(Model(), nn.Linear(2, 2)), (x,))


def test_not_a_module():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        capture(3, (torch.randn(2),))


def test_data_dependent_branch_is_refused_with_its_line():
    class Model(nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                return x
            return -x

    with pytest.raises(CaptureError, match=r"test_capture.py:\d+"):
        capture(Model(), (torch.randn(3),))
