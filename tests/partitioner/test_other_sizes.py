"""``report.at(sizes)``: the same stages for other sizes cost what a pipeline compiled for these would."""

import pytest
import torch
from torch import nn

import dtrp


class Encoder(nn.Module):
    """Its length, batch and number of classes are open; one length decides."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, batch, scale):
        ids, mask = batch["ids"], batch["mask"]
        n, t = ids.shape
        if t > 32:
            raise ValueError("too long")
        x = self.embed(ids) + torch.arange(t).view(1, t, 1) * 0.1
        weights = self.q(x) @ self.k(x).transpose(1, 2)
        weights = weights.masked_fill(~mask.view(n, 1, t), -1e4).softmax(-1)
        return self.head(weights @ self.v(x)) * scale


def call(n, t):
    return {"ids": torch.zeros(n, t, dtype=torch.long), "mask": torch.ones(n, t).bool()}, torch.ones(1)


@pytest.fixture(scope="module")
def report():
    return dtrp.compile(Encoder(), devices=["cpu"] * 2, example_inputs=call(2, 5)).report


@pytest.mark.parametrize(("n", "t"), [(2, 5), (2, 20), (7, 3)])
def test_it_is_what_a_pipeline_for_these_sizes_costs(report, n, t):
    found = report.at(call(n, t))
    named = report.at({"batch['ids']": (n, t), "batch['mask']": (n, t)})
    assert found.to_dict() == named.to_dict()
    fresh = dtrp.compile(Encoder(), devices=["cpu"] * 2, example_inputs=call(n, t)).report
    for total in ("flops", "backward_flops", "params_bytes", "activation_bytes"):
        sums = [sum(getattr(stage, total) for stage in r.stages) for r in (found, fresh)]
        assert sums[0] == sums[1], total
    assert found.single_time == pytest.approx(fresh.single_time)
    assert [s.submodules for s in found.stages] == [s.submodules for s in report.stages]


def test_the_report_itself_stays(report):
    before = report.to_dict()
    assert report.at(call(4, 9)).tick_time > 0
    assert report.to_dict() == before


def test_sizes_that_take_another_course_are_refused_with_the_line(report):
    with pytest.raises(ValueError, match=r"batch\['ids'\].*\(2, 33\).*test_other_sizes.py:\d+.*was False"):
        report.at(call(2, 33))


def test_sizes_that_do_not_fit_each_other(report):
    with pytest.raises(ValueError, match=r"fails with these sizes"):
        report.at({"batch['ids']": (2, 6)})


def test_unknown_names_and_structures(report):
    text = r"""no tensor input 'ids'; its inputs are "batch\['ids'\]" \(2, 5\), .*'scale' \(1,\)"""
    with pytest.raises(ValueError, match=text):
        report.at({"ids": (2, 6)})
    with pytest.raises(TypeError, match=r"do not fit|another structure"):
        report.at(torch.zeros(2, 5))


def test_recorded_models_are_priced_for_other_batches():
    class Recorded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                scale = x.abs().mean()
            return self.b(torch.relu(self.a(x)) * scale)

    report = dtrp.compile(Recorded(), devices=["cpu"] * 2, example_inputs=torch.ones(3, 4)).report
    assert report.method == "record"
    assert sum(s.flops for s in report.at({"x": (6, 4)}).stages) == 2 * sum(s.flops for s in report.stages)


def test_measured_times_are_scaled(monkeypatch):
    monkeypatch.setattr("dtrp.partitioner.measured.BUDGET", 0.05)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    pipe = dtrp.compile(model, devices=["cpu"] * 2, example_inputs=torch.ones(8, 64), costs="measured")
    assert pipe.report.at(torch.ones(8, 64)).tick_time == pytest.approx(pipe.report.tick_time)
    assert pipe.report.at(torch.ones(4096, 64)).tick_time > pipe.report.tick_time
