"""What forward does besides computing (modes, attributes, lent weights, writes) trains as in a plain loop."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import dtrp
from dtrp.errors import CaptureError
from dtrp.partitioner.capture import capture

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def batches(n=4):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(6, 8, generator=generator), torch.randn(6, 3, generator=generator)) for _ in range(n)
    ]


class Model(nn.Module):
    """A backbone with BatchNorm, a part in the middle, and a head; ``forward`` is the test's."""

    def __init__(self, function, part=None):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
        self.part = part or nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


class Part(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop = nn.Dropout(0.0)
        self.norm, self.losses = nn.BatchNorm1d(8), []
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def loss_of(output, target):
    first, aux = output if isinstance(output, tuple) else (output, 0.0)
    return F.mse_loss(first, target) + 0.1 * aux


def assert_trains_alike(model, *, executor="inline", stages=2, around=nullcontext):
    """Weights, buffers, losses and modes after some batches are those of the plain loop; the pipeline,
    which is compiled with ``around`` around it."""
    plain, data = copy.deepcopy(model), batches()
    optimizer, losses = SGD(plain.parameters()), []
    for x, y in data:
        optimizer.zero_grad()
        loss = loss_of(plain(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with around():
        pipe = dtrp.compile(model, n_gpus=stages, devices=["cpu"] * stages, example_inputs=data[0][0])
    with pipe.trainer(loss_fn=loss_of, optimizer=SGD, method="bp", executor=executor) as trainer:
        for x, y in data:
            trainer.step(x, y)
        trainer.flush()
    assert trainer.losses == pytest.approx(losses, rel=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)
    assert [m.training for m in model.modules()] == [m.training for m in plain.modules()]
    return pipe


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_compiled_where_gradients_are_off(around):
    assert_trains_alike(Model(lambda m, x: m.head(m.part(m.backbone(x)))), around=around)


def inference(m, x):
    with torch.inference_mode():
        x = m.backbone(x)
    return m.head(m.part(x.clone()))


def inference_in_evaluation(m, x):
    with torch.inference_mode(mode=not m.training):
        x = m.backbone(x)
    return m.head(m.part(x))


@torch.inference_mode()
def features(m, x):
    return F.normalize(m.backbone(x))


def inference_by_decorator(m, x):
    return m.head(m.part(torch.empty(6, 8).copy_(features(m, x))))


@pytest.mark.parametrize("forward", [inference, inference_in_evaluation, inference_by_decorator])
def test_inference_mode_before_layers_that_are_trained(forward):
    pipe = assert_trains_alike(Model(forward))
    assert not pipe.report.kept_whole


def test_inference_mode_in_a_part_that_is_kept_whole():
    """What it gives is an inference tensor, which the next stage gets."""

    @torch.inference_mode()
    def decide(m, x):
        return m.a(x) if x.sum() > 0 else m.b(x)

    pipe = assert_trains_alike(Model(lambda m, x: m.head(m.part(m.backbone(x)).clone()), Part(decide)))
    assert [name for name, _ in pipe.report.kept_whole] == ["part"]


def evaluates_its_backbone(m, x):
    m.backbone.eval()
    return m.head(m.part(m.backbone(x)))


def evaluates_all_norms(m, x):
    for module in m.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.train(False)
    return m.head(m.part(m.backbone(x)))


def evaluates_its_norm(m, x):
    if m.training:
        m.norm.eval()
    return m.norm(m.a(x))


def through(m, x):
    return m.head(m.part(m.backbone(x)))


@pytest.mark.parametrize(
    "model",
    [
        lambda: Model(evaluates_its_backbone),
        lambda: Model(evaluates_all_norms),
        lambda: Model(through, Part(evaluates_its_norm)),
    ],
    ids=["backbone", "norms", "part"],
)
def test_modes_that_forward_switches(model):
    pipe = assert_trains_alike(model())
    assert not pipe.report.kept_whole
    x, fresh = batches(1)[0][0], model()
    plain = copy.deepcopy(fresh)
    called = dtrp.compile(fresh, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    for mode in (True, False, True):
        torch.testing.assert_close(called.train(mode)(x), plain.train(mode)(x))
        torch.testing.assert_close(dict(fresh.named_buffers()), dict(plain.named_buffers()))
        assert [m.training for m in fresh.modules()] == [m.training for m in plain.modules()]


def there_and_back(m, x):
    m.norm.eval()
    y = m.norm(m.a(x))
    m.norm.train()
    return m.norm(y)


def test_modes_that_are_switched_back_run_for_real_or_are_refused():
    pipe = assert_trains_alike(Model(through, Part(there_and_back)))
    assert [name for name, _ in pipe.report.kept_whole] == ["part"]

    def root(m, x):
        m.backbone.eval()
        y = m.backbone(x)
        m.backbone.train()
        return m.head(y + m.backbone(x))

    with pytest.raises(
        CaptureError, match=r"calls 'backbone\.0' in another mode than it had when the call"
    ) as e:
        capture(Model(root), (batches(1)[0][0],))
    assert "move this code into a submodule" in str(e.value)


def test_dropout_that_stays_on_in_evaluation():
    def stays(m, x):
        m.drop.train()
        return m.drop(m.a(x))

    x = batches(1)[0][0]
    captured = capture(Model(through, Part(stays)), (x,))
    assert [k.module for k in captured.kept_whole] == ["part"]


def leaves_loss(m, x):
    y = m.a(x)
    m.aux = y.square().mean()
    return m.b(y)


def leaves_loss_of_few(m, x):
    """As a mixture of experts: which rows go through depends on values."""
    p = m.a(x).softmax(-1)
    rows = (p[:, 0] > 0.12).nonzero()[:, 0]
    m.aux = {"balance": p.mean(0).square().sum()}
    return x.index_add(0, rows, m.b(x[rows]))


def adds_loss(m, x):
    x = m.backbone(x)
    y = m.part(x)
    return m.head(y), m.part.aux


def adds_entry(m, x):
    y = m.part(m.backbone(x))
    return m.head(y), m.part.aux["balance"] * 2


def appends_loss(m, x):
    y = m.a(x)
    m.losses.append(y.square().mean())
    return m.b(y)


def adds_losses(m, x):
    m.part.losses.clear()
    y = m.part(m.part(m.backbone(x)))
    return m.head(y), sum(m.part.losses)


def through_itself(m, x):
    y = m.part(m.backbone(x))
    m.aux = y.square().mean()
    return m.head(y), m.aux


AUX = {
    "attribute": (adds_loss, leaves_loss, ["part"]),
    "by values": (adds_entry, leaves_loss_of_few, ["part"]),
    "list": (adds_losses, appends_loss, []),
    "of the model": (through_itself, leaves_loss, []),
}


@pytest.mark.parametrize(("forward", "inner", "whole"), AUX.values(), ids=AUX)
def test_losses_left_on_attributes(forward, inner, whole):
    pipe = assert_trains_alike(Model(forward, Part(inner)), stages=3)
    assert [name for name, _ in pipe.report.kept_whole] == whole


def test_without_gradients_none_flow_through_what_is_left():
    def forward(m, x):
        with torch.no_grad():
            y = m.part(m.backbone(x))
        return m.head(y), m.part.aux

    assert_trains_alike(Model(forward, Part(leaves_loss)))


def test_what_the_last_call_left_is_no_value_of_this_one():
    def forward(m, x):
        before = getattr(m.part, "aux", None)
        y = m.head(m.part(m.backbone(x)))
        return y if before is None else y * before

    with pytest.raises(CaptureError, match=r"reads 'part\.aux' before it is made anew"):
        capture(Model(forward, Part(leaves_loss)), (batches(1)[0][0],))


def assigns(m, x):
    y = x - m.centre
    m.centre = 0.9 * m.centre + 0.1 * x.mean(0).detach()
    return y


def writes(m, x):
    y = x - m.centre
    with torch.no_grad():
        m.centre.mul_(0.9).add_(x.mean(0), alpha=0.1)
    return y


@pytest.mark.parametrize(
    ("centre", "text"),
    [(assigns, "keeps the tensor 'centre' from one call"), (writes, "changes the tensor 'centre' in place")],
)
def test_a_running_mean_is_a_buffer_or_in_a_part(centre, text):
    """Whatever the model's size: nothing but the recording looks at it."""

    def forward(m, x):
        return m.head(centre(m, m.backbone(x)))

    loose, kept = Model(forward), Model(forward)
    loose.centre = torch.zeros(8)
    with pytest.raises(CaptureError, match=text + ".*make it .*register_buffer"):
        capture(loose, (batches(1)[0][0],), run=False)
    kept.register_buffer("centre", torch.zeros(8))
    assert_trains_alike(kept)
    part = Model(through, Part(centre))
    part.part.centre = torch.zeros(8)
    assert_trains_alike(part)


def carried(m, x):
    """As a recurrent model that goes on where the last batch ended."""
    y, state = m.part(m.backbone(x), m.carried)
    m.carried = state.detach()
    return m.head(y)


def whitened(m, x):
    x = m.backbone(x)
    y = m.part(x @ m.carried)
    m.carried = 0.9 * m.carried + 0.1 * (x.detach().T @ x.detach())
    return m.head(y @ m.carried)


@pytest.mark.parametrize(
    ("forward", "part", "buffer"),
    [(carried, nn.GRU(8, 8), torch.zeros(1, 8)), (whitened, None, torch.eye(8))],
    ids=["carried", "whitened"],
)
def test_buffers_that_are_used_and_then_assigned(forward, part, buffer):
    """The backward pass wants the value that was used."""
    model = Model(forward, copy.deepcopy(part))
    model.register_buffer("carried", buffer)
    assert_trains_alike(model)


def in_a_list(m, x):
    y = m.a(x)
    m.losses.append(y)
    return m.b(y)


def deep(m, x):
    y = m.a(x)
    m.seen = {"layers": {"a": [y]}}
    return m.b(y)


def by_a_hook(model):
    kept = {}
    model.part.a.register_forward_hook(lambda m, i, o: kept.update(a=o))
    return model


@pytest.mark.parametrize(
    "model",
    [
        lambda: Model(through, Part(in_a_list)),
        lambda: Model(through, Part(deep)),
        lambda: by_a_hook(Model(through, Part(lambda m, x: m.b(m.a(x))))),
    ],
    ids=["list", "deep", "hook"],
)
def test_activations_that_an_earlier_call_left(model):
    """A look at the model, a summary: torch refuses to copy what it leaves, which stages need not have."""
    torch.manual_seed(1)
    model = model()
    model.eval()(batches(1)[0][0])
    model.train()
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=batches(1)[0][0])
    with pipe.trainer(loss_of, SGD, method="bp", executor="inline") as trainer:
        for x, y in batches():
            trainer.step(x, y)
    assert len(trainer.losses) == 4
    torch.manual_seed(1)
    plain = Model(through, Part(lambda m, x: m.b(m.a(x))))
    plain.eval()(batches(1)[0][0])
    optimizer = SGD(plain.train().parameters())
    for (x, y), loss in zip(batches(), trainer.losses, strict=True):
        optimizer.zero_grad()
        expected = loss_of(plain(x), y)
        expected.backward()
        optimizer.step()
        assert loss == pytest.approx(expected.item(), rel=1e-5)


def assigns_then_decides(m, x):
    m.norm.num_batches_tracked = m.norm.num_batches_tracked + 1
    m.norm.running_mean = 0.9 * m.norm.running_mean + 0.1 * x.mean(0).detach()
    return m.a(x) if x.sum() > 0 else m.b(x - m.norm.running_mean)


def replaces_a_parameter(m, x):
    """As VQ-VAEs move their codebook."""
    m.norm.running_mean = 0.9 * m.norm.running_mean + 0.1 * x.mean(0).detach()
    m.norm.weight = nn.Parameter(0.9 * m.norm.weight + 0.1 * m.norm.running_mean)
    return m.b(x * m.norm.weight.detach())


@pytest.mark.parametrize("function", [assigns_then_decides, replaces_a_parameter])
def test_buffers_assigned_in_a_part_that_is_kept_whole(function):
    """What it had assigned before recording stopped is nothing of the graph."""
    pipe = assert_trains_alike(Model(through, Part(function)))
    assert [name for name, _ in pipe.report.kept_whole] == ["part"]


@pytest.mark.parametrize("called", [False, True], ids=["fresh", "stale"])
def test_a_loss_that_reads_them_is_refused(called):
    model, (x, y) = Model(through, Part(leaves_loss)), batches(1)[0]
    if called:
        model(x)
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    with (
        pytest.raises(ValueError, match=r"loss_fn .* reads 'part\.aux', where the model's forward leaves"),
        pipe.trainer(lambda o, t: F.mse_loss(o, t) + model.part.aux, SGD, executor="inline") as trainer,
    ):
        trainer.step(x, y)
    assert called == hasattr(model.part, "aux")


def halves(m, x):
    lent = {name: p * 0.5 for name, p in m.part.named_parameters()}
    return m.head(torch.func.functional_call(m.part, lent, (m.backbone(x),)))


def makes_weights(m, x):
    x = m.backbone(x)
    made = m.part.a(x.mean(0)).outer(m.part.b(x.mean(0)))
    return m.head(torch.func.functional_call(m.part.a, {"weight": made}, (x,)))


def steps_within(m, x):
    x = m.backbone(x)
    own = dict(m.part.named_parameters())
    slopes = torch.autograd.grad(m.part(x).square().mean(), list(own.values()), create_graph=True)
    ahead = {name: p - 0.1 * g for (name, p), g in zip(own.items(), slopes, strict=True)}
    return m.head(torch.func.functional_call(m.part, ahead, (x,)))


@pytest.mark.parametrize("forward", [halves, makes_weights, steps_within])
def test_layers_that_are_called_with_other_weights(forward):
    part = Part(through) if forward is makes_weights else None
    assert_trains_alike(Model(forward, part))


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


def test_parametrizations_that_are_cached():
    def forward(m, x):
        with parametrize.cached():
            return m.head(m.part(m.part(m.backbone(x))))

    part = nn.Linear(8, 8)
    parametrize.register_parametrization(part, "weight", Symmetric())
    assert_trains_alike(Model(forward, part))


def by_data(mine, theirs):
    mine.data = mine.data * 0.9 + theirs.data * 0.1


def in_place(mine, theirs):
    with torch.no_grad():
        mine.mul_(0.9).add_(theirs, alpha=0.1)


@pytest.mark.parametrize("update", [by_data, in_place])
def test_momentum_encoders(update):
    """As in MoCo and BYOL: frozen weights that follow the trained ones, whichever way they are written."""

    def forward(m, x):
        with torch.no_grad():
            for mine, theirs in zip(m.part.parameters(), m.backbone.parameters(), strict=True):
                update(mine, theirs)
            target = m.part(x)
        y = m.backbone(x)
        return m.head(y), F.mse_loss(y, target)

    model = Model(forward)
    model.part = copy.deepcopy(model.backbone).requires_grad_(False)
    assert_trains_alike(model, stages=3)


class Limited(nn.Module):
    """Embeddings of limited norm, which torch scales down in every forward pass, and other such writes."""

    def __init__(self, write):
        super().__init__()
        self.rows = nn.Embedding(6, 8, max_norm=1.0 if write is None else None)
        self.write = write

    def forward(self, x):
        if self.write is not None:
            self.write(self.rows.weight)
        return x + self.rows(torch.arange(6))


def clamps(weight):
    weight.data.clamp_(min=0)


@pytest.mark.parametrize("write", [None, clamps], ids=["max_norm", "clamp"])
def test_trained_weights_that_forward_writes_to(write):
    """Passes of a decoupled order run on other weights than those that are stepped: writes would be lost."""
    assert_trains_alike(Model(through, Limited(write)))
    model, (x, y) = Model(through, Limited(write)), batches(1)[0]
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    for options in ({}, {"predictor": "none"}, {"method": "fdg"}):
        with (
            pytest.raises(ValueError, match=r"writes to the parameter 'part\.rows\.weight', which is"),
            pipe.trainer(F.mse_loss, SGD, executor="inline", **options) as trainer,
        ):
            trainer.step(x, y)
    model.part.rows.weight.requires_grad_(False)
    with dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x).trainer(
        F.mse_loss, SGD, executor="inline"
    ) as trainer:
        trainer.step(x, y)
