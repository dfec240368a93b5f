"""Fewer stages on several devices each: what such layouts are predicted to take, and which is the best."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import networkx as nx
import pytest
import torch
from torch import nn

from dtrp.cli import main
from dtrp.partitioner.capture import capture
from dtrp.partitioner.costs import cost_graph
from dtrp.partitioner.devices import DeviceSpec
from dtrp.partitioner.replication import Layout, _best, _priced, comparison, layouts
from dtrp.partitioner.stage_cost import stage_costs
from dtrp.partitioner.training import Training

FAST = DeviceSpec("fast links", {"float32": 1e9}, 1e12, 0.0, 1e12, 1e12, link_latency=0.0)


def graph_of(widths: list[int], device: DeviceSpec, batch: int = 64) -> nx.DiGraph:
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)))
    return cost_graph(capture(model, (torch.zeros(batch, widths[0]),), {}), device=device)


def found(graph: nx.DiGraph, n_devices: int, **kwargs: Any) -> list[Layout]:
    training = Training(optimizer_bytes=0.0, predicts=False, order="lean", known=True)
    return layouts(graph, n_devices, groups=(), order=(), training=training, **kwargs)


def test_equal_layers_over_fast_links_are_trained_in_parallel() -> None:
    """Where summing gradients costs nothing, data parallelism has all the speed and no delay."""
    best, *others = found(graph_of([32] * 6, FAST), 4)
    assert (best.name, best.staleness, best.price) == ("data parallel x 4", 0, 1.0)
    assert best.optimal
    assert all(best.exact_seconds <= other.exact_seconds for other in others)
    assert {len(layout.replicas) for layout in (best, *others)} == {1, 2, 3, 4}


def test_gradients_over_slow_links_are_not_summed() -> None:
    """A batch whose gradients weigh more than its activations: a stage per device."""
    graph = graph_of([64] * 9, replace(FAST, link_bandwidth=1e7), batch=4)
    assert found(graph, 2)[0].replicas == (1, 1)
    training = Training(0.0, predicts=False, micro_batches=2, replicas=(2,))
    (cost,) = stage_costs(graph, dict.fromkeys(graph, 0), [False], training=training)
    assert cost.average == pytest.approx(8 * 64 * 64 * 4 / 1e7), "a ring of two: each byte once"
    assert cost.average > 10 * cost.forward


def test_the_layer_that_cannot_be_split_gets_the_devices() -> None:
    """One layer of three quarters of the work: four devices in a row are as fast as it is, three of them for
    it are three times as fast."""
    graph = graph_of([16, 16, 768, 16], FAST)
    in_a_row = stage_costs(
        graph, {"_0": 0, "_1": 1, "_2": 2}, [False] * 3, training=Training(0.0, predicts=False, order="lean")
    )
    two = next(layout for layout in found(graph, 4) if len(layout.replicas) == 2)
    assert two.seconds < 0.6 * max(cost.tick for cost in in_a_row)
    assert two.optimal


def test_memory_keeps_the_model_apart() -> None:
    """Data parallelism holds the whole model on each device; a limit rules it out."""
    graph = graph_of([64] * 9, FAST)
    names = {layout.name for layout in found(graph, 4, memory_limit=220_000)}
    assert "data parallel x 4" not in names
    assert "4 stages" in names


@pytest.mark.parametrize("timed_in", [1, 2, 8])
@pytest.mark.parametrize(("n_stages", "parts"), [(1, 4), (2, 4), (3, 2), (4, 2)])
def test_planned_load_is_the_evaluated_tick(n_stages: int, parts: int, timed_in: int) -> None:
    """The weights that the solver adds up and the costs of the stages that it found are the same seconds."""
    device = replace(FAST, launch_overhead=1e-6, tick_overhead=2e-6, link_bandwidth=1e8, parts=timed_in)
    graph = graph_of([32, 64, 16, 128, 8, 32], device)
    training = Training(0.0, predicts=False, order="lean", micro_batches=parts, known=True)
    result = _best(graph, n_stages, 4, [], [], training, "auto", None, 2.0)
    layout = _priced(graph, result, training)
    assert layout.seconds == pytest.approx(result.max_load, rel=1e-9)
    assert max(layout.replicas) > 1 or n_stages == 4


@pytest.mark.parametrize(
    ("replicas", "parts", "depth", "delay"),
    [
        ((), 1, 4, 3),
        ((), 4, 4, 1),
        ((2, 2, 2, 2), 2, 4, 3),
        ((1, 3), 3, 4, 1),
        ((4,), 4, 0, 0),
        ((6, 1), 6, 2, 1),
    ],
)
def test_devices_behind_make_it_deep(replicas: tuple[int, ...], parts: int, depth: int, delay: int) -> None:
    """Slots that a device of the first stage holds in "lean", and updates of delay: pipelines side by side
    have that of one of them."""
    training = Training(order="lean", micro_batches=parts, replicas=replicas)
    n_stages = len(replicas) or 4
    assert training.in_flight(0, n_stages) * parts == depth
    assert training.staleness(0, n_stages) == delay


def test_price_is_what_was_measured_and_rises() -> None:
    prices = [Training(order="lean").price(k) for k in range(1, 12)]
    assert prices == sorted(prices)
    for behind, adaptive, measured in (
        (3, False, 1.11),
        (5, False, 1.26),
        (3, True, 3.7),
    ):  # docs/results.md
        found = Training(order="lean", adaptive=adaptive).price(behind + 1)
        assert found == pytest.approx(measured, rel=0.1)
    assert Training(order="lean", micro_batches=4).price(4) == pytest.approx(1.0, abs=0.02)
    assert Training(order="1f1b", micro_batches=4).price(4) == 1.0


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "plan",
        "torch.nn:Linear",
        "--kwargs",
        '{"in_features": 8, "out_features": 8}',
        "--input",
        "4x8",
    ]
    command += ["--n-gpus", "1", "--device", "T4", "--layouts"]
    assert main(command) == 0
    assert "1 device" in capsys.readouterr().out
    assert main([*command, "--json", "-"]) == 0
    (only,) = json.loads(capsys.readouterr().out)["layouts"]
    assert (only["replicas"], only["price"]) == ([1], 1.0)


@pytest.mark.parametrize("n_devices", [0, True, 2.0])
def test_numbers_that_are_none(n_devices: Any) -> None:
    with pytest.raises(ValueError, match=r"n_devices=.*expected an int >= 1"):
        found(graph_of([8, 8], FAST), n_devices)


def test_nodes_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    from dtrp.partitioner.links import Links

    graph = cost_graph(
        capture(model, (torch.zeros(4, 8),), {}), device=FAST, bandwidth=Links(1e9, 1e8, nodes=2)
    )
    with pytest.raises(ValueError, match="one kind of link: give one bandwidth"):
        found(graph, 2)


@pytest.mark.parametrize("n_stages", [1, 2, 4])
def test_equal_numbers_are_solved_exactly(n_stages: int) -> None:
    """As good as the search over all numbers where that finds equal ones, and never better."""
    graph = graph_of([32, 64, 16, 64, 128, 8, 32], replace(FAST, link_bandwidth=1e9))
    training = Training(0.0, predicts=False, order="lean", micro_batches=4, known=True)
    alike = replace(training, replicas=(4 // n_stages,) * n_stages)
    found = [_best(graph, n_stages, 4, [], [], how, False, None, 2.0) for how in (alike, training)]
    equal, any_numbers = _priced(graph, found[0], alike), _priced(graph, found[1], training)
    assert equal.replicas == alike.replicas
    assert all(result.optimal for result in found)
    if any_numbers.replicas == equal.replicas:
        assert equal.seconds == pytest.approx(any_numbers.seconds, rel=1e-9)
    assert any_numbers.seconds <= equal.seconds * (1 + 1e-9)


def test_table() -> None:
    *lines, how = comparison(found(graph_of([32] * 5, FAST), 2)).splitlines()
    assert len(lines) == 3
    call = "dtrp.compile(model, n_gpus=1, replicas=2), micro_batches=2"
    assert how == f"To run data parallel x 2: {call}."
    assert lines[0].startswith("layout")
    assert "2 stages" in lines[1] + lines[2]
