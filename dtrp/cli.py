"""The command line: plan a model without running it, export its stages, see what works here.

``dtrp plan torchvision.models:resnet50 --input 32x3x224x224 --n-gpus 4`` builds the model (on the meta
device where it can: no memory, no time), captures it, plans and prints the report. Exit status: 0 done, 1
dtrp says why it cannot be done, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrp import cli_doctor, cli_export, cli_simulate
from dtrp.errors import DtrpError
from dtrp.files import write_text
from dtrp.names import nearest
from dtrp.version import __version__

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dtrp.partitioner.replication import Layout
    from dtrp.partitioner.report import PartitionReport
    from dtrp.simulation.result import Simulation

_EXAMPLES = """examples:
  dtrp plan torchvision.models:resnet50 --input 32x3x224x224 --n-gpus 4 --device A100-80GB
  dtrp plan my.models:gpt --kwargs '{"layers": 80}' --input tokens=1x2048:int64 --n-gpus 8 --html plan.html
  dtrp plan my.models:net --input 8x16 --n-gpus 2 --memory-limit 16GB --json - | jq .balance
  dtrp plan my.models:gpt --input tokens=1x2048:int64 --n-gpus 16 --cluster two_nodes.json --schedule lean
  dtrp export torchvision.models:resnet18 --input 1x3x224x224 --n-gpus 2 --out stages/
  dtrp doctor
"""


class UsageError(Exception):
    """What was typed makes no sense; the message says what would."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; gives the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    logging.basicConfig(format="dtrp: %(message)s", level=logging.INFO if args.verbose else logging.WARNING)
    try:
        status: int = args.run(args)
    except (UsageError, ValueError, TypeError) as e:
        print(f"dtrp: error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader (head, less) has seen enough
        sys.stderr.close()
        return 0
    except (DtrpError, OSError, ImportError) as e:
        print(f"dtrp: {type(e).__name__}: {e}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dtrp",
        description="Cut any PyTorch model into balanced stages.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dtrp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{plan,export,doctor}")
    plan = commands.add_parser("plan", help="plan a model and print the partition report")
    _common(plan)
    plan.add_argument(
        "--device", help="cpu, cuda:0 or a GPU's name such as A100-80GB (default: what is here)"
    )
    plan.add_argument(
        "--memory-limit", metavar="SIZE", help="per stage, such as 16GB; or one per stage: 16GB,24GB"
    )
    plan.add_argument(
        "--bandwidth",
        metavar="SIZE",
        help="bytes per second between stages, such as 25GB; with nodes: node=300GB,net=25GB,per_node=8",
    )
    plan.add_argument("--recompute", choices=("auto", "yes", "no"), default="auto", help="(default: auto)")
    plan.add_argument(
        "--costs", choices=("auto", "analytic", "measured"), default="auto", help="(default: auto)"
    )
    plan.add_argument(
        "--split-linear",
        action="store_true",
        help="let stages share Linear layers that take much of a stage's time, such as a vocabulary's head",
    )
    plan.add_argument("--dtype", help="the autocast dtype that training will use, such as bfloat16")
    plan.add_argument(
        "--compare-k",
        metavar="K,K,...",
        help="also predict other numbers of stages (1,2,4,8), under other orders and micro-batches",
    )
    plan.add_argument(
        "--layouts",
        action="store_true",
        help="also compare other ways to use K devices: fewer stages, of several each, or data parallelism",
    )
    cli_simulate.add_arguments(plan)
    plan.add_argument("--html", metavar="FILE", help="write the report as a page")
    plan.add_argument("--json", metavar="FILE", help="write the report as JSON; - for standard output, alone")
    plan.add_argument("--plan", metavar="FILE", help="write the plan, for dtrp.compile(plan=...)")
    plan.set_defaults(run=_plan)
    export = commands.add_parser("export", help="export each stage to ONNX")
    _common(export)
    cli_export.add_arguments(export)
    export.set_defaults(run=_export)
    doctor = commands.add_parser("doctor", help="say what is here and what works, and try two stages")
    doctor.add_argument("-v", "--verbose", action="store_true", help="say what is being done")
    doctor.set_defaults(run=lambda args: cli_doctor.run())
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="package.module:callable", help="anything that returns an nn.Module")
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="[NAME=]SHAPE[:DTYPE]",
        help="an input, such as 32x3x224x224 or tokens=2x128:int64; repeat it for several",
    )
    parser.add_argument("--n-gpus", type=int, required=True, metavar="K", help="number of stages")
    parser.add_argument("--kwargs", metavar="JSON", default="{}", help="keyword arguments of the callable")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is being done")


