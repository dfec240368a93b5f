"""The examples' own pieces: their models, data and schedules. The whole of them is run by .ci/run."""

import importlib.util
import math
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example():
    return {path.stem: load(path) for path in EXAMPLES}


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("path", [*EXAMPLES, ROOT / "benchmarks" / "throughput.py"], ids=lambda p: p.stem)
def test_each_script_explains_itself(path, monkeypatch, capsys):
    module = load(path)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    assert module.__doc__.splitlines()[0] in capsys.readouterr().out


class TestQuickstart:
    def test_data_are_disjoint_scaled_and_shuffled_by_seed(self, example):
        train, test = example["quickstart"].digits(32, seed=0)
        assert (len(train.dataset), len(test.dataset)) == (1437, 360)
        images, labels = next(iter(train))
        assert images.shape == (32, 1, 8, 8)
        assert images.min() >= 0
        assert images.max() == 1
        assert labels.dtype == torch.long
        again, _ = example["quickstart"].digits(32, seed=0)
        assert torch.equal(next(iter(again))[0], images)
        other, _ = example["quickstart"].digits(32, seed=1)
        assert not torch.equal(next(iter(other))[0], images)

    def test_the_skip_is_used(self, example):
        torch.manual_seed(0)
        model = example["quickstart"].DigitsNet().eval()
        x = torch.randn(2, 1, 8, 8)
        with torch.no_grad():
            model.high[0].weight.zero_()  # cuts the deep path
            assert not torch.allclose(model(x), model(x + torch.randn_like(x)))

    def test_schedule_warms_up_and_ends_at_zero(self, example):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = example["quickstart"].warm_up_then_cosine(optimizer, warm_up=10, total=100)
        rates = []
        for _ in range(100):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        assert all(a < b for a, b in pairwise(rates[:9]))
        assert all(a > b for a, b in pairwise(rates[10:]))
        assert schedule.get_last_lr()[0] == 0


class TestUNet:
    def test_every_level_is_skipped_around(self, example):
        torch.manual_seed(0)
        model = example["custom_architecture"].UNet().eval()
        x = torch.randn(1, 3, 32, 32)
        assert model(x).shape == (1, 4, 32, 32)
        with torch.no_grad():
            for merge, up in zip(model.merge, model.up, strict=True):
                before = model(x)
                outputs = up.out_channels  # the skip's half of the joined channels comes first
                merge[0].weight[:, :outputs] = 0
                assert not torch.equal(model(x), before)

    def test_shapes_are_labelled_where_they_are_drawn(self, example):
        images, labels = example["custom_architecture"].shapes(64, 48, torch.Generator().manual_seed(0))
        assert images.shape == (64, 3, 48, 48)
        assert labels.unique().tolist() == [0, 1, 2, 3]
        assert images[:, 0][labels == 0].max() <= 0.5
        assert 0.02 < float((labels > 0).float().mean()) < 0.5

    def test_mean_iou_of_a_perfect_answer_is_one(self, example):
        module = example["custom_architecture"]
        images, labels = module.shapes(16, 48, torch.Generator().manual_seed(0))

        class Oracle(torch.nn.Module):
            def forward(self, _):
                return torch.nn.functional.one_hot(labels, 4).permute(0, 3, 1, 2).float()

        assert module.mean_iou(Oracle(), images, labels) == 1


class TestGPT:
    def test_is_causal_and_tied(self, example):
        torch.manual_seed(0)
        model = example["language_model"].GPT(width=32, depth=2, context=16)
        assert model.head.weight is model.tokens.weight
        tokens = torch.randint(256, (2, 16))
        changed = tokens.clone()
        changed[:, 9] = (changed[:, 9] + 1) % 256
        a, b = model(tokens), model(changed)
        torch.testing.assert_close(a[:, :9], b[:, :9])
        assert not torch.allclose(a[:, 9:], b[:, 9:])

    def test_starts_at_the_loss_of_guessing(self, example):
        module = example["language_model"]
        torch.manual_seed(0)
        train, validation = module.text()
        assert len(train) > 100_000
        assert len(validation) > 20_000
        model = module.GPT(width=32, depth=2, context=16)
        assert module.validate(model, validation, 16) == pytest.approx(math.log(256), rel=0.02)

    def test_targets_are_the_next_bytes(self, example):
        module = example["language_model"]
        train, _ = module.text()
        x, y = module.batch(train, 8, 16, torch.Generator().manual_seed(0))
        assert torch.equal(x[:, 1:], y[:, :-1])


