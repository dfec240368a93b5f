"""The matrix before a release: each extra alone in an environment of its own, and the tests, by Python.

    python benchmarks/extras.py                                      # all extras, with this Python
    python benchmarks/extras.py none onnx plot                       # some; "none" is the wheel alone
    python benchmarks/extras.py --python python3.11 python3.12 python3.13
    python benchmarks/extras.py test --torch 2.11.0 --tests tests/test_first_hour.py   # the oldest torch

Needs pip's network. Builds the wheel from the source archive first. The wheel alone is installed once per
Python; each extra goes into a copy of that (hard links), so nothing of another extra is there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETUP = """
import torch, dtrp
from functools import partial
from torch import nn
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
pipe = dtrp.compile(model, devices=["cpu"] * 2, example_inputs=x)
trainer = partial(pipe.trainer, nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1))
if __name__ == "__main__":
"""
VERSIONS = "import platform, torch; print(f'Python {platform.python_version()}, torch {torch.__version__}')"
USES = {
    "none": "with trainer() as t: t.fit([(x, y)] * 3, 2)\nimport rich; print(pipe.report)",
    "onnx": "pipe.export_onnx('s'); import dtrp.onnx; dtrp.onnx.load_chain('s')(x.numpy())",
    "vision": "import torchvision; dtrp.compile(torchvision.models.resnet18(), 2, "
    "example_inputs=torch.randn(1, 3, 64, 64))",
    "plot": "pipe.report.plot('p.png')",
    "tensorboard": "with trainer(tensorboard='t') as t: t.fit([(x, y)] * 3, 1)",
    "transformers": "from transformers import TrainingArguments, GPT2Config, GPT2LMHeadModel\n"
    "from dtrp.integrations.transformers import PipelineTrainer\n"
    "m = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2, n_positions=8))\n"
    "a = TrainingArguments('o', max_steps=2, report_to='none', use_cpu=True, save_strategy='no')\n"
    "d = [{'input_ids': [1, 2, 3], 'labels': [1, 2, 3]}] * 8\n"
    "PipelineTrainer(m, a, train_dataset=d, pipeline={'n_gpus': 2}).train()",
    "lightning": "import lightning as L; from torch.utils import data\n"
    "from dtrp.integrations.lightning import PipelineStrategy\n"
    "class M(L.LightningModule):\n"
    "    def __init__(self): super().__init__(); self.net = model\n"
    "    def training_step(self, b, i): return nn.functional.cross_entropy(self.net(b[0]), b[1])\n"
    "    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.1)\n"
    "L.Trainer(strategy=PipelineStrategy({'n_gpus': 2}), max_epochs=1, accelerator='cpu', logger=False,\n"
    "    enable_checkpointing=False).fit(M(), data.DataLoader(data.TensorDataset(x, y), 4))",
}
"""What each extra is for; those left out are for work on dtrp itself."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("extras", nargs="*", help=f"of: {', '.join(USES)}, test (default: all but test)")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="to make environments with")
    parser.add_argument("--torch", help="this version of torch")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="what pytest runs, for the extra test")
    args = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder)
        for python in args.python:
            base = folder / "none"
            run([python, "-m", "venv", str(base)], folder)
            install(base, str(wheel), *([f"torch=={args.torch}"] if args.torch else []))
            found = run([str(base / "bin" / "python"), "-c", VERSIONS], base)
            print(found.strip(), flush=True)
            for extra in args.extras or USES:
                if not works(base, wheel, extra, args.tests):
                    failed.append(f"{extra} ({python})")
            shutil.rmtree(base)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def build(folder: Path) -> Path:
    """The wheel, made from the source archive."""
    run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], folder)
    (wheel,) = folder.glob("*.whl")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (archive,) = folder.glob("*.tar.gz")
    listed = run(["tar", "tzf", str(archive)], folder)
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md"):
        assert f"/{name}\n" in listed, f"the source archive lacks {name}"
    assert set(USES) - {"none"} <= set(project["optional-dependencies"])
    return wheel


def install(place: Path, *wanted: str) -> None:
    """Bytecode is made when it is needed: less to write."""
    python = str(place / "bin" / "python")
    run([python, "-m", "pip", "install", "--quiet", "--no-compile", *wanted], place)


def works(base: Path, wheel: Path, extra: str, tests: list[str]) -> bool:
    """Whether an environment with this extra alone does what the extra is for."""
    began = time.monotonic()
    place = base.with_name(extra + "-alone")
    shutil.copytree(base, place, symlinks=True, copy_function=os.link)
    python = str(place / "bin" / "python")
    try:
        if extra != "none":
            install(place, "--upgrade-strategy", "only-if-needed", f"{wheel}[{extra}]")
        if extra == "test":
            command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
            print(run(command, ROOT).strip().splitlines()[-1], flush=True)
        else:
            script = place / "use.py"
            lines = "".join(f"    {line}\n" for line in USES[extra].splitlines())
            script.write_text(SETUP + lines, encoding="utf-8")
            run([python, str(script)], place)
        run([python, "-m", "pip", "check"], place)
    except subprocess.CalledProcessError as e:
        print(f"{extra:14} FAILED\n{e.stdout[-6000:]}\n{e.stderr[-6000:]}", flush=True)
        return False
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(f"{extra:14} works ({time.monotonic() - began:.0f} s)", flush=True)
    return True


def run(command: list[str], folder: Path) -> str:
    """What a command prints."""
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout


if __name__ == "__main__":
    main()
