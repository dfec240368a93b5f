"""The cost graph: FLOPs against hand counts and torch's counter, saved bytes against what autograd keeps."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import dtrp
from dtrp.partitioner.capture import capture
from dtrp.partitioner.costs import cost_graph
from dtrp.partitioner.devices import DeviceSpec


def costs(model, *args, device, **kwargs):
    return cost_graph(capture(model, args), device=device, **kwargs)


def total(graph, attribute):
    return sum(value for _, value in graph.nodes(data=attribute))


def node(graph, op):
    found = [data for _, data in graph.nodes(data=True) if data["op"] == op]
    assert len(found) == 1, (
        f"{len(found)} nodes with op {op!r}: {sorted(d['op'] for _, d in graph.nodes.data())}"
    )
    return found[0]


class Residual(nn.Module):
    """Batch normalisation, in-place ReLU, dropout, a skip connection, pooling, a view."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.dropout = nn.Dropout(0.2)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.dropout(self.conv2(x))
        y = F.gelu(y + x)
        return self.fc(self.pool(y).flatten(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(17, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.qkv = nn.Linear(16, 48)
        self.head = nn.Linear(16, 17, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.layer(self.embed(tokens))
        q, k, v = (t.view(*t.shape[:2], 4, 4).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(y.transpose(1, 2).reshape(x.shape))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(6, 8, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.gru(x)[0])


class Masked(nn.Module):
    """Writes a value that requires a gradient into one that does not."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x):
        y = torch.zeros_like(x)
        y[:, :2] = self.a(x)[:, :2]
        return self.b(y * 2)


MODELS = {
    "residual": (Residual, lambda: (torch.randn(2, 3, 8, 8),)),
    "attention": (Attention, lambda: (torch.randint(17, (2, 5)),)),
    "recurrent": (Recurrent, lambda: (torch.randn(2, 5, 6),)),
    "masked": (Masked, lambda: (torch.randn(3, 4),)),
}


def really_saved(model, args):
    """Bytes of the storages that autograd keeps, once each, without parameters and buffers."""
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    saved, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive.append(model(*args))
    return sum(saved.values())


@pytest.mark.parametrize("name", MODELS)
def test_saved_bytes_are_those_that_autograd_keeps(name, device):
    make, inputs = MODELS[name]
    model, args = make().train(), inputs()
    assert total(costs(model, *args, device=device), "activation_bytes") == really_saved(model, args)


@pytest.mark.parametrize("name", ["attention", "masked"])
def test_flops_are_those_that_torch_counts(name, device):
    if (
        name == "attention"
        and torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry
    ):
        pytest.skip("this torch's own counter leaves out attention on the CPU, which dtrp counts")
    make, inputs = MODELS[name]
    model, args = make().train(), inputs()
    counter = FlopCounterMode(display=False)
    with counter:
        out = model(*args)
        forward = counter.get_total_flops()
        out.sum().backward()
    graph = costs(model, *args, device=device)
    assert total(graph, "flops") == forward > 0
    assert total(graph, "backward_flops") == counter.get_total_flops() - forward


def test_linear_by_hand(device):
    graph = costs(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), torch.randn(5, 8), device=device)
    first, second = (graph.nodes[n] for n in graph)
    assert first["flops"] == 2 * 5 * 8 * 16
    assert first["backward_flops"] == first["flops"], "the model's input needs no gradient"
    assert second["flops"] == 2 * 5 * 16 * 4
    assert second["backward_flops"] == 2 * second["flops"]
    assert first["params_bytes"] == 4 * (8 * 16 + 16)
    assert first["output_bytes"] == first["transfer_bytes"] == 4 * 5 * 16
    assert list(first["model_inputs"].values()) == [4 * 5 * 8]
    assert first["first_input_bytes"] == 4 * 5 * 8
    assert second["model_inputs"] == {}
    assert first["params"] == ("0.weight", "0.bias")


def test_time_is_the_roofline_of_each_operator():
    spec = DeviceSpec(
        name="uneven",
        flops={"float32": 100.0},
        memory_bandwidth=1000.0,
        launch_overhead=0.5,
        memory_bytes=1e9,
        link_bandwidth=10.0,
        link_latency=3.0,
    )
    graph = costs(nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU()), torch.randn(5, 8), device=spec)
    linear, relu = (graph.nodes[n] for n in graph)
    assert linear["forward_time"] == pytest.approx(2 * 5 * 8 * 16 / 100 + 0.5)
    assert relu["forward_time"] == pytest.approx(2 * 5 * 16 * 4 / 1000 + 0.5)
    assert linear["transfer_time"] == pytest.approx(5 * 16 * 4 / 10 + 3)
    assert linear["sweep_time"] == pytest.approx(8 * 16 * 4 / 1000)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_convolution_by_hand(groups, device):
    """torch's counter forgets the groups in the backward pass; ours must not (each gradient: one forward)."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=groups))
    graph = costs(model, torch.randn(2, 3, 6, 6), device=device)
    data = list(graph.nodes(data=True))[-1][1]
    assert data["flops"] == 2 * (2 * 8 * 6 * 6) * (8 // groups) * 9
    assert data["backward_flops"] == 2 * data["flops"]


def test_attention_by_hand(device):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x):
            x = x * self.scale
            return F.scaled_dot_product_attention(x, x, x)

    graph = costs(Plain(), torch.randn(2, 3, 16, 8), device=device)
    assert total(graph, "flops") == 2 * 2 * (2 * 3 * 16 * 16 * 8)
    assert total(graph, "backward_flops") == 5 * 2 * (2 * 3 * 16 * 16 * 8), "flash attention: five products"


def test_nothing_is_computed_a_model_on_meta_costs_the_same(device):
    model, args = Residual(), (torch.randn(2, 3, 8, 8),)
    here = costs(model, *args, device=device)
    meta = costs(Residual().to("meta"), args[0].to("meta"), device=device)
    assert dict(here.nodes.data()) == dict(meta.nodes.data())


def test_the_model_is_left_as_it_was(device):
    model = Residual().eval()
    model.bn1.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    costs(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), device=device)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_costs_are_those_of_training_also_for_a_model_in_eval_mode(device):
    args = (torch.randn(2, 3, 8, 8),)
    train, evaluate = Residual().train(), Residual().eval()
    assert total(costs(train, *args, device=device), "activation_bytes") == total(
        costs(evaluate, *args, device=device), "activation_bytes"
    )


def test_tied_parameters_count_at_their_first_user(device):
    model = Attention()
    graph = costs(model, torch.randint(17, (2, 5)), device=device)
    assert total(graph, "params_bytes") == sum(4 * p.numel() for p in model.parameters())
    users = [n for n, params in graph.nodes(data="params") if "embed.weight" in params]
    assert len(users) >= 2
    assert graph.graph["params"]["embed.weight"] == (17 * 16, 4 * 17 * 16)


def test_frozen_parameters_need_no_gradient(device):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    graph = costs(model, torch.randn(2, 4), device=device)
    first, second = (graph.nodes[n] for n in graph)
    assert first["backward_flops"] == first["gradient_bytes"] == 0
    assert first["activation_bytes"] == 2 * 4 * 4, "what it gives, because the second layer saves it"
    assert not first["differentiable"]
    assert second["backward_flops"] == second["flops"], "nothing upstream waits for a gradient"


def test_repeated_parts_cost_the_same_and_are_run_once(device, monkeypatch):
    from dtrp.partitioner.node_cost import NodeRunner

    runs = []
    original = NodeRunner._run
    monkeypatch.setattr(NodeRunner, "_run", lambda self, *a: runs.append(1) or original(self, *a))
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(50)])
    graph = costs(model, torch.randn(2, 8), device=device)
    assert len(graph) == 100
    assert len(runs) == 3  # the first linear layer needs no gradient for its input
    assert len({data["backward_flops"] for _, data in graph.nodes.data() if data["flops"]}) == 2


def test_autocast_is_cheaper_where_the_device_has_a_rate_for_it():
    spec = DeviceSpec("half", {"float32": 1e3, "bfloat16": 1e6}, 1e9, 0.0, 1e9, 1e9)
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(16, 64)
    full = costs(model, x, device=spec)
    half = costs(model, x, device=spec, dtype=torch.bfloat16)
    assert total(half, "forward_time") < total(full, "forward_time") / 100
    assert total(half, "output_bytes") * 2 == total(full, "output_bytes")


def test_bandwidth_and_several_devices(device):
    fast = DeviceSpec("fast", {"float32": 1e12}, 1e12, 0.0, 1e15, 1e12, link_latency=0.0)
    graph = costs(
        nn.Sequential(nn.Linear(64, 64)), torch.randn(16, 64), device=[device, fast, device], bandwidth=1e3
    )
    data = next(iter(graph.nodes.values()))
    assert [spec.name for spec in graph.graph["specs"]] == ["round", "fast"]
    assert data["forward_time"] == pytest.approx(1000 * data["forward_time@1"])
    assert data["transfer_time"] == pytest.approx(16 * 64 * 4 / 1e3)
    assert data["exchange_time"] == pytest.approx(2 * 16 * 64 * 4 / 1e3)


def test_a_node_that_cannot_be_run_alone_is_named_and_counts_as_free(device, monkeypatch, caplog):
    from dtrp.partitioner.node_cost import NodeRunner

    def fails(self, module, *args):
        raise RuntimeError("no fake kernel")

    monkeypatch.setattr(NodeRunner, "module", fails)
    monkeypatch.setattr(NodeRunner, "module_on_samples", fails)
    graph = costs(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4), device=device)
    data = next(iter(graph.nodes.values()))
    assert (data["exact"], data["flops"], data["output_bytes"]) == (False, 0, 2 * 3 * 4)
    assert "no fake kernel" in caplog.text


class Picking(nn.Module):
    """Cannot run on fake tensors: the size of what it gives depends on values."""

    def __init__(self):
        super().__init__()
        self.wide, self.back = nn.Linear(64, 4096), nn.Linear(4096, 64)

    def forward(self, x):
        y = self.back(torch.relu(self.wide(x)))
        return y[(y.sum(-1) > 0).nonzero()[:, 0]]


def test_a_module_that_decides_by_values_is_costed_on_random_ones(device):
    """As a free node a detector's heads would join any stage, and the plan be balanced on paper only."""
    model, x = nn.Sequential(nn.Linear(64, 64), Picking()), torch.randn(256, 64)
    before = copy.deepcopy(model.state_dict())
    graph = costs(model, x, device=device)
    data = graph.nodes["_1"]
    assert (data["exact"], data["sampled"]) == (True, True)
    assert data["flops"] == 2 * 2 * 256 * 64 * 4096
    assert data["backward_flops"] == 2 * data["flops"]
    hidden = 256 * 4096 * 4
    assert hidden <= data["activation_bytes"] < 2 * hidden, "relu's output, and little besides"
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())


