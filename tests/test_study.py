"""The study's documents say what its files say."""

import importlib.util
import sys
from pathlib import Path

import pytest

STUDY = Path(__file__).parent.parent / "benchmarks" / "study"


@pytest.fixture(scope="module")
def tables():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STUDY)
        spec = importlib.util.spec_from_file_location("tables", STUDY / "tables.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "tables", module)
        spec.loader.exec_module(module)
        yield module


def test_every_number_comes_from_a_file(tables):
    """A table that was edited by hand, or is older than its runs, says what nobody measured."""
    assert tables.PAGE.read_text(encoding="utf-8") == tables.page()


def test_files_belong_to_declared_runs(tables):
    """Else nobody could make them again."""
    from runs import RUNS

    names = [run.name for run in RUNS]
    assert len(set(names)) == len(names)
    assert {path.stem for path in tables.CSVS.glob("*.csv")} <= set(names)


def test_the_price_is_read_off_the_reference_curve(tables):
    """Epochs over epochs to the same loss: known for straight lines."""
    reference = [4.0, 3.0, 2.0, 1.0]
    assert tables.price([9, 9, 9, 2.5], reference) == pytest.approx(4 / 2.5)
    assert tables.price([9, 9, 9, 1.0], reference) == pytest.approx(1.0)
    assert tables.price([9, 9, 9, 0.5], reference) == 1.0
