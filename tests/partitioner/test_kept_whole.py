"""Modules that a graph holds whole: what they keep, change and give must be as in the plain model."""

from collections import OrderedDict, defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dtrp
from dtrp.partitioner.capture import capture

from .test_capture import assert_faithful


class Model(nn.Module):
    """``forward`` is given; ``inner`` is a submodule with a forward of its own."""

    def __init__(self, function, inner=None, **buffers):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.function = function
        self.cache = {}
        for name, value in buffers.items():
            self.register_buffer(name, value)
        if inner is not None:
            self.inner = inner if isinstance(inner, nn.Module) else Model(inner)

    def forward(self, *args):
        return self.function(self, *args)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(3, 4)


def around(m, x):
    return m.b(m.inner(m.a(x)))


def by_values(m, x):
    return m.a(x) if x.sum() > 0 else -m.b(x)


def names(captured):
    return [k.module for k in captured.kept_whole]


@pytest.mark.parametrize("read", [int, float, torch.Tensor.item, bool])
def test_a_number_in_a_buffer_is_not_frozen(read, x):
    """Warm-ups, queues and caches keep a step or a position in a 0-dim buffer."""

    def forward(m, x):
        return m.a(x) * (1 + float(read(m.step)))

    model = Model(around, Model(forward, step=torch.tensor(0)))
    captured = assert_faithful(model, (x,))
    assert names(captured) == ["inner"]
    model.inner.step.fill_(9)
    assert torch.equal(captured.graph(False)(x), model.eval()(x))


def test_an_index_that_a_module_gives_is_not_frozen(x):
    def forward(m, x):
        return (x if x.sum() > -1e9 else -x), x.sum(0).argmax()

    def choose(m, x):
        y, i = m.inner(m.a(x))
        return m.b(y) * (1 + int(i))

    outer = Model(lambda m, x: m.inner(x), Model(choose, forward))
    captured = capture(outer, (x,), run=False)
    assert names(captured) == ["inner"], "the code that reads the index is kept whole with it"


def test_what_it_gives_may_be_written_to(x):
    model = nn.Sequential(nn.Linear(4, 4), Model(by_values), nn.ReLU(inplace=True), nn.Linear(4, 4))
    assert names(assert_faithful(model, (x,))) == ["1"]
    for p in model.parameters():
        p.requires_grad_(False)
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    assert torch.equal(pipe(x), model(x))


def test_what_it_puts_into_an_ordered_dict(x):
    def fill(m, found):
        found["b"] = by_values(m, found["a"])
        return found

    def use(m, x):
        found = OrderedDict(a=m.a(x))
        m.inner(found)
        return found["b"] + found["a"]

    model = Model(use, fill)
    captured = capture(model, (x,), run=False)
    assert_faithful(model, (x,), captured=captured)
    assert names(captured) == ["inner"]


def test_an_ordered_dict_and_an_object_with_a_list_reach_it_as_such(x):
    """The graph handed it a plain dict, which has no order to be asked for."""

    def first(m, found, held):
        name, y = found.popitem(last=False)
        assert name == "a"
        assert type(held.sizes) is list
        return m.b(y) if y.sum() > 0 else m.a(held.x)

    def use(m, x):
        y = m.a(x)
        return m.inner(OrderedDict(a=y, b=2 * y), SimpleNamespace(x=y, sizes=[3, 4]))

    model = Model(use, first)
    assert names(assert_faithful(model, (x,))) == ["inner"]
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    assert torch.equal(pipe(x), model(x))


class Dot(dict):
    __getattr__ = dict.get
    __setattr__ = dict.__setitem__


class Strict(dict):
    __getattr__ = dict.__getitem__  # answers with a KeyError to whoever asks whether it has a name


class Itself(dict):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Easy(dict):
    def __init__(self, items=(), **kwargs):
        for name, value in {**dict(items), **kwargs}.items():
            setattr(self, name, value)

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        super().__setitem__(name, value)

    __setitem__ = __setattr__


class Sized(list):
    def total(self):
        return sum(self)


OPTIONS = Strict(depth=2)  # among the names that a recording looks through
OWN_DICTS = [Dot, Strict, Itself, Easy, partial(defaultdict, list)]


@pytest.mark.parametrize("kind", OWN_DICTS)
def test_a_dict_of_a_class_of_its_own_is_one_for_what_is_kept_whole(kind, x):
    """Every other project has one for its batches; the graph handed on a plain dict."""

    def add(m, found):
        y = found["a"] + (found["new"] or 0 if isinstance(found, defaultdict) else found.b)
        return m.b(y) if y.sum() > 0 else m.a(y)

    def use(m, x):
        found = kind()
        found["a"], found["b"] = m.a(x), m.b(x)
        return m.inner(found)

    model = Model(use, add)
    assert names(assert_faithful(model, (x,))) == ["inner"]


