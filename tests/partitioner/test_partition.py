"""The facade: what it gives on graphs small enough to follow, and what it says about wrong input."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import networkx as nx
import pytest

from dtrp.errors import InfeasiblePlanError
from dtrp.partitioner import Partition, StageModel, StageOption, partition


def chain(*times: float, **attributes: Any) -> nx.DiGraph:
    graph = nx.path_graph(len(times), create_using=nx.DiGraph)
    for node, seconds in enumerate(times):
        graph.nodes[node].update(time=seconds, memory=1.0, **attributes)
    return graph


def test_a_chain_is_cut_where_loads_are_even() -> None:
    result = partition(chain(1, 2, 3, 4, 5, 6), 3)
    assert result.max_load == 9
    assert result.optimal
    assert result.gap == 0
    assert result.lower_bound == 9
    assert [result.stage_of[u] for u in range(6)] == sorted(result.stage_of.values())
    assert set(result.stage_of.values()) == {0, 1, 2}
    assert result.loads[result.bottleneck] == 9
    assert result.seconds < 10


def test_one_stage_takes_everything() -> None:
    result = partition(chain(1, 2, transfer=100.0), 1)
    assert result.max_load == 3
    assert result.time_in == (0,)
    assert result.time_out == (0,)


def test_a_single_node() -> None:
    assert partition(chain(2), 1).stage_of == {0: 0}


def test_the_result_is_immutable() -> None:
    result = partition(chain(1, 1), 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.max_load = 0.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        result.stage_of[0] = 1  # type: ignore[index]


def test_a_value_is_charged_once_per_side() -> None:
    graph = nx.DiGraph()
    graph.add_node("a", time=1.0, transfer=0.25)
    for user in "bcd":
        graph.add_edge("a", user)
        graph.nodes[user]["time"] = 1.0
    result = partition(graph, 2, overlap=False, fixed={"a": 0, "b": 1, "c": 1, "d": 1})
    assert result.time_out == (0.25, 0)
    assert result.time_in == (0, 0.25)
    assert result.loads == (1.25, 3.25)


def test_the_largest_of_a_producers_edges_is_its_transfer() -> None:
    graph = nx.DiGraph([("a", "b", {"transfer": 1.0}), ("a", "c", {"transfer": 2.0})])
    nx.set_node_attributes(graph, 1.0, "time")
    result = partition(graph, 2, fixed={"a": 0, "b": 1, "c": 1})
    assert result.time_out == (2.0, 0)


def test_overlapping_communication_hides_behind_compute() -> None:
    graph = chain(3, 3, transfer=2.0)
    assert partition(graph, 2).max_load == 3
    assert partition(graph, 2, overlap=False).max_load == 5


def test_an_expensive_edge_is_not_cut() -> None:
    graph = chain(1, 1, 1, 1)
    graph.nodes[1]["transfer"] = 9.0
    result = partition(graph, 2, overlap=False)
    assert result.stage_of[1] == result.stage_of[2]
    assert result.max_load == 3


def test_a_skip_over_stages_goes_straight_there() -> None:
    graph = chain(1, 1, 1)
    graph.add_edge(0, 2)
    graph.nodes[0]["transfer"] = 0.5
    result = partition(graph, 3)
    assert result.time_out == (0.5, 0, 0)
    assert result.time_in == (0, 0.5, 0.5)


def test_values_without_precedence_may_flow_backwards() -> None:
    graph = chain(1, 1)
    graph.add_node("gradient", time=1.0, transfer=0.5)
    graph.add_edge("gradient", 0, precedence=False)
    result = partition(graph, 2, fixed={"gradient": 1})
    assert result.time_in[0] == 0.5


def test_colocated_nodes_share_a_stage() -> None:
    result = partition(chain(1, 1, 1, 1), 2, colocate=[[0, 2]])
    assert result.stage_of[0] == result.stage_of[1] == result.stage_of[2] == 0
    assert result.max_load == 3


def test_extra_order_and_pins_hold() -> None:
    graph = nx.DiGraph()
    for node in "abcd":
        graph.add_node(node, time=1.0)
    result = partition(graph, 2, order=[("b", "a"), ("a", "c")], fixed={"a": 0, "d": 0})
    assert result.stage_of == {"a": 0, "b": 0, "d": 0, "c": 1}


def test_stages_may_stay_empty_if_allowed() -> None:
    graph = chain(1, 1, 1, transfer=10.0)
    result = partition(graph, 3, overlap=False, allow_empty=True)
    assert result.max_load == 3
    assert len(set(result.stage_of.values())) == 1


def test_every_stage_holds_something_otherwise() -> None:
    result = partition(chain(5, 0, 0, 0), 4)
    assert sorted(result.stage_of.values()) == [0, 1, 2, 3]


def test_the_option_that_fits_is_chosen() -> None:
    keep = StageOption("keep", {"time": 1.0}, {"memory": 2.0})
    recompute = StageOption("recompute", {"time": 1.5}, {"memory": 1.0})
    model = StageModel((keep, recompute), memory_limit=4.0)
    graph = chain(1, 1, 1, 1, 1, 1)
    result = partition(graph, 2, stage_models=[model, model])
    # 2 + 4: the smaller stage keeps, the larger one must recompute; 3 + 3: both would.
    assert result.max_load == 4.5
    assert set(result.options) == {"recompute"}
    assert partition(graph, 3, stage_models=[model] * 3).options == ("keep",) * 3
    assert all(m <= 4 for m in result.memory)


def test_faster_stages_take_more() -> None:
    slow = StageModel((StageOption("slow", {"time": 1.0}, {}),))
    fast = StageModel((StageOption("fast", {"time": 0.25}, {}),))
    result = partition(chain(*[1.0] * 10), 2, stage_models=[slow, fast])
    assert sum(s == 1 for s in result.stage_of.values()) == 8
    assert result.max_load == 2
    assert result.optimal


def test_memory_of_inputs_counts_each_producer_once() -> None:
    option = StageOption("stash", {"time": 1.0}, {"memory": 1.0}, input_memory=3.0)
    graph = nx.DiGraph([("a", "b"), ("a", "c")])
    for node in graph:
        graph.nodes[node].update(time=1.0, memory=1.0, bytes=2.0)
    result = partition(graph, 2, stage_models=[StageModel((option,))] * 2, fixed={"a": 0, "b": 1, "c": 1})
    assert result.memory == (1.0, 8.0)


@pytest.mark.parametrize("engine", ["auto", "interval", "search", "downsets"])
def test_every_engine_solves_a_chain(engine: str) -> None:
    result = partition(chain(1, 2, 3, 4, 5, 6), 3, engine=engine, time_limit=1)
    assert result.max_load == 9


def test_a_heavy_node_is_named_as_the_reason() -> None:
    graph = nx.relabel_nodes(chain(1, 50, 1, 1), {1: "head"})
    result = partition(graph, 3)
    assert result.optimal
    assert "node 'head' cannot be split" in result.reason
    together = partition(chain(1, 25, 25, 1), 3, colocate=[[1, 2]])
    assert "the group of 2 nodes that stay together (1, 2) cannot be split" in together.reason


def test_same_seed_same_plan() -> None:
    graph = nx.gnp_random_graph(16, 0.2, seed=1, directed=True)
    graph = nx.DiGraph((u, v) for u, v in graph.edges if u < v)
    for node in graph:
        graph.nodes[node].update(time=(node * 7) % 5 + 0.5, transfer=0.2)
    results = [partition(graph, 4, overlap=False, seed=3) for _ in range(2)]
    assert results[0].stage_of == results[1].stage_of


def test_an_expired_clock_still_gives_a_plan_with_a_bound() -> None:
    result = partition(chain(*range(1, 60)), 5, time_limit=0)
    assert math.isfinite(result.max_load)
    assert 0 < result.lower_bound <= result.max_load


def test_thousands_of_nodes_and_dozens_of_stages() -> None:
    graph = nx.DiGraph()
    for i in range(5000):
        graph.add_node(i, time=1 + (i * 7919) % 13, memory=1.0, transfer=0.5)
        if i:
            graph.add_edge(i - 1, i)
        if i > 4 and i % 5 == 0:
            graph.add_edge(i - 4, i)
    result = partition(graph, 64, time_limit=3)
    assert result.seconds < 20
    assert result.gap < 0.05
    assert set(result.stage_of.values()) == set(range(64))


class TestInfeasible:
    def test_the_smallest_limit_is_named_and_can_be_met(self) -> None:
        graph = chain(1, 1, 1, 1)
        graph.nodes[2]["memory"] = 5.0
        with pytest.raises(
            InfeasiblePlanError, match=r"can be met is 5 bytes: stage \d would .* node 2"
        ) as e:
            partition(graph, 3, memory_limit=4)
        assert e.value.smallest_limit == 5
        assert partition(graph, 3, memory_limit=5).max_load == 2

    def test_limits_that_differ_are_scaled(self) -> None:
        with pytest.raises(InfeasiblePlanError, match=r"would have to be 2 times as large"):
            partition(chain(1, 1, 1, 1), 2, memory_limit=[1.0, 1.0 + 1e-9])

    def test_the_whole_is_more_than_all_limits(self) -> None:
        with pytest.raises(InfeasiblePlanError, match="the smallest limit that can be met is 2 bytes"):
            partition(chain(1, 1, 1, 1), 2, memory_limit=1.5)

    def test_pins_against_precedence(self) -> None:
        with pytest.raises(InfeasiblePlanError, match="node 1 is pinned to stage 0 and node 0 to stage 1"):
            partition(chain(1, 1), 2, fixed={0: 1, 1: 0})

    def test_pins_that_leave_a_stage_empty(self) -> None:
        with pytest.raises(InfeasiblePlanError, match="keeps every pinned node on its stage"):
            partition(chain(1, 1, 1), 3, fixed={1: 0})


class TestWrongArguments:
    def test_not_a_digraph(self) -> None:
        with pytest.raises(TypeError, match=r"must be a networkx\.DiGraph, got Graph"):
            partition(nx.Graph(), 2)

    def test_empty_graph(self) -> None:
        with pytest.raises(ValueError, match="no nodes"):
            partition(nx.DiGraph(), 1)

    @pytest.mark.parametrize("n_stages", [0, -1])
    def test_too_few_stages(self, n_stages: int) -> None:
        with pytest.raises(ValueError, match=f"at least 1, got {n_stages}"):
            partition(chain(1), n_stages)

    @pytest.mark.parametrize("n_stages", [1.5, True, "2"])
    def test_stages_that_are_no_number(self, n_stages: Any) -> None:
        with pytest.raises(TypeError, match="n_stages must be a whole number"):
            partition(chain(1, 1), n_stages)

    def test_more_stages_than_nodes(self) -> None:
        with pytest.raises(ValueError, match="3 non-empty stages of 2 nodes; use at most 2"):
            partition(chain(1, 1), 3)

    def test_more_stages_than_groups(self) -> None:
        with pytest.raises(ValueError, match="of 3 nodes, which form 2 groups that stay together"):
            partition(chain(1, 1, 1), 3, colocate=[[0, 1]])

    def test_a_cycle(self) -> None:
        graph = chain(1, 1)
        graph.add_edge(1, 0)
        with pytest.raises(ValueError, match="has a cycle: "):
            partition(graph, 2)
        with pytest.raises(ValueError, match="has a cycle: "):
            partition(chain(1, 1), 2, order=[(1, 0)])

    @pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "1"])
    def test_numbers_that_are_no_costs(self, value: Any) -> None:
        graph = chain(1, 1)
        graph.nodes[1]["time"] = value
        with pytest.raises(ValueError, match="node 1: time must be a finite number >= 0, got"):
            partition(graph, 2)
        graph = chain(1, 1)
        graph.edges[0, 1]["transfer"] = value
        with pytest.raises(ValueError, match="edge 0 -> 1: transfer must be"):
            partition(graph, 2)

    def test_an_attribute_that_no_node_has(self) -> None:
        with pytest.raises(ValueError, match="no node of the graph has the attribute 'flops'"):
            partition(chain(1, 1), 2, time="flops")

    @pytest.mark.parametrize("kwargs", [{"colocate": [["x", 0]]}, {"order": [(0, "x")]}, {"fixed": {"x": 0}}])
    def test_unknown_nodes(self, kwargs: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"{next(iter(kwargs))} names 'x', which is not a node"):
            partition(chain(1, 1), 2, **kwargs)

    def test_a_pin_to_no_stage(self) -> None:
        with pytest.raises(ValueError, match="pins node 0 to stage 2; stages are numbered 0 to 1"):
            partition(chain(1, 1), 2, fixed={0: 2})

    def test_stage_models_of_the_wrong_number(self) -> None:
        model = StageModel((StageOption("a", {"time": 1.0}, {}),))
        with pytest.raises(ValueError, match="one entry per stage: 2, got 1"):
            partition(chain(1, 1), 2, stage_models=[model])
        with pytest.raises(ValueError, match=r"stage_models\[1\] has no options"):
            partition(chain(1, 1), 2, stage_models=[model, StageModel(())])
        wrong = StageModel((StageOption("a", {"time": -1.0}, {}),))
        with pytest.raises(ValueError, match=r"option 'a': time\['time'\] must be a finite number >= 0"):
            partition(chain(1, 1), 2, stage_models=[model, wrong])

    @pytest.mark.parametrize("limit", [0, -1.0, math.nan])
    def test_memory_limits_that_are_none(self, limit: float) -> None:
        with pytest.raises(ValueError, match="memory limit of stage 0 must be a number of bytes > 0"):
            partition(chain(1, 1), 2, memory_limit=limit)

    def test_memory_limits_of_the_wrong_number(self) -> None:
        with pytest.raises(ValueError, match="memory_limit must have one entry per stage: 2, got 1"):
            partition(chain(1, 1), 2, memory_limit=[1.0])

    def test_engine_and_time_limit(self) -> None:
        with pytest.raises(ValueError, match="engine must be one of 'auto', 'interval'"):
            partition(chain(1, 1), 2, engine="magic")
        with pytest.raises(ValueError, match="time_limit must be"):
            partition(chain(1, 1), 2, time_limit=-1)


def test_results_are_partitions() -> None:
    assert isinstance(partition(chain(1, 1), 2), Partition)
