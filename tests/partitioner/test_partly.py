"""Stages that keep their graphs, but compute some nodes again where memory only just lacks."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dtrp
from dtrp.partitioner.capture import capture
from dtrp.partitioner.costs import cost_graph
from dtrp.partitioner.devices import device_spec
from dtrp.partitioner.hazards import find_hazards
from dtrp.partitioner.live_bytes import LiveBytes
from dtrp.partitioner.partly import repeatable
from dtrp.partitioner.peak import kept_bytes, leaving, pass_peak
from dtrp.partitioner.planner import make_plan
from dtrp.partitioner.stage_cost import stage_costs

SPEC = device_spec("A100-80GB")


class Block(nn.Module):
    """All that could be done twice by mistake: statistics, random numbers, writing in place."""

    def __init__(self, width, functional, p):
        super().__init__()
        self.functional = functional
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(p)

    def forward(self, x):
        y = self.conv(x)
        if self.functional:
            n = self.norm
            y = F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, True, 0.1)
        else:
            y = self.norm(y)
        return x + self.drop(self.act(y))


def model(blocks=6, width=4, functional=False, p=0.2):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 1),
        *(Block(width, functional, p) for _ in range(blocks)),
        nn.Flatten(),
        nn.Linear(width * 36, 5),
    )


def planned(net, x, n_stages, **how):
    captured = capture(net, (x,))
    graph = cost_graph(captured, device=SPEC)
    plan = make_plan(captured, graph, find_hazards(captured), n_stages, devices=[SPEC] * n_stages, **how)
    return captured, graph, plan


def middle(captured, graph, plan, stage):
    """Most of a stage's nodes that may be computed again."""
    nodes = plan.nodes(stage)[1:-1]
    again = tuple(n for n in nodes if n in repeatable(captured, nodes))
    assert len(again) > 3
    return again


def trained(plan, executor="inline", functional=False, p=0.2, **how):
    net = model(functional=functional, p=p)
    x, y = torch.randn(8, 3, 6, 6), torch.randint(5, (8,))
    pipe = dtrp.compile(net, devices=["cpu"] * plan.n_stages, example_inputs=x, plan=plan)
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    with pipe.trainer(
        F.cross_entropy, optimizer, executor=executor, seed=1, rebalance=False, threads=1, **how
    ) as trainer:
        for i in range(9):
            trainer.step(x + i, y)
        trainer.flush()
    return [*net.state_dict().values(), torch.tensor(trainer.losses)]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"method": "fdg"},
        {"method": "1f1b", "micro_batches": 2},
        {"method": "bp"},
        {"schedule": "fig1", "micro_batches": 1, "max_grad_norm": 0.1},
        {"method": "adl", "accumulate": 2},
        {"on_nonfinite": "skip", "autocast": torch.bfloat16},
    ],
    ids=str,
)
@pytest.mark.parametrize("functional", [False, True])
def test_the_bits_are_those_of_a_stage_that_keeps_all(how, functional):
    """Statistics are updated once, masks are the same, and weights are those of the first run, although the
    optimizer has stepped since."""
    x = torch.randn(8, 3, 6, 6)
    captured, graph, plan = planned(model(functional=functional), x, 3, recompute=False)
    again = tuple(middle(captured, graph, plan, stage) for stage in (0, 1))
    partly = replace(plan, recompute=(*again, False))
    torch.manual_seed(2)
    kept = trained(plan, functional=functional, **how)
    torch.manual_seed(2)
    for a, b in zip(trained(partly, functional=functional, **how), kept, strict=True):
        assert torch.equal(a, b)


