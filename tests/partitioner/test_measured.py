"""Measured costs: they are taken on the running model, which stays as it was, once."""

import pytest
import torch
from torch import nn

from dtrp.partitioner import measured
from dtrp.partitioner.capture import capture
from dtrp.partitioner.costs import cost_graph
from dtrp.partitioner.devices import device_spec
from tests.partitioner.test_costs import MODELS, Masked, Residual


@pytest.fixture
def cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "BUDGET", 0.2)
    return device_spec("cpu")


@pytest.mark.parametrize("name", MODELS)
def test_every_node_has_a_time(name, cpu):
    make, inputs = MODELS[name]
    captured = capture(make(), inputs())
    graph = cost_graph(captured, device=cpu, mode="measured")
    analytic = cost_graph(captured, device=cpu)
    assert graph.graph["mode"] == "measured"
    for node, data in graph.nodes(data=True):
        assert data["forward_time"] > 0 or data["kind"] == "get_attr"
        assert data["flops"] == analytic.nodes[node]["flops"]
        if data["backward_flops"]:
            assert data["backward_time"] > 0


def _plus(x, y):
    x += y
    return x


def _part(x, y):
    x[:, 0] = y[:, 1]
    return x


@pytest.mark.parametrize("write", [_plus, _part, lambda x, y: x.mul_(y), lambda x, y: torch.relu_(x) + y])
def test_what_is_written_in_place_can_be_timed(write, cpu):
    """Else models with `x += residual` could not be compiled with measured costs at all."""

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(write(self.first(x), x))

    graph = cost_graph(capture(Writes(), (torch.randn(3, 4),)), device=cpu, mode="measured")
    assert all(d["forward_time"] > 0 for d in graph.nodes.values() if d["kind"] != "get_attr")


def test_a_heavy_node_takes_longer_than_a_light_one(cpu):
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8), nn.Linear(8, 8))
    graph = cost_graph(capture(model, (torch.randn(256, 512),)), device=cpu, mode="measured")
    heavy, *_, light = graph.nodes.values()
    assert heavy["forward_time"] > 3 * light["forward_time"]
    assert heavy["backward_time"] > 3 * light["backward_time"]
    assert 0 < heavy["sweep_time"] < 0.1


@pytest.mark.parametrize("make", [Residual, Masked])
def test_the_model_is_left_as_it_was(make, cpu):
    model = make().eval()
    inputs = torch.randn(2, 3, 8, 8) if make is Residual else torch.randn(3, 4)
    captured = capture(model, (inputs,))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    threads = torch.get_num_threads()
    cost_graph(captured, device=cpu, mode="measured")
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads


def test_measuring_happens_once_for_a_graph_and_its_shapes(cpu, monkeypatch):
    def times(n):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        graph = cost_graph(capture(model, (torch.randn(n, 8),)), device=cpu, mode="measured")
        return [data["forward_time"] for data in graph.nodes.values()]

    first = times(4)
    runs = []
    original = measured._Clock.run
    monkeypatch.setattr(measured._Clock, "run", lambda self, budget: runs.append(1) or original(self, budget))
    assert times(4) == first
    assert not runs
    times(5)
    assert runs


def test_a_model_on_meta_cannot_be_measured(cpu):
    captured = capture(nn.Linear(4, 4).to("meta"), (torch.randn(2, 4, device="meta"),))
    with pytest.raises(ValueError, match=r"on the meta device, without numbers; use costs='analytic'"):
        cost_graph(captured, device=cpu, mode="measured")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_a_device_that_is_not_here_cannot_measure():
    captured = capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    with pytest.raises(ValueError, match=r"there is no A100-80GB here; use costs='analytic'"):
        cost_graph(captured, device=device_spec("A100-80GB"), mode="measured")


def test_stages_on_different_devices_cannot_be_measured(cpu):
    captured = capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    with pytest.raises(ValueError, match=r"needs stages on one kind of device; got CPU .*, T4"):
        cost_graph(captured, device=[cpu, device_spec("T4")], mode="measured")


@pytest.mark.cuda
def test_on_cuda():
    spec = device_spec("cuda:0")
    graph = cost_graph(capture(Residual(), (torch.randn(2, 3, 8, 8),)), device=spec, mode="measured")
    assert all(data["forward_time"] > 0 for data in graph.nodes.values() if data["flops"])
