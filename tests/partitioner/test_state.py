"""Python state: what forward changes runs for real, what the user changes is noticed."""

import copy
import types
from collections import OrderedDict, deque
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dtrp
from dtrp.errors import CaptureError
from dtrp.partitioner.capture import capture
from dtrp.partitioner.capture.watch import Watch
from tests.sweeps import sweep

COUNTS = {"calls": 0}


class Part(nn.Module):
    shared = 0

    def __init__(self, function):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("bank", torch.zeros(0))
        self.function = function
        self.ready, self.mode, self.where, self.step = False, "cold", None, (0, 1)
        self.seen, self.log, self.kinds, self.last = {}, [], set(), deque(maxlen=2)

    def forward(self, x):
        return self.function(self, self.a(x))


def first(m, x, ready):
    """Initialises with the first batch."""
    if not ready:
        m.mean.copy_(x.detach().mean(0))
    return x - m.mean


def by_bool(m, x):
    y = first(m, x, m.ready)
    m.ready = True
    return y


def by_text(m, x):
    y = first(m, x, m.mode == "warm")
    m.mode = "warm"
    return y


def by_none(m, x):
    y = first(m, x, m.where is not None)
    m.where = "here"
    return y


def by_tuple(m, x):
    y = first(m, x, m.step > (0, 1))
    m.step = (m.step[0] + 1, 1)
    return y


def by_dict(m, x):
    y = first(m, x, "calls" in m.seen)
    m.seen["calls"] = m.seen.get("calls", 0) + 1
    return y


def by_list(m, x):
    y = first(m, x, m.log)
    m.log.append("call")
    return y


def by_set(m, x):
    y = first(m, x, "call" in m.kinds)
    m.kinds.add("call")
    return y


def by_deque(m, x):
    y = first(m, x, len(m.last) > 1)
    m.last.append(1)
    return y


def by_hasattr(m, x):
    y = first(m, x, hasattr(m, "made"))
    m.made = 1
    return y


def by_size(m, x):
    if m.bank.numel() == 0:
        m.bank.resize_(x.shape[1]).copy_(x.detach().mean(0))
    return x - m.bank


class ByGlobal(Part):
    def forward(self, x):
        y = first(self, self.a(x), COUNTS["calls"])
        COUNTS["calls"] += 1
        return y


class ByClass(Part):
    def forward(self, x):
        y = first(self, self.a(x), ByClass.shared)
        ByClass.shared += 1
        return y


FUNCTIONS = [by_bool, by_text, by_none, by_tuple, by_dict, by_list, by_set, by_deque, by_hasattr, by_size]
MAKERS = {
    **{f.__name__: lambda f=f: Part(f) for f in FUNCTIONS},
    "global": lambda: ByGlobal(None),
    "class": lambda: ByClass(None),
}


def everything(model):
    return {
        path: (copy.deepcopy({k: v for k, v in vars(m).items() if k != "function" and k[0] != "_"}),
               {k: b.clone() for k, b in m.named_buffers()})
        for path, m in model.named_modules()
    }  # fmt: skip


def batches(n):
    torch.manual_seed(0)
    return [torch.randn(5, 4) * (i + 1) + i for i in range(n)]


def reset():
    COUNTS["calls"], ByClass.shared = 0, 0


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_forward_changes_runs_for_real(make):
    reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), make(), nn.ReLU(), nn.Linear(4, 2))
    plain, before = copy.deepcopy(model), everything(model)
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=batches(1)[0])
    assert (COUNTS["calls"], ByClass.shared) == (0, 0)
    after = everything(model)
    for path in before:
        assert before[path][0] == after[path][0]
        for k, v in before[path][1].items():
            assert torch.equal(v, after[path][1][k])
    expected = [plain(x) for x in batches(4)]
    reset()
    for x, y in zip(batches(4), expected, strict=True):
        assert torch.equal(pipe(x), y)


@pytest.mark.parametrize("make", sweep(MAKERS.values(), 3), ids=MAKERS)
def test_in_the_model_itself_it_is_refused_by_name(make):
    reset()
    names = "ready|mode|where|step|seen|log|kinds|last|made|bank|COUNTS|shared"
    text = rf"(changes|makes the attribute) '[\w. ]*({names})'"
    with pytest.raises(CaptureError, match=text):
        capture(make(), (batches(1)[0],))
    assert (COUNTS["calls"], ByClass.shared) == (0, 0)


