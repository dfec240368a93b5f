"""Habits of users that a graph does not hold by itself: each works as in the plain model, or is refused."""

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dtrp
from dtrp.errors import CaptureError
from dtrp.partitioner.capture import capture
from dtrp.runtime.transfer import dumps, loads
from tests.sweeps import sweep

from .test_capture import assert_faithful


class Model(nn.Module):
    """``forward`` is given; ``inner`` is a submodule with a forward of its own."""

    def __init__(self, function, inner=None):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(1))
        self.function = function
        if inner is not None:
            self.inner = inner if isinstance(inner, nn.Module) else Model(inner)

    def forward(self, *args):
        return self.function(self, *args)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(3, 4)


def counted(m):
    """Something that only the recorder follows."""
    with torch.no_grad():
        m.count.add_(1)


SPELLINGS = {
    "x ** 2": lambda h: h**2,
    "x ** 0.5": lambda h: h.abs() ** 0.5,
    "2 ** x": lambda h: 2**h,
    "x ** y": lambda h: h.abs() ** h,
    "x.__pow__(2)": lambda h: h.__pow__(2),
    "operators": lambda h: (1 - h) / (2 + abs(h)) % 3 - (-h) + (+h),
    "reflected": lambda h: h + 2 // (h.detach() + 10) + 5 % (h.detach() + 10) + h.detach() // 0.5 + 1 / h,
    "comparisons": lambda h: h * (h > 0) + h * ~(h > 1) + h * ((h < 2) & (h != 0)),
    "shifts": lambda h: h * (3 >> (h > 0).long()) + (1 << (h > 0).long()),
    "matmul": lambda h: h @ h.T @ h,
    "bound to torch": lambda h: torch.Tensor.pow(h, 3) + torch.Tensor.__rsub__(h, 2),
}


@pytest.mark.parametrize("spelt", SPELLINGS.values(), ids=SPELLINGS)
def test_operators_however_they_are_spelt(spelt, x):
    def forward(m, x):
        counted(m)
        return m.b(spelt(m.a(x)))

    captured = assert_faithful(Model(forward), (x,))
    assert captured.method == "record"
    compile(captured.train.module.code, "graph", "exec")


def test_operators_in_place(x):
    def forward(m, x):
        counted(m)
        h = m.a(x).abs() + 1
        h **= 2
        h += 1
        h /= 2
        h -= x
        h *= x
        return m.b(h)

    assert assert_faithful(Model(forward), (x,)).method == "record"


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 4, mode="sum", sparse=True)

    def forward(self, ids):
        return self.bag(ids.flatten(), torch.arange(0, ids.numel(), ids.shape[1]))


SPARSE = {
    "Embedding": lambda: nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Flatten(), nn.Linear(20, 2)),
    "EmbeddingBag": lambda: nn.Sequential(nn.EmbeddingBag(20, 4, sparse=True), nn.Linear(4, 2)),
    "with offsets": lambda: nn.Sequential(Bags(), nn.ReLU(), nn.Linear(4, 2)),
}


