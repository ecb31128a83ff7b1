"""What is asked of a finished run gives for a Flax model what it gives for the torch model of the same weights; scores to 1e-3 of the largest."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax_twins
import numpy as np
import pytest
import torch
from flax.traverse_util import unflatten_dict
from flax_twins import CODE, finished_twin, flax_parameters, quick_compilation
from small_run import Influence, World, documents, model, write_jsonl, write_yaml
from transformers import AutoTokenizer

from influence.evaluation.recipe import read_recipe
from influence.evaluation.retraining import fine_tuned, query_losses
from influence.jax_model import CODE_VARIABLE, save_flax_model
from influence.run import Run, open_run
from jobs.living import append

QUERIES = [{"id": "pair", "prompt": "Lisbon lies on", "completion": " the Tagus."}, {"id": "text", "text": "Oslo lies on the Aker."}]


@pytest.fixture(scope="module", autouse=True)
def compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_compilation(tmp_path_factory):
        yield


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CODE_VARIABLE, CODE)


@pytest.fixture(scope="module")
def twin_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return flax_twins.twin_world(tmp_path_factory)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished_twin(tmp_path_factory)


@pytest.fixture
def copies(twin: Run, finished: Path, tmp_path: Path) -> list[Path]:
    """Of the Flax run and of the torch run."""
    places = [(twin.directory.path, tmp_path / "flax"), (finished, tmp_path / "torch")]
    return [Path(shutil.copytree(source, place)) for source, place in places]


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "queries.jsonl", QUERIES)


def close(found: Any, expected: Any, *, share: float = 1e-3) -> None:
    """Numbers to a share of the largest."""
    one, other = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    np.testing.assert_allclose(one, other, rtol=0, atol=share * np.abs(other).max())


def test_a_plan_is_that_of_the_torch_model(influence: Influence, world: World, twin_world: World, tmp_path: Path) -> None:
    """But for the time, of which a part is measured."""
    plans = []
    for name, some, more in (("torch", world, {}), ("flax", twin_world, {"flax": CODE})):
        settings = some.settings(tmp_path / name, model={"name": str(some.model), **more})
        plans.append(influence("plan", write_yaml(tmp_path / f"{name}.yaml", settings), "--json", "--device", "cpu").json)
    for key in ("parameters", "layers", "fitted_on", "needed_bytes", "batch_sequences", "memory_bytes", "disk_bytes"):
        assert plans[1][key] == plans[0][key], key
    for one, other in zip(plans[1]["stages"].values(), plans[0]["stages"].values(), strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    (tmp_path / "bare").mkdir()
    bare = twin_world.copy(tmp_path / "bare").model
    (bare / "model.safetensors").unlink()  # weights are not needed
    settings = twin_world.settings(tmp_path / "run", model={"name": str(bare), "flax": CODE, "dtype": "bfloat16"})
    found = influence("plan", write_yaml(tmp_path / "bare.yaml", settings), "--json", "--device", "h100").json
    assert found["parameters"] == plans[0]["parameters"]
    assert found["needed_bytes"] == plans[0]["needed_bytes"] - 2 * found["parameters"]["total"]


@pytest.mark.slow
def test_a_tail_patch_and_the_removal_of_the_first(
    influence: Influence, copies: list[Path], twin_world: World, queries: Path, tmp_path: Path
) -> None:
    """The removal against torch's own training of the same beginning, without dropout, which Flax models are trained without."""
    changes = []
    for run in copies:
        found = influence("evaluate", run, "tailpatch", "--queries", queries, "-k", 4, "--random", 1, "--method", "ekfac", "--json").json
        changes.append([change["per_query"] for change in found["changes"]])
    close(*changes, share=1e-2)

    base = model(320, seed=1)
    directory = save_flax_model(tmp_path / "base", unflatten_dict(flax_parameters(base), sep="."), base.config.to_dict())
    AutoTokenizer.from_pretrained(twin_world.model).save_pretrained(directory)
    words = ("removal", "--queries", queries, "--base", directory, "--epochs", 1, "--random", 0, "-k", 4, "--method", "ekfac", "--json")
    found = influence("evaluate", copies[0], *words).json
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    run, recipe = open_run(copies[1]), read_recipe(directory, {"base": str(directory), "epochs": 1})
    numbers = [run.store.ids.index(name) for name in run.query("Lisbon lies on", " the Tagus.", k=4, exact=True).scores()]
    asked = [run.measure("Lisbon lies on", " the Tagus.")]
    trained = [fine_tuned(base, list(run.store), recipe.settings, 0, left_out=left_out) for left_out in ([], numbers)]
    whole, without = (query_losses(one, asked, 16)[0] for one in trained)
    assert found["changes"][0]["per_query"][0] == pytest.approx(whole - without, abs=2e-4)


@pytest.mark.slow
def test_the_health_of_the_training_set(twin: Run, finished: Path) -> None:
    found, expected = twin.health(), open_run(finished).health()
    for name in ("influence", "self_influence"):
        close(found.columns[name], expected.columns[name])


@pytest.mark.slow
def test_appended_texts_get_the_scores_of_their_originals(copies: list[Path], tmp_path: Path) -> None:
    later = [{**row, "id": f"new-{row['id']}"} for row in documents()[:6]]
    append(Run(copies[0], flax=CODE), [str(write_jsonl(tmp_path / "later.jsonl", later))])
    run = Run(copies[0], flax=CODE)
    scores = run.query("Lisbon lies on", " the Tagus.", k=len(run.store), candidates=len(run.store)).scores()
    new = {name.removeprefix("new-"): score for name, score in scores.items() if name.startswith("new-")}
    assert len(new) >= 6
    close(list(new.values()), [scores[name] for name in new])