def by_turns(m, x):
    m.ready = not m.ready
    return m.a(x)


class Reader(nn.Module):
    def __init__(self, inner=by_turns):
        super().__init__()
        self.inner, self.b = Part(inner), nn.Linear(4, 2)

    def forward(self, x):
        y = self.inner(x)
        return self.b(y) * (2 if self.inner.ready else 1)


def test_code_outside_that_reads_it():
    with pytest.raises(CaptureError, match=r"reads 'inner\.ready', which changes from call to call"):
        capture(Reader(), (batches(1)[0],))
    captured = capture(nn.Sequential(Reader(), nn.Linear(2, 2)), (batches(1)[0],))
    assert [k.module for k in captured.kept_whole] == ["0"]


def test_what_changes_once_and_for_all_is_no_reason_to_refuse():
    """As transformers' classifiers, which write into their config what kind of labels they were given."""

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.kind = nn.Linear(4, 4), None

        def forward(self, x):
            self.kind = self.kind or "regression"
            return self.a(x) * (1 if self.kind == "regression" else 2)

    xs = batches(2)
    for model in (Classifier(), Reader(by_bool)):
        pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=xs[0])
        plain = copy.deepcopy(model)
        assert any("as its first call does" in note for note in pipe.report.notes)
        assert all(torch.equal(pipe(x), plain(x)) for x in (*xs, *xs))


class Cached(nn.Module):
    """As transformers' LeViT: in eval mode it keeps what it has computed of its weights."""

    def __init__(self, config):
        super().__init__()
        self.config, self.a, self.cache = config, nn.Linear(4, 4), {}

    def forward(self, x):
        if self.training:
            self.cache.clear()
            return self.a(x)
        if "weight" not in self.cache:
            self.cache["weight"] = self.a.weight * 2
        return x @ self.cache["weight"].T


def test_what_all_parts_hold_changes_once_and_one_part_has_a_cache():
    """The part is kept whole for its cache alone, no other for the config; it was all refused."""

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = types.SimpleNamespace(kind=None)
            self.body = nn.Sequential(nn.Linear(4, 4), Cached(self.config), nn.Linear(4, 4))
            self.body.config = self.config

        def forward(self, x):
            self.config.kind = self.config.kind or "regression"
            return self.body(x) * (1 if self.config.kind == "regression" else 2)

    xs, model = batches(2), Classifier()
    plain = copy.deepcopy(model)
    captured = capture(model, (xs[0],))
    assert [k.module for k in captured.kept_whole] == ["body.1"]
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=xs[0])
    for training in (True, False):
        pipe.train(training), plain.train(training)
        assert all(torch.equal(pipe(x), plain(x)) for x in (*xs, *xs))


class Body(nn.Module):
    """Most of a model's work."""

    def __init__(self, then=None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(6))
        self.then, self.calls, self.ready = then, 0, False

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.then(self, x)


def counts(m, x):
    m.calls += 1
    return x * m.calls


def leaves_a_loss(m, x):
    m.aux = x.square().mean()
    return x


def gets_ready(m, x):
    m.ready = True
    return x


