"""Rules that keep the house as it is drawn: lines per folder, imports, homes of mechanisms, public names."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import dtrp
from dtrp.partitioner.report import PartitionReport

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dtrp"
BUDGET = [line.split() for line in (ROOT / ".ci" / "budget").read_text().splitlines() if line[:1].isdigit()]


@pytest.mark.parametrize(("most", "folder"), BUDGET)
def test_no_folder_outgrows_its_budget(most: str, folder: str) -> None:
    """If this fails: shorten, or raise the number and say in the commit message what users gain."""
    files = [f for f in (ROOT / folder).rglob("*.py") if "__pycache__" not in f.parts]
    assert files
    lines = sum(len(f.read_text(encoding="utf-8").splitlines()) for f in files)
    assert lines <= int(most), f"{folder} has {lines} lines, its budget in .ci/budget is {most}"


def imports(file: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, wherever in it."""
    package = [*file.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *(node.module or "").split(".")]).strip(".")


@pytest.mark.parametrize(("half", "other"), [("partitioner", "runtime"), ("runtime", "partitioner")])
def test_compiler_and_runtime_do_not_know_each_other(half: str, other: str) -> None:
    """They meet in the files right in dtrp/: else neither could be changed, or read, without the other."""
    for file in (PACKAGE / half).rglob("*.py"):
        found = [name for name in imports(file) if name.startswith(f"dtrp.{other}")]
        assert not found, f"{file.relative_to(ROOT)} imports {found}"


HOMES = {  # in the runtime
    "from torch.distributed": {"folder.py", "mesh.py"},
    "import torch.distributed": {"mesh.py", "group_links.py", "replicas.py"},
    "os.replace(": {"checkpoint.py", "folder.py"},
    "getsignal": {"interrupts.py"},
    "random.seed(": {"random.py"},
    "__dict__": {"twins.py", "program.py"},
    ".training = ": {"program.py", "answers.py"},
    "forkserver": {"starting.py", "preload.py"},
}


@pytest.mark.parametrize("what", HOMES)
def test_each_mechanism_has_its_home(what: str) -> None:
    """A second place that does the same is a second place to be wrong."""
    files = (PACKAGE / "runtime").rglob("*.py")
    places = {f.name for f in files if what in f.read_text(encoding="utf-8")}
    assert places <= HOMES[what]


def test_accelerators_are_asked_in_one_file() -> None:
    """A kind of device that another file knows is one that others do not work like."""
    words = ("torch.cuda", "torch.accelerator", "get_device_module", ".is_cuda")
    found = {f.name for f in PACKAGE.rglob("*.py") for word in words if word in f.read_text(encoding="utf-8")}
    assert found <= {"accelerators.py"}


def surface() -> str:
    """Every public name, with the parameters of what can be called."""
    lines = [f"dtrp.{name}" for name in sorted(dtrp.__all__)]
    lines.append(f"dtrp.compile{_parameters(dtrp.compile)}")
    lines.append(f"dtrp.simulate{_parameters(dtrp.simulate)}")
    for kind in (dtrp.Pipeline, dtrp.Trainer, dtrp.Plan, dtrp.Stage, dtrp.Simulation, PartitionReport):
        members = {n: m for base in kind.__mro__[::-1] if base is not object for n, m in vars(base).items()}
        for name, member in sorted(members.items()):
            if not name.startswith("_"):
                shown = _parameters(member) if inspect.isfunction(member) else ""
                lines.append(f"{kind.__name__}.{name}{shown}")
    return "\n".join(lines) + "\n"


def _parameters(function: object) -> str:
    signature = inspect.signature(function)  # type: ignore[arg-type]
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def test_the_public_surface_is_as_written_down() -> None:
    """A new name or parameter is a promise: write it into tests/public.txt, docs/api.md and the changelog."""
    assert surface() == (ROOT / "tests" / "public.txt").read_text(encoding="utf-8")
