"""What a forward may do that a graph does not hold by itself: each works, or is refused with a reason."""

import copy
import dataclasses
import math
import random
import re
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dtrp
from dtrp.errors import CaptureError
from dtrp.partitioner.capture import capture
from dtrp.partitioner.capture.custom import OtherSizes

from .test_capture import assert_faithful


class Part(nn.Module):
    """A model whose forward is given; ``inner``, if given, is a submodule with that forward."""

    def __init__(self, forward, inner=None):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.calls = 0
        self.memory = None
        self.function = forward
        if inner is not None:
            self.inner = Part(inner)

    def forward(self, x):
        return self.function(self, x)


def inner_then_b(m, x):
    return m.b(m.inner(m.a(x)))


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(3, 4)


class Triple(torch.autograd.Function):
    """Its gradient is not the true one, so that a trace through its forward would show."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * gradient * x


def without_gradient(m, x):
    with torch.no_grad():
        y = m.a(x) * 2 + m.b.weight.sum()
    return m.b(y) + y


def in_place(m, x):
    y = m.a(x)
    y[:, 1:].mul_(2)
    y[:, 0] = 1.0
    y += x
    z = y.clone()
    z[0] = y[1]
    return z, y


def moving_average(m, x):
    y = m.a(x)
    if m.training:
        m.mean = 0.9 * m.mean + 0.1 * y.detach().mean(0)
    return y - m.mean


def moved_in_place(m, x):
    m.mean += m.a(x).detach().mean(0)
    return m.b(x) - m.mean


def shapes(m, x):
    assert len(x) > 1
    batch, width = x.shape
    rows = [row.sum() for row in x.unbind(1)]
    positions = torch.arange(batch * 2).float().view(batch, 2).sum(1, keepdim=True)
    y = m.a(x).reshape(int(batch), 2, -1).flatten(1) * math.sqrt(width) + positions
    return y + torch.stack(rows) + torch.randn(x.size(0), 4)


def checkpointed(m, x):
    return checkpoint(m.b, checkpoint(m.a, x, use_reentrant=False), use_reentrant=True)


FOLLOWED = {
    "custom gradient": lambda m, x: Triple.apply(m.a(x)).reshape(len(x), 2, 2),
    "no_grad region": without_gradient,
    "views and in-place operations": in_place,
    "buffer assigned": moving_average,
    "buffer changed by +=": moved_in_place,
    "Python on shapes": shapes,
    "checkpointing": checkpointed,
    "shared and tied": lambda m, x: nn.functional.linear(m.a(m.a(x)), m.a.weight) + m.b(x),
}


@pytest.mark.parametrize("forward", FOLLOWED.values(), ids=FOLLOWED)
@pytest.mark.filterwarnings("ignore:.*requires_grad=True:UserWarning")
def test_is_followed(forward, x):
    captured = assert_faithful(Part(forward), (x,))
    assert not captured.kept_whole
    assert not captured.notes


def by_values(m, x):
    return m.a(x) if x.sum() > 0 else m.b(x)


def by_count(m, x):
    rows = (x.sum(-1) > 0).nonzero()[:, 0]
    y = torch.zeros_like(x)
    y[rows] = m.a(x[rows])
    return y


def counting(m, x):
    m.calls += 1
    return m.a(x) * m.calls


def remembering(m, x):
    if m.memory is None:
        m.memory = torch.zeros_like(x)
    m.memory = torch.tanh(m.a(x) + m.memory).detach()
    return m.memory + m.b(x)


def python_randomness(m, x):
    return m.a(x) if random.random() < 0.5 else m.b(x)


def autocast(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.a(x).float()


KEPT_WHOLE = {
    "branch on values": (by_values, "DataDependentOutput"),
    "shape from values": (by_count, "DynamicOutputShape"),
    "counter": (counting, "changes 'inner.calls' from 0 to 1"),
    "tensor between calls": (remembering, "keeps the tensor 'inner.memory'"),
    "Python's random numbers": (python_randomness, "random numbers"),
}


@pytest.mark.parametrize(("inner", "reason"), KEPT_WHOLE.values(), ids=KEPT_WHOLE)
def test_is_kept_whole_as_low_as_possible(inner, reason, x):
    captured = assert_faithful(Part(inner_then_b, inner), (x,))
    assert [k.module for k in captured.kept_whole] == ["inner"]
    assert reason in captured.kept_whole[0].reason
    targets = [n.target for n in captured.train.module.graph.nodes if n.op == "call_module"]
    assert targets == ["a", "inner", "b"]


@pytest.mark.parametrize("inner", [by_values, by_count], ids=["branch on values", "shape from values"])
def test_opening_what_cannot_be_opened_is_refused(inner, x):
    with pytest.raises(CaptureError, match=r"test_capture_constructs\.py:\d+"):
        capture(Part(inner_then_b, inner), (x,), opened=["inner"])


@pytest.mark.parametrize("way", ["record", "fixed sizes"])
def test_a_counter_of_the_root_is_refused(way, x):
    """No way may freeze it: the comparison cannot call the model often enough to see a change."""

    def rarely(m, x):
        m.calls += 1
        return m.a(x) * (1 if m.calls < 1000 else 2)

    with pytest.raises(CaptureError, match=r"(changes|sets the attribute) 'calls'"):
        capture(Part(rarely), (x,), ways=[way])


def nested_autocast(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.a(x)
        with torch.autocast("cpu", enabled=False):
            z = m.b(y.float() @ m.b.weight)
        return y @ m.mean.add(1).diag() + z


@torch.autocast("cpu", dtype=torch.bfloat16)
def decorated(m, x):
    return torch.relu(m.a(x) @ m.b.weight) + 1


@pytest.mark.parametrize("forward", [autocast, nested_autocast, decorated])
@pytest.mark.parametrize("where", ["root", "submodule"])
def test_regions_of_autocast_are_followed(forward, where, x):
    model = Part(forward) if where == "root" else Part(lambda m, x: m.b(m.inner(m.a(x)).float()), forward)
    captured = assert_faithful(model, (x,))
    assert captured.method == "record"
    assert not captured.kept_whole
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(captured.graph(False)(x), model.eval()(x)), "a region of the caller's around it"


def test_opened_modules_are_not_leaves(x):
    captured = capture(Part(inner_then_b, lambda m, x: m.a(x)), (x,), opened=["inner"])
    assert "inner" not in [str(n.target) for n in captured.train.module.graph.nodes]


@dataclasses.dataclass
class Output:
    y: torch.Tensor
    parts: dict
    count: int
    nothing: object = None


def test_dataclass_output(x):
    captured = assert_faithful(Part(lambda m, x: Output(m.a(x), {"k": [m.b(x), None]}, 3)), (x,))
    output = captured.graph(False)(x)
    assert isinstance(output, Output)
    assert output.count == 3
    assert output.parts["k"][1] is None


class Kept:
    """As transformers' MiniMax gives its cache, which knows of what class its layers are to be."""

    def __init__(self, y):
        self.y, self.layer = y, Output


