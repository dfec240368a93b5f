"""``dtrp doctor``: what it says, and its exit status."""

import tomllib
from pathlib import Path

import pytest

from dtrp import cli_doctor
from dtrp.cli import main


def test_a_sound_machine(capsys):
    """With its self-test: two worker processes."""
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("python", "torch", "cores", "shared memory", "passed: equal bit for bit"):
        assert word in out


@pytest.mark.parametrize("failure", ["other weights: 0.weight", RuntimeError("no processes [here]")])
def test_what_fails_has_status_1(capsys, monkeypatch, failure):
    def self_test():
        if isinstance(failure, Exception):
            raise failure
        return failure

    monkeypatch.setattr(cli_doctor, "self_test", self_test)
    assert main(["doctor"]) == 1
    assert (
        f"failed: {'RuntimeError: ' if isinstance(failure, Exception) else ''}{failure}"
        in capsys.readouterr().out
    )


def test_missing_extras_come_with_their_pip_line(capsys, monkeypatch):
    monkeypatch.setattr(cli_doctor, "self_test", lambda: "")
    monkeypatch.setattr(cli_doctor, "find_spec", lambda name: None)
    assert main(["doctor"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "pip install 'dtrp[plot]'" in out
    assert "missing: matplotlib" in out


def test_extras_are_those_of_the_package():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    declared = tomllib.loads(text)["project"]["optional-dependencies"]
    for extra, (_, packages) in cli_doctor.EXTRAS.items():
        assert {requirement.partition(">")[0] for requirement in declared[extra]} == set(packages)
