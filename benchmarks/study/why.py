"""Why decoupling costs what it costs: how far predictions miss, and where decoupled gradients point.

    python benchmarks/study/why.py --images FOLDER [--only "resnet-8-*"] [--out docs/results/why]

Trains runs of the study again, and looks at every 50th update from outside:

- *miss* of a stage: the distance between the weights that its first pass over a batch used and the weights
  at the moment it aimed at, over how far the weights moved meanwhile (1: as without prediction);
- *cosine* of a stage: between its gradient of a batch and back-propagation's of that batch, at the weights
  that all stages have at the moment the batch's passes aim at (that of stage 0's backward).

Where that moment lies between two updates of a stage, its weights are those on the line between them.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import argparse
import copy
import csv
import fnmatch
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from run import ROOT, train, where
from runs import RUNS, Run
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from dtrp.runtime.predictors import make_predictor

EVERY = 50  # updates
WATCHED = ("lean", "fig1", "dtr", "default", "lean, 4 parts")


class Watch:
    """What a run's stages did to every so many-th batch.

    Attributes
    ----------
    done : list of int
        Updates that each stage has made.
    weights : list of dict
        Of each stage, its weights by number of updates, as long as somebody asks for them.
    """

    needs_previous = False

    def __init__(self, run: Run) -> None:
        self.run = run
        self.inner = make_predictor("auto", torch.optim.SGD)
        self.rows: list[dict[str, float]] = []
        self.batches: dict[int, tuple[Tensor, Tensor]] = {}
        self.given = 0

    # ---- what the run calls ------------------------------------------------------------------------------

    def options(self, model: nn.Module, pipe: Any, loss_fn: Callable[..., Tensor]) -> dict[str, Any]:
        """The predictor, watched; the rest stays as the run has it."""
        self.twin, self.loss_fn = copy.deepcopy(model), loss_fn
        names = {id(p): name for name, p in model.named_parameters()}
        self.stages = [
            {names[id(p)]: p for p in stage.module.parameters() if id(p) in names} for stage in pipe.stages
        ]
        self.stage_of = {id(p): k for k, own in enumerate(self.stages) for p in own.values()}
        self.at = {p.data_ptr(): (k, n) for k, own in enumerate(self.stages) for n, p in own.items()}
        self.done = [0] * len(self.stages)
        self.weights: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.stages]
        self.gradients: dict[int, dict[int, dict[str, Tensor]]] = defaultdict(dict)
        self.predicted: list[dict[tuple[int, float], dict[str, Tensor]]] = [{} for _ in self.stages]
        self.hook = register_optimizer_step_pre_hook(self._before_step)
        without = self.run.trainer.get("method") == "dtr"
        return {} if without else {"predictor": self}

    def before(self, batch: tuple[Tensor, Tensor], trainer: Any) -> None:
        """A batch is about to be given."""
        self.trainer = trainer
        if self.given % EVERY == 0:
            self.batches[self.given] = batch
        self.given += 1

    def predict(self, weight: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], s: float) -> Tensor:
        """As the run's own predictor; kept where somebody will ask."""
        ahead = self.inner.predict(weight, group, state, s)
        stage, name = self.at[weight.data_ptr()]
        if self.done[stage] % EVERY == 0:
            self.predicted[stage].setdefault((self.done[stage], s), {})[name] = ahead.clone()
        return ahead

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        own = [p for group in optimizer.param_groups for p in group["params"]]
        stage = self.stage_of[id(own[0])]
        batch = self.done[stage]
        self.weights[stage][batch] = {n: p.detach().clone() for n, p in self.stages[stage].items()}
        if batch in self.batches:
            self.gradients[batch][stage] = {
                n: p.grad.clone() for n, p in self.stages[stage].items() if p.grad is not None
            }
        self.done[stage] += 1
        self._compare()

    # ---- what is made of it ------------------------------------------------------------------------------

    def _compare(self) -> None:
        """The oldest watched batch, once all stages have come far enough; what is older is forgotten."""
        n = len(self.stages)
        if (
            not self.batches or min(self.done) < (batch := min(self.batches)) + 2 * n + 1
        ):  # looked at farthest
            return
        config = self.trainer.config
        schedule = config.schedule(n)
        moments = [batch + schedule.backward_horizon(k, "common") / config.micro_batches for k in range(n)]
        true = self._gradients_at([self._weights(k, moment) for k, moment in enumerate(moments)], batch)
        for k, own in enumerate(self.stages):
            found = {"update": batch, "stage": k, "miss": self._miss(k, batch)}
            ours = self.gradients[batch][k]
            found["cosine"] = _cosine([ours[name] for name in own], [true[name] for name in own])
            self.rows.append(found)
        del self.batches[batch], self.gradients[batch]
        for k in range(n):
            self.weights[k] = {u: w for u, w in self.weights[k].items() if u > batch}
            self.predicted[k] = {at: w for at, w in self.predicted[k].items() if at[0] > batch}

    def _weights(self, stage: int, moment: Fraction | float) -> dict[str, Tensor]:
        before = math.floor(moment)
        share = float(moment - before)
        a, b = self.weights[stage][before], self.weights[stage].get(before + 1)
        return a if not share or b is None else {n: torch.lerp(a[n], b[n], share) for n in a}

    def _miss(self, stage: int, update: int) -> float:
        """Of the prediction that looked farthest, which is the first pass's."""
        looks = [s for at, s in self.predicted[stage] if at == update and s > 0]
        if not looks:
            return math.nan
        s = max(looks)
        ahead, now = self.predicted[stage][update, s], self.weights[stage][update]
        then = self._weights(stage, update + s)
        return _distance(ahead, then) / max(_distance(now, then), 1e-30)

    def _gradients_at(self, weights: list[dict[str, Tensor]], batch: int) -> dict[str, Tensor]:
        """Back-propagation's, in as many parts as the run makes."""
        named = dict(self.twin.named_parameters())
        with torch.no_grad():
            for own in weights:
                for name, value in own.items():
                    named[name].copy_(value)
        self.twin.zero_grad()
        x, y = self.batches[batch]
        parts = self.trainer.config.micro_batches
        for some, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (self.loss_fn(self.twin(some), target) * (len(some) / len(x))).backward()
        return {name: p.grad for name, p in named.items() if p.grad is not None}


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float((a[n] - b[n]).pow(2).sum()) for n in a))


def _cosine(a: list[Tensor], b: list[Tensor]) -> float:
    return float(
        torch.cosine_similarity(torch.cat([t.flatten() for t in a]), torch.cat([t.flatten() for t in b]), 0)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", help="folder with CIFAR-10")
    parser.add_argument("--only", default="*", help="pattern of names")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "why")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for run in RUNS:
        path = args.out / f"{run.name}.csv"
        wanted = run.model.startswith("resnet-") and run.seed == 0 and run.label in WATCHED
        if path.exists() or not wanted or not fnmatch.fnmatch(run.name, args.only):
            continue
        watch = Watch(run)
        for row in train(run, args.images, watch):
            print(run.name, row, flush=True)
        watch.hook.remove()
        with path.open("w", newline="", encoding="utf-8") as file:
            file.write(f"# {json.dumps({'run': asdict(run), 'where': where()})}\n")
            writer = csv.DictWriter(file, watch.rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(watch.rows)


if __name__ == "__main__":
    main()
