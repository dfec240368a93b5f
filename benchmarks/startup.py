"""How long the first batch with worker processes takes, against another revision of dtrp, in one run.

    python benchmarks/startup.py --against HEAD~1

Each revision is checked out aside and measured in fresh interpreters, in turns: from the trainer's making to
the loss of the first batch, right after `dtrp.compile`, and for a second trainer of the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MEASURE = """
import json, sys, time
from functools import partial
import torch, torch.nn.functional as F
from torch import nn
import dtrp

n = int(sys.argv[1])
torch.manual_seed(0)
block = lambda: (nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
model = nn.Sequential(nn.Conv2d(3, 16, 3), *(m for _ in range(8) for m in block()))
model.extend([nn.Flatten(), nn.LazyLinear(10)])
x, y = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
model(x)
began = time.perf_counter()
pipe = dtrp.compile(model, devices=["cpu"] * n, example_inputs=x)
times = {"compile": time.perf_counter() - began}
for name in ("first", "second"):
    began = time.perf_counter()
    with pipe.trainer(F.cross_entropy, partial(torch.optim.SGD, lr=0.1), executor="workers", threads=1) as t:
        t.step(x, y)
        t.flush()
        times[name] = time.perf_counter() - began
print(json.dumps(times))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", default="HEAD~1", help="the other revision (default: %(default)s)")
    parser.add_argument("--stages", type=int, default=2, help="worker processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of both revisions (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        revision = f"{folder}/revision"
        subprocess.run([*git, "add", "--quiet", "--detach", revision, args.against], check=True)
        try:
            roots = {"here": ROOT, args.against: Path(folder) / "revision"}
            found: dict[str, list[dict[str, float]]] = {who: [] for who in roots}
            for _ in range(args.rounds + 1):
                for i, (who, root) in enumerate(roots.items()):
                    found[who].append(measure(root, args.stages, Path(folder) / f"cache-{i}"))
            for kept in found.values():
                del kept[0]  # what is measured once per machine was measured then
        finally:
            subprocess.run([*git, "remove", "--force", revision], check=True)
    print(f"{args.stages} stages, medians of {args.rounds} rounds, seconds")
    print(f"{'':12}{'compile':>10}{'first':>10}{'second':>10}")
    medians = {
        who: {k: statistics.median(t[k] for t in rows) for k in rows[0]} for who, rows in found.items()
    }
    for who, row in medians.items():
        print(f"{who[:11]:12}" + "".join(f"{value:10.2f}" for value in row.values()))
    ratios = {k: medians["here"][k] / medians[args.against][k] for k in medians["here"]}
    print(f"{'ratio':12}" + "".join(f"{value:10.2f}" for value in ratios.values()))


def measure(root: Path, stages: int, cache: Path) -> dict[str, float]:
    """One fresh process, with the package of this folder."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(stages)],
        # A cache of its own: what one revision has measured of the machine, the other would measure again.
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)},
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
