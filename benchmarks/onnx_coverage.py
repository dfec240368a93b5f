"""Which models can be exported stage by stage, and does onnxruntime compute what torch computes?

    python benchmarks/onnx_coverage.py --zoo torchvision
    python benchmarks/onnx_coverage.py --zoo timm --n-gpus 4 --json timm.json
    python benchmarks/onnx_coverage.py --zoo transformers --names BertModel GPT2LMHeadModel

Each model has random weights and is cut into each number of stages. Beyond what `export_onnx` verifies
itself, the written folder is loaded again and must give the plain model's output, with the example's batch
size and with another; each file must pass onnx's full check; and the chain merged by onnx.compose must be one
valid model that gives the same output. Differences are relative to the largest magnitude of the output.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnx
import onnxruntime
import torch
from coverage_zoos import Sample, timm_sample, torchvision_sample
from onnx_zoos import TIMM, TORCHVISION, TRANSFORMERS, transformers_sample
from rich.console import Console
from rich.table import Table
from torch.utils import _pytree as pytree

import dtrp
from dtrp.onnx import load_chain, merge_chain

TOLERANCE = 1e-4


@dataclass
class Row:
    """What became of one model, cut into one number of stages."""

    name: str
    family: str
    n_gpus: int
    passed: bool = False
    params: int = 0
    dynamic: bool = False
    difference: float = float("nan")  # chain against model, the largest
    merged_difference: float = float("nan")
    per_stage: tuple[float, ...] = ()
    megabytes: float = 0.0
    seconds: float = 0.0  # of export_onnx, with verification
    note: str = ""  # why the batch is fixed
    problem: str = ""


def cover(zoo: str, name: str, family: str, stages: tuple[int, ...]) -> list[Row]:
    """Export one model with each number of stages."""
    warnings.filterwarnings("ignore")
    _read_the_operators_once()
    rows = []
    sample = {"torchvision": torchvision_sample, "timm": timm_sample, "transformers": transformers_sample}[
        zoo
    ](name)
    for n in stages:
        row = Row(name, family, n)
        folder = Path(tempfile.mkdtemp())
        try:
            export(sample, row, folder / "chain")
        except Exception as error:
            row.problem = f"{type(error).__name__}: {error}"
        finally:
            shutil.rmtree(folder)
        rows.append(row)
    return rows


def export(sample: Sample, row: Row, folder: Path) -> None:
    """Export, load, compare; fills ``row``."""
    torch.manual_seed(0)
    model = sample.build().eval()
    _enliven(model)
    args, kwargs = sample.call(2)
    row.params = sum(p.numel() for p in model.parameters())
    pipe = dtrp.compile(model, row.n_gpus, devices=["cpu"] * row.n_gpus)
    pipe.prepare(args, kwargs)
    start = time.perf_counter()
    paths = pipe.export_onnx(folder)
    row.seconds = time.perf_counter() - start
    row.megabytes = sum(p.stat().st_size for p in folder.iterdir()) / 1e6
    for path in paths[:-1]:
        onnx.checker.check_model(path, full_check=True)
    chain = load_chain(folder)
    row.dynamic, row.note = chain.manifest.batch.dynamic, chain.manifest.batch.reason
    row.per_stage = tuple(chain.manifest.verification["largest_difference_per_stage"])
    merged = onnxruntime.InferenceSession(
        merge_chain(folder).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    gaps, merged_gaps = [], []
    for size in (2, 5) if row.dynamic else (2,):
        args, kwargs = sample.call(size)
        with torch.no_grad():
            expected = [
                t.numpy() for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, torch.Tensor)
            ]
        inputs = [t.numpy() for t in pipe.bind(args, kwargs)]
        ours = [leaf for leaf in pytree.tree_leaves(chain(*inputs)) if isinstance(leaf, np.ndarray)]
        joined = merged.run(None, dict(zip(chain.inputs, inputs, strict=True)))
        gaps += [difference(a, b) for a, b in zip(ours, expected, strict=True)]
        merged_gaps += [difference(a, b) for a, b in zip(joined, expected, strict=True)]
    if not any(a.any() for a in expected):
        raise ValueError("the model's output is zero everywhere: it compares equal with too much")
    row.difference, row.merged_difference = max(gaps), max(merged_gaps)
    row.passed = max(row.difference, row.merged_difference) <= TOLERANCE
    if not row.passed:
        row.problem = f"differs by {row.difference:.1e}, merged {row.merged_difference:.1e}"


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """``max |a - b| / max |b|``, infinite for another shape or anything that is not finite."""
    if a.shape != b.shape or not np.isfinite(a).all() or not np.isfinite(b).all():
        return float("inf")
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30))


@torch.no_grad()
def _enliven(model: torch.nn.Module) -> None:
    """Give noise to weights and statistics that are all alike at first: they would hide what they multiply.

    A head of zeros, for one, makes every difference before it vanish.
    """
    tensors = [*model.parameters(), *model.buffers()]
    for t in tensors:
        if t.is_floating_point() and t.numel() > 1 and bool((t == t.flatten()[0]).all()):
            t.add_(torch.randn_like(t).mul_(0.05))


def _read_the_operators_once() -> None:
    """Torch's exporter reads the source of all its operators at each call; here once per process."""
    import onnxscript._framework_apis.torch_2_5 as api

    if not hasattr(api.get_torchlib_ops, "cache_info"):
        api.get_torchlib_ops = cache(api.get_torchlib_ops)


