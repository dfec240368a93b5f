"""Predicted peaks against what a real pass through each stage has alive, storage by storage."""

import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dtrp.partitioner.capture import capture
from dtrp.partitioner.costs import cost_graph
from dtrp.partitioner.hazards import find_hazards
from dtrp.partitioner.live_bytes import LiveBytes
from dtrp.partitioner.peak import pass_peak
from dtrp.partitioner.planner import make_plan
from dtrp.partitioner.split import split
from dtrp.wiring import CALLER
from tests.partitioner.test_costs import Attention, Residual


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, 1, 1) for i in range(3))
        self.up = nn.ModuleList(nn.Conv2d(16, 8, 3, 1, 1) for _ in range(2))
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        skips = []
        for conv in self.down:
            x = F.relu(conv(x))
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = F.interpolate(x, scale_factor=2.0)
        for conv in self.up:
            x = F.interpolate(F.relu(conv(torch.cat([x, skips.pop()], 1))), scale_factor=2.0)
        return self.head(x)


def dense():
    layers = [
        layer for _ in range(6) for layer in (nn.Linear(256, 256), nn.ReLU(inplace=True), nn.LayerNorm(256))
    ]
    return nn.Sequential(*layers, nn.Linear(256, 10))


MODELS = {
    "cnn": (Residual, lambda: torch.randn(16, 3, 8, 8)),
    "attention": (Attention, lambda: torch.randint(17, (8, 32))),
    "u-net": (UNet, lambda: torch.randn(4, 3, 32, 32)),
    "dense": (dense, lambda: torch.randn(512, 256)),
    "dense, few samples": (dense, lambda: torch.randn(4, 256)),
}


@pytest.mark.parametrize("n_stages", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_peaks(name, n_stages, device):
    make, inputs = MODELS[name]
    model, x = make().train(), inputs()
    captured = capture(model, (x,))
    hazards, graph = find_hazards(captured), cost_graph(captured, device=device)
    plan = make_plan(captured, graph, hazards, n_stages, time_limit=1.0)
    stages = split(captured, plan, hazards).train
    values, ratios = [], []
    for k, (module, wires) in enumerate(zip(stages.modules, stages.wiring.stages, strict=True)):
        given = [x if s.stage == CALLER else values[s.stage][s.index] for s in wires.inputs]
        with LiveBytes(given, list(module.parameters()), list(module.buffers())) as live:
            outputs = module(*given)
            kept = live.now
            wanted = [t for t in outputs if isinstance(t, torch.Tensor) and t.requires_grad]
            if k == n_stages - 1:
                (scores,) = wanted
                scores = scores.flatten(0, 1) if scores.dim() == 3 else scores
                target = torch.zeros(scores[:, 0].shape, dtype=torch.int64)
                F.cross_entropy(scores, target).backward()
            else:
                torch.autograd.backward(wanted, [torch.ones_like(t) for t in wanted])
        values.append([t.detach().requires_grad_(t.requires_grad) for t in outputs])
        model.zero_grad(set_to_none=True)
        nodes = plan.nodes(k)
        leaving = {n for n in nodes for user in graph.successors(n) if plan.stage_of[user] != k}
        leaving |= graph.graph["results"] & set(nodes)
        peak, predicted_kept = pass_peak(graph, nodes, leaving, is_last=k == n_stages - 1)
        assert predicted_kept == pytest.approx(kept, rel=0.05)
        assert 0.9 * live.peak <= peak <= 1.25 * live.peak
        ratios.append(peak / live.peak)
    assert statistics.median(ratios) == pytest.approx(1, rel=0.1)
