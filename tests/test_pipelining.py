"""Stages for torch.distributed.pipelining: its schedules give the plain gradients; skips are named."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import ScheduleInterleaved1F1B, ScheduleLoopedBFS

import dtrp


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    """A world of this process alone."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("world") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Branches(nn.Module):
    """Two values travel side by side, in another order than they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        a = self.norm(self.one(x)) * scale
        b = torch.tanh(self.two(x))
        return self.head(torch.relu(b) - a.sigmoid())


def cut(model: nn.Module, n_stages: int, example: Any, where: dict[str, int]) -> dtrp.Pipeline:
    """The model with modules in the stages that are wanted."""
    plan = dtrp.compile(model, n_stages, example_inputs=example).plan
    for module, stage in where.items():
        plan = plan.pin(module, stage)
    return dtrp.compile(model, example_inputs=example, plan=plan)


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="its engine sends to itself, which gloo cannot, and warms BatchNorm up"
)
@pytest.mark.parametrize("schedule", [ScheduleInterleaved1F1B, ScheduleLoopedBFS])
def test_schedules_of_torch_give_the_plain_gradients(mesh: DeviceMesh, schedule: Any) -> None:
    """With four micro-batches the mean loss and its gradients are those of the parts in the plain model."""
    torch.manual_seed(0)
    model, twin = Branches(), Branches()
    twin.load_state_dict(model.state_dict())
    x, scale, y = torch.randn(16, 8), torch.rand(16, 1), torch.randint(0, 4, (16,))
    pipe = cut(model, 2, (x[:4], scale[:4]), {"one": 0, "norm": 0, "two": 0, "head": 1})
    stages = pipe.to_pipelining(mesh)
    assert [type(s).__name__ for s in stages] == ["PipelineStage"] * 2
    assert {n for s in stages for n, _ in s.submod.named_parameters()} == set(dict(model.named_parameters()))
    losses: list[torch.Tensor] = []
    runs = schedule(stages, 4, loss_fn=F.cross_entropy)
    output = runs.step(x, scale, target=y, losses=losses)
    expected = []
    for part in range(4):
        rows = slice(4 * part, 4 * part + 4)
        out = twin(x[rows], scale[rows])
        (F.cross_entropy(out, y[rows]) / 4).backward()
        expected.append(out)
    torch.testing.assert_close(output, torch.cat(expected))
    assert len(losses) == 4
    for name, p in twin.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, p.grad)
    torch.testing.assert_close(model.norm.running_mean, twin.norm.running_mean)


SCRIPT = """
import sys, torch, torch.nn.functional as F, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe
import dtrp

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("stage",))
torch.manual_seed(0)
make = lambda: nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(16, 16), nn.Tanh())), nn.Linear(16, 4))
for schedule in (Schedule1F1B, ScheduleGPipe):
    model, twin = make(), make()
    twin.load_state_dict(model.state_dict())
    pipe = dtrp.compile(model, 2, example_inputs=torch.randn(4, 16))
    (stage,) = pipe.to_pipelining(mesh)
    runs = schedule(stage, 4, loss_fn=F.cross_entropy)
    mine = torch.optim.SGD(stage.submod.parameters(), lr=0.1, momentum=0.9)
    all_of_it = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for i in range(6):
        x, y = torch.randn(16, 16), torch.randint(0, 4, (16,))
        for optimizer in (mine, all_of_it):
            optimizer.zero_grad()
        if dist.get_rank() == 0:
            runs.step(x)
        else:
            runs.step(target=y)
        F.cross_entropy(twin(x), y).backward()
        for optimizer in (mine, all_of_it):
            optimizer.step()
    trained = dict(stage.submod.named_parameters())
    assert trained
    for name, p in twin.named_parameters():
        if name in trained:
            torch.testing.assert_close(trained[name], p, rtol=1e-5, atol=1e-6)
    print(f"{schedule.__name__} trained {len(trained)} of {len(list(twin.parameters()))}", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_train_as_the_plain_model_does(tmp_path: Path) -> None:
    """Started by torch.distributed.run: the same weights after six updates, by both schedules."""
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "train.py")], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line for line in done.stdout.splitlines() if " trained " in line]
    assert len(told) == 4
    assert not any("trained 10 of" in line for line in told)  # each rank has a part


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down(x)
        return self.up(torch.relu(self.middle(first))) + first


class Late(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x)) * mask


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(x)))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.two(self.one(x))}


X = torch.randn(4, 8)


@pytest.mark.parametrize(
    ("model", "example", "where", "text"),
    [
        (Skip(), X, {"down": 0, "middle": 1, "up": 2},
         r"value 'down' of module 'down' goes from stage 0 to stage 2, .* next stage only: keep both in one "
         r"stage \(pipe.plan.pin\(module, 2\)"),
        (Late(), (X, X), {"one": 0, "two": 1}, r"value 'mask' goes from the caller to stage 1"),
        (Tied(), X, {"one": 0, "two": 1}, r"parameter '\w+.weight' is used in stages 0 and 1"),
        (Named(), X, {"one": 0, "two": 1}, r"gives something else than a tensor or a tuple of tensors"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    mesh: DeviceMesh, model: nn.Module, example: Any, where: dict[str, int], text: str
) -> None:
    pipe = cut(model, max(where.values()) + 1, example, where)
    with pytest.raises(dtrp.PlanMismatchError, match=text):
        pipe.to_pipelining(mesh)


def test_a_mesh_of_other_dimensions_is_refused(mesh: DeviceMesh) -> None:
    pipe = dtrp.compile(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), 2, example_inputs=X)
    with pytest.raises(ValueError, match=r"along which the stages lie, mesh\['stage'\], or call it 'stage'"):
        pipe.to_pipelining(init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "pp")))
    named = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "stage"))
    assert len(pipe.to_pipelining(named)) == 2


class Features(nn.Module):
    """Gives what an earlier stage makes, too."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.body(x)
        return h, self.head(h)


def test_outputs_of_the_stage_before_are_given_on(mesh: DeviceMesh) -> None:
    x = torch.randn(4, 8)
    pipe = cut(Features(), 2, x, {"body": 0, "head": 1})
    first, second = pipe.to_pipelining(mesh)
    given = second.submod(*first.submod(x))
    assert all(map(torch.equal, given, pipe.model(x)))
