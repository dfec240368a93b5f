"""Which models are captured, and are their graphs the models? Whole zoos with random weights.

    python benchmarks/coverage.py --zoo torchvision
    python benchmarks/coverage.py --zoo timm --sample 200 --seed 1
    python benchmarks/coverage.py --zoo transformers --names GPT-2 Llama

Each model is built, compiled into four stages and compared in a process of its own, which gives its memory
back. Compared with the plain model, under the same seed: the evaluation output, the training output, the
updated buffers and all gradients, evaluation after training and training after evaluation, and a batch of
one more sample. The transformers are also trained for one step through a two-stage pipeline, and their
weights compared with those of a plain step.
Models of more than --max-params parameters are planned on the meta device, and not run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from coverage_training import training_step
from coverage_zoos import (
    Sample,
    timm_names,
    timm_sample,
    torchvision_names,
    torchvision_sample,
)
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._pytree import tree_structure
from tqdm import tqdm

import dtrp
from dtrp import compiling
from dtrp.errors import DtrpError
from dtrp.partitioner import compiler
from dtrp.partitioner.capture.structure import flatten_output

compiling._warm = lambda *_: None  # no workers are started: nobody needs to load torch for them

STAGES = 4
ROUNDING = 1e-5  # relative to a gradient's largest element


@dataclass
class Row:
    """What became of one model."""

    name: str
    passed: bool = False
    params: int = 0
    method: str = ""
    nodes: int = 0
    kept_whole: int = 0
    one_graph: bool = False
    balance: float = 0.0
    capture_s: float = 0.0
    compile_s: float = 0.0
    total_s: float = 0.0
    run: bool = False
    stepped: bool = False
    problem: str = ""
    notes: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def cover(sample: Sample, max_params: float) -> Row:
    """Capture one model and compare."""
    row = Row(sample.name)
    start = time.perf_counter()
    try:
        with torch.device("meta"):
            row.params = sum(p.numel() for p in sample.build().parameters())
    except Exception:
        row.params = 0  # cannot be built on the meta device: it is built for real below
    row.run = row.params <= max_params
    torch.manual_seed(0)
    with torch.device("cpu" if row.run else "meta"):
        model = sample.build()
        args, kwargs = sample.call(2)
    row.params = sum(p.numel() for p in model.parameters())
    pipe = dtrp.compile(model, n_gpus=STAGES, devices=["cpu"] * STAGES)
    began = time.perf_counter()
    try:
        with timed_capture(row):
            pipe.prepare(args, kwargs)
    except DtrpError as error:
        row.problem = f"{type(error).__name__}: {error}"
        return row
    finally:
        row.compile_s = time.perf_counter() - began
    row.balance = pipe.report.balance
    captured = pipe._planning.made.captured
    row.method = captured.method
    row.nodes = len(captured.train.module.graph.nodes)
    row.kept_whole = len(captured.kept_whole)
    row.kept = tuple(f"{k.module}: {k.reason}" for k in captured.kept_whole)
    row.one_graph = captured.one_graph
    row.notes = captured.notes
    row.problem = compare(model, pipe, sample) if row.run else ""
    if row.run and sample.steps and not row.problem:
        torch.manual_seed(0)
        row.problem = training_step(sample.build(), *sample.call(2))
        row.stepped = not row.problem
    row.passed = not row.problem
    row.total_s = time.perf_counter() - start
    return row


@contextlib.contextmanager
def timed_capture(row: Row) -> Iterator[None]:
    """Adds the CPU seconds that the compiler spends capturing to ``row.capture_s``."""
    original = compiler.capture

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()  # with one thread, the seconds that it takes on an idle machine
        try:
            return original(*args, **kwargs)
        finally:
            row.capture_s += time.process_time() - start

    compiler.capture = timed
    try:
        yield
    finally:
        compiler.capture = original


def compare(model: nn.Module, pipe: dtrp.Pipeline, sample: Sample) -> str:
    """The first difference between the model and its pipeline, ``""`` if there is none."""
    example = sample.call(2)
    more = sample.call(3)
    if tree_structure(more) != tree_structure(example):
        more = sample.call(2)  # a list of images: one more is another structure, not a larger batch
    for step, (training, call) in {
        "evaluation": (False, example),
        "training": (True, example),
        "evaluation after training": (False, example),
        "training after evaluation": (True, example),
        "one more sample": (False, more),
    }.items():
        state = copy.deepcopy(model.state_dict())
        plain = _run(model, lambda args, kwargs: model(*args, **kwargs), call, training)
        model.load_state_dict(state)

        try:
            ours = _run(model, lambda args, kwargs: pipe(*args, **kwargs), call, training)
        except Exception as error:
            return f"{step}: {type(error).__name__}: {str(error)[:300]}"
        problem = _difference(plain, ours)
        if problem:
            return f"{step}: {problem}"
    return ""


def _run(model: nn.Module, function: Any, call: Any, training: bool) -> dict[str, Any]:
    model.train(training)
    args, kwargs = call
    torch.manual_seed(1)
    if not training:
        with torch.no_grad():
            leaves, spec = flatten_output(function(args, kwargs))
        return {"structure": spec, **{f"output {i}": x for i, x in enumerate(leaves)}}
    output = function(args, kwargs)
    leaves, spec = flatten_output(output)
    seen: dict[str, Any] = {"structure": spec, **{f"output {i}": x for i, x in enumerate(leaves)}}
    losses = [x.float().pow(2).mean() for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    torch.stack(losses).sum().backward()
    for name, parameter in model.named_parameters():
        seen[f"gradient of {name}"] = parameter.grad
        parameter.grad = None
    seen.update({f"buffer {k}": b.clone() for k, b in model.named_buffers()})
    return seen


def _difference(plain: dict[str, Any], ours: dict[str, Any]) -> str:
    # Outputs and buffers must be equal bit for bit. A parameter's gradient is a sum over its value's uses,
    # which a pipeline may add up in another order.
    worst, where = 0.0, ""
    if plain.keys() != ours.keys():
        return f"other parts: {sorted(plain.keys() ^ ours.keys())[:4]}"
    for key, a in plain.items():
        b = ours[key]
        if not isinstance(a, torch.Tensor):
            if a is not b and a != b:
                return f"{key} is {str(b)[:60]} instead of {str(a)[:60]}"
            continue
        if not isinstance(b, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            shape = getattr(b, "shape", type(b))
            return f"{key} has shape {shape} instead of {a.shape}"
        if torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num())):
            continue
        error = float((a.double() - b.double()).abs().max() / (a.double().abs().max() + 1e-12))
        allowed = ROUNDING if key.startswith("gradient") else 0.0
        if not error <= max(worst, allowed):
            worst, where = error, key
    return f"{where} differs by {worst:.1e}" if where else ""


def _child(pipe: Any, sample: Sample, max_params: float) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        pipe.send(cover(sample, max_params))
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {str(error)[:300]} ({place.filename}:{place.lineno})"
        pipe.send(Row(sample.name, problem=text))


def in_process(sample: Sample, max_params: float, timeout: float) -> Row:
    """`cover` in a child process."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(theirs, sample, max_params))
    child.start()
    theirs.close()
    try:
        if ours.poll(timeout):
            row: Row = ours.recv()
            return row
        return Row(sample.name, problem=f"no result within {timeout:.0f} s")
    except EOFError:
        child.join(5)
        return Row(sample.name, problem=f"the process ended with exit code {child.exitcode}")
    finally:
        if child.is_alive():
            child.join(1)
            child.kill()
        child.join()


