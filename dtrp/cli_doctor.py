"""``dtrp doctor``: what is here, what works with it, and whether training on worker processes does."""

from __future__ import annotations

import os
import platform
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from dtrp.version import __version__

EXTRAS = {  # as in pyproject.toml: what for, and the packages that it takes
    "onnx": ("export of stages", ("onnx", "onnxscript", "onnxruntime")),
    "vision": ("torchvision's models", ("torchvision",)),
    "plot": ("report.plot", ("matplotlib",)),
    "tensorboard": ("curves of a run", ("tensorboard",)),
    "lightning": ("Lightning's Trainer", ("lightning",)),
    "transformers": ("Hugging Face's Trainer", ("transformers", "accelerate")),
}


def run() -> int:
    """Print what was found; 0 if the self-test passes."""
    from rich.console import Console
    from rich.table import Table

    table = Table("part", "found", title=f"dtrp {__version__}", title_justify="left")
    table.add_column("remark", overflow="fold")
    for row in (*_machine(), *_extras()):
        table.add_row(*row)
    console = Console(soft_wrap=True)
    console.print(table)
    console.print("self-test: two stages on worker processes, against the same in this process ...")
    began = time.perf_counter()
    try:
        problem = self_test()
    except Exception as e:
        problem = f"{type(e).__name__}: {e}"
    if problem:
        console.print(f"failed: {problem}", style="red", markup=False)
        return 1
    console.print(f"passed: equal bit for bit ({time.perf_counter() - began:.1f} s)", style="green")
    return 0


def self_test() -> str:
    """Train a small model inline and on workers; what differs, or nothing."""
    import torch
    from torch import nn

    import dtrp

    torch.manual_seed(0)
    x, y = torch.randn(8, 16), torch.randint(0, 4, (8,))
    first = nn.Sequential(
        nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.Linear(32, 4)
    )
    states, losses = [], []
    weights = {name: t.clone() for name, t in first.state_dict().items()}
    pipe = dtrp.compile(first, devices=["cpu"] * 2, example_inputs=x, costs="analytic")
    for executor in ("inline", "workers"):
        first.load_state_dict(weights)
        with pipe.trainer(
            nn.CrossEntropyLoss(),
            partial(torch.optim.SGD, lr=0.1, momentum=0.9),
            executor=executor,
            seed=0,
            threads=1,
        ) as trainer:
            for _ in range(6):
                trainer.step(x, y)
        states.append({name: t.clone() for name, t in first.state_dict().items()})
        losses.append(list(trainer.losses))
    apart = [name for name, t in states[0].items() if not torch.equal(t, states[1][name])]
    if apart or losses[0] != losses[1]:
        return f"worker processes train to other weights than this process: {', '.join(apart) or losses}"
    return ""


def _machine() -> list[tuple[str, str, str]]:
    import torch

    from dtrp import accelerators

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    rows = [
        ("python", platform.python_version(), platform.platform(terse=True)),
        ("torch", torch.__version__, f"CUDA {torch.version.cuda}" if torch.version.cuda else "for CPU"),
        ("torchvision", _version("torchvision"), ""),
        ("cores", str(cores), "" if cores > 1 else "stages on one core train right, not faster"),
        ("shared memory", *_shared_memory()),
    ]
    if not (devices := accelerators.here()):
        return [*rows, ("CUDA devices", "none", "stages run on CPU worker processes")]
    for device in devices:
        size = f"{accelerators.memory(device) / 2**30:.0f} GiB"
        rows.append((str(device), accelerators.name(device), size))
    return rows


def _extras() -> list[tuple[str, str, str]]:
    rows = []
    for extra, (use, packages) in EXTRAS.items():
        missing = [name for name in packages if find_spec(name) is None]
        rows.append(
            (use, "missing: " + ", ".join(missing), f"pip install 'dtrp[{extra}]'".replace("[", "\\["))
            if missing
            else (use, ", ".join(f"{name} {_version(name)}" for name in packages), "")
        )
    return rows


def _shared_memory() -> tuple[str, str]:
    """Whether stages can pass values through it."""
    if not hasattr(os, "memfd_create"):
        return "no memfd", "values travel through temporary files"
    try:
        descriptor = os.memfd_create("dtrp")
        try:
            os.truncate(descriptor, 1 << 20)
        finally:
            os.close(descriptor)
    except OSError as e:
        return f"memfd fails: {e.strerror}", "worker processes cannot pass values here"
    return "memfd", ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed" if find_spec(package) is None else "here"
