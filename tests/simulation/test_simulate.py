"""`dtrp.simulate` of plans, reports and files: it says what the planner says, and tells mistakes."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dtrp
from dtrp.cli import main
from dtrp.partitioner.profile import Message, Profile, StageProfile


class Skips(nn.Module):
    """A value of the first layer goes to the last one, too, and its weight where it is tied."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
        if tied:
            self.layers[7].weight = self.layers[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = torch.relu(layer(x))
        return x + first


@pytest.fixture(scope="module")
def pipe() -> dtrp.Pipeline:
    torch.manual_seed(0)
    return dtrp.compile(Skips(), 4, example_inputs=torch.randn(512, 64))


@pytest.fixture(scope="module", params=[True, False])
def either(request: pytest.FixtureRequest) -> dtrp.Pipeline:
    return dtrp.compile(
        Skips(tied=request.param), 3, example_inputs=torch.randn(512, 64), recompute=request.param
    )


def test_the_paper_s_order_costs_what_the_planner_says(either: dtrp.Pipeline) -> None:
    """Two ways to one number: ticks and peaks of the report are "fig1" with whole batches."""
    found = dtrp.simulate(either.plan)
    report = either.report
    assert found.batch_time == pytest.approx(report.tick_time, rel=1e-6)
    assert found.speedup == pytest.approx(report.speedup, rel=1e-6)
    assert [s.work_time for s in found.stages] == pytest.approx(
        [s.tick_time for s in report.stages], rel=1e-6
    )
    assert [s.peak_bytes for s in found.stages] == [s.peak_bytes for s in report.stages]
    assert {(0, 2), (2, 0)} <= {(link.source, link.target) for link in found.links}  # the skip's line


def test_a_plan_from_a_file_knows_its_costs(pipe: dtrp.Pipeline, tmp_path: Path) -> None:
    pipe.plan.save(tmp_path / "plan.json")
    loaded = dtrp.Plan.load(tmp_path / "plan.json")
    assert dtrp.simulate(loaded, schedule="lean") == dtrp.simulate(pipe, schedule="lean")
    cluster = dtrp.Cluster(replicas=2, per_node=3, net=dtrp.Link("1GB", 1e-4), speed={5: 0.5}, memory="1GB")
    (tmp_path / "cluster.json").write_text(json.dumps(cluster.to_dict()))
    assert dtrp.Cluster.load(tmp_path / "cluster.json") == pickle.loads(pickle.dumps(cluster)) == cluster
    found = dtrp.simulate(loaded, tmp_path / "cluster.json")
    assert found == dtrp.simulate(pipe.report, cluster) == dtrp.simulate(loaded, cluster.to_dict())
    assert found.batch_time > 1.5 * dtrp.simulate(loaded).batch_time  # the slow device's


def test_edited_and_old_plans_are_refused(pipe: dtrp.Pipeline, tmp_path: Path) -> None:
    """What they would cost is not known without the model."""
    edited = pipe.plan.move(pipe.plan.nodes(1)[0], 0)
    with pytest.raises(ValueError, match="was edited by hand and does not say what its stages cost"):
        dtrp.simulate(edited)
    data = pipe.plan.to_dict()
    del data["profile"]
    (tmp_path / "old.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="saved by an earlier version"):
        dtrp.simulate(dtrp.Plan.load(tmp_path / "old.json"))
    again = dtrp.compile(pipe.model, example_inputs=torch.randn(512, 64), plan=edited)
    assert dtrp.simulate(again).n_stages == 4


def test_other_numbers_of_stages(pipe: dtrp.Pipeline, tmp_path: Path) -> None:
    """Each is planned anew: as fast as `compare` says of it."""
    chain = dtrp.compile(pipe.model.layers, 4, example_inputs=torch.randn(512, 64))
    found = dtrp.simulate(chain, {"speed": {"3": 0.9}}).over([1, 2, 3, 400])
    assert [s.n_stages for s in found] == [1, 2, 3]
    points = chain.report.compare([1, 2, 3])
    assert [s.batch_time for s in found] == pytest.approx([p.tick_time for p in points], rel=1e-6)
    pytest.importorskip("matplotlib")
    drawn = dtrp.simulate(pipe).plot(tmp_path / "k.svg", ks=[1, 2])
    assert (tmp_path / "k.svg").stat().st_size > 1000
    lines = {line.get_label(): list(line.get_xdata()) for line in drawn.axes[0].lines}
    assert lines == {order: [1, 2, 4] for order in ("fig1", "lean", "1f1b", "gpipe", "bp")}
    with pytest.raises(ValueError, match="schedule='1F1B': expected one of"):  # no empty answer
        dtrp.simulate(pipe).over([1, 2], schedule="1F1B")
    with pytest.raises(ValueError, match="knows its own cut only"):
        dtrp.simulate(pipe.plan).over([2])


def test_what_it_prints_and_gives_as_data(pipe: dtrp.Pipeline, tmp_path: Path) -> None:
    found = dtrp.simulate(
        pipe.plan, {"memory": 1000}, schedule="1f1b", micro_batches=4, timeline=tmp_path / "t.json"
    )
    text = " ".join(str(found).split())
    assert "4 stages, 1f1b in 4 parts" in text
    assert "more micro-batches shorten that" in text
    assert "stages 0, 1, 2, 3" in text.split("more memory than the 1 kB there are")[1]
    data = json.loads(json.dumps(found.to_dict()))
    assert data["stages"][0]["idle"] == found.stages[0].idle
    assert data["limit"] == found.limit
    rows = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {r["pid"] for r in rows} == {0, 1, 2, 3}
    assert max(r["ts"] + r["dur"] for r in rows if r["ph"] == "X") >= found.fill_time * 1e6
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.batch_time = 0.0  # type: ignore[misc]
    wide = str(dtrp.simulate(Profile((StageProfile(1.0, 2.0, 0.0),) * 40, (Message(0, 1, 1, 1),))))
    assert "..." in wide
    assert len(wide.splitlines()) < 40


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"plan": 3}, "plan must be a dtrp.Plan, a Pipeline, its report or a Profile; got int"),
        ({"cluster": 3}, "cluster must be a Cluster, a mapping or the path"),
        ({"cluster": {"replica": 2}}, "no 'replica', only .*; did you mean 'replicas'"),
        ({"cluster": {"node": {"latency": 1}}}, "'node' needs a bandwidth, such as '25GB'"),
        ({"cluster": {"net": {"bandwidth": 1, "latncy": 1}}}, "'net' has no 'latncy', only .*'latency'"),
        ({"cluster": {"net": {"bandwidth": "fast"}}}, "not a number of bytes: 'fast'"),
        ({"cluster": {"speed": {"7": 1.0}}}, "speed names device 7, but 1 .* on devices 0 to 3"),
        ({"cluster": {"speed": {"a": 1.0}}}, "name devices by number"),
        ({"cluster": {"speed": {"1": 0}}}, r"speed\[1\]=0: expected a finite number > 0"),
        ({"cluster": {"jitter": -1}}, "jitter=-1: expected a finite number >= 0"),
        ({"cluster": {"replicas": 1.5}}, "replicas=1.5: expected an int >= 1"),
        ({"cluster": {"per_node": 0}}, "per_node=0: expected an int >= 1"),
        ({"schedule": "auto"}, "schedule='auto': expected one of 'fig1', 'lean', '1f1b', 'gpipe', 'bp'"),
        ({"micro_batches": 0}, "micro_batches=0: expected an int >= 1"),
        ({"batches": 0}, "batches=0: expected an int >= 1"),
        ({"horizon": "own"}, "horizon='own': expected one of 'common', 'stage'"),
        ({"predicts": "x"}, "predicts='x': expected True or False"),
        ({"optimizer_bytes": -1}, "optimizer_bytes=-1: expected a finite number >= 0"),
        ({"recompute": [True]}, "recompute has 1 entries for 4 stages"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(pipe: dtrp.Pipeline, wrong: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        dtrp.simulate(**{"plan": pipe.plan, **wrong})


@pytest.mark.parametrize("content", ["{", "[]", '{"net": 3}'])
def test_files_that_describe_no_cluster_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ValueError, match=r"c\.json describes no cluster: "):
        dtrp.Cluster.load(tmp_path / "c.json")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster, out = tmp_path / "cluster.json", tmp_path / "report.json"
    cluster.write_text('{"per_node": 1, "net": {"bandwidth": "1GB", "latency": 1e-5}}')
    command = ["plan", f"{__name__}:Skips", "--input", "512x64", "--n-gpus", "2", "--cluster", str(cluster)]
    pytest.importorskip("matplotlib")
    drawn = ["--figure", str(tmp_path / "k.png"), "--compare-k", "1,2"]
    assert main([*command, "--schedule", "lean", "--json", str(out), *drawn]) == 0
    shown = capsys.readouterr().out
    assert "2 stages, lean: one mini-batch per" in shown
    assert json.loads(out.read_text())["simulation"]["schedule"] == "lean"
    assert (tmp_path / "k.png").stat().st_size > 1000
    two = tmp_path / "nodes.json"
    two.write_text('{"per_node": 1, "node": {"bandwidth": "10GB"}, "net": {"bandwidth": "1MB"}}')
    assert main([*command[:-1], str(two), "--json", str(out)]) == 0  # is planned for, as if said in words
    planned = json.loads(out.read_text())
    words = ["--bandwidth", "node=10GB,net=1MB,per_node=1", "--json", str(out)]
    assert main([*command[:-2], *words]) == 0
    assert json.loads(out.read_text())["tick_time"] == planned["tick_time"] > 1e-1
    assert main([*command[:-1], str(tmp_path / "none.json")]) == 2
    assert "none.json cannot be read: No such file" in capsys.readouterr().err
    assert main([*command[:-2], "--schedule", "lean"]) == 2
    assert "--schedule simulates: say on what, --cluster FILE" in capsys.readouterr().err


def test_stages_of_several_devices_are_refused() -> None:
    """Their batches are shared out, which would be left out of the numbers."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    pipe = dtrp.compile(model, n_gpus=2, replicas=(1, 2), example_inputs=torch.randn(64, 64))
    with pytest.raises(ValueError, match=r"stages of several devices, \(1, 2\), which are not simulated"):
        dtrp.simulate(pipe)