def test_workers_train_the_same_bits():
    x = torch.randn(8, 3, 6, 6)
    captured, graph, plan = planned(model(), x, 2, recompute=False)
    plan = replace(plan, recompute=(middle(captured, graph, plan, 0), False))
    torch.manual_seed(2)
    inline = trained(plan)
    torch.manual_seed(2)
    for a, b in zip(trained(plan, "workers"), inline, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow  # torch.compile takes its time
def test_a_compiled_stage_trains_the_same():
    x = torch.randn(8, 3, 6, 6)
    captured, graph, plan = planned(model(p=0.0), x, 2, recompute=False)
    plan = replace(plan, recompute=(middle(captured, graph, plan, 0), False))
    torch.manual_seed(2)
    eager = trained(plan, p=0.0)
    torch.manual_seed(2)
    for a, b in zip(trained(plan, p=0.0, compile_stages=True), eager, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_memory_is_what_was_promised():
    """Bytes of a batch in flight: what the planner counts on is what is alive when a stage has run."""
    x = torch.randn(8, 3, 6, 6)
    captured, graph, plan = planned(model(), x, 2, recompute=False)
    nodes = plan.nodes(0)
    leave = leaving(graph, plan.stage_of, nodes)
    assert kept_bytes(graph, nodes, leave) == pass_peak(graph, nodes, leave, is_last=False)[1]
    for start, end in ((0, 0), (1, len(nodes) - 1), (0, len(nodes)), (3, 9), (2, 5)):
        again = tuple(n for n in nodes if n in repeatable(captured, nodes[start:end]))
        cut = replace(plan, recompute=(again, False))
        pipe = dtrp.compile(model(), devices=["cpu"] * 2, example_inputs=x, plan=cut)
        stage = pipe._planning.programs()[0].module.train()
        with LiveBytes(*stage.parameters(), *stage.buffers(), x) as live:
            out = stage(x)
            alive = live.now
        assert alive == pytest.approx(kept_bytes(graph, nodes, leave, again), rel=0.05), (start, end)
        del out


def test_what_is_written_outside_is_not_computed_again():
    """The second run would read what was written since, or write a second time."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            h = self.a(x)
            g = torch.sigmoid(h)
            h.relu_()
            return self.b(g + h) + self.count

    captured = capture(Counts(), (torch.randn(2, 4),))
    names = [n.name for n in captured.train.module.graph.nodes if n.op not in ("placeholder", "output")]
    whole = repeatable(captured, names)
    assert {"a", "relu_", "b"} <= whole  # made, written and read within
    assert not {n for n in names if "iadd" in n or n == "add_1"} & whole  # the count
    alone = repeatable(captured, [n for n in names if n != "relu_"])
    assert "a" not in alone
    assert "b" in alone


def test_code_of_the_user_is_not_computed_again():
    """It may keep things in Python, which a second run would change again."""

    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[1].register_forward_hook(lambda module, args, output: None)
    captured = capture(net, (torch.randn(2, 4),))
    names = [n.name for n in captured.train.module.graph.nodes if n.op == "call_module"]
    assert len(repeatable(captured, names)) == 2


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_no_more_is_computed_again_than_memory_asks(share):
    """Between a limit that all graphs fit and one at which all is recomputed: faster than the latter, under
    the limit, not faster than the bound."""
    with torch.device("meta"):
        net = nn.Sequential(
            nn.Embedding(1000, 256),
            *(nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True) for _ in range(8)),
            nn.Linear(256, 1000),
        )
        x = torch.zeros(16, 256, dtype=torch.int64)
    _, graph, keep = planned(net, x, 4, recompute=False)
    _, _, full = planned(net, x, 4, recompute=True)

    def worst(plan):
        costs = stage_costs(graph, plan.stage_of, plan.recompute)
        return max(c.peak for c in costs), max(c.tick for c in costs)

    limit = worst(full)[0] + share * (worst(keep)[0] - worst(full)[0])
    _, _, plan = planned(net, x, 4, memory_limit=limit)
    peak, tick = worst(plan)
    assert peak <= limit
    assert tick < worst(full)[1]
    assert tick >= plan.lower_bound * (1 - 1e-9)
    assert any(isinstance(again, tuple) for again in plan.recompute)
    assert dtrp.Plan.of_dict(plan.to_dict()) == plan
