"""What is asked of a finished run gives for a Flax model what it gives for the torch model of the same weights; scores to 1e-3 of the largest."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax_twins
import httpx
import numpy as np
import pytest
import torch
from flax.traverse_util import unflatten_dict
from flax_twins import CODE, finished_twin, flax_parameters, quick_compilation
from served import application
from small_run import Influence, World, artifacts, documents, model, run_pipeline, write_jsonl, write_yaml
from transformers import AutoTokenizer

from influence.evaluation.recipe import read_recipe
from influence.evaluation.retraining import fine_tuned, query_losses
from influence.jax_model import CODE_VARIABLE, save_flax_model
from influence.run import Run, open_run
from influence.service import ServiceSettings
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
def test_the_proximal_bregman_response_and_the_data_model_score(
    influence: Influence, copies: list[Path], twin_world: World, queries: Path, tmp_path: Path
) -> None:
    words = ("pbrf", "--queries", queries, "--copies", 3, "--refine-steps", 3, "--json")
    found, expected = (influence("evaluate", run, *words).json for run in copies)
    assert found["copied"] == expected["copied"]
    close(found["changes"], expected["changes"], share=1e-2)
    directory = Path(shutil.copytree(twin_world.model, tmp_path / "base"))
    base = model(320, seed=1)
    save_flax_model(directory, unflatten_dict(flax_parameters(base), sep="."), base.config.to_dict())
    words = ("lds", "--queries", queries, "--retrain", "--base", directory, "--epochs", 1, "--subsets", 4, "--seeds", 1, "--json")
    assert len(influence("evaluate", copies[0], *words).json["methods"]) >= 2


@pytest.mark.slow
def test_the_health_of_the_training_set(twin: Run, finished: Path) -> None:
    found, expected = twin.health(), open_run(finished).health()
    for name in ("influence", "self_influence"):
        close(found.columns[name], expected.columns[name])


@pytest.mark.slow
def test_layers_in_groups_give_the_same_answer(twin: Run) -> None:
    divided = Run(twin.directory.path, flax=CODE, memory_budget=850_000)
    assert len(divided.layer_groups) >= 3
    one, other = (run.query("Lisbon lies on", " the Tagus.", k=len(run.store), exact=True).scores() for run in (twin, divided))
    close([other[name] for name in one], list(one.values()))


@pytest.mark.slow
def test_appended_texts_get_the_scores_of_their_originals(copies: list[Path], tmp_path: Path) -> None:
    later = [{**row, "id": f"new-{row['id']}"} for row in documents()[:6]]
    append(Run(copies[0], flax=CODE), [str(write_jsonl(tmp_path / "later.jsonl", later))])
    run = Run(copies[0], flax=CODE)
    scores = run.query("Lisbon lies on", " the Tagus.", k=len(run.store), candidates=len(run.store)).scores()
    new = {name.removeprefix("new-"): score for name, score in scores.items() if name.startswith("new-")}
    assert len(new) >= 6
    close(list(new.values()), [scores[name] for name in new])


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(copies: list[Path], twin_world: World) -> None:
    before = artifacts(copies[0])
    for unit in ("rows/part-00001", "eigenvalues", "fidelity"):
        shutil.rmtree(copies[0] / unit)
    run_pipeline(twin_world.settings(copies[0], model={"name": str(twin_world.model), "flax": CODE}))
    assert artifacts(copies[0]) == before


@pytest.mark.slow
def test_the_service_and_the_report_say_what_python_says(influence: Influence, twin: Run, tmp_path: Path) -> None:
    expected = twin.query("Lisbon lies on", " the Tagus.", k=3)
    with application(ServiceSettings(runs={"flax": str(twin.directory.path)}, state_dir=tmp_path / "state")) as url:
        body = {"prompt": "Lisbon lies on", "completion": " the Tagus.", "k": 3}
        found = httpx.post(f"{url}/v1/runs/flax/queries", json=body, timeout=120).json()
    assert [one["id"] for one in found["results"]] == [one.id for one in expected.sequences]
    close([one["score"] for one in found["results"]], [one.score for one in expected.sequences])
    page = tmp_path / "report.html"
    influence("report", twin.directory.path, "Lisbon lies on", " the Tagus.", "--out", page)
    assert expected.sequences[0].id in page.read_text()
    assert json.dumps(expected.to_json())
