"""Which order and how many parts are chosen, and that parts never change what is trained without a word."""

import logging
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dtrp
from dtrp.orders import most_parts
from dtrp.partitioner.devices import DeviceSpec
from dtrp.partitioner.training import Training
from dtrp.runtime.arguments import split_batch
from dtrp.runtime.config import TrainConfig

SGD = partial(torch.optim.SGD, lr=0.05)
BATCH = 12


class Words(nn.Module):
    """Scores for each word of a text."""

    def __init__(self, words=11, width=16):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(4)])
        self.head = nn.Linear(width, words)

    def forward(self, x):
        return self.head(self.layers(self.embed(x)))


def dense(n=6, width=32):
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(n)])


def text(samples=BATCH, length=9):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(11, (samples, length), generator=generator) for _ in range(2)]


def per_word(output, target, **options):
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), **options)


@pytest.fixture
def dear(monkeypatch):
    """Arithmetic is dear, launches and hops are free: parts and "lean" cost nothing."""
    from dtrp.partitioner import calibration

    spec = DeviceSpec("slow", {"float32": 1e5}, 1e15, 0.0, 1e12, 1e15, 0.0, "cpu", 1)
    monkeypatch.setattr(calibration, "calibrate", lambda device, threads=None: spec)


def chosen(model, batch, loss_fn, n_stages=4, **options):
    """(order, parts) of a run of one batch, and the model's weights after it."""
    pipe = dtrp.compile(model, n_gpus=n_stages, example_inputs=batch[0])
    with pipe.trainer(loss_fn, SGD, executor="inline", **options) as trainer:
        trainer.step(*batch)
        trainer.flush()
        return trainer.config.order, trainer.config.micro_batches


