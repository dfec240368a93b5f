"""Install the wheel with each extra alone, in an environment of its own, and use what the extra is for.

    python benchmarks/extras.py                       # all extras, with this Python
    python benchmarks/extras.py onnx plot             # some
    python benchmarks/extras.py --python python3.13   # with another Python
    python benchmarks/extras.py --torch 2.11.0        # with another torch, the oldest say

Needs pip's network. Builds the wheel first, and checks that the source archive gives the same one.
"""

from __future__ import annotations

import argparse
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
USES = {
    "": "with trainer() as t: t.fit([(x, y)] * 3, 2)\nimport rich; print(pipe.report)",
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
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help=f"of: {', '.join(filter(None, USES))}")
    parser.add_argument("--python", default=sys.executable, help="to make the environments with")
    parser.add_argument("--torch", help="this version of torch")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        failed = [
            extra
            for extra in args.extras or USES
            if not works(Path(folder), wheel, extra, args.python, args.torch)
        ]
    if failed:
        sys.exit(f"failed: {', '.join(name or 'no extra' for name in failed)}")


def build(folder: Path) -> Path:
    """The wheel, made from the source archive."""
    run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], folder)
    (wheel,) = folder.glob("*.whl")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md"):
        (archive,) = folder.glob("*.tar.gz")
        listed = run(["tar", "tzf", str(archive)], folder)
        assert f"/{name}\n" in listed, f"the source archive lacks {name}"
    assert set(filter(None, USES)) <= set(project["optional-dependencies"])
    return wheel


def works(folder: Path, wheel: Path, extra: str, python: str, torch: str | None) -> bool:
    """Whether an environment with this extra alone does what the extra is for."""
    began = time.monotonic()
    place = folder / f"venv-{extra or 'none'}"
    run([python, "-m", "venv", str(place)], folder)
    wanted = [f"{wheel}[{extra}]" if extra else str(wheel), *([f"torch=={torch}"] if torch else [])]
    script = place / "use.py"
    script.write_text(SETUP + "".join(f"    {line}\n" for line in USES[extra].splitlines()), encoding="utf-8")
    try:
        run([str(place / "bin" / "pip"), "install", "--quiet", *wanted], folder)
        run([str(place / "bin" / "python"), str(script)], place)
    except subprocess.CalledProcessError as e:
        print(f"{extra or '(none)':14} FAILED\n{e.stdout}\n{e.stderr}", flush=True)
        return False
    finally:
        subprocess.run(["rm", "-rf", str(place)], check=False)
    print(f"{extra or '(none)':14} works ({time.monotonic() - began:.0f} s)", flush=True)
    return True


def run(command: list[str], folder: Path) -> str:
    """What a command prints."""
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
