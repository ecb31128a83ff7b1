"""The whole product on a Flax model: a run gives what the torch run of the same weights gives, scores to 1e-3 of the largest."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from flax.traverse_util import unflatten_dict
from flax_twins import CODE, compilation_settings, flax_parameters, twin_settings
from safetensors.torch import save_file
from served import application, without_times
from small_run import Influence, World, artifacts, documents, forked, model, run_pipeline, write_jsonl, write_yaml
from transformers import AutoTokenizer

from influence.config import load_config
from influence.evaluation.bank import read_bank
from influence.jax_model import CODE_VARIABLE, save_flax_model
from influence.run import Run, open_run
from influence.run_directory import STAGES
from influence.service import ServiceSettings
from influence.service.settings import named_runs
from jobs.driver import run_all

pytestmark = pytest.mark.usefixtures("quick_compilation")

LITTLE = 850_000  # bytes: the model, one sequence, and the factors of a quarter of the layers
QUERY = ("Lisbon lies on", " the Tagus.")
QUERIES = [{"id": "pair", "prompt": "Lisbon lies on", "completion": " the Tagus."}, {"id": "text", "text": "Oslo lies on the Aker."}]


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CODE_VARIABLE, CODE)


@pytest.fixture(scope="module")
def twin(twin_run: Path) -> Run:
    return open_run(twin_run)


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


def test_a_flax_run_answers_as_the_torch_run_of_the_same_weights(twin: Run, finished: Path) -> None:
    """Scores to 1e-3 of the largest: float32 gradients, solved with damping of a tenth of the mean eigenvalue."""
    torch_run = Run(finished)
    both = [[{**vars(layer), "modules": None} for layer in run.coverage.layers] for run in (twin, torch_run)]
    assert both[0] == both[1]  # but that in torch the tied head is a module of its own
    assert twin.coverage.share == 1
    mine, expected = twin.factors, torch_run.factors
    for name, factors in mine.items():
        largest = float(expected[name].eigenvalues.max())
        assert torch.allclose(factors.eigenvalues.sum(), expected[name].eigenvalues.sum(), rtol=1e-4, atol=1e-6 * largest), name
        assert factors.damping == pytest.approx(expected[name].damping, rel=1e-4)
    np.testing.assert_allclose(twin.self_influence, torch_run.self_influence, rtol=1e-3)
    # A row's bit is the sign of a sum: those near zero may differ.
    codes = [np.concatenate([np.load(path / "rows.npy") for path in run._row_paths()]) for run in (twin, torch_run)]
    assert np.unpackbits(codes[0] ^ codes[1]).mean() < 0.01
    for options in ({}, {"exact": True}, {"by_output_token": True}):
        found, wanted = (run.query("Oslo lies on the", " Aker", k=8, **options) for run in (twin, torch_run))  # type: ignore[arg-type]
        largest = max(one.score for one in wanted.sequences)
        assert [one.id for one in found.sequences] == [one.id for one in wanted.sequences]
        for one, other in zip(found.sequences, wanted.sequences, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-3 * largest)
            shares = [[share for _, share in tokens] for tokens in (one.tokens, other.tokens)]
            np.testing.assert_allclose(*shares, atol=1e-3 * largest)


@pytest.mark.slow
def test_refined_answers_and_functions_are_those_of_the_torch_run(twin: Run, finished: Path) -> None:
    from influence.answering import QueryOptions
    from influence.refinement import RefineOptions

    options = QueryOptions(k=5, exact=True, refine=RefineOptions(sequences=16, steps=2))
    found, wanted = (run.answer([run.measure("Lima lies on the", " Rímac")], options)[0] for run in (twin, Run(finished)))
    scores = [{one.id: one.score for one in result.sequences} for result in (found, wanted)]
    assert scores[0] == pytest.approx(scores[1], rel=0.01)

    def margin(model: torch.nn.Module, batch: object) -> torch.Tensor:
        logits = model(input_ids=batch.tokens).logits  # type: ignore[attr-defined]
        return logits[:, 2, 7] - logits[:, 3, 11]  # type: ignore[no-any-return]

    found, wanted = (run.query_function(margin, "Lima lies on the", " Rímac", k=5, exact=True) for run in (twin, Run(finished)))
    assert [one.id for one in found.sequences] == [one.id for one in wanted.sequences]


def test_a_direction_inside_the_model_is_asked_about(twin: Run, finished: Path, tmp_path: Path) -> None:
    save_file({"transformer.h.0": torch.sin(torch.arange(16.0))}, tmp_path / "feature.safetensors")
    file, answers = tmp_path / "feature.safetensors", []
    for run in (twin, Run(finished)):
        found = run.query_direction(file, "Oslo lies on the", " Aker", reduce="last", k=len(run.store), exact=True)
        answers.append(found.scores())
    assert answers[0].keys() == answers[1].keys()
    largest = max(map(abs, answers[1].values()))
    assert answers[0] == pytest.approx(answers[1], abs=1e-3 * largest)


def test_a_direction_that_the_model_does_not_have_is_refused(influence: Influence, twin: Run, tmp_path: Path) -> None:
    file = tmp_path / "feature.safetensors"
    words = ("query", twin.directory.path, "Oslo lies on the", " Aker", "--direction", file)
    save_file({"transformer.h.7": torch.ones(16)}, file)
    influence(*words).says("the model has no module 'transformer.h.7'; the nearest are transformer.h.")
    save_file({"transformer.h.1": torch.ones(8)}, file)
    influence(*words).says("the vector has shape (8,), but transformer.h.1 gives 16 numbers a position")


def test_code_that_only_a_run_names_is_not_imported(twin: Run, influence: Influence, monkeypatch: pytest.MonkeyPatch) -> None:
    run = twin.directory.path
    monkeypatch.delenv(CODE_VARIABLE)
    influence("query", run, "Oslo lies on the", " Aker").says(f"is made by code, {CODE}: where you trust it, set {CODE_VARIABLE}={CODE}")
    monkeypatch.setenv(CODE_VARIABLE, f"other:thing,{CODE}")
    assert Run(run).language_model.model is not None


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


@pytest.fixture(scope="module")
def bases(twin_world: World, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Another model, as if the runs' had been trained from it, in Flax and in torch; without dropout, which Flax models are trained without."""
    made, places = model(320, seed=1), [tmp_path_factory.mktemp("base") / name for name in ("flax", "torch")]
    made.config.update(dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0))
    save_flax_model(places[0], unflatten_dict(flax_parameters(made), sep="."), made.config.to_dict())
    made.save_pretrained(places[1])
    for place in places:
        AutoTokenizer.from_pretrained(twin_world.model).save_pretrained(place)
    return places