def samples(zoo: str, names: list[str] | None, count: int | None, seed: int) -> list[Sample]:
    """The zoo's models to go through."""
    if zoo == "torchvision":
        chosen = names or torchvision_names()
        if count is not None and not names:
            import random

            chosen = sorted(random.Random(seed).sample(chosen, min(count, len(chosen))))
        return [torchvision_sample(n) for n in chosen]
    if zoo == "timm":
        return [timm_sample(n) for n in names or timm_names(count, seed)]
    from coverage_transformers import transformers_names, transformers_sample

    return [transformers_sample(n) for n in names or transformers_names()]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 if all passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", choices=["torchvision", "timm", "transformers"], required=True)
    parser.add_argument("--sample", type=int, help="how many models to draw (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--max-params", type=float, default=100e6, help="larger models are not run")
    parser.add_argument("--names", nargs="+", help="these models only")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for one model")
    parser.add_argument("--json", help="write all rows to this file")
    options = parser.parse_args(argv)
    rows = []
    progress = tqdm(samples(options.zoo, options.names, options.sample, options.seed), disable=None)
    for sample in progress:
        progress.set_description(sample.name)
        rows.append(in_process(sample, options.max_params, options.timeout))
        if not rows[-1].passed:
            progress.write(f"{sample.name}: {rows[-1].problem}")
        if options.json:  # after each, so that a run that is cut off leaves what it found
            with open(options.json, "w") as file:
                json.dump([asdict(row) for row in rows], file, indent=1)
    report(rows)
    return 0 if all(row.passed for row in rows) else 1


def report(rows: list[Row]) -> None:
    """Print the table and the sums."""
    table = Table(
        "model",
        "params",
        "captured by",
        "nodes",
        "kept whole",
        "graphs",
        "balance",
        "capture CPU s",
        "run",
        "outcome",
    )
    for row in rows:
        table.add_row(
            row.name,
            f"{row.params / 1e6:.1f}M",
            row.method or "-",
            str(row.nodes),
            str(row.kept_whole),
            "1" if row.one_graph else "2",
            f"{row.balance:.2f}",
            f"{row.capture_s:.1f}",
            "yes" if row.run else "planned",
            ("passed, trained" if row.stepped else "passed")
            if row.passed
            else row.problem.splitlines()[0][:90],
        )
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    passed = sum(row.passed for row in rows)
    small = [row.capture_s for row in rows if row.params < 100e6]
    slowest = max(small, default=0.0)
    print(f"{passed} of {len(rows)} passed; slowest capture under 100M parameters: {slowest:.1f} CPU s")


if __name__ == "__main__":
    sys.exit(main())