@pytest.mark.usefixtures("dear")
class TestWhereTheyAreFree:
    def test_samples_one_by_one_travel_in_parts(self):
        """Else nothing that the issue of delay promises would reach those who set nothing."""
        assert chosen(Words(), text(), per_word) == ("lean", 12)

    def test_batch_statistics_are_of_sixteen_samples(self):
        model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(4)])
        batch = torch.randn(40, 8), torch.randn(40, 8)
        assert chosen(model, batch, F.mse_loss) == ("lean", 2)
        frozen = model.train()
        for m in frozen.modules():
            if isinstance(m, nn.BatchNorm1d):
                m.eval()
        assert chosen(frozen, batch, F.mse_loss) == ("lean", 10)  # twelve would be parts of four, ten of them

    @pytest.mark.parametrize(
        ("loss_fn", "why"),
        [
            (partial(per_word, reduction="sum"), "a sum"),
            (partial(per_word, weight=torch.arange(1.0, 12.0)), "weighted by class"),
            (lambda o, y: per_word(o, y) + (o.mean(0) ** 2).sum(), "of the batch's mean"),
            (lambda o, y: per_word(o, y.masked_fill(y < 0, 0)), "padding counts as a word"),
        ],
        ids=lambda x: x if isinstance(x, str) else "",
    )
    def test_a_loss_that_is_no_mean_keeps_the_batch_whole(self, loss_fn, why):
        """Parts would train something else, silently."""
        assert chosen(Words(), text(), loss_fn)[1] == 1, why

    @pytest.mark.parametrize(
        ("executor", "reduction"), [("inline", "mean"), ("workers", "mean"), ("inline", "none")]
    )
    def test_targets_that_a_function_of_the_users_leaves_out(self, executor, reduction):
        """What its call of torch's loss ignores is found as where the loss itself is torch's; the parts'
        shares were counted by -100, which trained something else. A mean of its own over all counts all."""

        def padded(output, target):
            return per_word(output, target, ignore_index=0, reduction=reduction).mean()

        x, y = text()
        y = y.clamp(min=1)
        y[torch.arange(9) >= torch.arange(BATCH)[:, None] % 8 + 2] = 0
        torch.manual_seed(0)
        model = Words()
        plain = deepcopy(model)
        optimizer = SGD(plain.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            padded(plain(x), y).backward()
            optimizer.step()
        pipe = dtrp.compile(model, n_gpus=2, example_inputs=x)
        with pipe.trainer(padded, SGD, method="1f1b", micro_batches=4, executor=executor) as trainer:
            for _ in range(3):
                trainer.step(x, y)
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        # By itself a batch stays whole where the loss takes no target of -100, with which it is tried.
        assert chosen(Words(), (x, y), padded) == ("lean", 12 if reduction == "mean" else 1)

    @pytest.mark.parametrize("way", ["tuple", "extra", "padding", "none"])
    def test_a_mask_that_is_full_in_the_first_batch(self, way):
        """Divided by its sum, it makes no mean over samples in those that come after."""

        def first_word(output, target):
            return F.cross_entropy(output[:, 0], target, reduction="none")

        def masked(output, target, mask=None):
            if way == "tuple":
                target, mask = target
            elif way == "padding":
                target, mask = target.clamp(min=0), (target >= 0).float()
            return (first_word(output, target) * mask).sum() / mask.sum()

        def every(output, target):
            return first_word(output, target).mean()

        x, y = text()
        y, ones = y[:, 0], torch.ones(BATCH)
        pipe = dtrp.compile(Words(), n_gpus=4, example_inputs=x)
        with pipe.trainer(every if way == "none" else masked, SGD, executor="inline") as trainer:
            extra = {"extra": {"mask": ones}} if way == "extra" else {}
            trainer.step(x, (y, ones) if way == "tuple" else y, **extra)
            assert trainer.config.micro_batches == (12 if way == "none" else 1)

    def test_a_model_that_mixes_samples_keeps_the_batch_whole(self):
        class Centred(nn.Module):
            def __init__(self):
                super().__init__()
                self.inside = dense()

            def forward(self, x):
                return self.inside(x - x.mean(0))

        x = torch.randn(BATCH, 32)
        assert chosen(Centred(), (x, x), F.mse_loss)[1] == 1

    def test_a_model_with_a_loss_of_its_own_keeps_the_batch_whole(self):
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.inside = dense()

            def forward(self, x, y):
                return F.mse_loss(self.inside(x), y)

        x = torch.randn(BATCH, 32)
        pipe = dtrp.compile(Own(), n_gpus=2, example_inputs=(x, x))
        with pipe.trainer(None, SGD, executor="inline") as trainer:
            trainer.step(x, x)
            assert trainer.config.micro_batches == 1

    def test_parts_that_were_asked_for_are_kept_with_a_warning(self, caplog):
        """The user's word counts, and the user is told."""
        with caplog.at_level(logging.WARNING, "dtrp"):
            assert chosen(Words(), text(), partial(per_word, reduction="sum"), micro_batches=3)[1] == 3
        assert "the loss is not the mean over the samples" in caplog.text

    def test_the_try_leaves_model_loss_and_generators_alone(self, monkeypatch):
        """It runs them: a counter, a buffer or a random number that it used would change training."""

        class Counts(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, x):
                self.calls.add_(1)
                return x + 0 * torch.rand(())

        class Counting(nn.MSELoss):
            def __init__(self):
                super().__init__()
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, output, target):
                self.calls += 1
                return super().forward(output, target) * (1 + 0.01 * self.calls)

        def trained():
            torch.manual_seed(0)
            model = nn.Sequential(dense(), Counts(), dense())
            batch = torch.randn(BATCH, 32), torch.randn(BATCH, 32)
            loss = Counting()
            chosen(model, batch, loss, n_stages=2, schedule="lean", seed=1, micro_batches=4)
            assert loss.calls == 4
            return model.state_dict(), torch.rand(3)

        def queued():
            """Of a function that keeps what it saw, as MoCo's queue."""
            count, seen = [0], torch.zeros(32)

            def loss(output, target):
                count[0] += 1
                seen.lerp_(output.detach().mean(0), 0.1)
                return F.mse_loss(output, target) * count[0] + (output.mean(0) * seen.clone()).sum()

            torch.manual_seed(0)
            model = dense()
            batch = torch.randn(BATCH, 32), torch.randn(BATCH, 32)
            once = model(batch[0]).mean(0) * 0.1
            assert chosen(model, batch, loss)[1] == 1
            assert count == [1]
            torch.testing.assert_close(seen, once.detach())

        queued()
        state, drawn = trained()
        monkeypatch.setattr("dtrp.orders.differs_in_parts", lambda *args: "")
        expected, wanted = trained()
        assert torch.equal(drawn, wanted)
        assert all(torch.equal(state[name], expected[name]) for name in state)

    def test_a_saved_run_goes_on_in_its_order(self, tmp_path):
        """Another order or number of parts after a restart would be another run."""
        batch = text()

        def trainer(**options):
            torch.manual_seed(0)
            pipe = dtrp.compile(Words(), n_gpus=3, example_inputs=batch[0])
            return pipe.trainer(per_word, SGD, executor="inline", seed=1, **options)

        with trainer(schedule="fig1", micro_batches=3) as first:
            first.step(*batch)
            first.save(tmp_path / "run")
        with trainer() as second:
            second.load(tmp_path / "run")
            second.step(*batch)
            assert (second.config.order, second.config.micro_batches) == ("fig1", 3)
        with trainer(micro_batches=2) as third:
            third.load(tmp_path / "run")
            third.step(*batch)
            assert (third.config.order, third.config.micro_batches) == ("fig1", 2)


def test_tiny_stages_get_the_papers_order_whole():
    """Where a hop takes longer than a tick, fewer batches in flight would leave stages idle."""
    x = torch.randn(4, 32)
    assert chosen(dense(), (x, x), F.mse_loss) == ("fig1", 1)


