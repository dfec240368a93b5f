"""The study's runs, declared: which models were trained how, and in which groups they are compared.

A run's name is its file's, so that a finished one is found again; whatever changes what it trains belongs in
its fields.
"""

from __future__ import annotations

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
        ``"resnet-8"``, ``"resnet-14"``, ``"resnet-8-gn"`` (GroupNorm), ``"gpt-6"``.
    optimizer : str
        ``"sgd"`` or ``"adamw"``.
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
    "bp, 4 parts": {"method": "1f1b", "micro_batches": 4},
    "default": {},
    "lean, 4 parts": {"schedule": "lean", "micro_batches": 4},
    "lean, 2 parts": {"schedule": "lean", "micro_batches": 2},
    "lean": {"schedule": "lean", "micro_batches": 1},
    "fig1": PAPER,
    "dtr": {"method": "dtr", **PAPER},
    "fdg": {"method": "fdg", **PAPER},
    "adl": {"method": "adl", "accumulate": 4, **PAPER},
}
MAIN = ("bp", "bp, 4 parts", "default", "lean, 4 parts")


def group(first: Run, labels: tuple[str, ...] | None = None, seeds: int = 3) -> list[Run]:
    """Each way of `WAYS` with the first seed, the main ones with the others too."""
    runs = []
    for seed in range(seeds):
        for label, arguments in WAYS.items():
            if label in (labels or WAYS) and (seed == 0 or label in MAIN):
                runs.append(replace(first, label=label, trainer=arguments, seed=seed))
    return runs


def images(model: str, stages: int) -> Run:
    return Run(f"{model}-k{stages}", "", model, stages)


def text(optimizer: str, stages: int) -> Run:
    return Run(
        f"gpt-6-{optimizer}-k{stages}", "", "gpt-6", stages, optimizer, epochs=8, batches=150, batch_size=16
    )


RUNS: list[Run] = [
    *group(images("resnet-8", 4), seeds=2),
    *group(images("resnet-14", 7)),
    *group(text("adamw", 4), seeds=2),
    *group(images("resnet-8-gn", 4), MAIN),
    *group(text("adamw", 2), MAIN, seeds=1),
    *group(text("adamw", 6), MAIN, seeds=1),
]