@pytest.mark.parametrize(("then", "opens"), [(counts, False), (leaves_a_loss, False), (gets_ready, True)])
def test_a_heavy_part_is_opened_only_if_that_loses_nothing_of_what_it_changes(then, opens):
    """It takes more than a stage's share, so that the plan would be better with its layers apart: what it
    counted was lost then, silently."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 256), Body(then), nn.Linear(256, 3))
    x, y = torch.randn(64, 16), torch.randint(0, 3, (64,))
    plain = copy.deepcopy(model)
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    assert pipe.plan.opened == (("1",) if opens else ())
    assert [k.module for k in pipe._planning.made.captured.kept_whole] == ([] if opens else ["1"])
    sgd = partial(torch.optim.SGD, lr=0.1)
    with pipe.trainer(F.cross_entropy, sgd, method="bp", executor="inline") as trainer:
        for _ in range(3):
            trainer.step(x, y)
    optimizer, losses = sgd(plain.parameters()), []
    for _ in range(3):
        loss = F.cross_entropy(plain(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert trainer.losses == losses
    assert model[1].calls == plain[1].calls
    assert hasattr(model[1], "aux") == hasattr(plain[1], "aux")


LOG = []


class Probe:
    def __init__(self):
        self.norms, self.last = {}, None

    def __call__(self, module, args, output):
        self.norms[len(self.norms)] = output.detach().norm()

    def note(self, module, args, output):
        self.last = output.detach()


def into_a_list():
    seen = []
    return lambda module, args, output: seen.append(output.detach().norm()), lambda: len(seen)


def into_a_variable():
    calls = 0

    def hook(module, args, output):
        nonlocal calls
        calls += 1

    return hook, lambda: calls


def into_a_global():
    LOG.clear()
    return lambda module, args, output: LOG.append(output.detach().norm()), lambda: len(LOG)


def into_an_object():
    probe = Probe()
    return probe, lambda: len(probe.norms)


def by_a_method():
    probe = Probe()
    return probe.note, lambda: probe.last is not None


@pytest.mark.parametrize(
    "kind",
    [into_a_list, into_a_variable, into_a_global, into_an_object, by_a_method],
    ids=lambda f: f.__name__,
)
def test_what_a_hook_keeps_is_left_as_it_was_and_kept_of_every_call(kind):
    """A probe on a part that takes more than a stage's share. Opened for a better balance the part called its
    hook no more, silently; and compiling left the fake values of its own runs with the probe."""
    hook, kept = kind()
    model = nn.Sequential(nn.Linear(16, 256), Body(lambda m, x: x), nn.Linear(256, 3))
    model[1].register_forward_hook(hook)
    x = torch.randn(64, 16)
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    assert not kept()
    assert pipe.plan.opened == ()
    pipe(x)
    assert kept() == 1


class Loss(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.a, self.inner = nn.Linear(4, 4), inner

    def forward(self, x):
        y = self.a(x)
        self.aux = y.square().mean()
        return y if self.inner is None else self.inner(y)


def test_a_loss_left_on_an_attribute():
    x = batches(1)[0]
    notes = capture(Loss(), (x,)).notes
    assert notes == ("it leaves the tensor 'aux' in an attribute; calls of the pipeline leave none there",)
    model = nn.Sequential(nn.Linear(4, 4), Loss(), nn.Linear(4, 2))
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    pipe(x)
    assert not hasattr(copy.deepcopy(nn.Sequential(nn.Linear(4, 4), Loss())), "aux")
    found = model[1].aux
    model(x)
    assert torch.equal(found, model[1].aux)


SCALES = {"helper": 1.0}
SETTINGS = types.ModuleType("settings")
SETTINGS.scale, ACTIVATION = 1.0, torch.relu


def enclosed():
    box = [1.0]
    return box, lambda y: y * box[0]


def helper(y):
    """Code that the model's own calls: what it reads counts too."""
    return y * SCALES["helper"] * SETTINGS.scale


class Scale:
    __slots__ = ("by",)

    def __init__(self):
        self.by = [np.ones(1), {"deep": [[{"down": 1.0}]]}]

    def __call__(self, y):
        return y * float(self.by[0][0]) * self.by[1]["deep"][0][0]["down"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, (self.box, self.closure) = Scale(), enclosed()
        self.factors = [torch.ones(1)]
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.tau, self.options = 1.0, {"scale": [1.0, 2.0]}
        self.weight = torch.ones(3)

    def forward(self, x):
        y = self.head(torch.relu(self.b(ACTIVATION(self.a(x))))) * self.weight
        y = self.act(self.closure(self.scale(helper(y * self.factors[0]))))
        return y * self.options["scale"][0] / self.tau

    def act(self, y):
        return y


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def new_head(m):
    m.head = nn.Linear(4, 7)
    m.weight = torch.ones(7)


def same_head(m):
    m.head = nn.Linear(4, 3)


def lora(m):
    m.requires_grad_(False)
    m.a, m.b = LoRA(m.a), LoRA(m.b)


def annealed(m):
    m.tau = 0.1


def nested(m):
    m.options["scale"][0] = 3.0


def constant(m):
    m.weight = torch.arange(3.0)


def parameter(m):
    m.head.bias = nn.Parameter(torch.ones(3))


def hook(m):
    m.b.register_forward_hook(lambda module, args, output: output + 1)


def method(m):
    m.forward = lambda x: m.head(m.a(x))


def in_a_helper(m):
    SCALES["helper"] = 3.0


def in_another_file(m):
    SETTINGS.scale = 3.0


def function_of_the_file(m):
    global ACTIVATION
    ACTIVATION = torch.tanh


def method_of_the_class(m):
    Net.act = lambda self, y: y + 1


def in_a_closure(m):
    m.box[0] = 3.0


def in_an_array_in_a_slot(m):
    m.scale.by[0][0] = 3.0


def deep_down(m):
    m.scale.by[1]["deep"][0][0]["down"] = 3.0


def tensor_in_a_list(m):
    m.factors[0] = torch.full((1,), 3.0)


CHANGES = [
    new_head, same_head, lora, annealed, nested, constant, parameter, hook, method,
    in_a_helper, in_another_file, function_of_the_file, method_of_the_class, in_a_closure,
    in_an_array_in_a_slot, deep_down, tensor_in_a_list,
]  # fmt: skip


@pytest.fixture
def as_before(monkeypatch):
    monkeypatch.setitem(SCALES, "helper", 1.0)
    monkeypatch.setattr(SETTINGS, "scale", 1.0)
    monkeypatch.setattr(Net, "act", Net.act)
    monkeypatch.setitem(globals(), "ACTIVATION", torch.relu)


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_later_is_noticed(change, as_before):
    torch.manual_seed(0)
    model, x, y = Net(), batches(1)[0], torch.randint(0, 3, (5,))
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    change(model)
    assert torch.equal(pipe(x), model(x))
    change(model) if change is not lora else None
    plain = copy.deepcopy(model) if change is not method else None
    with pipe.trainer(
        F.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.1), method="bp", executor="inline"
    ) as trainer:
        for _ in range(3):
            trainer.step(x, y)
    if plain is None:
        return
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    for k, v in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[k], v)


