"""Linear layers that stages share: a vocabulary's head that takes longer than a stage's whole share."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import dtrp
from dtrp.errors import CaptureError, PlanMismatchError
from dtrp.partitioner.capture import capture
from dtrp.partitioner.compiler import Request, compile_model
from dtrp.partitioner.costs import cost_graph
from dtrp.partitioner.devices import device_spec
from dtrp.partitioner.hazards import find_hazards
from dtrp.partitioner.heavy import heavy_linears
from dtrp.partitioner.links import Links
from dtrp.partitioner.planner import make_plan
from dtrp.partitioner.report import PartitionReport

WORDS = 4096


class Words(nn.Module):
    """A small decoder whose head is most of it."""

    def __init__(self, width=16, layers=3, words=WORDS, bias=True, tied=False, p=0.0):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.body = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        self.drop = nn.Dropout(p)
        self.head = nn.Linear(width, words, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.drop(torch.relu(self.body(self.embed(tokens)))))


def shared_plan(model, x, n_stages):
    """A plan on which several stages share the head, whatever this machine would plan."""
    spec = device_spec("A100-80GB")
    captured = capture(model, (x,), {}, divided={"head": 6})
    graph = cost_graph(captured, device=spec)
    plan = make_plan(
        captured, graph, find_hazards(captured), n_stages, devices=[spec] * n_stages, memory_limit=None
    )
    parts = {stage for node, stage in plan.stage_of.items() if plan.modules[node] == "head"}
    assert len(parts) > 1  # else nothing of this is tried
    return plan


def loss(output, target):
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def test_a_heavy_head_no_longer_bounds_eight_stages():
    """GPT with 50,304 words on devices like an A100: the head alone took twice a stage's share."""
    spec = device_spec("A100-80GB")
    with torch.device("meta"):
        blocks = nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True)
        model = nn.Sequential(
            nn.Embedding(50304, 768),
            *(copy.deepcopy(blocks) for _ in range(12)),
            nn.Linear(768, 50304, bias=False),
        )
        x = torch.zeros(4, 512, dtype=torch.int64)

    def report(divided):
        captured = capture(model, (x,), {}, divided=divided)
        graph = cost_graph(captured, device=spec)
        plan = make_plan(captured, graph, find_hazards(captured), 8, devices=[spec] * 8, recompute=False)
        return PartitionReport.of(captured, graph, plan), heavy_linears(captured, graph, 8)

    whole, heavy = report({})
    assert list(heavy) == ["13"]
    assert "split_linear=True" in str(whole)
    shared, _ = report(heavy)
    assert whole.balance < 0.6
    assert shared.balance >= 0.9
    assert shared.tick_time < 0.6 * whole.tick_time
    assert f"13 is computed in {heavy['13']} parts" in str(shared)