def run(
    zoo: str, names: Iterable[tuple[str, str]], stages: tuple[int, ...], console: Console, path: Path | None
) -> list[Row]:
    """All models, in worker processes that are replaced from time to time, which gives memory back.

    The rows are written to ``path`` after each model, so that a run that is stopped leaves its results.
    """
    rows: list[Row] = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=6) as pool:
        for family, name in names:
            try:
                made = pool.submit(cover, zoo, name, family, stages).result()
            except Exception as error:
                made = [Row(name, family, n, problem=f"{type(error).__name__}: {error}") for n in stages]
            for row in made:
                mark = "ok " if row.passed else "NO "
                console.print(
                    f"{mark}{row.name} x{row.n_gpus} {row.difference:.1e} "
                    f"{'dynamic' if row.dynamic else 'fixed'} {row.seconds:.0f} s {row.problem[:300]}",
                    highlight=False,
                    markup=False,
                )
            rows += made
            if path is not None:
                path.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    return rows


def show(rows: list[Row], console: Console) -> None:
    """The table, and what it comes to."""
    table = Table("model", "stages", "params (M)", "batch", "largest difference", "merged", "MB", "seconds")
    for row in rows:
        table.add_row(
            row.name,
            str(row.n_gpus),
            f"{row.params / 1e6:.1f}",
            "dynamic" if row.dynamic else "fixed",
            f"{row.difference:.1e}" if row.passed else "failed",
            f"{row.merged_difference:.1e}",
            f"{row.megabytes:.0f}",
            f"{row.seconds:.0f}",
        )
    console.print(table)
    passed = [r for r in rows if r.passed]
    console.print(
        f"{len(passed)} of {len(rows)} exports pass ({len({r.name for r in passed})} of "
        f"{len({r.name for r in rows})} models, {len({r.family for r in passed})} families), "
        f"{sum(r.dynamic for r in passed)} with a dynamic batch"
    )
    for row in rows:
        if row.problem or (row.note and not row.dynamic):
            console.print(
                f"{row.name}, {row.n_gpus} stages: {row.problem or row.note}", markup=False, highlight=False
            )


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 if an export failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", choices=["torchvision", "timm", "transformers"], default="torchvision")
    parser.add_argument("--names", nargs="+", help="models; default: a list that covers the zoo's families")
    parser.add_argument("--n-gpus", nargs="+", type=int, default=[2, 4], help="numbers of stages")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args(argv)
    zoo: dict[str, list[str]] = {"torchvision": TORCHVISION, "timm": TIMM, "transformers": TRANSFORMERS}[
        arguments.zoo
    ]
    known = [(family, name) for family, names in zoo.items() for name in names]
    if arguments.names:
        families: dict[str, Any] = {name: family for family, name in known}
        known = [(families.get(name, name), name) for name in arguments.names]
    console = Console(width=120)
    rows = run(arguments.zoo, known, tuple(arguments.n_gpus), console, arguments.json)
    show(rows, console)
    return int(not all(r.passed for r in rows))


if __name__ == "__main__":
    sys.exit(main())