def test_a_change_that_cannot_be_followed_is_told():
    model, x = Net(), batches(1)[0]
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    model.forward = lambda x: model.a(x) if x.sum() > 0 else model.b(x)
    with pytest.raises(CaptureError, match=r"the attribute 'forward' is not as it was when the pipeline was"):
        pipe(x)


def test_an_unchanged_model_is_not_captured_again(monkeypatch):
    model, x = Net(), batches(1)[0]
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    monkeypatch.setattr("dtrp.planning.compile_model", None)
    with torch.no_grad():
        model.head.weight.mul_(2)
    model.load_state_dict(Net().state_dict())
    assert torch.equal(pipe(x), model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_a_refused_transform_leaves_nothing_behind():
    class Jvp(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

        def forward(self, x):
            return torch.func.jvp(self.net, (x,), (torch.ones_like(x),))[1]

    x = torch.randn(5, 3)
    for way in (["record"], ["fixed sizes"], None):
        with pytest.raises(CaptureError):
            capture(Jvp(), (x,), ways=way)
        assert torch.isfinite(Jvp()(x)).all()
        capture(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), (x,))


class Table(OrderedDict):
    """As transformers' table of activations: what it gives is made when it is asked for."""

    def __getitem__(self, key):
        return super().__getitem__(key)()


ACTIVATIONS = Table(relu=nn.ReLU)


class UsesTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return ACTIVATIONS["relu"](self.a(x))


def test_a_table_that_makes_what_it_gives_is_left_as_it_was():
    """Else its entries are things made, not what makes them, in every later use in the process."""
    model, x = UsesTable(), torch.randn(3, 4)
    captured = capture(model, (x,))
    assert OrderedDict.__getitem__(ACTIVATIONS, "relu") is nn.ReLU
    assert torch.equal(captured.graph(True)(x), model(x))


class ByKind(dict):
    """As transformers' registry of what a model can give: known by the class of what it is for."""

    def __setitem__(self, key, value):
        super().__setitem__(type(key).__name__, value)


SLOPES = ByKind()


class UsesRegistry(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        SLOPES[self] = 0.1
        SLOPES[self.a] = 0.2

    def forward(self, x):
        return F.leaky_relu(self.a(x), dict.__getitem__(SLOPES, "UsesRegistry"))


def test_a_table_that_renames_its_keys_is_left_as_it_was():
    """A copy made through its own methods has one entry, "str", which then took the place of all: Segformer's
    second recording found no entry for its class, nor did any later model of the process."""
    model, x = UsesRegistry(), torch.randn(3, 4)
    captured = capture(model, (x,))
    assert SLOPES == {"UsesRegistry": 0.1, "Linear": 0.2}
    assert torch.equal(captured.graph(True)(x), model(x))


class Memory(nn.Module):
    """Carries tensors from call to call; ``keep`` says in what."""

    def __init__(self, keep):
        super().__init__()
        self.a, self.keep = nn.Linear(4, 4), keep
        keep(self, torch.zeros(5, 4))

    def forward(self, x):
        held = self.held
        while not isinstance(held, torch.Tensor):
            held = held["h"] if isinstance(held, dict) else held.h if hasattr(held, "h") else held[0]
        h = torch.tanh(self.a(x)) + held
        self.keep(self, h.detach())
        return h


def in_a_tuple(m, h):
    m.held = (h, h + 1)


def in_a_list(m, h):
    if hasattr(m, "held"):
        m.held[0] = h
    else:
        m.held = [h]


def in_a_dict(m, h):
    m.held = {"h": h}


def deep_in(m, h):
    m.held = ({"h": h},)


def in_an_object(m, h):
    m.held = types.SimpleNamespace(h=h)


@pytest.mark.parametrize("keep", [in_a_tuple, in_a_list, in_a_dict, deep_in, in_an_object])
def test_what_is_carried_in_containers_is_not_frozen(keep):
    """Whatever the model's size: the second look, which compares numbers, sees small ones alone."""
    with pytest.raises(CaptureError, match=r"'held'.* from one call to the next|changes 'held'"):
        dtrp.compile(Memory(keep), n_gpus=1, devices=["cpu"], example_inputs=batches(1)[0])
    model = nn.Sequential(Memory(keep), nn.ReLU(), nn.Linear(4, 2))
    plain = copy.deepcopy(model)
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=batches(1)[0])
    for x in batches(3):
        assert torch.equal(pipe(x), plain(x))


@pytest.mark.parametrize("parts", ["chunk", "split", "unbind", "max", "topk"])
def test_what_is_carried_through_several_results_is_no_cache(parts, monkeypatch):
    """As every hand-written LSTM cell has it."""
    monkeypatch.setattr("dtrp.partitioner.capture.second_look.MAX_FLOPS", 0.0)  # of large models
    several = {
        "chunk": lambda y: y.chunk(2, 1)[0], "split": lambda y: y.split([2, 2], 1)[0],
        "unbind": lambda y: torch.stack(y.unbind(1)[:2], 1), "max": lambda y: y.max(1, keepdim=True).values,
        "topk": lambda y: torch.topk(y, 2, 1)[0],
    }[parts]  # fmt: skip

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Linear(4, 4), None

        def forward(self, x):
            c = several(self.a(x))
            if self.c is not None:
                c = c + self.c
            self.c = c.detach()
            return x * c.sum()

    model = nn.Sequential(Cell(), nn.Linear(4, 2))
    plain = copy.deepcopy(model)
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=batches(1)[0])
    for x in batches(3):
        assert torch.equal(pipe(x), plain(x))