@settings(deadline=None)
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    now=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    parts=st.integers(1, 7),
    bias=st.booleans(),
)
def test_parts_add_up_to_the_layer(rows, now, parts, bias):
    """At any number of rows, fewer than parts too; outputs and gradients are the layer's."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, bias=bias)).double()
    captured = capture(model, (torch.randn(*rows, 3).double(),), {}, divided={"1": parts})
    now = (now * 3)[: len(rows)]
    x = torch.randn(*now, 3).double()
    whole, divided = model(x), captured.train(x)
    torch.testing.assert_close(divided, whole)
    weights = torch.randn_like(whole)
    wanted = torch.autograd.grad((whole * weights).sum(), list(model.parameters()))
    given = torch.autograd.grad((divided * weights).sum(), list(model.parameters()))
    torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n_stages", [2, 4])
def test_training_equals_the_plain_loop(n_stages, tied):
    """Stages that share a weight sum its gradients; sequences of other lengths, shorter than the parts."""
    torch.manual_seed(0)
    model = Words(tied=tied).double()
    reference = copy.deepcopy(model)
    x = torch.randint(WORDS, (4, 24))
    plan = shared_plan(model, x, n_stages)
    batches = [torch.randint(WORDS, (b, n)) for b, n in ((4, 24), (4, 7), (3, 1), (1, 5), (4, 30))] * 3
    make = partial(torch.optim.SGD, lr=0.2, momentum=0.9)
    optimizer, losses = make(reference.parameters()), []
    for batch in batches:
        optimizer.zero_grad()
        losses.append(loss(reference(batch), batch))
        losses[-1].backward()
        optimizer.step()
    pipe = dtrp.compile(model, devices=["cpu"] * n_stages, example_inputs=x, plan=plan)
    with pipe.trainer(loss, make, method="bp", executor="inline") as trainer:
        for batch in batches:
            trainer.step(batch, batch)
        trainer.flush()
    torch.testing.assert_close(
        torch.tensor(trainer.losses, dtype=torch.float64), torch.stack(losses).detach()
    )
    for (name, mine), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, msg=name)


def test_workers_train_the_same_bits(tmp_path):
    """Decoupled; saved by one, loaded by the other, the weight that is shared once under its own name."""
    x = torch.randint(WORDS, (4, 24), generator=torch.Generator().manual_seed(0))
    after = []
    for executor in ("inline", "workers"):
        torch.manual_seed(0)
        model = Words(p=0.1)
        pipe = dtrp.compile(model, devices=["cpu"] * 3, example_inputs=x, plan=shared_plan(model, x, 3))
        with pipe.trainer(
            loss, torch.optim.AdamW, executor=executor, seed=0, rebalance=False, threads=1
        ) as trainer:
            for n in (24, 9, 30, 2, 24, 24, 5):
                trainer.step(x[:, :n], x[:, :n])
            trainer.save(tmp_path / f"{executor}.ckpt")
            evaluated = trainer.evaluate([(x, x)])
        after.append((model.state_dict(), trainer.losses, evaluated))
    (mine, losses, found), (theirs, other_losses, other_found) = after
    assert losses == other_losses
    assert found == other_found
    assert mine.keys() == Words().state_dict().keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
    dtrp.load_weights(again := Words(), tmp_path / "workers.ckpt")
    assert torch.equal(again.head.weight, mine["head.weight"])


def test_a_plan_remembers(tmp_path):
    """Also in other modes, which are captured later, and in a file."""
    model = Words(p=0.5)
    x = torch.randint(WORDS, (4, 24))
    shared_plan(model, x, 3).save(tmp_path / "plan.json")
    pipe = dtrp.compile(model, devices=["cpu"] * 3, example_inputs=x, plan=tmp_path / "plan.json")
    assert pipe.plan.divided == {"head": 6}
    model.drop.eval()
    torch.testing.assert_close(pipe(x), model(x))
    model.eval()
    torch.testing.assert_close(pipe(x[:2, :3]), model(x[:2, :3]))
    assert [stage.submodules.count("head") for stage in pipe.stages].count(1) > 1


def test_a_plan_for_another_head_is_refused():
    """Its parts would leave out what the new layer does."""
    model, x = Words(), torch.randint(WORDS, (4, 24))
    plan = shared_plan(model, x, 3)
    model.head = Hooked(16, WORDS)
    with pytest.raises(CaptureError, match="was to be computed in parts, as a Linear layer, but is a Hooked"):
        capture(model, (x,), {}, divided=plan.divided)
    with pytest.raises(PlanMismatchError, match="computes 'head' in parts, which is no Linear layer"):
        dtrp.compile(model, devices=["cpu"] * 3, example_inputs=x, plan=plan)


def compiled(model, x, split_linear):
    """On four devices like an A100, which nobody has here."""
    devices, how = (torch.device("cpu"),) * 4, {"split_linear": split_linear, "named": "A100-80GB"}
    request = Request(devices, None, False, "analytic", Links(), None, **how)
    return compile_model(model, request, (x,), {})


class Hooked(nn.Linear):
    """No longer torch's own."""


@pytest.mark.parametrize("kind", ["hook", "class", "vector", "parametrized"])
def test_what_is_not_divided(kind):
    """Only what surely computes each row alone, by the weight: the graph would skip the rest."""
    model = Words()
    if kind == "hook":
        model.head.register_forward_hook(lambda module, args, output: output * 2)
    elif kind == "class":
        model.head = Hooked(16, WORDS)
    elif kind == "parametrized":
        nn.utils.parametrizations.weight_norm(model.head)
    x = torch.randint(WORDS, (24,) if kind != "vector" else ())
    captured = capture(model, (x,), {})
    graph = cost_graph(captured, device=device_spec("A100-80GB"))
    heavy = heavy_linears(captured, graph, 4)
    assert ("head" in heavy) == (kind == "vector")
    if kind == "vector":  # one row cannot be divided
        with pytest.raises(CaptureError):
            capture(model, (x,), {}, divided=heavy)
        assert "forward" not in vars(model.head)


def test_the_model_is_left_as_it_was():
    model = Words()
    before = dict(vars(model.head))
    capture(model, (torch.randint(WORDS, (4, 24)),), {}, divided={"head": 3})
    assert vars(model.head) == before


def test_only_who_asks_for_it_gets_it():
    """The results are the model's but for rounding; without it they are the model's to the bit."""
    model, x = Words(words=32768, width=64), torch.randint(WORDS, (32, 256))
    whole, shared = (compiled(model, x, asked) for asked in (False, True))
    assert whole.plan.divided == {}
    assert shared.plan.divided.keys() == {"head"}
    assert shared.report.tick_time < whole.report.tick_time
    with pytest.raises(TypeError, match="split_linear=1: expected True or False"):
        dtrp.compile(model, 2, split_linear=1)
