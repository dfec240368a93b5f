"""docs/results.md from the study's CSVs.

python benchmarks/study/tables.py            # writes it
python benchmarks/study/tables.py --check    # status 1 if it does not agree with the CSVs
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parent.parent.parent
CSVS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "results.md"

HEAD = """\
# What decoupling costs, and what takes the cost away

Written by `python benchmarks/study/tables.py` from the files in [results/](results); each holds one run's
settings, commit, versions and hardware in its first line, then a row per epoch. `python
benchmarks/study/run.py --images FOLDER` trains what is missing (FOLDER: CIFAR-10 as images). Runs of one
seed see the same batches from the same weights.

**bp** is exact back-propagation; **bp, 4 parts** too, with the batch in four micro-batches (for BatchNorm
another training than whole batches, and the reference of what travels in four parts). **default** is dtrp
with every setting left alone; *order* and *parts* say what it chose on that machine. **lean**, **fig1**:
that order, whole batches; **fig1** is the paper's DTRP. **dtr**: without prediction. **fdg**, **adl**: the
earlier schemes, in the paper's order. All of them recompute but fdg and adl.

*train loss* is the mean over the last epoch's batches, *test loss* and *accuracy* are of held-out data at
the end; ± is the standard deviation over seeds. *price*: the epochs of this run, divided by those after
which back-propagation in as many parts had the same training loss (between epochs: a straight line; at most
1.00 where this run's is lower).
"""


@dataclass(frozen=True)
class Result:
    """One finished run."""

    run: dict[str, Any]
    where: dict[str, str]
    rows: list[dict[str, str]]

    @classmethod
    def read(cls, path: Path) -> Result:
        with path.open(encoding="utf-8", newline="") as file:
            head = json.loads(file.readline().removeprefix("# "))
            return cls(head["run"], head["where"], list(csv.DictReader(file)))

    @property
    def curve(self) -> list[float]:
        """Training loss by epoch."""
        return [float(row["train_loss"]) for row in self.rows]

    @property
    def key(self) -> tuple[Any, ...]:
        """Of back-propagation that this is compared with: in as many parts, where there is BatchNorm."""
        statistics = self.run["model"].startswith("resnet-") and not self.run["model"].endswith("-gn")
        parts = int(self.rows[-1]["parts"]) if statistics else 1
        optimizer = self.run["optimizer"].removesuffix(" with error feedback")
        return self.run["model"], optimizer, self.run["epochs"], self.run["seed"], parts

    def last(self, column: str) -> float:
        return float(self.rows[-1][column])


def price(curve: Sequence[float], reference: Sequence[float]) -> float:
    """Epochs of ``curve`` over those at which ``reference`` had its last loss; at most 1 if it never did.

    >>> price([3.0, 2.5], [3.0, 2.0])
    1.3333333333333333
    """
    reached = curve[-1]
    for e, (before, after) in enumerate(pairwise(reference), start=1):
        if after <= reached:
            share = (before - reached) / (before - after) if before > after else 1.0
            return len(curve) / (e + max(0.0, share))
    return 1.0 if reached <= reference[-1] else float("inf")


def spread(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
    values = [scale * v for v in values]
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def table(results: Sequence[Result], exact: dict[tuple[Any, ...], Result]) -> list[str]:
    """Of one group, ways in the order of their declaration; ``exact``: all back-propagation by key."""
    ways: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        ways[result.run["label"]].append(result)
    with_accuracy = results[0].rows[-1]["accuracy"] != "nan"
    lines = [
        "| | order | parts | seeds | train loss | test loss | "
        + ("accuracy, % | " if with_accuracy else "")
        + "price |",
        "|---|---|--:|--:|--:|--:|" + ("--:|" if with_accuracy else "") + "--:|",
    ]
    for label, runs in ways.items():
        last = runs[0].rows[-1]
        prices = [price(r.curve, exact[r.key].curve) for r in runs if r.key in exact]
        cells = [label, last["order"], last["parts"], str(len(runs))]
        cells += [spread([r.last(c) for r in runs], 3) for c in ("train_loss", "test_loss")]
        if with_accuracy:
            cells.append(spread([r.last("accuracy") for r in runs], 1, 100))
        cells.append("" if label.startswith("bp") or not prices else f"{mean(prices):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


WHY = """\
## Why

Runs of the first seed, trained again and looked at every 50 updates (`python benchmarks/study/why.py --images
FOLDER`, files in [results/why](results/why)); means over training, a column per stage. *Cosine*: between a
stage's gradient of a batch and back-propagation's, at the weights that the batch's passes aim at; 1 is
back-propagation. *Miss*: how far the weights that the first pass over a batch used are from those it aimed
at, over how far the weights moved meanwhile; 1 is no prediction.
"""


def why(results: Sequence[Result]) -> list[str]:
    """Of one model: how well gradients point, and how well weights are predicted."""
    stages = results[0].run["stages"]
    lines = [
        "| | "
        + " | ".join([f"cosine {k}" for k in range(stages)] + [f"miss {k}" for k in range(stages)])
        + " |",
        "|---|" + "--:|" * (2 * stages),
    ]
    for result in results:
        cells = [result.run["label"]]
        for column in ("cosine", "miss"):
            for k in range(stages):
                found = [float(row[column]) for row in result.rows if int(row["stage"]) == k]
                found = [value for value in found if value == value]
                cells.append(f"{mean(found):.2f}" if found else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


CLOCK = """\
## By the clock

ResNet-8 with GroupNorm in two stages on two cores, every way in one run, an epoch each in turn (`python
benchmarks/study/clock.py --images FOLDER`, file in [results/clock](results/clock)); one seed. *to plain's
loss*: the seconds of all epochs times the price, as above. Back-propagation whose parts' gradients are added
up is the plain loop's to rounding; that grows over hundreds of updates, to what the losses show.
"""


def clock(result: Result) -> list[str]:
    """Of one run of clock.py: what each way's epochs took, and what plain training's loss takes."""
    ways: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in result.rows:
        ways[row["way"]].append(row)
    curves = {way: [float(row["loss"]) for row in rows] for way, rows in ways.items()}
    took = {way: float(rows[-1]["seconds"]) for way, rows in ways.items()}
    lines = [
        "| | seconds | train loss | price | to plain's loss, s | faster by |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for way, curve in curves.items():
        cost = price(curve, curves["plain"])
        until = took[way] * cost
        cells = [way, f"{took[way]:.0f}", f"{curve[-1]:.3f}", f"{cost:.2f}", f"{until:.0f}"]
        cells.append(f"{took['plain'] / until:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    made = "{machine}, torch {torch}, Python {python}; commit {commit}".format(**result.where)
    return [*lines, "", f"{result.run['epochs']} epochs of {result.run['batches']} batches; {made}."]


def curves(results: Sequence[Result], path: Path) -> None:
    """A figure of one group: training loss over epochs, first seed."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "dtrp"  # the same file for the same numbers
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for result in results:
        if result.run["seed"] == 0:
            axes.plot(range(1, len(result.curve) + 1), result.curve, label=result.run["label"], lw=1.2)
    axes.set(xlabel="epoch", ylabel="training loss")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def grouped(folder: Path) -> dict[str, list[Result]]:
    """The files of a folder by group, in the order of their declaration."""
    from runs import RUNS

    place = {r.name: i for i, r in enumerate(RUNS)}
    groups: dict[str, list[Result]] = defaultdict(list)
    for path in sorted(folder.glob("*.csv"), key=lambda p: place.get(p.stem, len(place))):
        result = Result.read(path)
        groups[result.run["group"]].append(result)
    return groups


def page() -> str:
    """The whole document."""
    parts, groups = [HEAD], grouped(CSVS)
    exact = {r.key: r for results in groups.values() for r in results if r.run["label"].startswith("bp")}
    for name, results in groups.items():
        run = results[0].run
        budget = f"{run['epochs']} epochs of {run['batches']} batches of {run['batch_size']}"
        parts.append(f"## {run['model']}, {run['stages']} stages\n\n{budget}; {run['optimizer']}.\n")
        parts.append("\n".join(table(results, exact)) + "\n")
        commits: dict[str, set[str]] = defaultdict(set)
        for r in results:
            commits["torch {torch}, Python {python}, {machine}".format(**r.where)].add(r.where["commit"])
        parts += [f"{where}; commits {', '.join(sorted(of))}.\n" for where, of in sorted(commits.items())]
        parts.append(f"![training loss over epochs](results/{name}.svg)\n")
    watched = grouped(CSVS / "why")
    parts += [WHY] if watched else []
    for results in watched.values():
        run = results[0].run
        parts.append(f"{run['model']}, {run['stages']} stages:\n\n" + "\n".join(why(results)) + "\n")
    for path in sorted((CSVS / "clock").glob("*.csv")):
        parts += [CLOCK, "\n".join(clock(Result.read(path))) + "\n"]
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.check:
        agrees = PAGE.read_text(encoding="utf-8") == page()
        print("docs/results.md agrees with the CSVs" if agrees else "docs/results.md differs from the CSVs")
        return int(not agrees)
    PAGE.write_text(page(), encoding="utf-8")
    for name, results in grouped(CSVS).items():
        curves(results, CSVS / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
