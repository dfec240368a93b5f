"""Every bit that training makes, recorded, and compared with what another version of the code makes.

    python benchmarks/golden.py record golden.pt
    python benchmarks/golden.py compare golden.pt [--executor workers] [--only "tied*"]

A change that only moves code, or makes it cheaper, must keep every weight, buffer and loss of the runs in
golden_runs.py. Only the public interface is used, so the same two files run on both versions. The recording
holds digests, the plans (so that both versions cut the models alike, whatever their planners would do), and
all weights and losses, from which a comparison says how far off a run is and since when; digests and first
values also go to golden.json, for readers.

Bits are those of one machine and one build of torch: record on the machine where you compare.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # before torch is loaded, here and in workers

import argparse
import contextlib
import dataclasses
import fnmatch
import hashlib
import inspect
import json
import platform
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from golden_runs import EPOCH, TABLE, Run
from torch import nn
from torch.utils import _pytree as pytree

import dtrp

SEED = 7
SHOWN = 4  # values of a tensor, losses of a run, in the JSON file
# Where a version has these arguments, their defaults may choose by what they measure; the table's runs have
# one order. Exact back-propagation has an order of its own.
FIXED = {"schedule": "fig1", "micro_batches": 1, "rebalance": False}


def play(run: Run, executor: str, plan: dict[str, Any] | None) -> dict[str, Any]:
    """Train one run and give what is recorded of it: plain data and tensors."""
    model, batches = run.model(), run.batches()
    outcome: dict[str, Any] = {"initial": digest(state(model)), "batches": digest(enumerate_leaves(batches))}
    pipe = compiled(run, model, batches[0], plan)
    options = {"seed": SEED, **fixed(pipe.trainer, run), **run.options}
    torch.manual_seed(SEED + 1)  # where a run draws its seed itself
    evaluations: list[dict[str, float]] = []
    with pipe.trainer(run.loss_fn, run.optimizer, executor=executor, threads=1, **options) as trainer:
        if run.fit:
            evaluations += trainer.fit(batches[:EPOCH], len(batches) // EPOCH, run.validation())
        else:
            for fed, batch in enumerate(batches, 1):
                trainer.step(*batch)
                if fed in run.flush:
                    trainer.flush()
                if fed in run.evaluate:
                    evaluations.append(trainer.evaluate(run.validation()))
        trainer.flush()
        losses = torch.tensor(trainer.losses, dtype=torch.float64)
    evaluated = {f"{i} {k}": torch.tensor(float(v)) for i, e in enumerate(evaluations) for k, v in e.items()}
    return outcome | {
        "plan": pipe.plan.to_dict(),
        "state": {name: tensor.detach().clone() for name, tensor in state(model).items()},
        "losses": losses,
        "evaluations": evaluated,
        "weights_sha256": digest(state(model)),
        "losses_sha256": digest({"losses": losses}),
        "evaluations_sha256": digest(evaluated),
    }


def compiled(
    run: Run, model: nn.Module, batch: tuple[Any, ...], plan: dict[str, Any] | None
) -> dtrp.Pipeline:
    """The run's pipeline, cut as the recorded ``plan`` says if there is one."""

    def with_plan(chosen: dtrp.Plan | str | None) -> dtrp.Pipeline:
        return dtrp.compile(
            model,
            n_gpus=run.stages,
            devices=["cpu"] * run.stages,
            example_inputs=run.example(batch),
            recompute=run.recompute,
            costs="analytic",
            plan=chosen,
        )

    if plan is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "plan.json"
            path.write_text(json.dumps(plan))
            with contextlib.suppress(dtrp.PlanMismatchError):  # another format, shapes told otherwise
                return with_plan(str(path))
    found = with_plan(None).plan
    stage_of = cut(found, run.lengths) if plan is None else plan["stage_of"]
    if set(found.stage_of) != set(stage_of) and len(found.stage_of) == len(stage_of):
        # Nodes of other names (x += y was written as an addition once) in the same order.
        stage_of = dict(zip(found.stage_of, stage_of.values(), strict=True))
    if set(found.stage_of) != set(stage_of):
        raise dtrp.PlanMismatchError("the captured graph has other nodes than the recorded plan")
    recompute = (*[run.recompute] * (run.stages - 1), False)
    return with_plan(dataclasses.replace(found, stage_of=stage_of, recompute=recompute, edited=True))


