"""The partition report: fixed names, numbers that add up, text, the page in a real browser, the figure."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from dtrp.partitioner.capture import capture
from dtrp.partitioner.costs import cost_graph
from dtrp.partitioner.hazards import find_hazards
from dtrp.partitioner.planner import make_plan
from dtrp.partitioner.report import PartitionReport
from dtrp.partitioner.report_html import page, stop_paying
from dtrp.partitioner.report_parts import Scaling
from dtrp.partitioner.units import count, duration, size


class Skips(nn.Module):
    """A first value that the last layer uses, and modules whose names HTML must not take for its own."""

    def __init__(self, depth=6):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.blocks = nn.ModuleDict({f"<b>{i}&": nn.Linear(16, 16) for i in range(depth)})
        self.last = nn.Linear(32, 4)

    def forward(self, x):
        early = x = self.first(x)
        for block in self.blocks.values():
            x = torch.relu(block(x))
        return self.last(torch.cat([x, early], dim=1))


def reported(n_stages, device, model=None, **kwargs):
    captured = capture(model or Skips(), (torch.randn(8, 16),))
    graph = cost_graph(captured, device=device)
    plan = make_plan(captured, graph, find_hazards(captured), n_stages, time_limit=1.0, **kwargs)
    limit = kwargs.get("memory_limit")
    return PartitionReport.of(captured, graph, plan, devices=["cpu"] * n_stages, memory_limit=limit)


@pytest.fixture(scope="module")
def report():
    from dtrp.partitioner.devices import DeviceSpec

    return reported(3, DeviceSpec("round", {"float32": 1e9}, 1e9, 0.0, 1e15, 1e9, 0.0), recompute=True)


PUBLIC = [
    "flops",
    "params",
    "params_bytes",
    "activation_bytes",
    "input_bytes",
    "output_bytes",
    "forward_time",
    "backward_time",
    "tick_time",
    "peak_bytes",
    "recompute",
    "submodules",
    "device",
]


def test_public_names(report):
    for stage in report.stages:
        assert all(hasattr(stage, name) for name in PUBLIC)
    for name in ("tick_time", "balance", "lower_bound", "gap", "speedup", "cut_bytes"):
        assert isinstance(getattr(report, name), (int, float))


def test_numbers_add_up(report):
    ticks = [stage.tick_time for stage in report.stages]
    assert report.tick_time == max(ticks) == ticks[report.bottleneck]
    assert report.balance == pytest.approx(sum(ticks) / 3 / max(ticks))
    assert report.gap == pytest.approx(report.tick_time / report.lower_bound - 1)
    assert report.speedup == pytest.approx(report.single_time / report.tick_time)
    assert report.lower_bound <= report.tick_time
    assert sum(stage.params for stage in report.stages) == sum(p.numel() for p in Skips().parameters())
    assert report.stages[0].input_bytes == 8 * 16 * 4
    for stage in report.stages:
        assert stage.peak_bytes == pytest.approx(sum(stage.memory.values()), abs=10)
        computing = sum(t for part, t in stage.time.items() if part != "transfer")
        assert stage.tick_time == max(computing, stage.time["transfer"])
    assert [stage.recompute for stage in report.stages] == [True, True, False]


def test_cuts_say_what_crosses_to_where(report):
    early = next(cut for cut in report.cuts if cut.module == "first")
    assert (early.source, early.targets[-1]) == (0, 2)
    assert early.bytes == 8 * 16 * 4
    assert early.shapes == ("8x16 float32",)
    assert report.cut_bytes == sum(cut.bytes * len(cut.targets) for cut in report.cuts)


def test_stages_name_modules_as_high_up_as_is_true(device):
    report = reported(1, device, nn.Sequential(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 4)))
    assert report.stages[0].holds == ("0", "1")
    assert report.stages[0].submodules == ("0.0", "0.1", "1")
    halves = reported(2, device, nn.Sequential(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))))
    assert [stage.holds for stage in halves.stages] == [("0.0",), ("0.1",)]


def test_one_stage(device):
    report = reported(1, device)
    assert report.speedup == pytest.approx(1)
    assert report.balance == 1
    assert report.cuts == ()
    assert "1 stage," in str(report)
    page(report)


@pytest.mark.parametrize("columns", [80, 100])
def test_text_in_a_narrow_terminal(device, monkeypatch, columns):
    report = reported(2, device)
    report = replace(report, stages=tuple(replace(s, device="CPU (AMD EPYC)") for s in report.stages))
    wide = str(report)
    monkeypatch.setenv("COLUMNS", str(columns))
    narrow = str(report)
    assert max(len(line) for line in wide.splitlines()) > columns >= max(map(len, narrow.splitlines()))
    assert "…" not in narrow
    row = next(line for line in narrow.splitlines() if line.startswith("stage"))
    assert " ".join(row.split()) == "stage device params GFLOP in out tick peak recompute"
    assert [line.split(",")[0] for line in narrow.splitlines() if " holds " in line] == [
        "stage 0 holds first",
        f"stage 1 holds {report.stages[1].holds[0]}",
    ]
    assert all(duration(stage.tick_time) in narrow for stage in report.stages)


def test_text(report):
    text = str(report)
    assert all(len(line) <= 120 for line in text.splitlines())
    for part in (
        "Skips: 3 stages",
        "balance",
        "lower bound",
        "gap",
        "is the slowest",
        "first",
        "Captured by",
    ):
        assert part in text
    assert "<b>0&" in text, "names are shown as they are"
    assert "\x1b" not in text


def test_on_the_cpu_transfers_are_part_of_the_bars(device):
    """Otherwise the bars would not add up to the tick."""
    host = reported(3, replace(device, kind="cpu"))
    for stage in host.stages:
        assert stage.tick_time == pytest.approx(sum(stage.time.values()))
        assert stage.time["transfer"] > 0
    assert "Sending and receiving take CPU time from computing" in host._repr_html_()
    assert "computes while it communicates" in reported(3, device)._repr_html_()
    assert "transfer" in [label.get_text() for label in host.plot().legends[0].get_texts()]


def test_the_bottleneck_is_told_once():
    from dtrp.partitioner.solvers.explain import slowest

    assert slowest(2, 0.008, 0.006, 0.002, 0.0)[1] == "stage 2 is the slowest (8 ms, 75 % of it computing)"
    assert slowest(0, 3.0, 3.0, 1.0, 1.0) == ("computing", "stage 0 is the slowest (3 s, all computing)")


def test_json(report, tmp_path):
    text = report.to_json(tmp_path / "report.json")
    data = json.loads(text)
    assert (
        json.loads((tmp_path / "report.json").read_text()) == data == json.loads(json.dumps(report.to_dict()))
    )
    assert data["n_stages"] == len(data["stages"]) == 3
    assert data["tick_time"] == report.tick_time
    assert set(PUBLIC) <= data["stages"][0].keys()


def test_a_stage_over_its_limit_is_noted(device):
    captured = capture(Skips(), (torch.randn(8, 16),))
    graph = cost_graph(captured, device=device)
    plan = make_plan(captured, graph, find_hazards(captured), 2, time_limit=1.0)
    report = PartitionReport.of(captured, graph, plan, memory_limit=["1kB", "1GB"])
    assert any("Stage 0 needs" in note for note in report.notes)
    assert not any("Stage 1 needs" in note for note in report.notes)


def test_an_edited_plan_is_reported_as_such(device):
    captured = capture(Skips(), (torch.randn(8, 16),))
    graph = cost_graph(captured, device=device)
    plan = make_plan(captured, graph, find_hazards(captured), 2, time_limit=1.0)
    best = PartitionReport.of(captured, graph, plan)
    edited = PartitionReport.of(captured, graph, plan.pin("last", 1).pin("first", 0).pin("blocks", 1))
    assert edited.tick_time >= best.tick_time
    assert edited.lower_bound == best.lower_bound
    assert any("edited by hand" in note for note in edited.notes)


def test_a_plan_made_under_other_costs_has_a_bound_of_these(device):
    from dtrp.partitioner.devices import DeviceSpec

    captured = capture(Skips(), (torch.randn(8, 16),))
    slow = DeviceSpec.from_dict(device.to_dict() | {"flops": {"float32": 1e3}})
    plan = make_plan(captured, cost_graph(captured, device=slow), find_hazards(captured), 2, time_limit=1.0)
    report = PartitionReport.of(captured, cost_graph(captured, device=device), plan)
    assert 0 < report.lower_bound <= report.tick_time < plan.lower_bound


def test_compare(report):
    with pytest.raises(TypeError, match=r"compare\(2\): expected numbers of stages, such as"):
        report.compare(2)
    points = report.compare([1, 2, 3, 100])
    assert [p.n_stages for p in points] == [1, 2, 3]
    assert points[0].speedup == pytest.approx(1)
    assert points[2].tick_time == report.tick_time
    assert points[1].tick_time <= points[0].tick_time


def test_one_stage_has_no_loop(device):
    """It is plain training on one device, whatever the loop of several stages costs."""
    slow = reported(3, replace(device, tick_overhead=1.0))
    assert slow.stages[0].time["loop"] >= 1
    (alone,) = slow.compare([1])
    assert (alone.tick_time, alone.speedup) == (slow.single_time, 1.0)


def test_compare_prices_orders_too(report):
    """The plan's own order costs what the report says; exact ones wait, and hold nothing stale."""
    (here,) = report.compare([3], orders=True)
    prices = {(o.order, o.micro_batches): o for o in here.orders}
    assert prices["fig1", 1].seconds == pytest.approx(report.tick_time)
    assert prices["fig1", 1].staleness == 3
    assert prices["lean", 1].peak_bytes <= prices["fig1", 1].peak_bytes
    assert prices["1f1b", 8].staleness == 0
    assert prices["1f1b", 8].seconds > prices["lean", 1].seconds
    assert prices["gpipe", 8].peak_bytes >= prices["1f1b", 8].peak_bytes
    assert not report.compare([3])[0].orders