@pytest.mark.parametrize(
    ("slot", "order", "adaptive", "parts"),
    [
        (0.001, "auto", False, 12),  # next to free: until the delay is a quarter of an update
        (0.01, "auto", False, 6),  # a twentieth of a tick is always spent
        (0.06, "auto", False, 2),  # more where it pays: 1.06 x 1.04 beats 1 x 1.12 and 1.12 x 1.02
        (0.03, "auto", False, 2),
        (0.03, "fig1", False, 3),  # older weights, dearer delay
        (0.2, "auto", False, 1),  # a tick 1.2 times as long buys less than it costs
        (0.2, "auto", True, 3),
        (0.05, "auto", True, 5),  # but not with Adam, which delay costs dear
    ],
)
def test_parts_are_worth_what_they_cost(slot, order, adaptive, parts):
    """Else a run is slower to the same loss than it has to be, either way."""
    pipe = dtrp.compile(dense(8, 64), n_gpus=4, example_inputs=torch.randn(8, 64))
    config = TrainConfig(loss_fn=F.mse_loss, optimizer=SGD, micro_batches="auto", order=order)
    training = Training(adaptive=adaptive)
    now = [replace(stage, tick_time=1e-2, slot_time=slot * 1e-2) for stage in pipe.report.stages]
    assert most_parts(now, training, config, 1000) == parts
    now = [replace(stage, tick_time=1e-2 * (1 + 4 * slot)) for stage in now]
    assert most_parts(now, training, config, 1000, priced=5) == parts  # as timed in five


@pytest.mark.parametrize("slot", [0.001, 0.01, 0.03, 0.035, 0.05, 0.2])
def test_only_numbers_of_parts_that_come_about_are_compared(slot):
    """Sixteen samples in five parts are four of four, whose delay is another, and costs other epochs."""
    pipe = dtrp.compile(dense(8, 64), n_gpus=4, example_inputs=torch.randn(8, 64))
    config = TrainConfig(loss_fn=F.mse_loss, optimizer=SGD, micro_batches="auto", order="auto")
    training = Training(adaptive=True, order="lean")
    now = [replace(stage, tick_time=1.0, slot_time=slot) for stage in pipe.report.stages]
    cost = {n: (1 + (n - 1) * slot) * replace(training, micro_batches=n).price(4) for n in (1, 2, 3, 4, 6, 8)}
    chosen = most_parts(now, training, config, 16)
    assert len(list(split_batch([torch.zeros(16, 1)], None, chosen))) == chosen
    if slot > 0.02:  # else a twentieth of a tick buys more
        assert cost[chosen] == min(cost.values())


def test_shares_count_the_targets_that_are_not_ignored():
    """The mean of the parts' means is the whole's mean, as cross-entropy takes it."""
    x, y = text()
    for i in range(BATCH):
        y[i, i % 9 + 1 :] = -100
    output = Words()(x)
    whole = per_word(output, y)
    for parts in (2, 3, 6, 12):
        cut = list(split_batch([output], y, parts))
        assert len(cut) == parts
        total = sum(share * per_word(o[0], t) for o, t, share in cut)
        torch.testing.assert_close(total, whole)


