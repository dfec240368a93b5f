"""Plans: planning end to end, JSON and back, refusal where they do not fit, checked hand edits."""

import itertools
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dtrp
from dtrp.errors import InfeasiblePlanError, PlanMismatchError
from dtrp.partitioner.capture import capture
from dtrp.partitioner.costs import cost_graph
from dtrp.partitioner.devices import DeviceSpec
from dtrp.partitioner.hazards import find_hazards
from dtrp.partitioner.plan import Plan, fingerprint
from dtrp.partitioner.planner import default_limits, make_plan, memory_limits
from dtrp.partitioner.stage_cost import stage_costs

FREE = SimpleNamespace(groups=(), order=())


def linears(widths):
    return nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)])


def planned(model, x, n_stages, device, **kwargs):
    captured = capture(model, (x,))
    graph = cost_graph(captured, device=device)
    return captured, graph, make_plan(captured, graph, find_hazards(captured), n_stages, **kwargs)


@pytest.fixture
def fast_link(device):
    return DeviceSpec.from_dict(device.to_dict() | {"link_bandwidth": 1e15, "flops": {"float32": 1e3}})


def test_a_chain_whose_best_cut_is_known(fast_link):
    """Equal layers, compute only. Keeping its graphs, every stage costs the same per layer: equal halves."""
    _, _, plan = planned(linears([32] * 9), torch.randn(64, 32), 4, fast_link, recompute=False)
    assert [len(plan.nodes(k)) for k in range(4)] == [2, 2, 2, 2]


def test_recomputing_stages_get_less_than_the_last(fast_link):
    """A recomputing layer costs 4 forwards, one in the last stage 3: of 14, it gets 8 (6 x 4 = 8 x 3)."""
    model, x = linears([32] * 15), torch.randn(4096, 32)
    _, graph, plan = planned(model, x, 2, fast_link, recompute=True)
    assert [len(plan.nodes(k)) for k in range(2)] == [6, 8]
    assert plan.recompute == (True, False)
    ticks = [cost.tick for cost in stage_costs(graph, plan.stage_of, plan.recompute)]
    assert plan.lower_bound == pytest.approx(max(ticks))


def test_one_stage(device):
    _, graph, plan = planned(linears([8, 8, 8]), torch.randn(2, 8), 1, device)
    assert set(plan.stage_of.values()) == {0}
    assert plan.recompute == (False,)
    assert set(dict(graph.nodes(data="stage")).values()) == {0}


def test_auto_recomputes_only_where_memory_asks_for_it(fast_link):
    model, x = linears([64] * 9), torch.randn(512, 64)
    _, graph, free = planned(model, x, 3, fast_link, recompute="auto")
    assert free.recompute == (False, False, False)
    kept = stage_costs(graph, free.stage_of, free.recompute)
    _, graph, on = planned(model, x, 3, fast_link, recompute=True)
    limit = 0.6 * kept[0].peak
    _, graph, tight = planned(model, x, 3, fast_link, recompute="auto", memory_limit=limit)
    assert any(tight.recompute)
    costs = stage_costs(graph, tight.stage_of, tight.recompute)
    assert all(cost.peak <= limit for cost in costs)
    slowest = max(cost.tick for cost in costs)
    assert slowest <= max(c.tick for c in stage_costs(graph, on.stage_of, on.recompute)) * (1 + 1e-9)


def test_an_impossible_limit_says_the_smallest_possible(device):
    model, x = linears([64] * 5), torch.randn(4, 64)
    with pytest.raises(
        InfeasiblePlanError, match=r"the smallest limit that can be met is ([\d,]+) bytes"
    ) as info:
        planned(model, x, 2, device, memory_limit=1000)
    smallest = int(str(info.value).split("met is ")[1].split(" bytes")[0].replace(",", ""))
    planned(model, x, 2, device, memory_limit=smallest)
    with pytest.raises(InfeasiblePlanError):
        planned(model, x, 2, device, memory_limit=smallest - 1)


def test_without_a_limit_a_model_larger_than_the_device_is_still_planned(device, caplog):
    small = DeviceSpec.from_dict(device.to_dict() | {"memory_bytes": 1000.0})
    _, _, plan = planned(linears([64] * 5), torch.randn(4, 64), 2, small)
    assert plan.recompute == (True, False)
    assert "no plan fits the devices' memory" in caplog.text


def test_more_stages_than_nodes(device):
    with pytest.raises(ValueError, match="at most 2 stages"):
        planned(linears([8, 8, 8]), torch.randn(2, 8), 3, device)


def test_memory_limits():
    assert memory_limits("1GB", 2) == [1e9, 1e9]
    assert memory_limits(["1GB", None], 2) == [1e9, None]
    assert memory_limits(None, 2) is None
    with pytest.raises(ValueError, match="3 memory limits for 2 stages"):
        memory_limits([1, 2, 3], 2)


def test_stages_on_cpu_share_the_machines_memory(device):
    cpu = DeviceSpec.from_dict(device.to_dict() | {"kind": "cpu", "memory_bytes": 100.0})
    gpu = DeviceSpec.from_dict(device.to_dict() | {"memory_bytes": 100.0})
    assert default_limits([cpu, cpu]) == [45.0, 45.0]
    assert default_limits([gpu, gpu]) == [90.0, 90.0]


@pytest.fixture
def example(device):
    return planned(linears([8] * 7), torch.randn(2, 8), 3, device)


def test_json_and_back(example, tmp_path):
    _, _, plan = example
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    data = json.loads((tmp_path / "plan.json").read_text())
    assert {"format", "dtrp", "fingerprint", "stage_of", "recompute"} <= data.keys()


