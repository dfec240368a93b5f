"""The eval graph over the train graph's stages: parameters stay where they are trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dtrp
from dtrp.partitioner.capture import capture
from dtrp.partitioner.hazards import find_hazards
from dtrp.partitioner.plan import Plan
from dtrp.partitioner.split import Split, split


class TwoModes(nn.Module):
    """Two layers and another forward in each mode."""

    def __init__(self, train: Any, evaluate: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self._forwards = {True: train, False: evaluate}

    def forward(self, x: Tensor) -> Tensor:
        return self._forwards[self.training](self, x)


def cut_behind_a(model: TwoModes) -> Split:
    """In training, all up to the layer ``a`` is stage 0 and the rest stage 1."""
    captured = capture(model, (torch.randn(3, 4),))
    assert not captured.one_graph
    names = [n.name for n in captured.train.module.graph.nodes if n.op not in ("placeholder", "output")]
    stages = {name: int(i > names.index("a")) for i, name in enumerate(names)}
    return split(captured, Plan(2, stages, (True, False)), find_hazards(captured))


def train(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x) * 3)) * 2


def with_more_before(m: Any, x: Tensor) -> Tensor:
    # By their order among multiplications, these are others than training's: the second is taken for the
    # one behind b, and would pull a (which needs it) out of its stage.
    return m.b(torch.tanh(m.a((x * 5) * 7) * 3)) * 2


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y.view(-1)[::2].mul_(2)
    z = y + 1  # of the written values
    return m.b(z)


def by_parts(m: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(torch.tanh(m.a(x)), m.b.weight) + m.b.bias


@pytest.mark.parametrize("evaluate", [with_more_before, in_place, by_parts])
def test_parameters_stay_in_their_stage(evaluate: Any) -> None:
    model = TwoModes(train, evaluate)
    stages = cut_behind_a(model)
    first, second = ({n for n, _ in m.named_parameters()} for m in stages.eval.modules)
    assert first == {"a.weight", "a.bias"}
    assert second == {"b.weight", "b.bias"}, "these are trained in the other process"
    x = torch.randn(5, 4)
    assert torch.equal(stages.eval(x), model.eval()(x))


def test_what_is_written_in_place_in_eval_is_not_cut() -> None:
    """Between stages a value is a copy: a write to it in a later stage would be lost."""
    stages = cut_behind_a(TwoModes(train, in_place))
    x = torch.randn(2, 4)
    made = stages.eval.modules[0](x)
    sources = stages.eval.wiring.stages[1].inputs
    copies = [made[s.index].clone() for s in sources]
    assert torch.equal(stages.eval.modules[1](*copies)[0], stages.eval(x))


def test_parameters_used_in_the_opposite_order_share_a_stage() -> None:
    """The eval graph could not run from stage to stage, which training alone does not show."""
    model = TwoModes(train, lambda m, x: m.a(m.b(x)))
    with pytest.raises(dtrp.PlanMismatchError, match=r"evaluation uses them in another order"):
        cut_behind_a(model)
    x = torch.randn(5, 4)
    assert any({"a", "b"} <= group for group in find_hazards(capture(model, (x,))).groups)


def test_what_only_evaluation_needs_first_is_not_behind() -> None:
    """In training ``b`` stands alone; in eval ``a`` takes its result, so that ``b`` must not come later."""
    model = TwoModes(lambda m, x: (m.a(x), m.b(x)), lambda m, x: (m.a(m.b(x)), x))
    hazards = find_hazards(capture(model, (torch.randn(5, 4),)))
    assert ("b", "a") in hazards.order or any({"a", "b"} <= group for group in hazards.groups)
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=torch.randn(5, 4))
    x = torch.randn(7, 4)
    for training in (True, False):
        model.train(training)
        assert all(torch.equal(a, b) for a, b in zip(pipe(x), model(x), strict=True))