def test_a_part_without_a_target_that_counts_is_not_cut_off():
    """Its mean would be 0 / 0."""
    x, y = text()
    y[: BATCH // 2] = -100
    assert [share for *_, share in split_batch([x], y, 2)] == [1.0]


def test_few_samples_make_fewer_parts():
    x = torch.randn(20, 3)
    assert [len(part[0]) for part, *_ in split_batch([x], None, 4, least=16)] == [16, 4]


@pytest.mark.parametrize(("parts", "first"), [(4, 12), ("auto", 64)])
def test_no_sample_is_alone_under_batch_normalisation(dear, parts, first):
    """A last batch that the plain loop takes: torch refuses the statistics of one sample."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(4)])
    pipe = dtrp.compile(model, n_gpus=4, example_inputs=torch.randn(first, 8))
    optimizer = partial(torch.optim.AdamW, lr=0.01)
    with pipe.trainer(F.mse_loss, optimizer, micro_batches=parts, executor="inline") as trainer:
        for samples in (first, 5, 3, 2, 17, 33):
            trainer.step(torch.randn(samples, 8), torch.randn(samples, 8))
        assert trainer.config.micro_batches > 1
    assert len(trainer.losses) == 6


@pytest.mark.parametrize(("least", "sizes"), [(1, [2, 2, 1]), (2, [2, 3])])
def test_shares_of_a_longer_last_part(least, sizes):
    samples = 5
    x, y = torch.randn(samples, 3), torch.arange(samples) % 3
    y[0] = -100
    cut = list(split_batch([x], y, 3, least=least))
    assert [len(part[0]) for part, *_ in cut] == sizes
    total = sum(share * F.cross_entropy(part[0], wanted) for part, wanted, share in cut)
    torch.testing.assert_close(total, F.cross_entropy(x, y))


def test_an_input_that_is_as_long_as_the_batch_by_chance_is_not_cut():
    """Positions of a text with as many words as there are texts."""
    x, positions = torch.randn(5, 5), torch.arange(5)
    cut = list(split_batch([x, positions], None, 2, along=[True, False]))
    assert [len(p[1]) for p, *_ in cut] == [5, 5]


@pytest.mark.usefixtures("dear")
def test_old_weights_are_warned_of_where_they_are_dear(caplog):
    """Known to lose: nobody should find it out after a week."""
    x = torch.randn(1, 32)  # of which no parts can be made
    adam = partial(torch.optim.AdamW, lr=1e-3)
    muon = torch.optim.Muon  # takes matrices alone
    matrices = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(6)])
    for model, optimizer, told in ((dense(), adam, True), (dense(), SGD, False), (matrices, muon, False)):
        caplog.clear()
        pipe = dtrp.compile(model, n_gpus=4, example_inputs=x)
        with pipe.trainer(F.mse_loss, optimizer, executor="inline") as trainer:
            trainer.step(x, x)
        assert ("weights are 3 updates old" in caplog.text) is told


@pytest.mark.usefixtures("dear")
@pytest.mark.parametrize("settings", [{"method": "bp"}, {"method": "1f1b"}, {"accumulate": 6}], ids=str)
def test_no_warning_of_delay_that_is_not_there(settings, caplog):
    """A false alarm would send users away from the very settings that avoid delay."""
    x = torch.randn(1, 32)
    pipe = dtrp.compile(dense(), n_gpus=4, example_inputs=x)
    with pipe.trainer(F.mse_loss, torch.optim.AdamW, executor="inline", **settings) as trainer:
        trainer.step(x, x)
    assert "updates old" not in caplog.text


@pytest.mark.usefixtures("dear")
def test_delay_that_was_asked_for_is_warned_of_too(caplog):
    """Who pins the order and the parts has not thereby been told what they cost with Adam."""
    x = torch.randn(40, 32)
    pipe = dtrp.compile(dense(), n_gpus=4, example_inputs=x)
    settings = {"schedule": "lean", "micro_batches": 1}
    with pipe.trainer(F.mse_loss, torch.optim.AdamW, executor="inline", **settings) as trainer:
        trainer.step(x, x)
    assert "weights are 3 updates old" in caplog.text


class Graph(nn.Module):
    """Edges name rows of the nodes."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, nodes, edges):
        h = self.one(nodes)
        return self.two(torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])).mean()[None]


def test_parts_that_the_model_cannot_take_are_refused(capfd):
    """They went to the stages, one of which failed, behind a page of torch.fx's."""
    nodes, edges = torch.randn(12, 4), torch.randint(8, 12, (2, 30))
    pipe = dtrp.compile(Graph(), n_gpus=2, example_inputs=(nodes, edges))
    with (
        pipe.trainer(F.mse_loss, SGD, executor="inline", micro_batches=4) as trainer,
        pytest.raises(ValueError, match="fails with the first part: IndexError") as caught,
    ):
        trainer.step(nodes, edges, torch.zeros(1))
    assert "they are 12, 2 long there" in str(caught.value)
    assert "use micro_batches=1" in str(caught.value)
    assert "FX-traced" not in capfd.readouterr().err


def test_what_is_advised_can_be_done(caplog):
    """Six parts or more were advised where a batch has four samples, or is not cut at all."""
    caplog.set_level(logging.WARNING, "dtrp")
    adam = partial(torch.optim.AdamW, lr=1e-3)

    def trained(samples, loss_fn):
        caplog.clear()
        x = torch.randn(samples, 32)
        pipe = dtrp.compile(dense(), n_gpus=4, example_inputs=x)
        with pipe.trainer(loss_fn, adam, executor="inline", schedule="fig1") as trainer:
            trainer.step(x, x)
        return caplog.text

    assert "micro_batches=6 or more, fewer stages" in trained(12, F.mse_loss)
    assert "micro_batches" not in trained(4, F.mse_loss)


def test_batch_statistics_of_parts_are_told(caplog):
    """The orders are exact, and BatchNorm sees the parts all the same."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)), torch.randn(8, 4)
    pipe = dtrp.compile(model, n_gpus=2, example_inputs=x)
    for parts, told in ((1, False), (2, True)):
        caplog.clear()
        with pipe.trainer(F.mse_loss, SGD, method="gpipe", micro_batches=parts, executor="inline") as trainer:
            trainer.step(x, x)
        assert ("BatchNorm takes its statistics from each part" in caplog.text) == told