class Experts(nn.Module):
    """As a mixture of experts in transformers: torch has no fake kernel for these dtypes, but a real one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 16, 16))

    def forward(self, x):
        ends = torch.tensor([x.shape[0] // 2, x.shape[0]], dtype=torch.int32)
        return torch._grouped_mm(x, self.weight, offs=ends)


def test_what_fakes_cannot_do_is_not_printed_with_torchs_stacks():
    """torch logs each such failure as an error, with forty lines, on the user's screen."""
    told = []
    handler = logging.Handler()
    handler.emit = told.append
    loggers = [logging.getLogger(name) for name in ("torch", "torch._subclasses.fake_tensor")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        dtrp.compile(nn.Sequential(Experts(), nn.Linear(16, 4)), n_gpus=2, example_inputs=torch.randn(8, 16))
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert not told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "guess"}, "costs must be 'analytic', 'measured' or 'auto'; got 'guess'"),
        ({"bandwidth": 0.0}, "bandwidth must be a positive number of bytes per second; got 0.0"),
    ],
)
def test_wrong_arguments(arguments, message, device):
    with pytest.raises(ValueError, match=message):
        costs(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4), device=device, **arguments)


def test_looking_for_anomalies_changes_no_costs(device):
    """Scripts leave it switched on; what it would look at are fakes."""
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    plain = costs(model, torch.randn(6, 8), device=device)
    with torch.autograd.set_detect_anomaly(True):
        looked_at = costs(model, torch.randn(6, 8), device=device)
        assert torch.is_anomaly_enabled()
    assert dict(plain.nodes(data=True)) == dict(looked_at.nodes(data=True))
