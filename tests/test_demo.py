"""The demo as a newcomer runs it, in processes of its own: it ends with measured ranks, and again it only prints.

INFLUENCE_TEST_DEMO names the directory of a demo that was just run, so that CI does not train the model twice; left out, it is run here, on Ray.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def demo(out: Path) -> dict[str, Any]:
    words = [sys.executable, "-m", "jobs.cli", "demo", "--out", str(out), "--workers", "2", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def changed(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.timeout(1200)
def test_demo_measures_ranks_and_resumes(tmp_path: Path) -> None:
    out = Path(os.environ.get("INFLUENCE_TEST_DEMO", tmp_path / "demo"))
    outcome = demo(out)
    assert set(outcome["ranks"]) == {"ordinary", "swapped"}
    for figures in outcome["ranks"].values():
        assert {"index-normalized", "index", "ekfac", "gradient-cosine", "bm25"} <= set(figures)
        for row in figures.values():
            assert 0 <= row["first"]["value"] <= row["reciprocal_rank"]["value"] <= 1
            assert row["median_rank"] >= 1
    # Loose: what is printed is whatever was measured. The facts' sequences must only be found far better than by chance (an MRR of about .01).
    assert outcome["ranks"]["ordinary"]["index-normalized"]["reciprocal_rank"]["value"] > 0.3
    assert outcome["peak_memory_bytes"] < 3 * 2**30
    assert 10_000 < (out / "report.html").stat().st_size < 2_000_000
    before = changed(out)
    again = demo(out)
    assert changed(out) == before
    assert {key: value for key, value in again.items() if key not in ("seconds", "peak_memory_bytes")} == {
        key: value for key, value in outcome.items() if key not in ("seconds", "peak_memory_bytes")
    }
