"""The cost of a stage: the published table by hand, and planning and reporting that agree."""

from dataclasses import replace

import networkx as nx
import pytest
import torch
from torch import nn

from dtrp.partitioner.capture import capture
from dtrp.partitioner.costs import cost_graph
from dtrp.partitioner.devices import device_spec
from dtrp.partitioner.peak import NodeMemory
from dtrp.partitioner.planner import solve
from dtrp.partitioner.stage_cost import predictions, stage_costs
from dtrp.partitioner.stage_models import stage_models
from dtrp.partitioner.training import Training
from tests.sweeps import each_once

P, G, A, X, Y = 100, 100, 7, 5, 3  # bytes: parameters, gradients, kept, model input, output of each node
F, B, S = 2.0, 3.0, 0.25  # seconds: forward, backward, one sweep over the parameters


def chain(n):
    graph = nx.DiGraph()
    for i in range(n):
        graph.add_node(
            f"n{i}",
            flops=10,
            backward_flops=20,
            forward_ops=1,
            backward_ops=2,
            forward_time=F,
            backward_time=B,
            sweep_time=S,
            params=(f"w{i}",),
            params_bytes=P,
            gradient_bytes=G,
            buffer_bytes=1,
            activation_bytes=A + (X if i == 0 else 0),
            kept_bytes=A,
            output_bytes=Y,
            transfer_bytes=Y,
            transfer_time=0.5,
            exchange_time=1.0,
            model_inputs={"x": X} if i == 0 else {},
            first_input_bytes=X if i == 0 else 0,
            kind="call_module",
            differentiable=True,
            memory=NodeMemory((), (), (), (), inside=A, forward_peak=A, backward_peak=A + G),
        )
        if i:
            graph.add_edge(f"n{i - 1}", f"n{i}")
    graph.graph.update(
        specs=(device_spec("T4"), replace(device_spec("T4"), name="host", kind="cpu")),
        storages={},
        results=frozenset({f"n{n - 1}"}),
        params={f"w{i}": (25, P) for i in range(n)},
        trainable=frozenset(f"w{i}" for i in range(n)),
    )
    return graph


def per_node(n_stages):
    return {f"n{i}": i for i in range(n_stages)}


def test_recomputing_stages():
    first, second, last = stage_costs(chain(3), per_node(3), (True, True, True))
    update, prediction = (3 + 2 * 2) * S, (2 + 2) * S
    assert first.compute == pytest.approx(2 * F + B + update + prediction)
    assert second.compute == pytest.approx(2 * F + B + update + 2 * prediction)
    assert last.compute == pytest.approx(F + B + update + prediction)
    assert not last.recomputes, "the last stage never does"
    assert first.copies == G, "its recomputation is on the true weights; the predicted ones stay beside them"
    assert first.peak == (P + 1) + G * (1 + 2) + G + 4 * X + A + Y
    assert second.peak == (P + 1) + G * (1 + 2) + G + 2 * Y + A + Y
    assert last.peak == (P + 1) + G * (1 + 2) + G + Y + A + Y
    assert (second.time_in, second.time_out) == (0.5, 0.5)
    assert (first.input_bytes, first.output_bytes, last.output_bytes) == (X, Y, 0)


def on_host(graph):
    """The same graph, with times for the host alone."""
    graph.graph["specs"] = graph.graph["specs"][1:]
    return graph


def test_on_the_cpu_communication_adds_to_computing_there_and_back():
    """If it were hidden, plans for CPU workers would cut wide tensors for a little balance."""
    first, second, last = stage_costs(on_host(chain(3)), per_node(3), (True,) * 3)
    assert (first.time_in, first.time_out) == (0.0, 1.0)
    assert second.tick == pytest.approx(second.compute + 2.0)
    assert last.tick == pytest.approx(last.compute + 1.0)
    for cost in stage_costs(chain(3), per_node(3), (True,) * 3):
        assert cost.tick == cost.compute > cost.transfer == 0.5


def test_one_stage_on_the_cpu_makes_all_stages_count_their_communication():
    graph = chain(3)
    for node in graph.nodes.values():
        node |= {f"{key}@1": value for key, value in node.items() if key.endswith("_time")}
    for cost in stage_costs(graph, per_node(3), (True,) * 3, devices=[0, 1, 0]):
        assert cost.tick == cost.compute + cost.transfer


def test_the_planner_pays_for_what_crosses_a_cut_on_the_cpu():
    """Balance alone would cut the middle, whose value is wide; there and back it costs more than it gains."""
    options = {"groups": [], "order": [], "recompute": False, "training": Training(predicts=False)}
    cuts = {}
    for name, graph in {"gpu": chain(4), "host": on_host(chain(4))}.items():
        graph.nodes["n1"].update(transfer_time=6.0, exchange_time=12.0)
        cuts[name] = list(solve(graph, 2, **options).stage_of.values())
    assert cuts["gpu"] == [0, 0, 1, 1]
    assert cuts["host"] in ([0, 1, 1, 1], [0, 0, 0, 1])


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("parts", [1, 4])
def test_gradients_of_tied_weights_take_time(host, parts):
    """The guest sends one for each part, the owner their sum; stages between them see nothing of it."""
    training, found = Training(micro_batches=parts), []
    for tied in (False, True):
        graph = on_host(chain(3)) if host else chain(3)
        if tied:
            graph.nodes["n2"]["params"] = ("w0",)
        found.append(stage_costs(graph, per_node(3), (True,) * 3, training=training))
    spec = graph.graph["specs"][0]
    once = spec.transfer_time(P)
    assert once > 0
    before, after = ([c.time_in + c.time_out + (c.loop if host else 0.0) for c in costs] for costs in found)
    more = [b - a for a, b in zip(before, after, strict=True)]
    assert more == pytest.approx([(1 + parts) * once, 0.0, (1 + parts) * once], abs=1e-12)


