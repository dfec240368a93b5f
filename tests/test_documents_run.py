"""Documents keep their word: every python block of README and docs is run, notebook and site are built."""

import ast
import doctest
import importlib
import importlib.util
import re
import shlex
import socket
import subprocess
import sys
import textwrap
from functools import partial, wraps
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dtrp
from dtrp.cli import main
from dtrp.pipeline import Pipeline

from .runtime.ranks import ended, started

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"`(dtrp (?:plan|export) [^`]*:[^`]*)`")


def blocks(page, language="python"):
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [textwrap.dedent(text) for _, kind, text in found if kind == language]


def commands(page):
    """Lines for a shell, those that stand in a sentence included."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if not line.startswith("python benchmarks/")]  # by their options, below
    return lines + SHELL.findall(page.read_text(encoding="utf-8"))


@pytest.fixture
def names(monkeypatch, tmp_path):
    """What the pages take for granted: a model, its data, usual imports; stages run in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    made = Pipeline.trainer
    monkeypatch.setattr(
        Pipeline, "trainer", wraps(made)(lambda self, *a, **k: made(self, *a, **{"executor": "inline", **k}))
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


def test_the_recipe(names):
    (block,) = blocks(ROOT / "docs" / "recipe.md")
    run(block, names)


def test_cluster_pages_blocks_work_without_a_launcher_too(names):
    *found, last = blocks(ROOT / "docs" / "cluster.md")
    for block in [*found, last]:
        if "init=" not in block:
            run(block, names)
    assert Path("run", ".metadata").exists()


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

    block, _ = blocks(ROOT / "docs" / "running.md")  # the other one: test_under_torchs_own_schedules
    loss, loop = block.split("\n\n", 1)
    run(loss, names)
    pipe = dtrp.compile(Coder(), n_gpus=2, example_inputs=torch.randn(4, 4))
    with pipe.trainer(names["loss_fn"], names["optimizer"]) as trainer:
        run(loop, {**names, "loader": [torch.randn(4, 4)] * 3, "trainer": trainer})
    assert len(trainer.losses) == 3


def test_two_trainers_that_take_turns(names):
    """What they train is compared with the plain loop in tests/runtime/test_changes.py."""

    class Judged(nn.Module):
        def __init__(self, generator, critic):
            super().__init__()
            self.generator, self.critic = generator, critic

        def forward(self, noise):
            return self.critic(self.generator(noise))

    (block,) = blocks(ROOT / "docs" / "restrictions.md")
    generator = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 3))
    before = generator[0].weight.clone()
    given = {
        "Judged": Judged, "generator": generator, "critic": nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1)),
        "loader": [torch.randn(8, 3)] * 3, "real": torch.ones(8, 1), "fake": torch.zeros(8, 1),
        "loss_fn": F.binary_cross_entropy_with_logits, "adam": partial(torch.optim.Adam, lr=0.01),
    }  # fmt: skip
    run(block, names | given)
    assert not torch.equal(before, generator[0].weight)


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
                 "PipelineTrainer", "PipelineStrategy", "partition(")  # fmt: skip
        for block in blocks(ROOT / "docs" / "api.md"):
            assert any(mark in block for mark in marks), block

    def test_the_partitioner_alone(self, block, names):
        run(block("partition("), names)


def test_no_page_is_forgotten():
    """A page with python blocks or commands that no test here runs."""
    python = [
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
        "restrictions",
    ]
    shell = ["README", "api", "cluster", "onnx", "planner", "simulator"]  # README's two lines: .ci/run
    for page in PAGES:
        assert not blocks(page) or page.stem in python, f"{page.name} has blocks that no test runs"
        assert not commands(page) or page.stem in shell, f"{page.name} has commands that no test runs"
        for text in blocks(page, ""):
            assert not re.match(r"(\$ )?(dtrp|python|torchrun|pip) ", text), f"not marked as bash: {text}"


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


# --- Commands -----------------------------------------------------------------------------------------


def test_scripts_named_in_sentences_take_those_options():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        for script, rest in re.findall(r"python ((?:benchmarks|examples)/\S+?\.py)([^`\n#]*)", text):
            source = (ROOT / script).read_text(encoding="utf-8")
            for option in re.findall(r"--[\w-]+", rest):
                assert f'"{option}"' in source, f"{page.name}: {script} {option}"


GPT = """
from torch import nn
class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        layer = lambda: nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.layers = nn.Sequential(*(layer() for _ in range(16)))
        self.head = nn.Linear(32, 100)
    def forward(self, tokens):
        return self.head(self.layers(self.embed(tokens)))
gpt = GPT
"""


@pytest.fixture
def cluster(names):
    """What the simulator's page takes for granted: a model of one's own, and the file that it shows."""
    Path("my").mkdir()
    Path("my", "models.py").write_text(GPT, encoding="utf-8")
    (text,) = blocks(ROOT / "docs" / "simulator.md", "json")
    Path("cluster.json").write_text(text, encoding="utf-8")


def test_the_simulators_page(names, cluster):
    (block,) = blocks(ROOT / "docs" / "simulator.md")
    names["model"] = nn.Sequential(*(nn.Linear(16, 16) for _ in range(20)))
    run(block, {**names, "x": torch.randn(4, 16)})