def test_objects_that_hold_classes(x):
    """Given, and between two layers: they were refused."""
    model = Part(lambda m, x: Kept(m.b(m.inner(Kept(m.a(x))).y)), lambda m, kept: Kept(m.a(kept.y)))
    captured = assert_faithful(model, (x,))
    for graph in (captured.graph(False), dtrp.compile(model, devices=["cpu"] * 2, example_inputs=x)):
        found = graph(x)
        assert isinstance(found, Kept)
        assert found.layer is Output
        assert torch.equal(found.y, model.eval()(x).y)


DISTRIBUTIONS = {
    "logits": lambda h: torch.distributions.Categorical(logits=h),
    "probabilities": lambda h: torch.distributions.Categorical(probs=h.softmax(-1)),
    "in another": lambda h: torch.distributions.Independent(torch.distributions.Normal(h, h.exp()), 1),
    "beside": lambda h: (torch.distributions.Bernoulli(logits=h), h),
    "a mixture": lambda h: torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=h), torch.distributions.Normal(h, torch.ones_like(h))
    ),
}


@pytest.mark.parametrize("kind", list(DISTRIBUTIONS))
def test_distributions_as_outputs(kind, x):
    """As a policy gives them: the loss asks for what it needs, and gradients go back through it."""

    def asked(found):
        found = found[0] if isinstance(found, tuple) else found
        return found.log_prob(torch.ones(found.batch_shape + found.event_shape)).sum()

    model = Part(lambda m, x: DISTRIBUTIONS[kind](m.b(m.a(x))))
    graph = capture(model, (x,)).graph(True)
    assert type(graph(x)) is type(model(x))
    for y in (x, torch.randn_like(x)):
        expected = asked(model(y))
        found = asked(graph(y))
        assert torch.equal(found, expected)
        grads = [
            torch.autograd.grad(value, tuple(model.parameters()), allow_unused=True)
            for value in (expected, found)
        ]
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_hooks_run(x):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model[1].register_forward_hook(lambda module, inputs, output: output * 2)
    captured = assert_faithful(model, (x,))
    assert [n.target for n in captured.train.module.graph.nodes if n.op == "call_module"] == ["0", "1"]
    assert [k.module for k in captured.kept_whole] == ["1"]
    assert "hooks" in captured.kept_whole[0].reason
    opened = capture(model, (x,), opened=["1"], run=False)
    assert [n.target for n in opened.train.module.graph.nodes if n.op == "call_module"] == ["0", "1.0", "1.1"]
    assert_faithful(model, (x,), captured=opened)


