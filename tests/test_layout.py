"""``replicas="auto"``: dtrp says how many devices each stage has, and why; what is trained stays the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrp
from dtrp import layout
from dtrp.errors import PlanMismatchError
from dtrp.partitioner.replication import Layout

from .runtime.toys import SGD, batches, mlp


def model() -> nn.Module:
    torch.manual_seed(0)
    return mlp(dropout=0.0, norm=False).double()


def data(n: int = 1) -> list[tuple[Tensor, Tensor]]:
    return [(x.double(), y) for x, y in batches(n, size=8)]


def compiled(n_gpus: int | None = 3, of: nn.Module | None = None, **options: Any) -> dtrp.Pipeline:
    options = {"replicas": "auto", "costs": "analytic", "example_inputs": data()[0][0], **options}
    return dtrp.compile(of or model(), n_gpus, **options)


def trained(pipe: dtrp.Pipeline, executor: str) -> dict[str, Tensor]:
    with pipe.trainer(F.cross_entropy, SGD, executor=executor, seed=0, micro_batches=4) as t:
        for x, y in data(5):
            t.step(x, y)
    return pipe.model.state_dict()


@pytest.fixture
def one_and_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine, one device and then two are best."""
    search = layout.layouts

    def layouts(*args: Any, **kwargs: Any) -> list[Layout]:
        found = search(*args, **kwargs)
        return (
            [replace(found[0], replicas=(1, 2), micro_batches=2), *found]
            if kwargs["most_parts"] > 1
            else found
        )

    monkeypatch.setattr(layout, "layouts", layouts)


def test_the_best_layout_is_taken_and_told() -> None:
    plain = compiled(4, replicas=1)
    found = plain.report.layouts()
    pipe = compiled(4)
    best = found[0].replicas
    assert pipe.n_stages == len(best)
    assert pipe.plan.replicas == (best if max(best) > 1 else ())
    (told,) = (note for note in pipe.report.notes if "shared out" in note)
    assert found[0].name in told
    assert sum(best) == 4 or "left out" in told


@pytest.mark.usefixtures("one_and_two")
def test_it_trains_what_the_same_numbers_do_that_are_given() -> None:
    pipe, same = compiled(), compiled(2, replicas=(1, 2))
    assert pipe.plan.stage_of == same.plan.stage_of
    assert pipe.plan.replicas == (1, 2)
    found, given = trained(pipe, "workers"), trained(same, "inline")
    torch.testing.assert_close(found, given, rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("one_and_two")
def test_a_plan_keeps_the_numbers_of_devices(tmp_path: Path) -> None:
    """Without them a plan for three devices would run on two: and a launcher would be given two ranks."""
    pipe = compiled()
    pipe.plan.save(tmp_path / "plan.json")
    again = compiled(None, replicas=None, plan=tmp_path / "plan.json")
    assert again.plan == pipe.plan
    assert [s.device for s in again.report.stages] == ["cpu", "cpu x 2"]
    with pytest.raises(PlanMismatchError, match="the plan is for 2 stages, not for 3"):
        compiled(3, replicas=None, plan=pipe.plan)
    with pytest.raises(ValueError, match="2 devices for stages of 1 \\+ 2"):
        compiled(None, replicas=None, plan=pipe.plan, devices=["cpu"] * 2)
    assert compiled(None, replicas=1, plan=pipe.plan).plan.replicas == ()  # who says one each means it
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace('"replicas": [\n  1,', '"replicas": [\n  0,'))
    with pytest.raises(PlanMismatchError, match=r"replicas=.*expected one >= 1 for each"):
        dtrp.Plan.load(tmp_path / "plan.json")


class Spread(nn.Module):
    """Its samples are not independent."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = model()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return y - y.mean(0)


@pytest.mark.usefixtures("one_and_two")
def test_a_model_whose_batches_are_not_cut_gets_no_stages_of_several() -> None:
    """A trainer would have to refuse them at its first batch."""
    pipe = compiled(of=Spread())
    assert pipe.plan.replicas == ()
    (told,) = (note for note in pipe.report.notes if "shared out" in note)
    assert "does not treat samples one by one" in told
    trained(pipe, "inline")


def test_more_devices_than_a_model_can_be_cut_for() -> None:
    """One stage, or two, may have them; who asks for a stage on each is told."""
    small = nn.Sequential(nn.Linear(8, 6), nn.ReLU()).double()
    pipe = compiled(8, of=small)
    assert pipe.n_stages <= 2
    with pytest.raises(ValueError, match="at most 2 stages"):
        compiled(8, of=small, replicas=1)


def test_what_was_asked_for_holds_in_the_layout() -> None:
    pipe = compiled(4, recompute=True, memory_limit="1GB")
    assert all(pipe.plan.recomputes[:-1])
    assert {stage.memory_limit for stage in pipe.report.stages} == {1e9}


@pytest.mark.usefixtures("one_and_two")
def test_a_model_without_values_is_planned_too() -> None:
    pipe = compiled(of=model().to("meta"), example_inputs=data()[0][0].to("meta"))
    assert pipe.plan.replicas == (1, 2)


@pytest.mark.usefixtures("one_and_two")
def test_a_changed_model_keeps_its_layout() -> None:
    pipe = compiled()
    pipe.model[-1] = nn.Linear(pipe.model[-1].in_features, 3).double()
    pipe(data()[0][0])
    assert pipe.plan.replicas == (1, 2)
    assert pipe.n_stages == 2


def test_other_numbers_of_stages_are_of_one_device_each(tmp_path: Path) -> None:
    """They were asked how many devices the third of two stages has; the page, and so notebooks, failed."""
    report, plain = compiled(2, replicas=(1, 2)).report, compiled(2, replicas=1).report
    own, other = report.compare([2, 3], orders=True)
    assert own.tick_time == report.tick_time
    assert {price.micro_batches for price in own.orders} == {4, 8}  # a part for each device
    assert len(other.orders) == len(plain.compare([3], orders=True)[0].orders)
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "cpu x 2" in page
    assert "average" in page
    report.plot(tmp_path / "report.png")


def test_one_device_alone_is_what_speed_ups_are_relative_to() -> None:
    """As long as that took as long as the first stage's devices together, two looked like one."""
    alone, together = compiled(2, replicas=1), compiled(1, replicas=2)
    assert together.report.single_time == pytest.approx(alone.report.single_time)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"replicas": "all"}, "or 'auto'"),
        ({"example_inputs": None}, "without example_inputs"),
        ({"memory_limit": ["1GB"] * 3}, "one for all devices"),
        ({"speed": [1, 1, 1]}, "replicas with speed"),
        ({"bandwidth": {"node": "1GB", "net": "1GB", "nodes": 3}}, "or with several nodes"),
        ({"devices": ["cpu", "cpu", "meta"]}, "devices of several kinds"),
    ],
)
def test_what_it_cannot_be_found_for_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        compiled(**options)


def test_numbers_that_a_plan_has_are_not_sought() -> None:
    with pytest.raises(ValueError, match="leave replicas out"):
        compiled(plan=compiled(replicas=1).plan)


def test_ranks_are_to_plan_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would time its own machine, and two might find two layouts."""
    monkeypatch.setattr("dtrp.runtime.launched.world_size", lambda: 3)
    with pytest.raises(ValueError, match="plan once without it"):
        compiled()
