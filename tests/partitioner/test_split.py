"""Stages together are the model: same outputs, same gradients, same state, whatever lies across the cuts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dtrp
from dtrp.partitioner.capture import capture
from dtrp.partitioner.hazards import find_hazards
from dtrp.partitioner.plan import Plan
from dtrp.partitioner.split import split
from dtrp.wiring import CALLER

from .models import CASES, InPlace, SharedNorm, SkipsOverStages, Tied


def run(call: Any, model: nn.Module, args: Any, kwargs: Any, *, training: bool) -> dict[str, Any]:
    """Output, gradients and buffers of one pass, from a fixed random state."""
    model.train(training)
    model.zero_grad()
    torch.manual_seed(7)
    output = call(*args, **kwargs)
    loss = sum(
        (t.double() ** 2).sum()
        for t in pytree.tree_leaves(output)
        if isinstance(t, Tensor) and t.requires_grad
    )
    if isinstance(loss, Tensor):
        loss.backward()
    return {
        "structure": pytree.tree_structure(output),
        "output": pytree.tree_leaves(output),
        "gradients": {n: p.grad for n, p in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
    }


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the bit, all the way down."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("n_stages", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_stages_together_are_the_model(name: str, n_stages: int) -> None:
    make, example = CASES[name]
    torch.manual_seed(0)
    model = make()
    args, kwargs = example()
    plain = copy.deepcopy(model)
    pipe = dtrp.compile(
        model,
        n_gpus=n_stages,
        example_inputs=args if not kwargs else {**dict(zip(("x", "late"), args, strict=False)), **kwargs},
    )
    for training in (True, False, True):
        expected = run(plain, plain, args, kwargs, training=training)
        assert_same(run(pipe, model, args, kwargs, training=training), expected, name)


@pytest.mark.parametrize("name", CASES)
def test_every_legal_cut_is_right(name: str) -> None:
    """Not only the planner's cuts: each way to cut the program's order in two that keeps the rules."""
    make, example = CASES[name]
    torch.manual_seed(0)
    model = make()
    args, kwargs = example()
    plain = copy.deepcopy(model)
    captured = capture(model, args, kwargs)
    hazards = find_hazards(captured)
    nodes = [n.name for n in captured.train.module.graph.nodes if n.op not in ("placeholder", "output")]
    expected = run(plain, plain, args, kwargs, training=True)
    tried = 0
    for cut in range(1, len(nodes)):
        stage_of = {n: int(i >= cut) for i, n in enumerate(nodes)}
        if any(len({stage_of[n] for n in group}) > 1 for group in hazards.groups):
            continue
        made = split(captured, Plan(2, stage_of, (True, False)), hazards)
        model.load_state_dict(make_state(make))
        tensors = captured.signature.flatten(args, kwargs)
        got = run(lambda *_, **__: made.train(*tensors), model, args, kwargs, training=True)  # noqa: B023
        assert_same(got, expected, f"cut at {nodes[cut]}")
        tried += 1
    assert tried > 0


def test_tensors_made_on_the_way_are_not_taken_for_each_other() -> None:
    """Memory given back by one comes again as another's: layers far apart seemed to share a tensor."""

    class Constants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))

        def forward(self, x: Tensor) -> Tensor:
            for i, layer in enumerate(self.layers):
                x = layer(x) * torch.as_tensor([float(i)]) + torch.tensor(0.5)
                torch.relu_(x)
                x = torch.where(x > torch.as_tensor(1.0), x + torch.full((8,), 2.0), torch.tensor([1.0]))
            return x

    groups = find_hazards(capture(Constants(), (torch.randn(4, 8),))).groups
    assert all(len(group) == 2 for group in groups), "relu_ and what made its input"
    assert len(groups) == 12