def test_a_plan_is_immutable(example):
    _, _, plan = example
    with pytest.raises(TypeError):
        plan.stage_of["x"] = 0
    with pytest.raises(AttributeError):
        plan.n_stages = 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a plan: no valid JSON"),
        ("[1]", "is JSON but not a plan"),
        ('{"a": 1}', "is JSON but not a plan"),
        ('{"format": 99, "dtrp": "9.9"}', r"plan format 99 \(written by dtrp 9.9\).*reads format 1"),
        ('{"format": 1}', "is a damaged plan"),
    ],
)
def test_files_that_are_no_plan(content, message, tmp_path):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(PlanMismatchError, match=message):
        Plan.load(tmp_path / "plan.json")


def test_a_truncated_plan(example, tmp_path):
    _, _, plan = example
    data = plan.to_dict() | {"n_stages": 5, "recompute": [False] * 5}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanMismatchError, match=r"damaged plan.*stage 3 would be empty"):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_fits_the_same_model_and_shapes_only(example):
    _, _, plan = example
    plan.check(capture(linears([8] * 7), (torch.randn(2, 8),)), 3)
    with pytest.raises(PlanMismatchError, match="for 3 stages, not for 2"):
        plan.check(capture(linears([8] * 7), (torch.randn(2, 8),)), 2)
    with pytest.raises(PlanMismatchError, match="operations, shapes or dtypes are not"):
        plan.check(capture(linears([8] * 7), (torch.randn(3, 8),)))
    with pytest.raises(PlanMismatchError, match="1 of the model's 7 nodes are not in it"):
        plan.check(capture(linears([8] * 8), (torch.randn(2, 8),)))
    with pytest.raises(PlanMismatchError, match="2 of its nodes are not in the model"):
        plan.check(capture(linears([8] * 5), (torch.randn(2, 8),)))


def test_a_plan_fits_the_model_whose_heavy_part_was_opened_for_it(tmp_path):
    """The part stands as one node by itself (it has a hook): a plan that does not say it was opened was
    refused, for the very model that it was made for."""
    model, x = nn.Sequential(nn.Linear(32, 32), linears([32] * 7), nn.Linear(32, 4)), torch.randn(512, 32)
    model[1].register_forward_hook(lambda module, args, output: None)
    pipe = dtrp.compile(model, n_gpus=2, example_inputs=x)
    assert pipe.plan.opened == ("1",)
    pipe.plan.save(tmp_path / "plan.json")
    again = dtrp.compile(model, n_gpus=2, example_inputs=x, plan=tmp_path / "plan.json")
    assert again.plan == pipe.plan
    assert torch.equal(again(x), model(x))


def test_the_fingerprint_is_of_the_graph_not_of_weights():
    x = torch.randn(2, 8)
    first = fingerprint(capture(linears([8] * 3), (x,)))
    assert first == fingerprint(capture(linears([8] * 3), (x,)))
    assert first != fingerprint(capture(linears([8] * 3).double(), (x.double(),)))

    class Scaled(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.by, self.fc = by, nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(x) * self.by

    assert fingerprint(capture(Scaled(2.0), (x,))) != fingerprint(capture(Scaled(3.0), (x,)))


def test_move(example):
    _, _, plan = example
    first = plan.nodes(1)[0]
    moved = plan.move(first, 0)
    assert moved.stage_of[first] == 0
    assert moved.edited
    assert plan.stage_of[first] == 1, "the old plan is as it was"
    assert not plan.edited


def test_moves_that_break_the_plan(example):
    _, _, plan = example
    a, b = plan.nodes(0)
    with pytest.raises(
        ValueError, match=f"'{b}' .stage 0. cannot come before '{a}' .stage 1.*or pin their module"
    ):
        plan.move(a, 1)
    with pytest.raises(ValueError, match="stage must be one of 0 to 2; got 3"):
        plan.move(a, 3)
    with pytest.raises(ValueError, match="no node 'headd'"):
        plan.move("headd", 1)
    with pytest.raises(ValueError, match="stage 0 would be empty"):
        plan.move(b, 1).move(a, 1)


def test_moving_takes_along_what_must_stay_together(device):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8))
    _, _, plan = planned(model, torch.randn(2, 8), 2, device)
    plan = plan.pin("1", 0)
    together = next(iter(plan.groups))
    moved = plan.move(together[0], 1)
    assert {moved.stage_of[n] for n in together} == {1}


def test_pin_pulls_along_what_comes_before(example):
    _, _, plan = example
    assert [len(plan.nodes(k)) for k in range(3)] == [2, 2, 2]
    pinned = plan.pin("2", 0)
    assert [len(pinned.nodes(k)) for k in range(3)] == [3, 1, 2]
    assert [len(plan.pin("1", 1).nodes(k)) for k in range(3)] == [1, 3, 2]
    assert all(pinned.stage_of[u] <= pinned.stage_of[v] for u, v in pinned.edges)
    with pytest.raises(ValueError, match=r"no node of the plan comes from a module '3\.weight'"):
        plan.pin("3.weight", 0)
    with pytest.raises(ValueError, match="would be empty"):
        plan.pin("5", 0)


def test_tied_parameters_may_be_in_two_stages(device):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))
            self.between = nn.Linear(8, 8)

        def forward(self, x):
            x = nn.functional.linear(x, self.weight)
            return nn.functional.linear(self.between(x), self.weight)

    _, graph, plan = planned(Tied(), torch.randn(2, 8), 2, device)
    first, last = stage_costs(graph, plan.stage_of, plan.recompute)
    assert first.params + last.params == 8 * 8 * 2 + 8 * 8 + 8