def cut(plan: dtrp.Plan, lengths: Sequence[int]) -> dict[str, int]:
    """Stages of so many nodes each in the graph's order, or of equally many, later where a rule wants it.

    What the planner would choose depends on what it takes the machine for, and gives tiny models stages
    without a single weight.
    """
    nodes, n = list(plan.stage_of), plan.n_stages
    ends = list(accumulate(lengths)) if lengths else [len(nodes) * k // n for k in range(1, n)]
    stage_of = {node: bisect_right(ends, i) for i, node in enumerate(nodes)}
    before: dict[str, int] = {}
    while before != stage_of:
        before = dict(stage_of)
        for u, v in plan.edges:
            stage_of[v] = max(stage_of[u], stage_of[v])
        for group in plan.groups:
            stage_of |= dict.fromkeys(group, max(stage_of[node] for node in group))
    return stage_of


def fixed(trainer: Any, run: Run) -> dict[str, Any]:
    """Arguments of this version's trainer that must not be chosen by measuring."""
    known = inspect.signature(trainer).parameters
    chosen = {name: value for name, value in FIXED.items() if name in known}
    if run.options.get("method") == "bp":
        chosen.pop("schedule", None)
    return chosen


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights and buffers, those that are not saved too."""
    return {**dict(model.named_buffers()), **model.state_dict()}


def enumerate_leaves(batches: Iterable[Any]) -> dict[str, torch.Tensor]:
    """All tensors of the batches, numbered."""
    return {f"{i:09d}": leaf for i, leaf in enumerate(pytree.tree_leaves(list(batches)))}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, kinds and bits; all NaNs count as one."""
    made = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().contiguous()
        if tensor.is_floating_point():
            tensor = torch.where(tensor.isnan(), torch.nan, tensor)
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        made.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


# ---- comparing -------------------------------------------------------------------------------------------


def difference(new: dict[str, Any], old: dict[str, Any]) -> str:
    """In what a run differs from its recording; "" if in nothing."""
    for what, name in (("initial", "initial weights"), ("batches", "batches")):
        if new[what] != old[what]:
            return f"the {name} are others than recorded: nothing can be compared"
    found = []
    for what in ("state", "evaluations"):
        sha = f"{'weights' if what == 'state' else what}_sha256"
        if new[sha] != old[sha]:
            found.append(_farthest(new[what], old[what], "weights" if what == "state" else what))
    if new["losses_sha256"] != old["losses_sha256"]:
        found.append(_first_loss(new["losses"], old["losses"]))
    return ", ".join(found)


def _farthest(new: dict[str, torch.Tensor], old: dict[str, torch.Tensor], what: str) -> str:
    if new.keys() != old.keys():
        return f"{what} have other names: {', '.join(sorted(new.keys() ^ old.keys())[:3])} ..."
    most, where = -1.0, ""
    for name, a in new.items():
        b = old[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{name} is {a.dtype} {tuple(a.shape)}, was {b.dtype} {tuple(b.shape)}"
        off = (a.double() - b.double()).abs().max().item() / max(b.double().abs().max().item(), 1e-300)
        if a.numel() and not torch.equal(a, b) and not off <= most:  # NaN is farthest
            most, where = off, name
    return f"largest relative difference in {what} {most:.2g} (in {where})"


def _first_loss(new: torch.Tensor, old: torch.Tensor) -> str:
    if len(new) != len(old):
        return f"{len(new)} losses instead of {len(old)}"
    equal = (new == old) | (new.isnan() & old.isnan())
    first = int((~equal).nonzero()[0]) if not bool(equal.all()) else 0
    return f"first loss that differs: batch {first}, {new[first].item()!r} instead of {old[first].item()!r}"


# ---- command line ----------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """What the bits depend on besides the code."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    return {
        "torch": str(torch.__version__),
        "cpu": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version(),
    }


def summary(outcome: dict[str, Any]) -> dict[str, Any]:
    """A run's digests and first values."""
    return {
        **{name: outcome[name] for name in outcome if name.endswith("_sha256")},
        "losses": outcome["losses"][:SHOWN].tolist() + outcome["losses"][-SHOWN:].tolist(),
        "first_values": {name: t.reshape(-1)[:SHOWN].tolist() for name, t in outcome["state"].items()},
    }


def record(path: Path, runs: list[Run], executor: str) -> int:
    """Play the runs and write what came of them."""
    made = {}
    for run in runs:
        start = time.perf_counter()
        made[run.name] = outcome = play(run, executor, None)
        print(
            f"{run.name:30} weights {outcome['weights_sha256'][:12]}  losses {outcome['losses_sha256'][:12]}",
            f" last loss {outcome['losses'][-1].item():.4f}  {time.perf_counter() - start:.1f} s",
            flush=True,
        )
    about = {**machine(), "dtrp": dtrp.__version__, "executor": executor}
    torch.save({**about, "runs": made}, path)
    readable = {**about, "runs": {name: summary(outcome) for name, outcome in made.items()}}
    path.with_suffix(".json").write_text(json.dumps(readable, indent=1) + "\n")
    print(f"{len(made)} runs recorded in {path} and {path.with_suffix('.json')}")
    return 0


def compare(path: Path, runs: list[Run], executor: str) -> int:
    """Play the runs again; 1 if any differs from its recording."""
    recording = torch.load(path, weights_only=True)
    for what, now in machine().items():
        if recording[what] != now:
            print(f"note: recorded with {what} {recording[what]}, here it is {now}: bits may differ by that")
    wrong = 0
    for run in runs:
        old = recording["runs"].get(run.name)
        try:
            found = "not recorded" if old is None else difference(play(run, executor, old["plan"]), old)
        except Exception as e:
            found = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        wrong += bool(found)
        print(f"{run.name:30} {f'differs ({found})' if found else 'same'}", flush=True)
    print(
        f"{len(runs) - wrong} of {len(runs)} runs are the same ({executor}, recorded {recording['executor']})"
    )
    return int(wrong > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=["record", "compare", "list"])
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--executor", choices=["inline", "workers"], default="inline")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="a run, or a pattern; may be repeated"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)

    patterns = args.only or ["*"]
    runs = [run for run in TABLE if any(fnmatch.fnmatchcase(run.name, pattern) for pattern in patterns)]
    if not runs:
        parser.error(f"no run is called {' or '.join(patterns)}; see: golden.py list")
    if args.command == "list":
        print("\n".join(run.name for run in runs))
        return 0
    if args.file is None:
        parser.error(f"{args.command} needs a file")
    return {"record": record, "compare": compare}[args.command](args.file, runs, args.executor)


if __name__ == "__main__":
    sys.exit(main())
