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
    def key(self) -> tuple[int, int]:
        """Of back-propagation that this is compared with: its parts, and the seed."""
        statistics = self.run["model"] in ("resnet-8", "resnet-14")  # parts train otherwise there
        return int(self.rows[-1]["parts"]) if statistics else 1, self.run["seed"]

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


def table(results: Sequence[Result]) -> list[str]:
    """Of one group, ways in the order of their declaration."""
    ways: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        ways[result.run["label"]].append(result)
    exact = {(int(r.rows[-1]["parts"]), r.run["seed"]): r for r in results if r.run["label"].startswith("bp")}
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


def page() -> str:
    """The whole document."""
    from runs import RUNS

    place = {r.name: i for i, r in enumerate(RUNS)}
    groups: dict[str, list[Result]] = defaultdict(list)
    for path in sorted(CSVS.glob("*.csv"), key=lambda p: place.get(p.stem, len(place))):
        result = Result.read(path)
        groups[result.run["group"]].append(result)
    parts = [HEAD]
    for results in groups.values():
        run = results[0].run
        seen = sorted({json.dumps(r.where, sort_keys=True) for r in results})
        budget = f"{run['epochs']} epochs of {run['batches']} batches of {run['batch_size']}"
        parts.append(f"## {run['model']}, {run['stages']} stages\n\n{budget}; {run['optimizer']}.\n")
        parts.append("\n".join(table(results)) + "\n")
        for text in seen:
            where = json.loads(text)
            told = "Commit {commit}, torch {torch}, Python {python}, {machine}.\n"
            parts.append(told.format(**where))
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
