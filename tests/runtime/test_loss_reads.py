"""What a loss reads of the script is in worker processes as it was in the script when a batch was given."""

from __future__ import annotations

import copy
import importlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .toys import batches, compiled, mlp, same, trainer

ANNEALED = 1.0


class Weighed(nn.Module):
    """No tensors, but a number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = 1.0

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.weight * F.cross_entropy(output, target)


class Script:
    """Holds what a loss may read, and a loss that is a method."""

    def __init__(self) -> None:
        global ANNEALED
        ANNEALED = 1.0
        self.weight, self.history = 1.0, [0.0]
        self.tensor, self.table = torch.ones(()), {"deep": [1.0]}
        self.critic, self.plain = nn.Linear(3, 1), Weighed()
        with torch.no_grad():
            self.critic.weight.fill_(0.1)
            self.critic.bias.fill_(0.0)
        closed, tensor, table, critic, plain = 1.0, self.tensor, self.table, self.critic, self.plain

        def loss(output: Tensor, target: Tensor) -> Tensor:
            scale = closed * ANNEALED * tensor * table["deep"][0]
            return scale * plain(output, target) + critic(output).square().mean()

        def close(value: float) -> None:
            nonlocal closed
            closed = value

        self.loss, self.close = loss, close

    def method(self, output: Tensor, target: Tensor) -> Tensor:
        return self.helper() * self.loss(output, target)

    def helper(self) -> float:
        return self.weight

    def change(self, step: int) -> None:
        """One of them before each step."""
        global ANNEALED
        self.history.append(1.0)
        value = 1.0 + 0.1 * step
        if step == 1:
            self.close(value)
        elif step == 2:
            ANNEALED = value
        elif step == 3:
            self.tensor.fill_(value)
        elif step == 4:
            self.table["deep"][0] = value
        elif step == 5:
            with torch.no_grad():
                self.critic.weight.add_(value)
        elif step == 6:
            self.plain.weight = value
        elif step == 7:
            self.weight = value


def run(executor: str, method: str, which: str, lr: float = 0.05) -> tuple[list[float], dict[str, Tensor]]:
    script, model = Script(), mlp(3, dropout=0.0, norm=False)

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr)

    with trainer(
        compiled(model), executor, getattr(script, which), method=method, optimizer=sgd, micro_batches=1
    ) as t:
        for step, (x, y) in enumerate(batches(10)):
            script.change(step)
            t.step(x, y)
        t.flush()
        return t.losses, model.state_dict()


@pytest.mark.parametrize(
    ("which", "executor"), [("loss", "workers"), ("loss", "auto"), ("method", "workers")]
)
def test_as_in_the_plain_loop(which: str, executor: str) -> None:
    losses, state = run(executor, "bp", which)
    expected, weights = run("inline", "bp", which)  # where loss and script are in one process
    assert losses == expected
    assert same(state, weights)


def test_a_batch_in_flight_keeps_what_held_when_it_was_given(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dtrp"):
        losses, _ = run("workers", "dtrp", "loss", lr=0.0)
    assert losses == run("inline", "bp", "loss", lr=0.0)[0]
    assert [record.message.split(":")[0] for record in caplog.records].count(
        "what the loss reads of the script was changed while batches were in flight"
    ) == 1


def test_what_else_changes_empties_no_pipeline(caplog: pytest.LogCaptureFixture) -> None:
    script = Script()
    with trainer(compiled(), "workers", script.method) as t, caplog.at_level(logging.WARNING, "dtrp"):
        for x, y in batches(4):
            script.history.append(1.0)
            t.step(x, y)
            copy.copy(script)  # which leaves an attribute of its class
    assert not caplog.records


def test_settings_in_modules_that_workers_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "settings_of_a_run.py").write_text(
        "from types import SimpleNamespace\nimport torch\n"
        "SCALE, SHARE = 1.0, torch.ones(())\nCFG = SimpleNamespace(loss={'weight': 1.0})\n"
    )
    (tmp_path / "losses_of_a_run.py").write_text(
        "import torch.nn.functional as F\nimport settings_of_a_run\nfrom settings_of_a_run import CFG\n"
        "def loss(output, target):\n"
        "    scale = settings_of_a_run.SCALE * settings_of_a_run.SHARE * CFG.loss['weight']\n"
        "    return scale * F.cross_entropy(output, target)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = importlib.import_module("settings_of_a_run")
    losses: Any = importlib.import_module("losses_of_a_run")
    settings.SCALE, settings.CFG.loss["weight"] = 3.0, 5.0
    settings.SHARE = torch.full((), 0.5)
    found = []
    for executor in ("inline", "workers"):
        with trainer(compiled(mlp(3, dropout=0.0)), executor, losses.loss, method="bp", seed=0) as t:
            for step, (x, y) in enumerate(batches(3)):
                settings.SCALE = 3.0 + step
                t.step(x, y)
            t.flush()
            found.append(t.losses)
    assert found[0] == found[1]