@pytest.mark.parametrize("make", SPARSE.values(), ids=SPARSE)
def test_sparse_gradients(make):
    torch.manual_seed(0)
    model, ids = make(), torch.randint(0, 20, (6, 5))
    captured = capture(model, (ids,))
    name, weight = next(iter(model.named_parameters()))
    found = []
    for function in (model, captured.graph(True)):
        model.zero_grad(set_to_none=True)
        output = function(ids)
        output.pow(2).sum().backward()
        found.append((output, weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert found[1][1].is_sparse, name
    assert torch.equal(found[0][1].to_dense(), found[1][1].to_dense())
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=ids)
    assert torch.equal(pipe(ids), found[0][0])


def jvp(m, x):
    return torch.func.jvp(m.a, (x,), (torch.ones_like(x),))


def inside_a_mode(m, x):
    torch.set_grad_enabled(False)
    torch.set_autocast_enabled("cpu", True)
    torch.set_default_dtype(torch.float64)
    torch.overrides.BaseTorchFunctionMode().__enter__()
    if x.sum() > 0:
        return m.a(x)
    return m.b(x)


def dual_level(m, x):
    torch.autograd.forward_ad.enter_dual_level()
    return m.a(x) if x.sum() > 0 else m.b(x)


# What torch compiles for forward-mode differentiation warns when it is first used.
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("forward", [jvp, inside_a_mode, dual_level])
def test_a_refusal_leaves_nothing_behind_in_torch(forward, x):
    with pytest.raises(CaptureError):
        capture(Model(forward), (x,))
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.get_default_dtype() == torch.float32
    assert not torch.overrides._get_current_function_mode_stack()
    value, tangent = jvp(Model(jvp), x)
    assert value.shape == tangent.shape
    assert_faithful(Model(lambda m, x: m.b(m.a(x))), (x,))


def rsample(m, x):
    mean, scale = m.a(x).chunk(2, -1)
    return torch.distributions.Normal(mean, scale.exp()).rsample()


def likelihood(m, x):
    scores = torch.distributions.Categorical(logits=m.a(x))
    return scores.log_prob(scores.sample()) + scores.entropy()


def divergence(m, x):
    one = torch.distributions.Normal(m.a(x), nn.functional.softplus(m.b(x)))
    many = torch.distributions.Independent(one, 1)
    return (
        torch.distributions.kl_divergence(one, torch.distributions.Normal(0.0, 1.0))
        + many.log_prob(x)[:, None]
    )


def policy(m, x):
    chosen = torch.distributions.Bernoulli(probs=m.a(x).sigmoid())
    action = chosen.sample()
    return action, chosen.log_prob(action).sum(-1)


def others(m, x):
    beta = torch.distributions.Beta(m.a(x).exp(), m.b(x).exp()).rsample()
    return beta + torch.distributions.Uniform(m.a(x) - 9, 9.0).rsample()


@pytest.mark.parametrize("inside", sweep([False, True]), ids=["root", "submodule"])
@pytest.mark.parametrize("forward", [rsample, likelihood, divergence, policy, others])
def test_distributions_check_their_arguments(forward, inside, x):
    model = Model(lambda m, x: m.inner(x), forward) if inside else Model(forward)
    assert not assert_faithful(model, (x,)).kept_whole


def refuse_if_not_all(m, x):
    if not x.isfinite().all():
        raise ValueError("not finite")
    return m.a(x)


def refuse_any_or_any(m, x):
    if x.isnan().any() or x.isinf().any():
        raise ValueError("not finite")
    return m.a(x)


def refuse_unless_both(m, x):
    if not (x.isfinite().all() and (x < 1e9).all()):
        raise ValueError("too large")
    return m.a(x)


def refuse_several(m, x):
    if any(row.isnan().any() for row in x):
        raise ValueError("not a number")
    return m.a(x)


def refuse_both(m, x):
    if (x.isnan()).any() and (x < 1e9).any():
        raise ValueError("nan beside small ones")
    return m.a(x)


def assert_all(m, x):
    assert x.isfinite().all(), "not finite"
    assert -1e9 < x.min() < 1e9
    return m.a(x)


# fmt: off
def in_one_line(m, x):
    assert x.shape[-1] == 4; assert not x.isnan().any(), "nan"; assert x.isfinite().all(); return m.a(x)  # noqa: E702
# fmt: on


@pytest.mark.parametrize(
    "forward",
    [
        refuse_if_not_all,
        refuse_any_or_any,
        refuse_unless_both,
        refuse_several,
        refuse_both,
        assert_all,
        in_one_line,
    ],
)
def test_checks_however_they_are_spelt(forward, x):
    outer = Model(lambda m, x: m.b(m.inner(x)), forward)
    captured = assert_faithful(outer, (x,))
    assert not captured.kept_whole
    with pytest.raises(RuntimeError, match="does not pass the model's check"):
        captured.graph(True)(torch.where(x > 0, x, float("nan")))


def net(m, h):
    return m.b(torch.tanh(m.a(h)))


def forces(m, x):
    x = x.requires_grad_(True)
    energy = net(m, x).sum(-1)
    return energy, -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


def forces_with_keywords(m, x):
    x.requires_grad = True
    energy = net(m, x)
    (gradient,) = torch.autograd.grad(
        outputs=energy, inputs=[x], grad_outputs=torch.ones_like(energy), create_graph=True, retain_graph=True
    )
    return gradient.pow(2).sum(-1)


def penalty_inside(m, x):
    """Of values in the middle of the model."""
    h = m.a(x)
    score = m.b(torch.relu(h)).pow(2).sum()
    return m.b(h) + torch.autograd.grad(score, h, create_graph=True)[0].norm(dim=-1, keepdim=True)


def laplacian(m, x):
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(net(m, x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    return m.b(first + second)


def inner_step(m, x):
    """For parameters, as meta-learning does."""
    gradients = torch.autograd.grad(net(m, x).pow(2).mean(), list(m.a.parameters()), create_graph=True)
    weight, bias = (p - 0.1 * g for p, g in zip(m.a.parameters(), gradients, strict=True))
    return m.b(nn.functional.linear(x, weight, bias))


def inner_step_by_hand(m, x):
    """For a parameter that a function is given, not its layer."""
    weight = m.a.weight
    slope = torch.autograd.grad(nn.functional.linear(x, weight).tanh().mean(), weight, create_graph=True)[0]
    return m.b(nn.functional.linear(x, weight - 0.1 * slope, m.a.bias))


def under_enable_grad(m, x):
    with torch.enable_grad():
        h = m.a(x).detach().requires_grad_()
        return m.b(h) * torch.autograd.grad(m.b(torch.tanh(h)).sum(), h, create_graph=True)[0]


GRADIENTS = [
    forces,
    forces_with_keywords,
    penalty_inside,
    laplacian,
    inner_step,
    inner_step_by_hand,
    under_enable_grad,
]


@pytest.mark.parametrize("inside", sweep([False, True]), ids=["root", "submodule"])
@pytest.mark.parametrize("forward", GRADIENTS)
def test_gradients_inside_forward(forward, inside, x):
    model = Model(lambda m, x: m.inner(x), forward) if inside else Model(forward)
    captured = capture(model, (x.clone(),))
    assert not captured.kept_whole
    assert_faithful(model, (x,), captured=captured)
    for costs in ("analytic", "measured"):
        pipe = dtrp.compile(
            model, n_gpus=2, devices=["cpu"] * 2, example_inputs=(x.detach().clone(),), costs=costs
        )
        assert_faithful(model, (x,), function=pipe)


@pytest.mark.parametrize("forward", GRADIENTS)
def test_gradients_inside_forward_are_trained(forward, x):
    """First passes and evaluation go without gradients; what differentiates has its own all the same."""

    def loss(output, y):
        return sum(o.pow(2).mean() for o in (output if isinstance(output, tuple) else (output,)))

    outer = nn.Sequential(nn.Identity(), Model(forward), nn.Identity())
    plain = copy.deepcopy(outer)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss(plain(x.clone()), None).backward()
        optimizer.step()
    pipe = dtrp.compile(outer, n_gpus=2, devices=["cpu"] * 2, example_inputs=(x.clone(),), recompute=True)
    make = functools.partial(torch.optim.SGD, lr=0.1)
    with pipe.trainer(loss, make, method="bp", executor="inline") as trainer:
        for _ in range(2):
            trainer.step(x.clone(), torch.zeros(3))
        found = trainer.evaluate([(x.clone(), torch.zeros(3))])["loss"]
    assert found == pytest.approx(loss(plain(x.clone()), None).item(), rel=1e-6)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(outer.get_parameter(name), p, rtol=0, atol=0, msg=name)


def test_gradients_for_a_parameter_under_its_other_name(x):
    """A tied layer uses the parameter as its own; it belongs to the region like the layer that is named."""

    def forward(m, x):
        slope = torch.autograd.grad(m.tied(x).tanh().mean(), m.a.weight, create_graph=True)[0]
        return m.b(nn.functional.linear(x, m.a.weight - 0.1 * slope))

    model = Model(forward)
    model.tied = nn.Linear(4, 4)
    model.tied.weight = model.a.weight
    expected = model(x).detach()
    for costs in ("analytic", "measured"):
        pipe = dtrp.compile(model, n_gpus=3, devices=["cpu"] * 3, example_inputs=(x.clone(),), costs=costs)
        with torch.no_grad():
            torch.testing.assert_close(pipe(x), expected, rtol=0, atol=0)
        assert pipe.graph.nodes["tied"]["stage"] == pipe.graph.nodes["grad"]["stage"]


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.a = norm(nn.Conv1d(4, 4, 3, padding=1))
        self.body = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), norm(nn.Conv1d(4, 4, 1)))
        self.b = norm(nn.Linear(7, 3), name="weight")

    def forward(self, x):
        return self.b(self.body(self.a(x)))


NORMS = [
    nn.utils.weight_norm,
    nn.utils.spectral_norm,
    nn.utils.parametrizations.weight_norm,
    nn.utils.parametrizations.spectral_norm,
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", NORMS, ids=["old weight", "old spectral", "weight", "spectral"])
def test_normed_weights(norm):
    """The old ones are hooks that leave a tensor with a history on the module."""
    torch.manual_seed(0)
    model, x, y = Normed(norm), torch.randn(5, 4, 7), torch.randn(5, 4, 3)
    state = copy.deepcopy(model.state_dict())
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    model(x)
    model.load_state_dict(state)
    plain = Normed(norm)
    plain.load_state_dict(state)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(plain(x), y).backward()
        optimizer.step()
    make = functools.partial(torch.optim.SGD, lr=0.1)
    with pipe.trainer(nn.functional.mse_loss, make, method="bp", executor="inline") as trainer:
        for _ in range(3):
            trainer.step(x, y)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(pipe.eval()(x), plain.eval()(x))
    sent = loads(dumps([stage.module for stage in pipe.stages]))  # as a worker gets them
    for stage, copied in zip(pipe.stages, sent, strict=True):
        assert list(copied.state_dict()) == list(stage.module.state_dict())
    assert torch.equal(sent[1].eval()(sent[0].eval()(x)[0])[0], plain(x))


class Checkpointed(nn.Module):
    """Two blocks with BatchNorm, each of which runs again in the backward pass."""

    def __init__(self, reentrant, nested=False):
        super().__init__()
        self.a, self.b = (
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU()) for _ in range(2)
        )
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.reentrant, self.nested = reentrant, nested

    def both(self, x):
        return checkpoint(self.b, self.a(x), use_reentrant=self.reentrant)

    def forward(self, x):
        x = self.first(x)
        if self.nested:
            return self.head(checkpoint(self.both, x, use_reentrant=self.reentrant) + x)
        x = checkpoint(self.a, x, use_reentrant=self.reentrant) + x
        return self.head(checkpoint(self.b, x, use_reentrant=self.reentrant) + x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", sweep([False, True]), ids=["root", "submodule"])
def test_batchnorm_under_checkpoint(inside, reentrant, x):
    """The plain model's statistics move twice in a step: in the forward pass and in the backward pass."""
    model = Checkpointed(reentrant)
    if inside:
        model = nn.Sequential(nn.Linear(4, 4), model)
    captured = assert_faithful(model, (x,))
    assert not captured.kept_whole
    pipe = dtrp.compile(model.train(), n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    assert_faithful(model, (x,), function=pipe)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("reentrant", [False, True])
def test_batchnorm_under_checkpoint_under_checkpoint(reentrant, x):
    model = nn.Sequential(nn.Linear(4, 4), Checkpointed(reentrant, nested=True))
    captured = assert_faithful(model, (x,))
    assert [k.module for k in captured.kept_whole] == ["1"]
    with pytest.raises(CaptureError, match=r"Switch checkpointing off .*recompute=True"):
        capture(model[1], (x,))


def running_mean(m, x):
    y = m.a(x)
    if m.training:
        m.count = m.count * 0.9 + y.detach().mean()
    return y - m.count


def running_mean_in_place(m, x):
    y = m.a(x)
    if m.training:
        m.count.mul_(0.9).add_(y.detach().mean())
    return y - m.count


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_buffer_changed_under_checkpoint(reentrant, x):
    """In a submodule the region is kept whole, and runs as it does in the plain model."""

    def forward(m, x):
        return checkpoint(functools.partial(running_mean_in_place, m), x, use_reentrant=reentrant)

    captured = assert_faithful(Model(lambda m, x: m.b(m.inner(m.a(x))), forward), (x,))
    assert [k.module for k in captured.kept_whole] == ["inner"]


@pytest.mark.parametrize("inside", [False, True], ids=["root", "submodule"])
def test_a_buffer_assigned_under_checkpoint_is_refused(inside, x):
    def forward(m, x):
        return checkpoint(functools.partial(running_mean, m), m.b(x), use_reentrant=False)

    model = Model(lambda m, x: m.b(m.inner(m.a(x))), forward) if inside else Model(forward)
    with pytest.raises(CaptureError, match=r"Switch checkpointing off .*recompute=True") as error:
        capture(model, (x,))
    assert "count' under torch.utils.checkpoint" in str(error.value)


def test_checkpoint_without_gradients_at_its_inputs(x):
    """The reentrant kind then gives none to its parameters either."""

    def forward(m, x):
        return m.b(checkpoint(m.a, x, use_reentrant=True))

    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        captured = assert_faithful(Model(forward), (x,))
    captured.graph(True)(x).sum().backward()
    assert captured.model.a.weight.grad is None
    assert captured.model.b.weight.grad is not None


def test_what_code_under_checkpoint_leaves_for_others(x):
    """As router logits that transformers collects for a loss: the reentrant kind gives them no gradient.
    Graphs gave them one, which large models were trained with."""

    class Router(Model):
        def __init__(self, reentrant):
            super().__init__(None)
            self.reentrant = reentrant

        def forward(self, x):
            left = []

            def region(x):
                left.append(self.a(x))
                return self.b(left[0])

            return checkpoint(region, x * self.a.bias, use_reentrant=self.reentrant) + left[0].square()

    assert_faithful(Router(False), (x,))
    with pytest.raises(CaptureError, match=r"to do: Use use_reentrant=False"):
        capture(Router(True), (x,))


def test_inputs_that_take_no_other_order():
    """Offsets begin with zero: other samples of the example are no call of the model."""

    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.bags, self.head = nn.EmbeddingBag(20, 4, mode="mean"), nn.Linear(4, 2)

        def forward(self, ids, offsets):
            return self.head(self.bags(ids, offsets))

    assert_faithful(Bags(), (torch.arange(12) % 20, torch.tensor([0, 3, 4, 9])))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.b(m.a(x) + torch.arange(x.shape[1], dtype=int)),
        lambda m, x: m.b(m.a(x) * x.sign().to(int)),
        lambda m, x: m.b(m.a(x).to(float).to(x.dtype)),
        lambda m, x: m.b(m.a(x) * torch.ones(x.shape[0], 1, dtype=bool)),
        lambda m, x: m.b(m.a(x) / np.sqrt(x.size(-1))),
        lambda m, x: m.b(m.a(x) * np.log(x.shape[0] + 1)),
    ],
    ids=["arange", "to(int)", "to(float)", "bool", "sqrt", "log"],
)
def test_kinds_of_numbers_and_functions_of_numpy_leave_sizes_open(function, x):
    model = Model(function)
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    for n in (3, 2, 5):
        torch.testing.assert_close(pipe(x[:1].expand(n, 4)), model(x[:1].expand(n, 4)))


@pytest.mark.parametrize("kind", ["plain", "buffer"])
def test_tensors_of_a_layer_that_is_called_are_its_own(kind, x):
    """A graph must not make persistent buffers of them on the user's layer."""
    model = Model(lambda m, x: m.b(m.a(x) * m.a.mask))
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
    if kind == "plain":
        model.a.mask = mask
    else:
        model.a.register_buffer("mask", mask, persistent=False)
    keys = list(model.state_dict())
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    assert torch.equal(pipe(x), model(x))
    assert list(model.state_dict()) == keys
