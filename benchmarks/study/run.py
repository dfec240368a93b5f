"""Train the study's runs, one after the other; a finished one is kept, so that the study can be interrupted.

    python benchmarks/study/run.py --images FOLDER [--only "resnet-8-*"] [--out docs/results]

``FOLDER`` holds CIFAR-10 as examples/cifar10.py takes it (groups of text need none). The stages run inline,
with one thread: what is trained is bit for bit what worker processes train. Each run leaves a CSV: a comment
with its settings and where it ran, then a row per epoch.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import argparse
import csv
import dataclasses
import fnmatch
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optimizers
import torch
import torch.nn.functional as F
from runs import RUNS, Run
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import dtrp

if TYPE_CHECKING:
    from why import Watch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import cifar10  # noqa: E402
import language_model  # noqa: E402

Batch = tuple[Tensor, Tensor]
TRAINED_ON, TESTED_ON = 12_800, 2_000  # images
CONTEXT = 64  # bytes of a text
WARM_UP = 0.05  # of the updates


class CutText(nn.Module):
    """The example's GPT with a head of its own: a tied one would hold first and last stage together."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = language_model.GPT(width=128, depth=6, heads=4, context=CONTEXT)
        self.gpt.head.weight = nn.Parameter(self.gpt.tokens.weight.detach().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.gpt(tokens)


def with_group_norm(model: nn.Module) -> nn.Module:
    """BatchNorm replaced by GroupNorm of eight groups: no statistics over a batch."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(8, child.num_features))
    return model


def model_of(run: Run) -> nn.Module:
    """The run's model, with the initial weights of its seed."""
    torch.manual_seed(run.seed)
    if run.model == "gpt-6":
        return CutText()
    net = cifar10.CifarResNet(int(run.model.split("-")[1]))
    return with_group_norm(net) if run.model.endswith("-gn") else net


@cache
def pictures(folder: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The subset: every so many-th image, so that all classes are as frequent as in the whole."""
    found: list[Tensor] = []
    for train, count in ((True, TRAINED_ON), (False, TESTED_ON)):
        images, labels = cifar10.load(Path(folder), train=train)
        chosen = torch.arange(count) * len(labels) // count
        found += [images[chosen], labels[chosen]]
    return tuple(found)  # type: ignore[return-value]


class Texts:
    """An epoch of random windows, the same for the same seed and epoch."""

    def __init__(self, run: Run, epoch: int) -> None:
        self.run, self.data = run, language_model.text()[0]
        self.generator = torch.Generator().manual_seed(1_000_003 * run.seed + epoch)

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.run.batches):
            yield language_model.batch(self.data, self.run.batch_size, CONTEXT, self.generator)


def data_of(run: Run, folder: str | None) -> tuple[Callable[[int], Iterable[Batch]], list[Batch], Any]:
    """Batches by epoch, batches to validate on, and the loss."""
    if run.model == "gpt-6":
        held_out = language_model.text()[1]
        generator = torch.Generator().manual_seed(0)
        tests = [language_model.batch(held_out, 64, CONTEXT, generator) for _ in range(8)]
        return partial(Texts, run), tests, language_model.next_byte_loss
    if folder is None:
        raise SystemExit(f"{run.group} needs --images")
    images, labels, test_images, test_labels = pictures(folder)
    tests = list(zip(cifar10.normalise(test_images).split(500), test_labels.split(500), strict=True))

    def epoch_of(epoch: int) -> Iterable[Batch]:
        return cifar10.Batches(images, labels, run.batch_size, run.seed, epoch)

    return epoch_of, tests, F.cross_entropy


def rate_of(run: Run) -> Callable[[int], float]:
    """The learning rate's factor by update: a warm-up, then a cosine."""
    total = run.epochs * run.batches
    return lambda update: float(
        cifar10.rate(update, schedule="cosine", warm_up=int(WARM_UP * total), total=total)
    )


def train(run: Run, folder: str | None, watch: Watch | None = None) -> Iterator[dict[str, float]]:
    """A row per epoch."""
    batches_of, tests, loss_fn = data_of(run, folder)
    model = model_of(run)
    example = next(iter(batches_of(0)))[0]
    pipe = dtrp.compile(
        model, devices=["cpu"] * run.stages, example_inputs=example, recompute=True, costs="analytic"
    )
    options: dict[str, Any] = {"rebalance": False, **run.trainer}
    if watch is not None:
        options |= watch.options(model, pipe, loss_fn)
    with pipe.trainer(
        loss_fn,
        optimizers.BY_NAME[run.optimizer],
        lr_scheduler=partial(LambdaLR, lr_lambda=rate_of(run)),
        executor="inline",
        threads=1,
        seed=run.seed,
        **options,
    ) as trainer:
        started = time.thread_time()
        for epoch in range(run.epochs):
            before = len(trainer.losses)
            for batch in batches_of(epoch):
                if watch is not None:
                    watch.before(batch, trainer)
                trainer.step(*batch)
            trainer.flush()
            losses = trainer.losses[before:]
            row = {"epoch": epoch + 1, "train_loss": math.fsum(losses) / len(losses)}
            row["cpu_seconds"] = round(time.thread_time() - started, 1)
            found = trainer.evaluate(tests)
            row |= {"test_loss": found["loss"], "accuracy": found.get("accuracy", math.nan)}
            config = trainer.config
            yield row | {
                "order": config.method if config.exact else config.order,
                "parts": config.micro_batches,
            }


def where() -> dict[str, str]:
    """What a number depends on besides the run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return {
        "commit": commit.stdout.strip(),
        "dtrp": dtrp.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", help="folder with CIFAR-10")
    parser.add_argument("--only", default="*", help="pattern of names")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [r for r in RUNS if fnmatch.fnmatch(r.name, args.only)]
    for run in tqdm(wanted, unit="run"):
        path = args.out / f"{run.name}.csv"
        if path.exists():
            continue
        rows = list(tqdm(train(run, args.images), total=run.epochs, desc=run.name, unit="epoch", leave=False))
        aside = path.with_suffix(".part")
        with aside.open("w", newline="", encoding="utf-8") as file:
            file.write(f"# {json.dumps({'run': dataclasses.asdict(run), 'where': where()})}\n")
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        aside.rename(path)


if __name__ == "__main__":
    main()