def make_state(make: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(make().state_dict())


def test_values_and_inputs_go_straight_to_where_they_are_used() -> None:
    """A skip over stages is not relayed, and a late input does not pass through early stages."""
    captured = capture(SkipsOverStages(), (torch.randn(2, 8), torch.randn(2, 8)), {"scale": torch.ones(2, 1)})
    stage_of, stage = {}, 0
    starts = {"layers.0": 0, "layers.1": 1, "layers.3": 2, "layers.5": 3}
    for node in captured.train.module.graph.nodes:
        if node.op not in ("placeholder", "output"):
            stage = stage_of[node.name] = starts.get(str(node.target), stage)
    plan = Plan(4, stage_of, (True,) * 3 + (False,))
    wiring = split(captured, plan, find_hazards(captured)).train.wiring
    sources = wiring.stages[3].inputs
    assert any(s.stage == 0 for s in sources), "the first layer's output goes from stage 0 to stage 3"
    assert {s.index for s in sources if s.stage == CALLER} == {1, 2}, "late and scale"
    assert all(s.stage != CALLER for stage in wiring.stages[1:3] for s in stage.inputs)
    assert (0, 3) in wiring.sends
    assert len(wiring.sends[0, 3]) == 1


def test_parameters_keep_their_names_and_are_shared() -> None:
    model = Tied()
    pipe = dtrp.compile(model, n_gpus=3, example_inputs=torch.randint(11, (2, 5)))
    names = {n: p for stage in pipe.stages for n, p in stage.module.named_parameters(remove_duplicate=False)}
    original = dict(model.named_parameters(remove_duplicate=False))
    assert names.keys() <= original.keys()
    assert all(names[n] is original[n] for n in names)
    assert pipe.state_dict().keys() == model.state_dict().keys()


def test_an_in_place_operation_stays_with_what_it_writes() -> None:
    captured = capture(InPlace(), (torch.randn(3, 8),))
    groups = find_hazards(captured).groups
    assert any({"a", "relu"} <= group for group in groups), "relu writes a's output"
    assert any({"view", "relu"} <= group for group in groups), "and the view of it"


def test_a_norm_used_twice_stays_in_one_stage() -> None:
    captured = capture(SharedNorm(), (torch.randn(5, 8),))
    calls = [n.name for n in captured.train.module.graph.nodes if n.target == "norm"]
    assert len(calls) == 2
    assert any(set(calls) <= group for group in find_hazards(captured).groups)


def test_random_operations_keep_their_order() -> None:
    class TwoBranches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.first, self.second = nn.Dropout(0.5), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.a(x)) + self.second(self.b(x))

    hazards = find_hazards(capture(TwoBranches(), (torch.randn(2, 4),)))
    assert ("first", "second") in hazards.order


def legal_plan() -> tuple[Any, Any, dict[str, int]]:
    captured = capture(InPlace(), (torch.randn(3, 8),))
    nodes = [n.name for n in captured.train.module.graph.nodes if n.op not in ("placeholder", "output")]
    return captured, find_hazards(captured), dict.fromkeys(nodes, 0)


def test_plans_that_cut_the_impossible_are_refused() -> None:
    captured, hazards, stage_of = legal_plan()
    cut = {n: int(n != "a") for n in stage_of}  # between a tensor and the ReLU that writes it
    with pytest.raises(dtrp.PlanMismatchError, match="must share a stage"):
        split(captured, Plan(2, cut, (True, False)), hazards)


def test_plans_that_run_backwards_are_refused() -> None:
    captured, hazards, stage_of = legal_plan()
    with pytest.raises(dtrp.PlanMismatchError, match=r"needs node .* of a later stage"):
        split(captured, Plan(2, {**stage_of, "a": 1}, (True, False)), hazards)


def test_plans_for_other_graphs_are_refused() -> None:
    captured, hazards, stage_of = legal_plan()
    with pytest.raises(dtrp.PlanMismatchError, match="says nothing of node"):
        split(captured, Plan(1, dict.fromkeys(list(stage_of)[1:], 0), (False,)), hazards)
    with pytest.raises(dtrp.PlanMismatchError, match="that the captured graph lacks"):
        split(captured, Plan(1, {**stage_of, "nowhere": 0}, (False,)), hazards)
