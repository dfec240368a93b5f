"""What a model on the meta device costs each rank: while its weights are read, and in training.

    torchrun --nproc-per-node 2 benchmarks/meta_ranks.py FOLDER

24 linear layers of 2048 x 2048 (384 MiB), one safetensors file each; written to FOLDER if it is not there.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import dtrp
from dtrp.runtime import world

WIDTH, DEPTH, STAGES = 2048, 24, 2


def megabytes(line: str) -> float:
    """Of this process: VmRSS now, VmHWM at most."""
    return int(Path("/proc/self/status").read_text().split(f"{line}:")[1].split()[0]) / 1024


def write(folder: Path) -> None:
    folder.mkdir()
    for i in range(DEPTH):
        weight = torch.randn(WIDTH, WIDTH) * (2 / WIDTH) ** 0.5
        save_file({f"{2 * i}.weight": weight}, folder / f"{i}.safetensors")
    save_file({f"{2 * DEPTH}.weight": torch.zeros(10, WIDTH)}, folder / "head.safetensors")


def main() -> None:
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
    if rank == 0 and not folder.exists():
        write(folder)
    read, found = world.materialise, {}

    def measured(*arguments: object) -> None:
        found["before"] = megabytes("VmRSS")
        read(*arguments)  # type: ignore[arg-type]
        found["read"] = megabytes("VmRSS")
        found["reading"] = megabytes("VmHWM")

    world.materialise = measured  # type: ignore[assignment]
    with torch.device("meta"):
        layers = [m for _ in range(DEPTH) for m in (nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU())]
        model = nn.Sequential(*layers, nn.Linear(WIDTH, 10, bias=False))
    torch.manual_seed(0)
    x, y = torch.randn(8, WIDTH), torch.randint(0, 10, (8,))
    pipe = dtrp.compile(model, n_gpus=STAGES, example_inputs=x, devices=["cpu"] * STAGES)
    with pipe.trainer(F.cross_entropy, partial(torch.optim.SGD, lr=0.01), init=folder) as trainer:
        for _ in range(5):
            trainer.step(x, y)
        trainer.flush()
        mine = sum(p.numel() * 4 for p in model.parameters() if not p.is_meta) / 2**20
        plan = pipe.report.stages[rank % STAGES].peak_bytes / 2**20
        print(
            f"rank {rank}: stage {mine:.0f} MiB; above the process before: "
            f"reading {found['reading'] - found['before']:.0f}, read {found['read'] - found['before']:.0f}, "
            f"training {megabytes('VmHWM') - found['before']:.0f} (planned {plan:.0f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