def test_what_a_defaultdict_makes_its_items_of(x):
    def add(m, found):
        return m.b(found["a"]) if found["a"].sum() > 0 else m.a(found["a"])

    captured = capture(Model(lambda m, x: m.inner(defaultdict(list, a=x)), add), (x,))
    assert names(captured) == ["inner"]
    made = next(n for n in captured.train.module.graph.nodes if n.name == "defaultdict")
    assert made.target(x).default_factory is list


def test_a_list_of_a_class_of_its_own(x):
    def add(m, found):
        return m.b(found.total()) if found[0].sum() > 0 else found.total()

    model = Model(lambda m, x: m.inner(Sized([m.a(x), m.b(x)])), add)
    assert names(assert_faithful(model, (x,))) == ["inner"]


@pytest.mark.parametrize("kind", OWN_DICTS)
def test_a_dict_of_a_class_of_its_own_as_input_and_output(kind, x):
    def forward(m, batch):
        found = kind()
        found["y"], found["z"] = m.b(m.a(batch["x"]).relu()), len(batch)
        return found

    model, batch = Model(forward), kind()
    batch["x"] = x
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=(batch,))
    out = pipe(batch)
    assert type(out) is type(batch)
    assert torch.equal(out["y"], model(batch)["y"])
    assert out["z"] == 1


def test_a_factorization_of_a_heavy_product():
    """Random numbers in the product's place cannot be factorized: it runs in full."""

    def whiten(m, x):
        covariance = x.t() @ x / len(x) + 1e-3 * torch.eye(x.shape[1])
        y = x @ torch.linalg.inv(torch.linalg.cholesky(covariance)).t()
        return y[y.norm(dim=-1) > 0]

    model = nn.Sequential(nn.Linear(256, 256), Model(whiten), nn.Linear(256, 4))
    assert names(capture(model, (torch.randn(300, 256),))) == ["1"]


def test_complex_layers_without_gradients():
    def forward(m, x):
        with torch.no_grad():
            y = m.inner(x)
        return (y * x).abs()

    model = Model(forward, nn.Linear(4, 4, dtype=torch.complex64))
    x = torch.randn(3, 4, dtype=torch.complex64)
    captured = capture(model, (x,), ways=["record"], run=False)
    assert not model(x).requires_grad
    assert not captured.graph(True)(x).requires_grad, "the layer's own weight must not let gradients in"


def caching(m, x):
    if len(x) not in m.cache:
        m.cache[len(x)] = torch.arange(4.0)
    return by_values(m, x) + m.cache[len(x)]


def test_caches_and_hooks_are_left_alone(x):
    """What a run on fake tensors puts into a module's dicts must not meet the user's tensors."""
    model = Model(around, caching)
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    assert model.inner.cache == {}
    assert type(pipe(x)) is torch.Tensor
    assert torch.equal(pipe(x), model(x))
    assert type(model.inner.cache[3]) is torch.Tensor


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_in_which_a_model_is_compiled_does_not_matter(training, x):
    def forward(m, x):
        y = by_values(m, x)
        return {"loss": y} if m.training else {"scores": y}

    def use(m, x):
        found = m.inner(m.a(x))
        return found["loss"] if m.training else found["scores"]

    captured = capture(Model(use, forward).train(training), (x,))
    assert names(captured) == ["inner"]


def test_what_needs_another_batch_size_to_show_is_refused(x):
    """With more samples the module would decide by values."""

    def forward(m, x):
        if len(x) > 3 and x.sum() > 1e9:
            return x
        return m.a(x)

    captured = capture(Model(around, forward), (x,))
    with pytest.raises(RuntimeError, match=r"test_kept_whole\.py:\d+ needs a plain Python value"):
        captured.graph(True)(torch.randn(8, 4))


def flag(m, x):
    return by_values(m, x), bool((x.abs() > 50).any())


def optional(m, x):
    return by_values(m, x), (x * 2 if (x.abs() > 50).any() else None)


def growing(m, x):
    return [by_values(m, x), *([x] if (x.abs() > 50).any() else [])]


@pytest.mark.parametrize("inner", [flag, optional, growing])
def test_another_form_of_result_is_refused(inner, x):
    """The code behind was recorded for one: entries of a longer list would be lost without a word."""
    model = Model(lambda m, x: m.b(m.inner(m.a(x))[0]), inner)
    captured = capture(model, (x,), run=False)
    assert torch.equal(captured.graph(False)(x), model.eval()(x))
    with pytest.raises(RuntimeError, match=r"module 'inner' gave .* now and .* when the model was captured"):
        captured.graph(False)(x * 1e4)
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    assert torch.equal(pipe(x), model(x))


