"""What a decoder on the meta device costs each rank: while its weights are read, and in training.

    torchrun --nproc-per-node 4 benchmarks/meta_ranks.py FOLDER
    torchrun --nproc-per-node 2 benchmarks/meta_ranks.py FOLDER --width 512 --layers 8    # a small one

The GPT of decoder.py, by default with 1.31e9 parameters (4.9 GiB in float32), one safetensors file per block;
random ones are written to FOLDER if it is not there. Trains steps of SGD in exact order.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from decoder import GPT
from safetensors.torch import save_file
from torch import nn

import dtrp
from dtrp.runtime import world

LENGTH, SAMPLES = 64, 1


def mebibytes(line: str) -> float:
    """Of this process: VmRSS now, VmHWM at most; without pages of files, which the system may take back."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{line}:")[1].split()[0]) / 1024


def write(folder: Path, model: nn.Module) -> None:
    folder.mkdir()
    files: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, p in model.named_parameters():
        files[".".join(name.split(".")[:2]) if name.startswith("blocks") else "rest"][name] = p
    for file, tensors in files.items():
        made = {name: torch.empty(p.shape).normal_(0.0, 0.02) for name, p in tensors.items()}
        save_file(made, folder / f"{file}.safetensors")


def cross_entropy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--steps", type=int, default=2)
    given = parser.parse_args()
    rank = int(os.environ["RANK"])
    with torch.device("meta"):
        model = GPT(given.width, given.layers, given.width // 128, 50257)
    if rank == 0 and not given.folder.exists():
        write(given.folder, model)
    read, found = world.materialise, {}

    def measured(*arguments: object) -> None:
        found["before"] = mebibytes("VmRSS")
        read(*arguments)  # type: ignore[arg-type]
        found["read"] = mebibytes("VmRSS")
        found["reading"] = mebibytes("VmHWM")

    world.materialise = measured  # type: ignore[assignment]
    torch.manual_seed(0)
    x = torch.randint(0, 50257, (SAMPLES, LENGTH + 1))
    pipe = dtrp.compile(model, costs="analytic", devices=["cpu"] * int(os.environ["WORLD_SIZE"]))
    sgd = partial(torch.optim.SGD, lr=0.01)
    with pipe.trainer(cross_entropy, sgd, method="1f1b", init=given.folder) as trainer:
        for _ in range(given.steps):
            trainer.step(x[:, :-1], x[:, 1:])
        trainer.flush()
        stage = pipe.report.stages[rank % pipe.n_stages]
        held = {id(p): p.nbytes for p in model.parameters() if not p.is_meta}
        print(
            f"rank {rank}: stage {sum(held.values()) / 2**20:.0f} MiB; above the process before: "
            f"reading {found['reading'] - found['before']:.0f}, read {found['read'] - found['before']:.0f}, "
            f"training {mebibytes('VmHWM') - found['before']:.0f} (planned {stage.peak_bytes / 2**20:.0f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