def test_compare_recomputes_where_the_plan_does(device):
    """Otherwise the curve has a kink at the plan's own number of stages."""
    recomputing, keeping = (reported(3, device, recompute=r).compare([2])[0] for r in (True, False))
    assert recomputing.tick_time > keeping.tick_time


def test_where_more_stages_stop_paying():
    points = [Scaling(1, 10.0, 1, 1), Scaling(2, 6.0, 1, 1), Scaling(4, 5.9, 1, 1), Scaling(8, 5.9, 1, 1)]
    assert stop_paying(points).startswith("More than 2 stages stop paying: 4 would shorten the tick by 1.7 %")
    assert stop_paying(points[:2]) == "Each step up to 2 stages still pays."


def test_stages_that_share_cores_have_no_line_of_their_sum(report):
    """The bound is of a batch then: beside one stage's bar it would say something else."""
    shared = replace(report, tick_time=2 * report.tick_time, lower_bound=2 * report.lower_bound, speedup=0.5)
    assert "The line is the lower bound" in page(report)
    assert "one device would be faster" not in page(report)
    assert f"a batch takes {duration(shared.tick_time)}, at least {duration(shared.lower_bound)}" in page(
        shared
    )
    assert "The line is the lower bound" not in page(shared)
    assert "one device would be faster" in page(shared)
    assert "one device would be faster" in " ".join(str(shared).split())
    assert len(report.plot().axes[0].lines) == 1
    assert not shared.plot().axes[0].lines