def _plan(args: argparse.Namespace) -> int:
    import torch

    from dtrp import accelerators, loop_cost
    from dtrp.partitioner.compiler import Request, compile_model, threads_per_stage
    from dtrp.partitioner.devices import device_spec, parse_bytes
    from dtrp.partitioner.links import parse_links

    if args.n_gpus < 1:
        raise UsageError(f"--n-gpus must be at least 1; got {args.n_gpus}")
    for path in (args.html, args.json, args.plan, args.figure):
        if path in (None, "-"):
            continue
        if Path(path).is_dir():
            raise UsageError(f"cannot write {path!r}: it is a folder")
        there = next(folder for folder in Path(path).absolute().parents if folder.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise UsageError(f"cannot write {path!r}: {there} is no directory that can be written into")
    ks = _numbers(args.compare_k)
    cluster = cli_simulate.cluster(args)
    limits = (
        None if args.memory_limit is None else [parse_bytes(part) for part in args.memory_limit.split(",")]
    )
    if limits is not None and len(limits) not in (1, args.n_gpus):
        raise UsageError(
            f"--memory-limit has {len(limits)} sizes for {args.n_gpus} stages; give 1 or {args.n_gpus}"
        )
    limit = limits[0] if limits is not None and len(limits) == 1 else limits
    model = _build(args.model, args.kwargs, on_meta=args.costs != "measured")
    positional, named = _inputs(args.input, model)
    here = next(iter(accelerators.here()), torch.device("cpu")).type  # each stage has one
    threads = threads_per_stage(args.n_gpus)
    on_cpu = device_spec(args.device or here, threads=threads).kind == "cpu"
    if args.device is None and on_cpu:
        print("dtrp: planning for this machine's CPU; for a GPU name it: --device A100-80GB", file=sys.stderr)
    links = parse_links(_bandwidth(args.bandwidth) or cli_simulate.links(cluster), args.n_gpus)
    request = Request(
        (torch.device("cpu"),) * args.n_gpus,
        limit,
        "auto" if args.recompute == "auto" else args.recompute == "yes",
        args.costs,
        links,
        None,
        loop=loop_cost.loop_cost() if on_cpu and args.n_gpus > 1 else None,
        split_linear=args.split_linear,
        named=args.device or here,
        dtype=None if args.dtype is None else _dtype(args.dtype),
    )
    made = compile_model(model, request, positional, named)
    plan, report = made.plan, made.report
    if args.plan:
        plan.save(args.plan)
    if args.html:
        report.to_html(args.html)
    simulated = None if cluster is None else cli_simulate.run(report, cluster, args, ks)
    _print(report, ks, args.json, simulated, report.layouts() if args.layouts else [])
    return 0


def _bandwidth(text: str | None) -> Any:
    """``25GB``, or ``node=300GB,net=25GB,per_node=8`` as a mapping."""
    if text is None or "=" not in text:
        return text
    pairs = dict(part.partition("=")[::2] for part in text.split(","))
    whole = {key: int(value) for key, value in pairs.items() if "node" in key and value.isdigit()}
    return {**pairs, **{key: whole[key] for key in ("nodes", "per_node") if key in whole}}


def _print(
    report: PartitionReport,
    ks: Sequence[int],
    json_path: str | None,
    simulated: Simulation | None,
    layouts: Sequence[Layout],
) -> None:
    from dtrp.partitioner import replication
    from dtrp.partitioner.report_text import comparison

    points = report.compare(ks, orders=True)
    if json_path is not None:
        data = report.to_dict()
        if ks:
            data["compare_k"] = [asdict(point) for point in points]
        if layouts:
            data["layouts"] = [replication.summary(layout) for layout in layouts]
        if simulated is not None:
            data["simulation"] = simulated.to_dict()
        text = json.dumps(data, indent=2)
        if json_path == "-":
            print(text)
            return
        write_text(json_path, text + "\n")
    print(report)
    if ks:
        print(comparison(points, set(ks) - {point.n_stages for point in points}))
    if layouts:
        print(f"\n{replication.comparison(layouts)}")
    if simulated is not None:
        print(f"\n{simulated}")


def _export(args: argparse.Namespace) -> int:
    model = _build(args.model, args.kwargs, on_meta=False)
    return cli_export.run(args, model, *_inputs(args.input, model))


def _build(name: str, kwargs_text: str, *, on_meta: bool) -> nn.Module:
    """The model that ``package.module:callable`` gives, on the meta device if asked for and possible."""
    import torch
    from torch import nn

    try:
        kwargs = json.loads(kwargs_text)
    except ValueError as e:
        raise UsageError(f"--kwargs is no valid JSON ({e}): {kwargs_text}") from None
    if not isinstance(kwargs, dict):
        raise UsageError(
            f"--kwargs must be a JSON object such as '{{\"num_classes\": 10}}'; got {kwargs_text}"
        )
    found = _resolve(name)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise UsageError(
            f"{name} is a {type(found).__name__}, neither an nn.Module nor a callable that gives one"
        )
    model: Any = None
    if on_meta:
        try:
            with torch.device("meta"):
                model = found(**kwargs)
        except Exception as e:  # whatever it is that its code needs real numbers for
            logging.getLogger("dtrp").info("%s cannot be built on the meta device: %s", name, e)
    if model is None:
        try:
            model = found(**kwargs)
        except TypeError as e:
            raise UsageError(f"{name} could not be called with --kwargs {kwargs_text}: {e}") from e
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name} gave a {type(model).__name__}, not an nn.Module")
    return model