def test_backward_hooks_run(x):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model[1].register_full_backward_hook(lambda module, inner, outer: (3 * inner[0],))
    assert_faithful(model, (x,))
    assert_faithful(model, (x,), captured=capture(model, (x,), opened=["1"], run=False))


@pytest.mark.parametrize("run", [True, False], ids=["compared", "not compared"])
def test_hooks_of_the_model_itself(x, run):
    model = Part(lambda m, x: m.a(x))
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    model.register_forward_hook(lambda module, inputs, output: output * 2)
    assert_faithful(model, (x,), captured=capture(model, (x,), run=run))
    model.register_full_backward_hook(lambda module, inner, outer: None)
    with pytest.raises(CaptureError, match="backward hooks on the model itself"):
        capture(model, (x,))


def test_layers_without_a_shape_are_refused(x):
    with pytest.raises(CaptureError, match=r"'0\.weight' \(lazy layers\)\. Call the model once"):
        capture(nn.Sequential(nn.LazyLinear(3)), (x,))


def test_a_mask_of_a_transformer_is_no_branch_on_values():
    """nn.Transformer asks whether a mask is the causal one; the graph must take any."""
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)
    a, b, causal = torch.randn(2, 3, 8), torch.randn(2, 5, 8), model.generate_square_subsequent_mask(5)
    captured = capture(model, (a, b), {"tgt_mask": causal})
    assert not captured.kept_whole
    for mask in (causal, torch.randn(5, 5)):
        for training in (True, False):
            expected = model.train(training)(a, b, tgt_mask=mask)
            torch.testing.assert_close(captured.graph(training)(a, b, mask), expected)


# torch.compile itself looks at .grad of its inputs; with warnings as errors the plain model fails as well.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_compiled_submodule(x):
    model = nn.Sequential(nn.Linear(4, 4), torch.compile(nn.Sequential(nn.Linear(4, 4)), backend="eager"))
    captured = capture(model, (x,))
    torch.testing.assert_close(captured.graph(False)(x), model(x))


