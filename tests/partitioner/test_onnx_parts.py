"""The export's parts on their own: sizes that follow the batch, names, differences, examples."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dtrp
from dtrp.partitioner.capture import capture
from dtrp.partitioner.example import SAMPLES, keep_example
from dtrp.partitioner.hazards import find_hazards
from dtrp.partitioner.onnx.examples import example_call
from dtrp.partitioner.onnx.names import Names, identifier, shape_text
from dtrp.partitioner.onnx.study import Affine, ScalarEnd, TensorEnd, _size, study
from dtrp.partitioner.onnx.verify import Differences, difference, require
from dtrp.partitioner.split import split_graph
from dtrp.wiring import CALLER, Source, StageWires, Wiring


class TestSizes:
    @given(times=st.integers(1, 100), plus=st.integers(-3, 50), batch=st.integers(2, 9))
    def test_affine_ones_are_found(self, times, plus, batch):
        calls = [{"length": 7, "batch": s} for s in (batch, batch + 1, 4 * batch + 3)]
        calls.append({"length": 9, "batch": batch})
        assert _size([times * c["batch"] + plus for c in calls], calls) == Affine("batch", times, plus)

    @given(st.integers(0, 1000))
    def test_fixed_ones_stay_numbers(self, size):
        assert _size([size] * 3, [{"batch": b} for b in (2, 3, 11)]) == size

    def test_of_two_axes_are_neither(self):
        calls = [{"a": 2, "b": 5}, {"a": 3, "b": 5}, {"a": 2, "b": 6}, {"a": 3, "b": 7}]
        assert _size([c["a"] * c["b"] for c in calls], calls) is None

    @pytest.mark.parametrize(
        "function", [lambda b: b // 2, lambda b: b * b, lambda b: 100 - b, lambda b: -(-b // 3)]
    )
    def test_others_are_neither(self, function):
        assert _size([function(b) for b in (2, 3, 11)], [{"batch": b} for b in (2, 3, 11)]) is None

    def test_texts(self):
        made = Affine("batch"), Affine("x_1", 64), Affine("batch", 1, 2), Affine("x_1", 3, -1)
        assert [str(a) for a in made] == ["batch", "64*x_1", "batch+2", "3*x_1-1"]
        assert shape_text("x", (Affine("batch", 2), 3, None)) == ("2*batch", 3, "x_size_2")


class Halves(nn.Module):
    """A size that crosses stages as a number, and one that follows the batch in its own way."""

    def forward(self, x):
        n = x.shape[0]
        y = x[::2]
        return y.repeat(2, 1)[:n] + x + n


def studied(model, x, later=(), **options):
    """In two stages; ``later``: the nodes of the second one."""
    captured = capture(model, (x,))
    names = {n.name: int(n.name in later) for n in captured.eval.module.graph.nodes}
    assert set(later) <= set(names)
    graph = split_graph(captured.eval, names, 2, find_hazards(captured).differentiable)
    return study(graph, captured.model, captured.signature, [x], dynamic=True, **options)


class TestStudy:
    def test_numbers_and_odd_sizes(self):
        made = studied(Halves(), torch.randn(4, 3), ("repeat", "getitem_1", "add", "add_1"))
        assert made.dynamic, made.reason
        assert any(isinstance(e, TensorEnd) and e.shape == (None, 3) for e in made.stage_inputs[1])

    def test_stage_that_cannot_know_the_batch(self):
        class Lost(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Parameter(torch.randn(50, 2))

            def forward(self, x):
                n = x.shape[0] + 1
                return self.table[:n] * 2

        made = studied(Lost(), torch.randn(4, 3), ("table", "getitem", "mul"))
        # Either the number itself crosses, and stage 1 gets no tensor that tells it ...
        assert not made.dynamic
        assert "stage 1 needs a size that no tensor which it gets tells" in made.reason
        # ... so it is a constant for the example's batch.
        assert [e.value for e in made.stage_inputs[1] if isinstance(e, ScalarEnd)] == [5]

    def test_no_batch_dimension(self):
        class Number(nn.Module):
            def forward(self, x):
                return x + 1

        made = studied(Number(), torch.tensor(1.0))
        assert not made.dynamic
        assert made.reason == "no input has a batch dimension"


class TestNames:
    @pytest.mark.parametrize(
        ("text", "name"),
        [
            ("x", "x"),
            ("batch['a b']", "batch_a_b"),
            ("0", "value_0"),
            ("", "value_"),
            ("ä", "value_"),
            ("l[0]", "l_0"),
        ],
    )
    def test_are_identifiers(self, text, name):
        assert identifier(text) == name

    def test_are_distinct(self):
        wires = StageWires((), ("x", "x_1", "x[1]"), (True, True, True))
        names = Names(["x"], Wiring((wires,), (), torch.utils._pytree.tree_structure(0)))
        assert [names[Source(CALLER, 0)], *(names[Source(0, i)] for i in range(3))] == [
            "x",
            "x_2",
            "x_1",
            "x_1_2",
        ]


class TestDifference:
    @pytest.mark.parametrize(
        ("ours", "theirs", "expected"),
        [
            ([1.0, 2.0], [1.0, 2.0], 0),
            ([1.0, 2.2], [1.0, 2.0], 0.1),
            ([0.0, 1e-9], [0.0, 0.0], 1e-9 / np.finfo(np.float32).tiny),
            ([np.nan, 1.0], [np.nan, 1.0], 0),
            ([np.nan, 1.0], [2.0, 1.0], np.inf),
            ([np.inf, 1.0], [-np.inf, 1.0], np.inf),
            ([np.inf], [np.inf], 0),
            ([1.0], [1.0, 2.0], np.inf),
            ([True, False], [True, True], 1),
            ([], [], 0),
        ],
    )
    def test_is_relative_to_the_largest(self, ours, theirs, expected):
        assert difference(np.array(ours), torch.tensor(theirs)) == pytest.approx(expected, rel=1e-6)

    def test_that_adds_up_names_the_stage_where_it_is_too_much(self):
        found = Differences({}, 2, (5e-5, 5e-5), (5e-5, 2e-4), 2e-4, ("a", "b"))
        with pytest.raises(dtrp.ExportError, match=r"add up to 0.0002 at stage 1, .*\(it runs m, n, o ...\)"):
            require(found, 1e-4, [["k"], ["m", "n", "o", "p"]])

    def test_of_the_graph_itself_blames_no_stage(self):
        with pytest.raises(
            dtrp.ExportError, match="the stages agree with the captured graph, and the graph differs"
        ):
            require(Differences({}, 2, (0.0,), (0.0,), 0.5, ("a",)), 1e-4, [[]])
        require(Differences({}, 2, (0.0,), (0.0,), 0.0, ("a",)), 1e-4, [[]])


class TestExamples:
    def test_few_samples_are_kept_as_copies(self):
        x, table = torch.arange(40.0).view(20, 2), torch.ones(3)
        kept = keep_example([x, x.to("meta"), table, x.to_sparse()])
        assert [None if t is None else tuple(t.shape) for t in kept] == [(SAMPLES, 2), None, (3,), None]
        x.zero_()
        assert kept[0][1, 1] == 3

    def test_are_repeated_or_drawn(self):
        made = studied(nn.Linear(2, 2), torch.randn(4, 2))
        real = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        assert example_call(made, [real], {"batch": 3})[0].tolist() == [[1, 2], [3, 4], [1, 2]]
        drawn = example_call(made, [None], {"batch": 3})[0]
        assert drawn.shape == (3, 2)
        assert torch.equal(drawn, example_call(made, [None], {"batch": 3})[0])