@pytest.mark.parametrize(
    ("order", "parts", "owner", "guest"),
    [("fig1", 1, 3, 2), ("lean", 1, 2, 1), ("lean", 4, 1, 1), ("1f1b", 1, 1, 0), ("gpipe", 8, 1, 1)],
)
def test_gradients_of_tied_weights_on_their_way(order, parts, owner, guest):
    """Stages 0 and 2 hold one weight. In "fig1" the first one comes to a batch two ticks after the last one,
    and what it says of it is seen one tick later: three batches' sums are on their way then, and two
    gradients besides the one in its place. Sums come once per update."""
    graph = chain(3)
    costs = [c.tied for c in stage_costs(graph, per_node(3), (True,) * 3, training=Training(order=order))]
    assert costs == [0, 0, 0]
    graph.nodes["n2"]["params"] = ("w0",)
    training = Training(order=order, micro_batches=parts)
    costs = stage_costs(graph, per_node(3), (True,) * 3, training=training)
    assert [c.tied for c in costs] == [owner * P, 0, guest * P]
    graph.graph["trainable"] = frozenset({"w1"})
    costs = stage_costs(graph, per_node(3), (True,) * 3, training=training)
    assert [c.tied for c in costs] == [0, 0, 0]


def test_stages_that_keep_their_graphs():
    first, second, last = stage_costs(chain(3), per_node(3), (False,) * 3, training=Training(1.0))
    assert first.compute == pytest.approx(F + B + 5 * S + 3 * S)
    assert first.peak == (P + 1) + G * (1 + 1) + 4 * (G + X + A) + Y
    assert second.peak == (P + 1) + G * (1 + 1) + 2 * (G + Y + A) + Y
    assert last.peak == (P + 1) + G * (1 + 1) + G + Y + A + Y


def test_frozen_weights_are_not_stashed():
    """They do not change, so that batches in flight share them."""
    graph = chain(2)
    graph.graph["trainable"] = frozenset({"w1"})
    first, _ = stage_costs(graph, per_node(2), (False, False))
    assert (first.weights, first.stashed_weights) == (P + 1, 0)


def test_one_stage_is_plain_training():
    (only,) = stage_costs(chain(3), dict.fromkeys(chain(3), 0), (False,), training=Training(0.0))
    assert only.compute == pytest.approx(3 * (F + B + 3 * S))
    assert only.peak == 3 * (P + 1) + 3 * G + A + Y + X


def test_the_stages_own_horizon_predicts_first_forwards_only():
    first, second, last = stage_costs(
        chain(3), per_node(3), (True,) * 3, training=Training(0.0, horizon="stage")
    )
    assert first.compute == second.compute == pytest.approx(2 * F + B + 3 * S + 2 * S)
    assert last.compute == pytest.approx(F + B + 3 * S)
    assert first.copies == second.copies == G
    assert last.copies == 0


def test_without_prediction():
    first, _, last = stage_costs(chain(3), per_node(3), (True,) * 3, training=Training(0.0, predicts=False))
    assert first.compute == pytest.approx(2 * F + B + 3 * S)
    assert first.copies == last.copies == 0


@pytest.mark.parametrize(
    ("k", "recompute", "horizon", "passes"),
    [
        (0, True, "common", 1),  # its recomputation is the moment that all aim at
        (1, True, "common", 2),
        (2, True, "common", 2),
        (3, False, "common", 1),
        (1, False, "common", 1),
        (0, True, "stage", 1),
        (2, True, "stage", 1),
        (3, False, "stage", 0),
    ],
)
def test_predictions_per_tick(k, recompute, horizon, passes):
    assert predictions(k, 4, recompute=recompute, training=Training(horizon=horizon)) == passes


def test_one_stage_predicts_nothing():
    assert predictions(0, 1, recompute=False, training=Training()) == 0


def test_a_parameter_that_two_stages_hold_is_in_both():
    graph = chain(2)
    graph.nodes["n1"]["params"] = ("w0",)
    graph.nodes["n1"]["params_bytes"] = 0
    first, second = stage_costs(graph, per_node(2), (True, False))
    assert first.weights == second.weights == P + 1
    assert second.params == 25


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x):
        early = x
        for layer in self.layers:
            x = torch.relu(layer(x)) + early
        return x


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize(
    ("recompute", "n_stages", "limit"), each_once([True, False, "auto"], [1, 2, 3, 5], [None, 40_000.0])
)
def test_planning_and_reporting_agree(recompute, n_stages, limit, kind, device):
    """The weights that the solver sums up and the exact evaluation are two ways to the same numbers."""
    graph = cost_graph(capture(Branches(), (torch.randn(8, 16),)), device=replace(device, kind=kind))
    limit = limit if recompute == "auto" else None
    result = solve(
        graph,
        n_stages,
        groups=[],
        order=[],
        recompute=recompute,
        memory_limit=[limit] * n_stages,
        time_limit=1.0,
    )
    costs = stage_costs(graph, result.stage_of, [label == "recompute" for label in result.options])
    assert [c.tick for c in costs] == pytest.approx(result.loads)
    assert all(cost.peak > 0 for cost in costs)


def test_recompute_must_be_known():
    with pytest.raises(ValueError, match=r"recompute must be True, False, 'auto'.*got 'sometimes'"):
        stage_models(3, recompute="sometimes")