def test_a_flag_that_differs_between_the_modes(x):
    """All else in the two graphs is equal, but each has its own guard."""

    def forward(m, x):
        return by_values(m, x), m.training

    model = Model(lambda m, x: m.b(m.inner(m.a(x))[0]), forward)
    captured = assert_faithful(model, (x,))
    assert names(captured) == ["inner"]
    assert not captured.one_graph


def test_numbers_that_differ_between_two_runs_are_refused(x):
    def lengths(m, x, mask):
        return by_values(m, x), [int(n) for n in mask.sum(-1)]

    model = Model(lambda m, x, mask: m.b(m.inner(m.a(x), mask)[0]), lengths)
    with pytest.raises(dtrp.CaptureError, match="Python values that it makes from tensors"):
        capture(model, (x, torch.ones(3, 4, dtype=torch.bool)), run=False)


def test_a_mask_that_is_all_true_in_the_example(x):
    """The number of rows that it picks is made from values, and is not the batch size."""

    def pick(m, x, mask):
        return x[mask]

    model = Model(lambda m, x, mask: m.b(m.inner(m.a(x), mask)).sum(0) / len(x), pick)
    captured = capture(model, (x, torch.ones(3, dtype=torch.bool)))
    some = torch.tensor([True, False, True])
    assert torch.equal(captured.graph(False)(x, some), model.eval()(x, some))


@pytest.mark.parametrize("start", [0.0, None])
def test_what_it_leaves_in_an_attribute_is_not_read_as_it_was(start, x):
    """A mixture of experts' auxiliary loss: the code that reads it gets what was left in this call."""

    def route(m, x):
        y = by_values(m, x)
        m.aux = y.softmax(-1).mean(0).pow(2).sum()
        return y

    def use(m, x):
        y = m.b(m.inner(m.a(x)))
        return y * m.inner.aux

    model = Model(use, route)
    model.inner.aux = start
    captured = capture(model, (x,), run=False)
    assert names(captured) == ["inner"]
    assert model.inner.aux is start
    for given in (x, 2 * x, -x):
        assert torch.equal(captured.graph(True)(given), model(given))


def test_objects_that_it_changes_for_some_values_are_refused(x):
    """The caller reads them: the graph would hold either what was there before or what was put in."""

    def clamp(m, found):
        for i, row in enumerate(found):
            if row.sum() > 0:
                found[i] = row.clamp(-1, 1)
        return found

    def use(m, x):
        found = list(m.a(x).unbind(-1) * 3)
        m.inner(found)
        return m.b(torch.stack(found[:4], -1))

    with pytest.raises(
        dtrp.CaptureError, match="how it changes an object that it is given depends on values"
    ):
        capture(Model(use, clamp), (x,), run=False)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_what_calls_a_scripted_function(x):
    """Recording sees nothing of what happens in it: that shows where its result is given back, not later
    where another module uses it."""
    scripted = torch.jit.script(torch.nn.functional.silu)
    captured = assert_faithful(Model(around, Model(lambda m, x: m.b(scripted(m.a(x))))), (x,))
    assert names(captured) == ["inner"]
    with pytest.raises(dtrp.CaptureError, match=r"cannot be followed \(TorchScript"):
        capture(Model(lambda m, x: m.b(scripted(m.a(x)))), (x,))


def by_vmap(m, x):
    return m.b(torch.func.vmap(torch.func.jacrev(lambda v: v.tanh().sum()))(m.a(x)))


def by_grad(m, x):
    return m.b(torch.func.grad(lambda v: v.tanh().sum())(m.a(x)))


@pytest.mark.parametrize("function", [by_vmap, by_grad])
def test_what_calls_torch_func(x, function):
    captured = capture(Model(around, Model(function)), (x,))
    assert names(captured) == ["inner"]
    with pytest.raises(dtrp.CaptureError, match=r"(?s)(?=.*torch\.func).* a submodule of its own"):
        capture(Model(function), (x,))


def split_by_a_tensor(m, x):
    first, second = torch.tensor_split(m.a(x), torch.tensor([2]))
    return m.b(torch.cat([second, first]))


def test_a_function_that_reads_numbers_unseen(x):
    """In C++, which dispatches nothing: the message names what it is and where it works."""
    captured = assert_faithful(Model(around, Model(split_by_a_tensor)), (x,))
    assert names(captured) == ["inner"]
    with pytest.raises(dtrp.CaptureError, match=r"(?s)tensor_split by a tensor.* a submodule of its own"):
        capture(Model(split_by_a_tensor), (x,))