RETRAIN = ("--retrain", "--subsets", 3, "--seeds", 1, "--epochs", 1, "--method", "bm25", "--json")


def test_models_retrained_on_halves_are_those_of_torch(influence: Influence, copies: list[Path], bases: list[Path], queries: Path) -> None:
    """Losses to 1e-4: AdamW in float32."""
    found = []
    for run, base in zip(copies, bases, strict=True):
        words = ("evaluate", run, "lds", "--queries", queries, "--base", base, *RETRAIN)
        found.append(read_bank(Path(influence(*words).json["bank"])))
    np.testing.assert_array_equal(found[0].masks, found[1].masks)
    np.testing.assert_allclose(found[0].losses, found[1].losses, rtol=1e-4)
    assert np.ptp(found[1].losses) > 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # Ray's notice of what a later version will do with accelerators
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves the log files of its processes open
def test_models_retrained_on_ray_are_those_of_one_process(
    influence: Influence, twin_run: Path, bases: list[Path], queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers find what the code that makes the model imports."""
    found = []
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    for name, workers in (("here", 0), ("ray", 2)):
        run = shutil.copytree(twin_run, tmp_path / name)
        words = ("evaluate", run, "lds", "--queries", queries, "--base", bases[0], "--workers", workers, *RETRAIN)
        found.append(read_bank(Path(influence(*words).json["bank"])).losses)
    np.testing.assert_allclose(*found, rtol=1e-3)  # workers may run more threads, and XLA optimizes there: sums in another order


@pytest.mark.slow
def test_a_tail_patch_and_the_removal_of_the_first(influence: Influence, copies: list[Path], bases: list[Path], queries: Path) -> None:
    patched, removed = [], []
    for run, base in zip(copies, bases, strict=True):
        words = ("--queries", queries, "-k", 4, "--method", "ekfac", "--json")
        found = influence("evaluate", run, "tailpatch", "--random", 1, *words).json
        patched.append([change["per_query"] for change in found["changes"]])
        found = influence("evaluate", run, "removal", "--base", base, "--epochs", 1, "--random", 0, *words).json
        removed.append(found["changes"][0]["per_query"])
    close(*patched, share=1e-2)
    np.testing.assert_allclose(*removed, rtol=0, atol=2e-4)


@pytest.mark.slow
def test_proximal_bregman_responses_are_those_of_torch(influence: Influence, copies: list[Path], queries: Path) -> None:
    """To a hundredth: the solver stops at a thousandth or so of the way."""
    words = ("--queries", queries, "--copies", 3, "--refine-steps", 1, "--json")
    found, expected = (influence("evaluate", run, "pbrf", *words).json for run in copies)
    assert found["copied"] == expected["copied"]
    close(found["changes"], expected["changes"], share=1e-2)


@pytest.mark.slow
def test_the_health_of_the_training_set(twin: Run, finished: Path) -> None:
    found, expected = twin.health(), open_run(finished).health()
    for name in ("influence", "self_influence"):
        close(found.columns[name], expected.columns[name])


def test_a_report_is_that_of_the_torch_run(influence: Influence, copies: list[Path]) -> None:
    """The page, and its data."""
    found, expected = (influence("report", run, *QUERY, "-k", 3, "--exact", "--json").json for run in copies)
    assert "Lisbon lies on" in Path(found["report"]).read_text(encoding="utf-8")
    assert found.keys() == expected.keys()
    (one,), (other,) = found["queries"], expected["queries"]
    assert one.keys() == other.keys()
    assert one["query"]["tokens"] == other["query"]["tokens"]
    close(*([value for value in query["query"]["token_log_probabilities"] if value is not None] for query in (one, other)))
    assert one["coverage"] == other["coverage"]
    for end in ("results", "opponents"):
        assert [result["id"] for result in one[end]] == [result["id"] for result in other[end]]
        close(*([list(result["layers"].values()) for result in query[end]] for query in (one, other)))
        close(*([share for result in query[end] for _, share in result["tokens"]] for query in (one, other)))


def test_a_service_answers_as_the_command_line(influence: Influence, copies: list[Path], tmp_path: Path) -> None:
    settings = ServiceSettings(runs=named_runs([copies[0]]), state_dir=tmp_path / "state")
    with application(settings) as url:
        response = httpx.post(f"{url}/v1/runs/flax/queries", json={"prompt": QUERY[0], "completion": QUERY[1], "k": 3}, timeout=60)
    assert response.status_code == 200, response.text
    found, expected = (without_times(one) for one in (response.json(), influence("query", copies[0], *QUERY, "-k", 3, "--json").json))
    assert found["provenance"] == expected["provenance"]
    assert [result["id"] for result in found["results"]] == [result["id"] for result in expected["results"]]
    close(*([list(result["layers"].values()) for result in one["results"]] for one in (found, expected)))


@pytest.mark.parametrize("lost", ["eigenvalues/part-00002", "rows/part-00001"])
def test_a_run_that_lost_a_unit_and_what_came_after_goes_on_to_the_same_bytes(
    lost: str, twin_world: World, twin_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(twin_run, tmp_path / "run"))
    for stage in STAGES[STAGES.index(lost.partition("/")[0]) + 1 :]:
        shutil.rmtree(run / stage, ignore_errors=True)
    shutil.rmtree(run / lost)
    run_pipeline(twin_settings(twin_world, run))
    assert artifacts(run) == artifacts(twin_run)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(
    twin_world: World, twin_run: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in compilation_settings(tmp_path_factory).items():
        monkeypatch.setenv(name.upper(), str(value))
    settings = twin_settings(twin_world, tmp_path / "run")
    process = forked(run_pipeline, settings)
    while not any((tmp_path / "run").glob("eigenvalues/part-*")):
        assert process.exitcode is None
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    run_pipeline(settings)
    assert artifacts(tmp_path / "run") == artifacts(twin_run)


@pytest.mark.slow
def test_layers_in_groups_have_the_same_factors(twin: Run, twin_world: World, tmp_path: Path) -> None:
    """To the rounding of float32: batches are smaller."""
    settings = twin_settings(twin_world, tmp_path / "run", resources={"memory_budget": LITTLE})
    flat = {f"{section}.{key}": value for section, keys in settings.items() for key, value in keys.items()}
    run_all(load_config(None, flat), until="factors")
    divided = Run(tmp_path / "run", flax=CODE, memory_budget=LITTLE)
    assert len(divided.layer_groups) >= 3
    for name, factor in open_run(tmp_path / "run").factors.items():
        expected = twin.factors[name]
        vector = torch.sin(torch.arange(1.0, 1 + expected.eigenvalues.numel())).reshape(expected.eigenvalues.shape)
        close(factor.precondition(vector), expected.precondition(vector))


def test_appended_texts_get_the_scores_of_their_originals_and_removed_ones_none(
    influence: Influence, copies: list[Path], tmp_path: Path
) -> None:
    run = copies[0]
    later = [{**row, "id": f"new-{row['id']}"} for row in documents()[:6]]
    assert influence("append", run, write_jsonl(tmp_path / "later.jsonl", later), "--json").json["appended"] >= 6
    (tmp_path / "ids.txt").write_text("doc-00\nnew-doc-01\n")
    assert influence("remove", run, "--ids", tmp_path / "ids.txt", "--json").json["removed_now"] >= 2
    opened = open_run(run)
    scores = opened.query(*QUERY, k=len(opened.store), candidates=len(opened.store)).scores()
    assert not [name for name in scores if name.partition(":")[0] in ("doc-00", "new-doc-01")]
    new = {name.removeprefix("new-"): score for name, score in scores.items() if name.startswith("new-")}
    assert {name.partition(":")[0] for name in new} == {"doc-00", "doc-02", "doc-03", "doc-04", "doc-05"}
    both = new.keys() & scores.keys()
    close([new[name] for name in both], [scores[name] for name in both])