def test_large_containers_on_a_model_cost_nothing_in_every_batch():
    """A vocabulary, or a dataset on a LightningModule, was gone through before each one."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model.vocabulary = {f"word {i}": i for i in range(2000)}
    watch = Watch(model)
    assert len(watch._pointers()) < 100
    assert watch.changed() == ""
    model.vocabulary["another"] = 0
    assert "vocabulary" in watch.changed()  # its length is looked at


@pytest.mark.parametrize("inner", [False, True])
def test_buffers_that_are_none_until_they_are_needed(inner):
    """A mask of the largest length so far: a cache, made anew by the graph."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.register_buffer("mask", None, persistent=False)

        def forward(self, x):
            if self.mask is None or self.mask.shape[0] < x.shape[0]:
                self.mask = torch.ones(x.shape[0], x.shape[0]).tril()
            return self.mask[: x.shape[0], : x.shape[0]] @ self.a(x)

    model = nn.Sequential(Masked(), nn.Linear(4, 2)) if inner else Masked()
    pipe = dtrp.compile(model, n_gpus=1, devices=["cpu"], example_inputs=batches(1)[0])
    assert not any("mask" in name for name, _ in model.named_buffers())
    assert not pipe._planning.made.captured.kept_whole
    x = batches(1)[0]
    assert torch.equal(pipe(x), copy.deepcopy(model)(x))


def test_a_model_with_a_call_of_its_own():
    class Wrapped(nn.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    model = Wrapped(4, 2)
    pipe = dtrp.compile(model, n_gpus=1, devices=["cpu"], example_inputs=batches(1)[0])
    assert torch.equal(pipe(batches(1)[0]), model(batches(1)[0]))