def _resolve(name: str) -> Any:
    module_name, colon, path = name.partition(":")
    if not colon or not module_name or not path:
        raise UsageError(
            f"the model must be package.module:callable, such as torchvision.models:resnet50; got {name!r}"
        )
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # models of the current directory, as with python -m
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        raise UsageError(
            f"cannot import {module_name!r}: {e}. Is it installed, or in the current directory?"
        ) from e
    for part in path.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{module_name!r} has no {path!r}{nearest(part, dir(found))}")
        found = getattr(found, part)
    return found


def _inputs(texts: Sequence[str], model: nn.Module) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The example inputs: zeros, on the model's device."""
    import torch

    place = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    positional: list[Tensor] = []
    named: dict[str, Tensor] = {}
    for text in texts:
        name, equals, rest = text.rpartition("=")
        shape_text, _, dtype_text = rest.partition(":")
        try:
            shape = [int(part) for part in shape_text.lower().split("x")] if shape_text else []
        except ValueError:
            shape = [-1]
        if any(n < 1 for n in shape):
            raise UsageError(
                f"--input must be sizes joined by x, such as 32x3x224x224, 2x128:int64 or "
                f"tokens=2x128:int64; got {text!r}"
            )
        tensor = torch.zeros(shape, dtype=_dtype(dtype_text or "float32"), device=place)
        if equals:
            named[name] = tensor
        elif named:
            raise UsageError(f"--input {text!r} comes after a named input: give unnamed ones first")
        else:
            positional.append(tensor)
    return tuple(positional), named


def _dtype(name: str) -> Any:
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"unknown dtype {name!r}: give one of torch's, such as float32, bfloat16 or int64")
    return dtype


def _numbers(text: str | None) -> list[int]:
    if text is None:
        return []
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = [0]
    if numbers[0] < 1:
        raise UsageError(f"--compare-k must be numbers of stages such as 1,2,4,8; got {text!r}")
    return numbers


if __name__ == "__main__":
    sys.exit(main())
