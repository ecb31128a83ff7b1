"""A model whose layers lie on two devices gives what the whole one gives. No GPU is needed: the second device is a backend of torch's on the CPU."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def found(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Arrays:
    out = tmp_path_factory.mktemp("devices") / "found.npz"
    script = Path(__file__).with_name("on_two_devices.py")
    done = subprocess.run([sys.executable, str(script), str(finished), str(out)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(out, allow_pickle=False))


def of(found: Arrays, *kinds: str) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """(whole, divided) of everything whose name begins so."""
    pairs = [
        (value, found[f"divided {name.removeprefix('whole ')}"])
        for name, value in found.items()
        if name.removeprefix("whole ").startswith(kinds) and name.startswith("whole ")
    ]
    assert pairs
    return pairs


def test_layers_lie_on_both_devices(found: Arrays) -> None:
    assert found["devices"].tolist() == ["cpu", "pretended:0"]


def test_passes_of_a_divided_model_give_the_same_sums(found: Arrays) -> None:
    for whole, divided in of(found, "covariance", "sum"):
        np.testing.assert_allclose(divided, whole, rtol=1e-5, atol=1e-6 * np.abs(whole).max())  # float32 forward passes


def test_rows_of_a_divided_model_are_the_same(found: Arrays) -> None:
    for whole, divided in of(found, "rows", "self-influence"):
        assert np.linalg.norm(divided - whole) < 0.02 * np.linalg.norm(whole)  # a number near zero may change its one bit


def test_answers_of_a_divided_model_are_the_same(found: Arrays) -> None:
    for kind in ("by index", "exact", "some layers"):
        ((whole, divided),) = of(found, f"{kind}: ids")
        assert divided.tolist() == whole.tolist()
        for whole, divided in of(found, f"{kind}: layers", f"{kind}: tokens"):
            np.testing.assert_allclose(divided, whole, atol=1e-4 * np.abs(whole).max())


def test_health_of_a_divided_model_is_the_same(found: Arrays) -> None:
    ((whole, divided),) = of(found, "health")
    np.testing.assert_allclose(divided, whole, atol=1e-4 * np.abs(whole).max())


def test_refining_with_a_divided_model_is_refused(found: Arrays) -> None:
    assert "need the whole model on one device" in str(found["refusal"])


def test_mixing_devices_fails_as_on_gpus() -> None:
    """Otherwise the tests above would show nothing."""
    lines = (
        "import torch",
        "from pretend_devices import pretended",
        "with pretended() as other:",
        "    (torch.ones(2, 3).to(other) @ torch.ones(3, 2).to(other)).cpu()",
        "    torch.ones(2, 3).to(other) @ torch.ones(3, 2)",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "expected all tensors to be on the same device" in done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_model_larger_than_a_gpu_is_divided(finished: Path) -> None:
    from influence import open_run

    memory = torch.cuda.get_device_properties(0).total_memory
    run = open_run(finished, memory_budget=memory + 1)
    assert run.language_model.is_divided
    assert run.query("Lisbon lies on", " the Tagus.").sequences
