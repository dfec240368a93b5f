"""The study's runs, declared: which models were trained how, and in which groups they are compared.

A run's name is its file's, so that a finished one is found again; whatever changes what it trains belongs in
its fields.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes
    ----------
    group : str
        Runs of one group share model, data and budget.
    label : str
        What it is called in the tables; unique in its group.
    trainer : dict
        Arguments of `Pipeline.trainer`.
    stages, seed : int
    model : str
        ``"resnet-8"``, ``"resnet-14"``, ``"resnet-20"``, ``"resnet-8-gn"`` (GroupNorm), ``"gpt-6"``.
    optimizer : str
        A name of optimizers.py.
    epochs, batches, batch_size : int
        The budget: so many batches in each epoch.
    """

    group: str
    label: str
    model: str
    stages: int
    optimizer: str = "sgd"
    trainer: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    epochs: int = 8
    batches: int = 200
    batch_size: int = 64

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.group}--{self.label.replace(' ', '-').replace(',', '')}--seed{self.seed}"


PAPER = {"schedule": "fig1", "micro_batches": 1}
"""DTRP's own order, whole batches."""

WAYS: dict[str, dict[str, Any]] = {
    "bp": {"method": "bp"},
    "bp, 2 parts": {"method": "1f1b", "micro_batches": 2},
    "bp, 3 parts": {"method": "1f1b", "micro_batches": 3},
    "bp, 4 parts": {"method": "1f1b", "micro_batches": 4},
    "default": {},
    "lean, 4 parts": {"schedule": "lean", "micro_batches": 4},
    "lean, 2 parts": {"schedule": "lean", "micro_batches": 2},
    "lean": {"schedule": "lean", "micro_batches": 1},
    "fig1": PAPER,
    "dtr": {"method": "dtr", **PAPER},
    "fdg": {"method": "fdg", **PAPER},
    "adl": {"method": "adl", "accumulate": 4, **PAPER},
    "lean, 4 parts, no prediction": {"schedule": "lean", "micro_batches": 4, "predictor": "none"},
}


def group(first: Run, labels: Iterable[str], seeds: int = 1) -> list[Run]:
    """Those ways of `WAYS`, with so many seeds."""
    return [
        replace(first, label=label, trainer=arguments, seed=seed)
        for seed in range(seeds)
        for label, arguments in WAYS.items()
        if label in labels
    ]


def images(model: str, stages: int) -> Run:
    return Run(f"{model}-k{stages}", "", model, stages)


def text(optimizer: str, stages: int, epochs: int = 8) -> Run:
    name = f"gpt-6-{optimizer}-k{stages}" + (f"-{epochs}-epochs" if epochs != 8 else "")
    return Run(name, "", "gpt-6", stages, optimizer, epochs=epochs, batches=150, batch_size=16)


def feedback(first: Run) -> Run:
    """Error feedback in place of prediction, where the delay is one update at most."""
    return replace(
        first,
        label="lean, 4 parts, error feedback",
        optimizer="sgd with error feedback",
        trainer=WAYS["lean, 4 parts, no prediction"],
    )


def nadam(first: Run, label: str) -> Run:
    """With the betas that are recommended against delay; predicted by the last update."""
    return replace(first, label=f"{label}, nadam", optimizer="nadam", trainer=WAYS[label])


R8, R14, GPT = images("resnet-8", 4), images("resnet-14", 7), text("adamw", 4)
EARLIER = ("lean", "fig1", "dtr", "fdg", "adl")

RUNS: list[Run] = [
    *group(R8, ("bp", "bp, 2 parts", "bp, 4 parts", "default", "lean, 4 parts"), seeds=3),
    *group(R8, (*EARLIER, "lean, 2 parts", "lean, 4 parts, no prediction")),
    feedback(R8),
    *group(R14, ("bp", "bp, 3 parts", "bp, 4 parts", "default", "lean, 4 parts"), seeds=3),
    *group(R14, EARLIER),
    *group(replace(images("resnet-20", 4), epochs=10), ("bp", "bp, 2 parts", "bp, 3 parts", "default")),
    *group(images("resnet-8-gn", 4), ("bp", "default"), seeds=3),
    *group(images("resnet-8-gn", 4), ("lean",)),
    *group(GPT, ("bp", "default"), seeds=3),
    *group(GPT, ("lean", "lean, 2 parts", "lean, 4 parts", "fig1")),
    *(nadam(GPT, label) for label in ("bp", "lean", "default")),
    *group(text("adamw", 4, epochs=4), ("bp", "default")),
    *group(text("adamw", 2), ("default",)),  # back-propagation is that of four stages, bit for bit
    *group(text("adamw", 6), ("default",)),
    *group(text("muon", 4), ("bp", "default", "lean")),
    *group(text("muon", 4, epochs=4), ("bp", "default")),
    *group(text("muon", 2), ("default",)),
    *group(text("muon", 6), ("default",)),
]
