"""The examples run, and what they show is so."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_wrong_labels_are_found_better_than_by_chance(capsys: pytest.CaptureFixture[str]) -> None:
    found = runpy.run_path(str(EXAMPLES / "mislabelled.py"))["main"](per_package=120, epochs=6)
    assert "attributed: 100%" in capsys.readouterr().out
    assert set(found) == {"self-influence", "norm of the gradient", "loss"}
    assert found["self-influence"] > 0.2  # a tenth of the labels are wrong