class TestCifar10:
    @pytest.mark.parametrize(
        ("name", "parameters"),
        [
            # Millions of parameters as He et al. 2016 and Zagoruyko and Komodakis 2016 print them.
            ("resnet20", 0.27),
            ("resnet56", 0.85),
            ("resnet110", 1.7),
            pytest.param("resnet1202", 19.4, marks=pytest.mark.slow),
            ("resnet18", 11.2),
            ("wrn-28-10", 36.5),
        ],
    )
    def test_sizes_are_the_published_ones(self, example, name, parameters):
        with torch.device("meta"):
            model = example["cifar10"].MODELS[name]()
        assert count(model) / 1e6 == pytest.approx(parameters, rel=0.02)
        assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)

    def test_depth_must_fit(self, example):
        with pytest.raises(ValueError, match=r"6n \+ 2 .*, not 21"):
            example["cifar10"].CifarResNet(21)
        with pytest.raises(ValueError, match=r"6n \+ 4 .*, not 27"):
            example["cifar10"].WideResNet(27, 1)

    def test_option_a_shortcut_keeps_the_input(self, example):
        block = example["cifar10"].BasicBlock(4, 8, stride=2).eval()
        torch.nn.init.zeros_(block.conv2.weight)
        x = torch.rand(1, 4, 8, 8)
        y = block(x)
        torch.testing.assert_close(y[:, :4], x[:, :, ::2, ::2])
        assert not y[:, 4:].any()

    def test_reads_an_image_folder(self, example, tmp_path):
        image_module = pytest.importorskip("PIL.Image")
        for kind, shade in (("bird", 10), ("cat", 200)):
            (tmp_path / "train" / kind).mkdir(parents=True)
            for i in range(2):
                picture = np.full((32, 32, 3), shade, dtype=np.uint8)
                image_module.fromarray(picture).save(tmp_path / "train" / kind / f"{i}.png")
        images, labels = example["cifar10"].load(tmp_path, train=True)
        assert images.shape == (4, 3, 32, 32)
        assert images.dtype == torch.uint8
        assert labels.tolist() == [0, 0, 1, 1]
        assert images[:, 0, 0, 0].tolist() == [10, 10, 200, 200]

    def test_a_folder_without_data_is_named(self, example, tmp_path):
        with pytest.raises(SystemExit, match=r"holds neither train/ and test/ folders"):
            example["cifar10"].load(tmp_path, train=True)

    def test_augmented_images_are_crops_or_their_mirror(self, example):
        images = torch.randint(1, 256, (16, 3, 32, 32), dtype=torch.uint8)
        out = example["cifar10"].augment(images, torch.Generator().manual_seed(0))
        padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
        for picture, source in zip(out, padded, strict=True):
            crops = source.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 32, 32)
            both = torch.cat([crops, crops.flip(-1)])
            assert (both == picture).flatten(1).all(1).sum() == 1

    def test_batches_depend_on_seed_and_epoch_alone(self, example):
        images, labels = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8), torch.arange(10)

        def run(seed, epoch):
            return list(example["cifar10"].Batches(images, labels, 4, seed, epoch))

        first, again = run(0, 1), run(0, 1)
        assert [len(y) for _, y in first] == [4, 4, 2]
        assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
        assert sorted(torch.cat([y for _, y in first]).tolist()) == list(range(10))
        for other in (run(0, 2), run(1, 1)):
            assert not torch.equal(torch.cat([y for _, y in other]), torch.cat([y for _, y in first]))

    def test_rates(self, example):
        rate = example["cifar10"].rate
        step = [rate(i, schedule="step", warm_up=10, total=100) for i in (0, 9, 10, 49, 50, 74, 75, 99)]
        assert step == pytest.approx([0.1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
        cosine = [rate(i, schedule="cosine", warm_up=10, total=110) for i in (4, 10, 60, 110, 200)]
        assert cosine == pytest.approx([0.5, 1, 0.5, 0, 0])

    def test_the_newest_checkpoint_wins_and_the_older_go(self, example, tmp_path):
        class Trainer:
            def save(self, path):
                path.write_text("weights")

        module = example["cifar10"]
        assert module.newest_checkpoint(tmp_path) == (0, None)
        for epoch in (1, 2, 10):
            module.save_checkpoint(Trainer(), tmp_path, epoch)
        assert [path.name for path in tmp_path.iterdir()] == ["epoch-10.ckpt"]
        (tmp_path / "epoch-9.ckpt").touch()
        assert module.newest_checkpoint(tmp_path) == (10, tmp_path / "epoch-10.ckpt")

    def test_rows_share_one_header(self, example, tmp_path):
        path = tmp_path / "deep" / "runs.csv"
        for epoch in (1, 2):
            example["cifar10"].write_row(path, {"epoch": epoch, "loss": 0.5})
        assert path.read_text().splitlines() == ["epoch,loss", "1,0.5", "2,0.5"]