class _Checker(HTMLParser):
    """Every tag is closed; nothing is fetched; text is kept."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not {"src", "href", "onclick", "onload"} & {name for name, _ in attrs}
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_well_formed_and_stands_alone(report, tmp_path):
    path = report.to_html(tmp_path / "plan.html")
    html = path.read_text(encoding="utf-8")
    checker = _Checker()
    checker.feed(html)
    assert checker.open == []
    assert "script" not in checker.tags
    assert "http" not in html.replace("http-equiv", "")
    assert "b" in checker.tags
    assert "<b>0&" in "".join(checker.text), "names are escaped, and shown as they are"
    assert "<b>0&" not in html
    assert checker.tags.count("details") == 3
    for heading in ("Pipeline", "Time per tick", "Memory", "More or fewer stages", "Schedule"):
        assert heading in checker.text


def test_notebooks_show_a_fragment(report):
    html = report._repr_html_()
    assert html.startswith("<style>")
    assert "<html" not in html


def test_many_stages_have_a_page(device):
    report = reported(20, device, Skips(depth=24))
    assert "drawn for up to 16 stages" in report._repr_html_()


def test_in_a_browser(report, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no browser")
    path = report.to_html(tmp_path / "plan.html")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,2400"]
    shot = tmp_path / "plan.png"
    subprocess.run(
        [*command, f"--screenshot={shot}", path.as_uri()], check=True, capture_output=True, timeout=60
    )
    assert shot.read_bytes().startswith(b"\x89PNG")
    assert shot.stat().st_size > 20_000
    dom = subprocess.run(
        [*command, "--dump-dom", path.as_uri()], check=True, capture_output=True, timeout=60, text=True
    ).stdout
    assert dom.count("<svg") >= 5
    assert dom.count("stage 2") >= 4


def test_figure(report, tmp_path):
    pytest.importorskip("matplotlib")
    figure = report.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert [axis.get_xlabel() for axis in figure.axes] == ["ms per tick", "kB at the fullest moment"]


def test_figure_without_matplotlib_says_what_to_install(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'dtrp\[plot\]'"):
        report.plot()


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (size(0), "0 B"),
        (size(1536), "1.54 kB"),
        (size(2.5e12), "2.5 TB"),
        (count(999), "999"),
        (count(25_600_000), "25.6 M"),
        (duration(0.0123), "12.3 ms"),
        (duration(2.0), "2 s"),
        (duration(4e-5), "40 us"),
    ],
)
def test_numbers_for_people(shown, expected):
    assert shown == expected