@pytest.mark.slow
@pytest.mark.parametrize("page", ["api.md", "onnx.md", "planner.md", "simulator.md"])
def test_commands(page, names, cluster, monkeypatch):
    """As they stand there."""
    torchvision = pytest.importorskip("torchvision")
    pytest.importorskip("onnxscript")
    monkeypatch.syspath_prepend(".")
    if page == "onnx.md":
        pipe = dtrp.compile(torchvision.models.resnet18(), n_gpus=2, example_inputs=torch.randn(2, 3, 32, 32))
        with pipe.trainer(F.cross_entropy, partial(torch.optim.SGD, lr=1e-5)) as trainer:
            trainer.step(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))
            trainer.save("run.ckpt")
    found = [line for line in commands(ROOT / "docs" / page) if line.startswith("dtrp ")]
    assert found
    for line in found:
        assert main(shlex.split(line)[1:]) == 0, line


# --- Under a launcher ---------------------------------------------------------------------------------

PREAMBLE = """
import os, torch, dtrp, torch.nn.functional as F
from functools import partial
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import Schedule1F1B
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(0)
class Decoder(nn.Sequential):
    def __init__(self, config=None):
        super().__init__(*(nn.Linear(8, 8) for _ in range(9)))
model, config = Decoder(), None
x, y = torch.randn(32, 8), torch.randint(0, 8, (32,))
loader = val_loader = DataLoader(TensorDataset(x, y), 8)
"""


def launch(command, folder, block, mended=()):
    """A torchrun line of a page, with a page's block as train.py."""
    for was, becomes in (
        ("epochs=90", "epochs=1"),
        ("trainer(...,", "trainer(F.cross_entropy, SGD,"),
        *mended,
    ):
        block = block.replace(was, becomes)
    script = f"{PREAMBLE}\nSGD = partial(torch.optim.SGD, lr=0.1)\n{block}\nprint('ENDED', flush=True)\n"
    (folder / "train.py").write_text(script, encoding="utf-8")
    words = [sys.executable, "-m", "torch.distributed.run", *shlex.split(command)[1:]]
    return started(words, folder, {})


def ended_well(*processes, ranks):
    found = [ended(process, 200.0) for process in processes]
    assert [code for code, _ in found] == [0] * len(found), found
    assert sum(text.count("ENDED") for _, text in found) == ranks


@pytest.mark.slow
def test_under_a_launcher(tmp_path):
    """The first and the last line of the page on clusters, on this host; between them stand those for two
    hosts (tests/runtime/test_two_hosts.py) and for Slurm, of which it says that it was not run."""
    plain, of_meta, resumes = (blocks(ROOT / "docs" / "cluster.md")[i] for i in (0, 2, 3))
    first, *between, last = commands(ROOT / "docs" / "cluster.md")
    assert all("is_host" in line or line.startswith(("#SBATCH", "head=", "srun ")) for line in between)
    ended_well(launch(first, tmp_path, plain), ranks=4)
    safetensors = pytest.importorskip("safetensors.torch")
    (tmp_path / "weights").mkdir()
    tensors = nn.Sequential(*(nn.Linear(8, 8) for _ in range(9))).state_dict()
    safetensors.save_file(tensors, tmp_path / "weights" / "all.safetensors")
    mended = [("loss_fn=..., optimizer=...", "loss_fn=F.cross_entropy, optimizer=SGD")]
    ended_well(launch(first, tmp_path, of_meta, mended), ranks=4)
    assert (tmp_path / "run" / ".metadata").exists()
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        here = f"localhost:{sock.getsockname()[1]}"
    last = last.replace("host1:29500", here).replace("--nproc-per-node 4", "--nproc-per-node 2")
    hosts = [launch(last, tmp_path, "pipe = dtrp.compile(model, n_gpus=4)\n" + resumes) for _ in range(2)]
    ended_well(*hosts, ranks=4)


@pytest.mark.slow
def test_under_torchs_own_schedules(tmp_path):
    _, block = blocks(ROOT / "docs" / "running.md")
    (command,) = re.findall(
        r"Under `(torchrun [^`]*)`, in every rank", (ROOT / "docs" / "running.md").read_text()
    )
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(9)))
    dtrp.compile(model, n_gpus=2, example_inputs=torch.randn(8, 8)).plan.save(tmp_path / "plan.json")
    ended_well(launch(f"{command} train.py", tmp_path, block, [('"cuda"', '"cpu"')]), ranks=2)


WITH_EXAMPLES = [
    "onnx", "partitioner.devices", "partitioner.partition", "partitioner.report",
    "simulation.cluster", "simulation.run",
]  # fmt: skip


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_in_docstrings(module):
    failed, tried = doctest.testmod(importlib.import_module(f"dtrp.{module}"))
    assert tried > 0
    assert failed == 0


def test_no_docstring_with_an_example_is_forgotten():
    for path in (ROOT / "dtrp").rglob("*.py"):
        found = [line for line in path.read_text(encoding="utf-8").splitlines() if ">>> " in line]
        if not all("+SKIP" in line for line in found):  # what needs a file of the user's
            name = ".".join(path.relative_to(ROOT / "dtrp").with_suffix("").parts).removesuffix(".__init__")
            assert name in WITH_EXAMPLES, f"{path} has examples that no test runs"