def test_the_same_tensor_for_two_arguments(x):
    class Model(nn.Module):
        def forward(self, a, b):
            return a.reshape(len(a), 2, 2).flatten(1) - 2 * b

    captured = assert_faithful(Model(), (x, x))
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(captured.graph(True)(a, b), a - 2 * b)


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_any_batch_size(batch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(6, 6)

        def forward(self, x):
            b, t, c = x.shape
            y = self.mix(x.reshape(b * t, c)).view(b, t, 2, c // 2).permute(0, 2, 1, 3)
            return y.reshape(b * 2, t, -1).expand(b * 2, t, c // 2).sum(0)

    captured = capture(Model(), (torch.randn(2, 5, 6),))
    assert not captured.notes
    x = torch.randn(batch, 5, 6)
    torch.testing.assert_close(captured.graph(True)(x), captured.model(x))


def test_a_fixed_size_is_noted():
    """Else nobody knows, before a batch is refused, what keeps the model from taking it."""
    model = Part(lambda m, x: m.a(x) * max(range(len(x))))
    captured = capture(model, (torch.randn(3, 4),))
    assert re.search(r"size 0 of 'x' is fixed at 3: .*test_capture_constructs.py:\d+", captured.notes[0])


def test_code_that_takes_plain_sizes_alone_gets_them(x):
    """For want of more: the graph is right for the example's sizes and refuses others."""
    model = Part(lambda m, x: m.a(x) * {int: 2.0}[type(x.shape[0])])
    captured = assert_faithful(model, (x,))
    assert captured.method == "fixed sizes"
    with pytest.raises(OtherSizes, match="needs a plain Python value that depends on sizes, which is 9 now"):
        captured.graph(True)(torch.randn(9, *x.shape[1:]))


def test_constants_and_unregistered_tensors(x):
    loose = torch.randn(4)
    model = Part(lambda m, x: m.a(x) * m.scale + loose + m.more[0])
    model.scale, model.more = torch.randn(4), [torch.randn(4)]
    captured = assert_faithful(model, (x,), captured=capture(model, (x,), ways=["record"]))
    targets = {n.target for n in captured.train.module.graph.nodes if n.op == "get_attr"}
    assert targets == {"scale", "_constant_0", "_constant_1"}


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.LSTM(4, 5), (6, 3, 4)),
        (nn.BatchNorm1d(4), (3, 4)),
        (nn.MultiheadAttention(4, 2, batch_first=True), None),
        (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False),
            (5, 3, 8),
        ),
    ],
    ids=["LSTM", "BatchNorm", "MultiheadAttention", "TransformerEncoder"],
)
def test_layers_as_whole_models(model, shape):
    torch.manual_seed(0)
    args = (torch.randn(shape),) if shape else tuple(torch.randn(2, 3, 4) for _ in range(3))
    assert_faithful(model, args)
    assert_faithful(model, args, function=dtrp.compile(model, n_gpus=1, example_inputs=args))


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)  # which allows nested tensors
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 2)

    def forward(self, x, mask):
        hidden = self.encoder(x, src_key_padding_mask=mask).masked_fill(mask[..., None], 0.0)
        return self.head(hidden.sum(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_with_a_padding_mask():
    """In eval mode torch asks the mask's values for a fused path; without gradients it even takes that."""
    torch.manual_seed(0)
    model, mask = Padded(), torch.arange(6) >= torch.tensor([[6], [4], [2]])
    args = torch.randn(3, 6, 8), mask
    pipe = dtrp.compile(model, n_gpus=2, example_inputs=args)
    assert_faithful(model, args, function=pipe)
    with torch.no_grad():
        torch.testing.assert_close(pipe.eval()(*args), model(*args))
    assert torch.backends.mha.get_fastpath_enabled()


def test_unsuitable_inputs_are_an_error_with_the_line(x):
    with pytest.raises(CaptureError, match="running it on tensors of the example's shapes failed") as error:
        capture(Part(lambda m, x: m.a(x)), (torch.randn(3, 5),))
    text = str(error.value)
    assert text.count("must have same reduction dim") == 1
    assert "test_capture_constructs.py:" in text
    assert "Call model(*args, **kwargs) on the example inputs" in text


def test_numbers_given_to_an_embedding_are_told():
    with pytest.raises(CaptureError, match=r"to do: Give it int64: x.long\(\), or .* --input 2x128:int64"):
        capture(nn.Embedding(5, 4), (torch.zeros(2, 3),))


def test_deep_copies_are_independent_of_the_graph(x):
    model = Part(inner_then_b, counting)
    captured = capture(model, (x,))
    copy.deepcopy(model)(x)
    captured.graph(True)(x)
    assert model.inner.calls == 1


def test_a_check_of_values_in_the_root_becomes_a_guard(x):
    def checking(m, x):
        if (x > 100).any():
            raise ValueError("too large")
        assert x.isfinite().all()
        return m.a(x)

    captured = assert_faithful(Part(checking), (x,))
    assert len(captured.notes) == 2
    with pytest.raises(RuntimeError, match=r"does not pass the model's check at .*constructs\.py:\d+"):
        captured.graph(True)(x * 1000)
    with pytest.raises(RuntimeError, match="its condition is False"):
        captured.graph(True)(x * float("nan"))


def picked_rows(m, x):
    rows = (x.sum(-1) > 0).nonzero()[:, 0]
    return x[rows]


def test_sizes_that_come_from_values_stay_open(x):
    """The example's number of rows must not be baked into the code behind."""
    model = Part(lambda m, x: m.b(m.inner(m.a(x)).reshape(-1, 2, 2).flatten(1)), picked_rows)
    captured = assert_faithful(model, (x,))
    assert [k.module for k in captured.kept_whole] == ["inner"]
    many = torch.randn(64, 4)
    assert torch.equal(captured.graph(False)(many), model.eval()(many))


def by_length(m, x):
    rows = m.inner(m.a(x))
    return m.b(rows) if len(rows) > 0 else torch.zeros(0, 4)


def test_a_branch_on_a_size_that_comes_from_values_is_refused(x):
    """Neither course may be frozen into the graph, also where comparing with the model is too dear."""
    model = Part(by_length, picked_rows)
    with pytest.raises(CaptureError, match=r"another size, which is computed from values") as error:
        capture(model, (torch.randn(8, 4),), run=False)
    assert "test_capture_constructs.py" in str(error.value).split("tried:")[0]
    outer = nn.Sequential(nn.Linear(4, 4), model)
    captured = capture(outer, (torch.randn(8, 4),), run=False)
    assert [k.module for k in captured.kept_whole] == ["1"]


class Detector(nn.Module):
    """Picks rows by their values in methods of its own, as detection models do."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.threshold = 0.1

    def pick(self, scores):
        kept = (scores.sum(-1) > self.threshold).nonzero()[:, 0]
        return {"rows": scores[kept] if len(kept) else scores, "count": len(scores)}

    def postprocess(self, scores):
        return [self.pick(scores), self.pick(-scores)]

    def weigh(self, scores):
        found = scores[scores > 0]
        return self.b.weight.sum() * found if len(found) else scores

    def forward(self, x):
        scores = self.b(torch.relu(self.a(x)))
        return scores if self.training else self.postprocess(scores)


def test_a_method_of_the_root_is_kept_whole(x):
    captured = assert_faithful(Detector(), (x,))
    assert [k.module for k in captured.kept_whole] == ["pick"]
    assert "DynamicOutputShape" in captured.kept_whole[0].reason
    assert not [n for n, _ in captured.eval.module.named_parameters() if n[:2] not in ("a.", "b.")]
    pipe = dtrp.compile(Detector(), n_gpus=2, example_inputs=(x,))
    assert_faithful(pipe.model, (x,), function=pipe)


def test_a_method_that_uses_parameters_is_refused(x):
    """They belong to a module: in a node of its own they would not be trained."""
    model = Detector()
    model.postprocess = model.weigh
    with pytest.raises(CaptureError, match=r"where: Detector\.forward, .*test_capture_constructs\.py:\d+"):
        capture(model, (x,))


def test_python_values_made_from_tensors_are_refused(x):
    """A number that a module kept whole gives is only an example's."""
    model = Part(lambda m, x: m.b(x) * m.inner(m.a(x))[1], lambda m, x: (x, float(x.sum())))
    with pytest.raises(CaptureError, match=r"test_capture_constructs\.py:\d+"):
        capture(model, (x,), run=False)


def intervals(m, x):
    rows = x[(x.sum(-1) > 0).nonzero()[:, 0]]
    return torch.stack([rows.amin(-1), rows.amax(-1) + 1], -1)


def lengths(m, rows):
    for low, high in rows.tolist():
        assert low < high, "an interval ends before it begins"
    return (rows[:, 1] - rows[:, 0])[(rows.sum(-1) != 0).nonzero()[:, 0]]


def test_what_a_module_kept_whole_gives_is_what_the_next_one_gets(x):
    """Random numbers would not do for code that expects the corners of boxes in order."""
    captured = assert_faithful(nn.Sequential(nn.Linear(4, 4), Part(intervals), Part(lengths)), (x,))
    assert [k.module for k in captured.kept_whole] == ["1", "2"]


def fill_in(m, found):
    """Into the caller's own list and dict, as torchvision's postprocessing does."""
    found[0]["norm"] = torch.full((3,), float(found[0]["row"].norm()))
    found.append(found[0]["row"] * (1 if found[0]["row"].sum() > 0 else 2))
    return found


@pytest.mark.parametrize("way", ["its result", "the caller's objects"])
def test_objects_that_a_module_changes(way, x):
    """A list and a dict that a module kept whole fills: their contents are known by its result."""

    def use(m, x):
        found = [{"row": m.a(x)}]
        result = m.inner(found)
        if way == "the caller's objects":
            result = found
        return m.b(result[1] + result[0]["row"]) * result[0]["norm"].sum()

    captured = assert_faithful(Part(use, fill_in), (x,))
    assert [k.module for k in captured.kept_whole] == ["inner"]


def test_objects_that_a_module_changes_unseen_are_refused(x):
    """What it puts into the caller's dict must not be lost, or stay as it was in the example."""

    def hidden(m, found):
        fill_in(m, found)
        return found[0]["row"]

    def use(m, x):
        found = [{"row": m.a(x)}]
        return m.inner(found) * found[0]["norm"].sum()

    with pytest.raises(CaptureError, match=r"where: module 'inner', .*test_capture_constructs\.py") as error:
        capture(Part(use, hidden), (x,), run=False)
    assert "puts a tensor into an object that it is given, and does not return it" in str(error.value)


def test_random_numbers_from_python_in_the_root_are_refused(x):
    """They would be drawn once and stand in the graph for ever."""
    with pytest.raises(CaptureError, match="draws random numbers from Python's or numpy's generator"):
        capture(Part(lambda m, x: m.a(x) * random.random()), (x,), run=False)
    outer = Part(inner_then_b, inner_then_b)
    outer.inner.inner = Part(python_randomness)
    captured = assert_faithful(outer, (x,))
    assert [k.module for k in captured.kept_whole] == ["inner.inner"], "and no module around it"


def test_a_refusal_prints_nothing(x, capfd):
    """Users see our error alone."""
    with pytest.raises(CaptureError):
        capture(Part(by_values), (x,))
    assert capfd.readouterr() == ("", "")


def test_factories_in_other_threads_are_left_alone(x):
    """Somebody who fills batches while the model is captured gets tensors."""
    found = []

    def forward(m, x):
        other = threading.Thread(target=lambda: found.append(torch.zeros(3) + torch.arange(3)))
        other.start()
        other.join()
        return m.a(x) + torch.ones(x.shape[0], 1)

    captured = assert_faithful(Part(forward), (x,))
    assert captured.method == "record"
    assert len(found) > 1
    assert all(type(t) is torch.Tensor for t in found)


class Asserts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = self.a(x)
        torch._assert_async((x < 5).all())
        return self.b(y)


def test_an_assertion_on_the_device_is_part_of_the_graph():
    """It gives nothing, and was left out: the model (timm's Gemma 4 encoders) was refused for that."""
    model, x = Asserts(), torch.rand(3, 4)
    pipe = dtrp.compile(model, devices=["cpu"] * 2, example_inputs=x)
    assert torch.equal(pipe(x), model(x))
    with pytest.raises(RuntimeError, match="nonzero"):
        pipe(x + 10)
