"""The house: version, typing marker, links, cost of importing, the command, what documents promise."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import dtrp

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dtrp"
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
README = (ROOT / "README.md").read_text()


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestPackage:
    def test_version_is_the_installed_one(self):
        try:
            installed = metadata.version("dtrp")
        except metadata.PackageNotFoundError:
            pytest.skip("dtrp is run from its sources without being installed")
        assert installed == dtrp.__version__

    def test_is_typed(self):
        assert (PACKAGE / "py.typed").is_file()

    @pytest.mark.parametrize("name", ["partitioner", "runtime"])
    @pytest.mark.skipif(not (ROOT / ".git").exists(), reason="links are kept by git, not by source archives")
    def test_links_at_the_root_show_the_two_halves(self, name):
        link = ROOT / name
        assert link.is_symlink()
        assert link.readlink() == Path("dtrp") / name
        assert link.samefile(PACKAGE / name)

    def test_every_public_name_is_there(self):
        for name in dtrp.__all__:
            assert hasattr(dtrp, name), name
        assert {"compile", "Pipeline", "Plan", "Trainer", "DtrpError"} <= set(dtrp.__all__)

    def test_extras_hold_what_the_errors_tell_users_to_install(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"]
        assert {"onnx", "vision", "plot", "tensorboard", "examples", "test", "dev"} <= set(extras)
        for path in PACKAGE.rglob("*.py"):
            for extra in re.findall(r"dtrp\[(\w+)\]", path.read_text()):
                assert extra in extras, f"{path} names the extra {extra}"


class TestImport:
    """Public names are imported on first use; the tests use them all."""

    def test_imports_nothing_optional(self):
        heavy = "torchvision matplotlib onnx onnxruntime onnxscript rich sklearn tensorboard transformers"
        code = f"""
import json, sys, torch
before = set(sys.modules)
import dtrp; dtrp.compile, dtrp.Plan, dtrp.Trainer  # names are imported on first use
print(json.dumps([m for m in {heavy.split()} if m in sys.modules and m not in before]))
"""
        assert json.loads(python(code)) == []

    def test_by_itself_does_not_import_torch(self):
        """`dtrp.onnx` must run where torch is not installed."""
        assert python("import sys, dtrp, dtrp.errors; print('torch' in sys.modules)").strip() == "False"

    def test_has_every_public_name(self):
        code = "import dtrp; print([n for n in dtrp.__all__ if not hasattr(dtrp, n)], callable(dtrp.compile))"
        assert python(code).strip() == "[] True"

    def test_takes_little_beyond_torchs_own_time(self):
        """A share of what torch takes in the same process: how fast the machine is does not matter."""
        code = """
import time
start = time.process_time()  # not the clock on the wall: the machine may be busy with something else
import torch
loaded = time.process_time()
import dtrp; dtrp.compile
print((time.process_time() - loaded) / (loaded - start))
"""
        assert min(float(python(code)) for _ in range(3)) < 0.5


class TestLayers:
    """The compiler knows nothing of training, the runtime nothing of graphs; pipeline.py joins them."""

    @pytest.mark.parametrize(("half", "other"), [("partitioner", "runtime"), ("runtime", "partitioner")])
    def test_neither_half_imports_the_other(self, half, other):
        for path in (PACKAGE / half).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    imported = [node.module or "", *(alias.name for alias in node.names)]
                elif isinstance(node, ast.Import):
                    imported = [alias.name for alias in node.names]
                else:
                    continue
                assert not any(other in name.split(".") for name in imported), f"{path}:{node.lineno}"

    def test_nothing_is_left_undone(self):
        for path in PACKAGE.rglob("*.py"):
            found = re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", path.read_text())
            assert found is None, f"{path}: {found[0]}"


class TestCommand:
    def test_help_names_the_commands(self):
        out = python("import sys; sys.argv = ['dtrp', '--help']\nfrom dtrp.cli import main\nsys.exit(main())")
        assert "usage: dtrp" in out
        assert "plan" in out

    def test_script_is_declared(self):
        scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
        assert scripts == {"dtrp": "dtrp.cli:main"}


class TestDocuments:
    def test_first_screen_holds_the_two_lines(self):
        screen = README.splitlines()[:20]
        (main_job,) = [line for line in screen if line.endswith("python examples/quickstart.py")]
        (tests,) = [line for line in screen if line.endswith("python -m pytest")]
        for line in (main_job, tests):
            assert line.startswith("python3 -m venv .venv && .venv/bin/pip install ")

    @pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
    def test_links_lead_somewhere(self, path):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)[^)]*\)", path.read_text()):
            assert (path.parent / target).exists(), target

    @pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
    def test_python_blocks_are_python(self, path):
        for block in re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL):
            ast.parse(block)

    def test_changelog_and_citation_know_the_version(self):
        text = (ROOT / "CHANGELOG.md").read_text()
        (date,) = re.findall(rf"## \[{re.escape(dtrp.__version__)}\] - (\S+)\n", text)
        citation = (ROOT / "CITATION.cff").read_text()
        assert f"\nversion: {dtrp.__version__}\ndate-released: {date}\n" in citation

    def test_api_guide_names_every_argument(self):
        guide = (ROOT / "docs" / "api.md").read_text()
        for function in (dtrp.compile, dtrp.Pipeline.trainer):
            for name in list(inspect.signature(function).parameters):
                assert name == "self" or f"`{name}`" in guide, (
                    f"docs/api.md lacks {function.__qualname__}'s {name}"
                )

    def test_api_guide_names_every_public_member(self):
        guide = (ROOT / "docs" / "api.md").read_text()
        for kind in (dtrp.Pipeline, dtrp.Trainer):
            for name in vars(kind):
                assert name.startswith("_") or name in guide, f"docs/api.md lacks {kind.__name__}.{name}"
