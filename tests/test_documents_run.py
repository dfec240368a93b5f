"""Documents keep their word: every python block of README and docs is run, notebook and site are built."""

import ast
import importlib.util
import re
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dtrp
from dtrp.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
ELSEWHERE = {  # pages whose blocks need what is not here, and the test that has them
    ("running.md", "init_device_mesh"): "tests of to_pipelining",
    ("simulator.md", "cluster.json"): "tests of the simulator",
    ("api.md", "simulate("): "tests of the simulator",
}


def blocks(page):
    return [b for b in BLOCK.findall(page.read_text(encoding="utf-8")) if not _elsewhere(page, b)]


def _elsewhere(page, block):
    return any(page.name == name and mark in block for name, mark in ELSEWHERE)


@pytest.fixture
def names(monkeypatch, tmp_path):
    """What the pages take for granted: a model, its data, usual imports; stages run in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    made = Pipeline.trainer
    monkeypatch.setattr(
        Pipeline, "trainer", lambda self, *a, **k: made(self, *a, **{"executor": "inline", **k})
    )
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4),
    )  # fmt: skip
    x, y = torch.randn(8, 3, 12, 12), torch.randint(0, 4, (8,))
    loader = [(x, y)] * 2
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    pipe = dtrp.compile(model, n_gpus=2, example_inputs=x)
    return {
        "dtrp": dtrp, "torch": torch, "nn": nn, "F": F, "partial": partial, "model": model, "x": x, "y": y,
        "loader": loader, "train_loader": loader, "val_loader": loader, "optimizer": optimizer,
        "dataset": TensorDataset(x, y), "DataLoader": DataLoader,
        "loss_fn": F.cross_entropy, "pipe": pipe, "images": x.numpy(),
    }  # fmt: skip


def run(block, names):
    """A block as it stands, but for how long it trains."""
    block = re.sub(r"epochs=\d\d", "epochs=1", block).replace("trainer(...,", "trainer(loss_fn, optimizer,")
    exec(compile(ast.parse(block), "a document's block", "exec"), names)


def test_the_first_page(names):
    (block,) = blocks(ROOT / "README.md")
    run(block, names)
    (block,) = blocks(ROOT / "docs" / "index.md")
    run(block, names)


@pytest.mark.parametrize("page", ["recipe.md", "cluster.md"])
def test_pages_that_train(page, names):
    """Of the cluster page the first block: the others need a launcher (tests/runtime/test_torchrun.py)."""
    found = blocks(ROOT / "docs" / page)
    for block in found[:1] if page == "cluster.md" else found:
        run(block, names)


def test_the_tutorial_and_the_report(names):
    for page in ("tutorial.md", "report.md"):
        for block in blocks(ROOT / "docs" / page):
            run(block, names)


def test_an_annealed_loss(names):
    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.spread, self.back = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(2, 4)

        def forward(self, x):
            return self.back(self.mean(x)), self.mean(x), self.spread(x)

    (block,) = blocks(ROOT / "docs" / "running.md")
    loss, loop = block.split("\n\n", 1)
    run(loss, names)
    pipe = dtrp.compile(Coder(), n_gpus=2, example_inputs=torch.randn(4, 4))
    with pipe.trainer(names["loss_fn"], names["optimizer"]) as trainer:
        run(loop, {**names, "loader": [torch.randn(4, 4)] * 3, "trainer": trainer})
    assert len(trainer.losses) == 3


@pytest.mark.slow
def test_stages_as_onnx(names):
    pytest.importorskip("onnxscript")
    for block in blocks(ROOT / "docs" / "onnx.md"):
        run(block, names)


class TestApiGuide:
    """The blocks of docs/api.md, each with what it needs."""

    @pytest.fixture
    def block(self):
        found = blocks(ROOT / "docs" / "api.md")
        return lambda mark: next(b for b in found if mark in b)

    def test_compile_and_train(self, block, names):
        run(block("plans at the first batch"), names)
        run(block("for x, y in loader"), names)
        run(block("class Half"), names)

    def test_callbacks(self, block, names):
        with names["pipe"].trainer(F.cross_entropy, names["optimizer"]) as trainer:
            run(block("SaveBest"), {**names, "trainer": trainer})
        assert Path("best.ckpt").exists()
        assert Path("run.csv").exists()

    @pytest.mark.slow
    def test_onnx(self, block, names):
        pytest.importorskip("onnxscript")
        run(block("load_chain"), names)

    @pytest.mark.slow
    def test_trainer_libraries(self, block, names, tmp_path):
        """Only that what stands there can be made: tests/integrations train with it."""
        transformers = pytest.importorskip("transformers")
        lightning = pytest.importorskip("lightning.pytorch")
        for mark in ("PipelineTrainer", "PipelineStrategy"):
            tree = ast.parse(block(mark))
            kept = [node for node in tree.body if not isinstance(node, ast.Expr)]  # what trains
            code = ast.unparse(ast.Module(kept, []))
            config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8)
            small = {"model": transformers.GPT2LMHeadModel(config), "data": [1], "collator": None}
            quiet = partial(transformers.TrainingArguments, use_cpu=True, report_to="none")
            exec(code, {**names, **small, "TrainingArguments": quiet, "L": lightning})

    def test_every_block_is_run_by_one_of_these(self):
        marks = ("plans at the first batch", "for x, y in loader", "class Half", "SaveBest", "load_chain",
                 "PipelineTrainer", "PipelineStrategy", "partition(", "simulate(")  # fmt: skip
        for block in blocks(ROOT / "docs" / "api.md"):
            assert any(mark in block for mark in marks), block

    def test_the_partitioner_alone(self, block, names):
        run(block("partition("), names)


def test_no_page_is_forgotten():
    """A page with python blocks that no test above runs."""
    known = [
        "README",
        "index",
        "recipe",
        "cluster",
        "tutorial",
        "report",
        "running",
        "onnx",
        "api",
        "simulator",
    ]
    for page in PAGES:
        assert not blocks(page) or page.stem in known, f"{page.name} has blocks that no test runs"


def test_the_notebook_is_the_tutorial():
    """If this fails: python docs/notebook.py."""
    spec = importlib.util.spec_from_file_location("notebook", ROOT / "docs" / "notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.notebook((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))
    assert made == (ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """On worker processes, as a user's does."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    code = textwrap.dedent(f"""
        import nbclient, nbformat
        notebook = nbformat.read({str(ROOT / "docs" / "tutorial.ipynb")!r}, as_version=4)
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
        print(notebook.cells[-2].outputs[-1].text)
    """)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "mixer.ckpt").exists()


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    reference = (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf-8")
    for name in ("dtrp.compiling.compile", "dtrp.callbacks.EMA", "lightning.PipelineStrategy"):
        assert f'id="dtrp.{name.removeprefix("dtrp.")}"' in reference or f".{name}" in reference, name
