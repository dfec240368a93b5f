"""The command line: what it prints and writes, its exit status, its errors."""

import json
import runpy
import subprocess
import sys

import pytest
from torch import nn

from dtrp.cli import main
from dtrp.partitioner.plan import Plan
from dtrp.version import __version__

MODEL = f"{__name__}:net"
PLAN = ["plan", MODEL, "--input", "4x8", "--device", "T4"]


def net(width=8, depth=4):
    return nn.Sequential(*[nn.Linear(8 if i == 0 else width, width) for i in range(depth)])


def two_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(10, 8), nn.Linear(8, 8)

        def forward(self, tokens, mask):
            return self.fc(self.embed(tokens)) * mask

    return Two()


def stubborn():
    """Cannot be built on the meta device."""
    model = net()
    assert model[0].weight.abs().max().item() > 0
    return model


not_a_model = 3


def wrong():
    return 3


def test_report(capsys):
    assert main([*PLAN, "--n-gpus", "2"]) == 0
    out = capsys.readouterr().out
    assert "Sequential: 2 stages" in out
    assert "balance" in out


def test_json_alone_on_standard_output(capsys):
    assert main([*PLAN, "--n-gpus", "2", "--json", "-", "--compare-k", "2,1,9"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["n_stages"] == 2
    assert [point["n_stages"] for point in data["compare_k"]] == [1, 2]


def test_files(tmp_path, capsys):
    names = {"--html": "a.html", "--json": "a.json", "--plan": "plan.json"}
    options = [part for option, name in names.items() for part in (option, str(tmp_path / name))]
    assert main([*PLAN, "--n-gpus", "2", *options, "--compare-k", "1,2,9"]) == 0
    out = capsys.readouterr().out
    assert "speed-up" in out
    assert "9   impossible" in out
    assert "2 stages: order, micro-batches" in out
    assert (tmp_path / "a.html").read_text().startswith("<!DOCTYPE html>")
    assert json.loads((tmp_path / "a.json").read_text())["model"] == "Sequential"
    assert Plan.load(tmp_path / "plan.json").n_stages == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--kwargs", '{"width": 16}', "--memory-limit", "16GB"],
        ["--memory-limit", "1GB,2GB", "--recompute", "yes"],
        ["--recompute", "no", "--bandwidth", "1GB", "--dtype", "bfloat16"],
    ],
)
def test_options(arguments, capsys):
    assert main([*PLAN, "--n-gpus", "2", *arguments]) == 0


def test_several_inputs_by_name_and_dtype(capsys):
    command = ["plan", f"{__name__}:two_inputs", "--n-gpus", "1", "--device", "T4"]
    assert main([*command, "--input", "2x3:int64", "--input", "2x3x8"]) == 0
    assert main([*command, "--input", "2x3:int64", "--input", "mask=2x3x8"]) == 0
    assert main([*command, "--input", "mask=2x3x8", "--input", "tokens=2x3:int64"]) == 0


def test_a_model_that_cannot_be_built_on_meta(capsys):
    assert main(["plan", f"{__name__}:stubborn", "--input", "2x8", "--n-gpus", "2", "--device", "T4"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "nocolon", "--input", "1"], "must be package.module:callable"),
        (["plan", "no_such_package:f", "--input", "1"], "cannot import 'no_such_package'"),
        (["plan", f"{__name__}:nett", "--input", "1"], "did you mean 'net'"),
        (
            ["plan", f"{__name__}:not_a_model", "--input", "1"],
            "is a int, neither an nn.Module nor a callable",
        ),
        (["plan", f"{__name__}:wrong", "--input", "1"], "gave a int, not an nn.Module"),
        (["plan", MODEL, "--input", "4x8", "--kwargs", "{"], "--kwargs is no valid JSON"),
        (["plan", MODEL, "--input", "4x8", "--kwargs", "[1]"], "--kwargs must be a JSON object"),
        (["plan", MODEL, "--input", "4x8", "--kwargs", '{"no": 1}'], "could not be called with --kwargs"),
        (["plan", MODEL, "--input", "4xx8"], "--input must be sizes joined by x"),
        (["plan", MODEL, "--input", "0x8"], "--input must be sizes joined by x"),
        (["plan", MODEL, "--input", "4x8:float99"], "unknown dtype 'float99'"),
        (["plan", MODEL, "--input", "x=4x8", "--input", "3"], "give unnamed ones first"),
        (["plan", MODEL, "--input", "4x8", "--memory-limit", "lots"], "not a number of bytes: 'lots'"),
        (["plan", MODEL, "--input", "4x8", "--memory-limit", "1,2,3"], "3 sizes for 2 stages"),
        (["plan", MODEL, "--input", "4x8", "--compare-k", "1,two"], "--compare-k must be numbers of stages"),
        (["plan", MODEL, "--input", "4x8", "--device", "abacus"], "unknown device 'abacus'"),
        (
            ["plan", MODEL, "--input", "4x8", "--html", f"{__file__}/a.html"],
            "no directory that can be written",
        ),
        (["plan", MODEL, "--input", "4x8", "--plan", "/"], "cannot write '/': it is a folder"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    device = ["--device", "T4"] if "--memory-limit" in arguments else []
    assert main([*arguments, "--n-gpus", "2", *device]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("dtrp: error: ")  # of what is planned for not a word yet
    assert message in captured.err
    assert captured.out == ""


def test_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dtrp", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("dtrp", run_name="__main__")
    assert capsys.readouterr().out == f"dtrp {__version__}\n"


@pytest.mark.parametrize("n_gpus", ["0", "-1", "100"])
def test_impossible_numbers_of_stages(n_gpus, capsys):
    assert main([*PLAN, "--n-gpus", n_gpus]) == 2
    assert "stages" in capsys.readouterr().err or n_gpus != "100"


def test_what_dtrp_refuses_has_status_1(capsys):
    assert main([*PLAN, "--n-gpus", "2", "--memory-limit", "100"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("dtrp: InfeasiblePlanError: ")
    assert "smallest limit" in err


def test_files_that_are_not_there_are_named(tmp_path, capsys):
    """In a line: how dtrp came to read them is nothing to the user."""
    command = ["export", MODEL, "--input", "4x8", "--n-gpus", "2", "--out", str(tmp_path / "out")]
    assert main([*command, "--plan", str(tmp_path / "nope.json")]) == 1
    err = capsys.readouterr().err
    assert "dtrp: FileNotFoundError" in err
    assert "nope.json" in err


def test_argparse_errors_have_status_2(capsys):
    with pytest.raises(SystemExit) as info:
        main(["plan", MODEL])
    assert info.value.code == 2
    assert "--input" in capsys.readouterr().err


def test_version_and_help(capsys):
    for option in ("--version", "--help"):
        with pytest.raises(SystemExit) as info:
            main([option])
        assert info.value.code == 0
    out = capsys.readouterr().out
    assert __version__ in out
    assert "dtrp plan torchvision.models:resnet50" in out


def test_as_a_program():
    command = [sys.executable, "-m", "dtrp.cli", *PLAN, "--n-gpus", "2", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout)["n_stages"] == 2
