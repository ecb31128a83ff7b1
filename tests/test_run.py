"""A run's answers: equal to a dense computation, and the same whoever did the work and however it was cut."""

import copy
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import World, run_pipeline
from torch import nn
from transformers.pytorch_utils import Conv1D

from ekfac import Layer
from influence import QueryOptions, Run, open_run
from influence.artifacts import read_eigenvalues
from influence.config import Config, load_config
from influence.errors import RequestError
from influence.fidelity import Fidelity
from influence.run import MOST_FIT_UNITS
from influence.sequences import TrainingSequence
from jobs.driver import run_all
from jobs.executors import OnRay, ray_cluster
from jobs.stages import STAGES, create_run, do_unit, fitted_sequences

QUERY = ("Oslo lies on the", " Aker. The town")


@pytest.fixture(scope="session")
def run(finished: Path) -> Run:
    return open_run(finished)


def autograd_gradient(model: nn.Module, layers: Sequence[Layer], sequence: TrainingSequence) -> list[np.ndarray]:
    """The gradient of minus the counted tokens' log-probability in each layer, [O, J], by plain autograd."""
    ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None]
    log_probabilities = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    places = np.flatnonzero(sequence.counted) - 1
    loss = -log_probabilities[places, ids[0, places + 1]].sum()
    found = []
    for layer in layers:
        module = model.get_submodule(layer.name)
        parameters = [module.weight] + ([module.bias] if layer.bias else [])
        weight, *bias = torch.autograd.grad(loss, parameters, retain_graph=True)
        weight = weight.T if isinstance(module, Conv1D) else weight.reshape(len(weight), -1)
        found.append(torch.cat([weight, *(part[:, None] for part in bias)], 1).numpy())
    return found


def dense_scores(run: Run, query: TrainingSequence) -> np.ndarray:
    """[N, L] by explicit inversion in the stored eigenbases, in float64."""
    model, layers = copy.deepcopy(run.language_model.model).double(), run.coverage.layers
    asked = []
    for layer, gradient in zip(layers, autograd_gradient(model, layers, query), strict=True):
        factor = run.factors[layer.name]
        left = np.eye(layer.shape[0]) if factor.output_vectors is None else factor.output_vectors.double().numpy()
        right = np.eye(layer.shape[1]) if factor.input_vectors is None else factor.input_vectors.double().numpy()
        eigenvalues = factor.eigenvalues.double().numpy()
        asked.append(left @ ((left.T @ gradient @ right) / (eigenvalues + factor.damping)) @ right.T)
    table = []
    for sequence in run.store:
        gradients = autograd_gradient(model, layers, sequence)
        table.append([(one * other).sum() for one, other in zip(asked, gradients, strict=True)])
    return np.array(table) / len(run.store)


def test_answer_equals_dense_computation_from_autograd(run: Run) -> None:
    measurement = run.measure(*QUERY)
    expected = dense_scores(run, measurement.parts[0][1])
    result = run.answer([measurement], QueryOptions(k=len(run.store), candidates=len(run.store)))[0]
    numbers = [run.store.ids.index(sequence.id) for sequence in result.sequences]
    assert sorted(result.scores()) == sorted(run.store.ids)  # with the near-duplicates that are shown with another
    for name, score in result.scores().items():
        assert score == pytest.approx(expected[run.store.ids.index(name)].sum(), rel=2e-3, abs=1e-4 * np.abs(expected).sum(1).max())
    scale = np.abs(expected).sum(1).max()  # the model runs in float32: sums over 1e5 products, some of which cancel
    for sequence, number in zip(result.sequences, numbers, strict=True):
        np.testing.assert_allclose(list(sequence.layers.values()), expected[number], rtol=2e-3, atol=2e-5 * scale)
        assert sum(share for _, share in sequence.tokens) == pytest.approx(sequence.score, rel=1e-5, abs=1e-6 * scale)
    assert [sequence.score for sequence in result.sequences] == sorted((s.score for s in result.sequences), reverse=True)


def test_share_of_a_token_belongs_to_the_position_at_which_it_is_the_input(run: Run) -> None:
    # The last token of a sequence predicts nothing, so its position has no gradient; the first one predicts the second.
    for sequence in run.query(*QUERY, k=5).sequences:
        shares = [share for _, share in sequence.tokens]
        assert shares[-1] == 0
        assert shares[0] != 0


def test_normalized_scores_are_scores_over_root_self_influence(run: Run) -> None:
    everything = len(run.store)
    plain = run.query(*QUERY, k=everything, candidates=everything).scores()
    result = run.query(*QUERY, k=everything, candidates=everything, normalize=True)
    assert result.unit == "√nats"
    for sequence in result.sequences:
        own = run.store[run.store.ids.index(sequence.id)]
        score = sum(dense_scores(run, own)[run.store.ids.index(sequence.id)]) if sequence.rank <= 2 else None
        weight = sequence.score / plain[sequence.id]
        if score is not None:
            assert weight == pytest.approx(score**-0.5, rel=1e-3)
        assert sum(sequence.layers.values()) == pytest.approx(sequence.score, rel=1e-5, abs=1e-9)
    assert [s.score for s in result.sequences] == sorted((s.score for s in result.sequences), reverse=True)


def test_log_probability_is_the_models(run: Run) -> None:
    query = run.query(*QUERY, k=1).query
    sequence = run.measure(*QUERY).parts[0][1]
    with torch.no_grad():
        logits = run.language_model.model(input_ids=torch.from_numpy(sequence.tokens.astype(np.int64))[None]).logits[0].log_softmax(-1)
    expected = [
        float(logits[t - 1, token]) if counted else None
        for t, (token, counted) in enumerate(zip(sequence.tokens, sequence.counted, strict=True))
    ]
    for found, wanted in zip(query["token_log_probabilities"], expected, strict=True):
        assert found == (wanted if wanted is None else pytest.approx(wanted, rel=1e-5))
    assert query["log_probability"] == pytest.approx(sum(value for value in expected if value is not None), rel=1e-5)
    assert "".join(query["tokens"]) == "".join(QUERY)


def all_scores(run: Run) -> dict[str, float]:
    result = run.query(*QUERY, k=len(run.store), exact=True)
    return result.scores()


def assert_same_scores(left: dict[str, float], right: dict[str, float]) -> None:
    """Equal up to float32 sums in another order, amplified by eigenvectors of close eigenvalues."""
    assert left.keys() == right.keys()
    scale = max(map(abs, left.values()))
    assert max(abs(left[name] - right[name]) for name in left) < 1e-2 * scale
    assert np.corrcoef([left[name] for name in left], [right[name] for name in left])[0, 1] > 0.9999


def test_scores_do_not_depend_on_shards(run: Run, world: World, tmp_path: Path) -> None:
    other = run_pipeline(world.settings(tmp_path / "run", data={"sequences_per_shard": 7}))
    assert other.store.num_shards != run.store.num_shards
    assert_same_scores(all_scores(run), all_scores(other))


def test_scores_do_not_depend_on_the_memory_budget(run: Run, world: World, tmp_path: Path) -> None:
    other = run_pipeline(world.settings(tmp_path / "run", resources={"memory_budget": "2MiB"}))
    assert other.attributed.budget.memory_bytes < run.attributed.budget.memory_bytes / 100
    assert_same_scores(all_scores(run), all_scores(other))


def test_sequences_to_fit_on_do_not_depend_on_shards(world: World, tmp_path: Path) -> None:
    chosen = []
    for shard_size in (7, 100):
        run = run_pipeline(world.settings(tmp_path / f"{shard_size}", data={"sequences_per_shard": shard_size}, factors={"sequences": 9}))
        chosen.append(sorted(s.id for shard in range(run.store.num_shards) for s in fitted_sequences(run, "eigenvalues", shard)))
    assert len(chosen[0]) == 9
    assert chosen[0] == chosen[1]


def test_as_many_sequences_are_fitted_as_are_enough(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("influence.run.TOKENS_PER_DIMENSION", 1)
    monkeypatch.setattr("influence.run.MIN_FITTED", 20)
    run = run_pipeline(world.settings(tmp_path / "run"))
    widest = max(max(layer.shape) for layer in run.coverage.layers if layer.kind == "linear")
    tokens = run.training.summary["counted_tokens"] / len(run.training)
    assert run.fitted_on == {"covariances": math.ceil(widest / tokens), "eigenvalues": 20}
    assert run.fitted_on["covariances"] < 20 < len(run.training)
    for stage, count in run.fitted_on.items():
        assert sum(len(fitted_sequences(run, stage, shard)) for shard in range(run.training.num_shards)) == count
    units = next(stage for stage in STAGES if stage.name == "eigenvalues").units(run)
    for layer in run.coverage.layers:
        sums = [read_eigenvalues(run.path_of("eigenvalues", unit), layer.name) for unit in units]
        assert sum(part.num_sequences for part in sums if part) == 20


def test_measured_fidelity_is_kept_with_the_index(run: Run) -> None:
    measured = run.fidelity
    assert measured is not None
    assert measured.num_queries == 4
    for end in measured.ends.values():
        assert 0 < end.ndcg_at_20 <= 1
        shares = list(end.recall[10].values())
        assert shares == sorted(shares)
    assert Fidelity.from_json(json.loads(json.dumps(measured.to_json()))) == measured


def test_absolute_damping_is_what_was_asked_for(world: World, tmp_path: Path) -> None:
    run = run_pipeline(world.settings(tmp_path / "run", factors={"damping": {"absolute": 0.5}}))
    assert {factor.damping for factor in run.factors.values()} == {0.5}


def test_result_reads_as_a_table(run: Run) -> None:
    result = run.query(*QUERY, k=3)
    table = result.to_pandas()
    assert list(table["rank"]) == [1, 2, 3]
    assert list(table["source"]) == [sequence.metadata["source"] for sequence in result.sequences]
    assert "<table" in result._repr_html_()
    assert sum(result.layers().values()) == pytest.approx(sum(s.score for s in result.sequences), rel=1e-6)
    assert json.loads(json.dumps(result.to_json()))["results"][0]["id"] == result.sequences[0].id


def test_query_on_a_span_is_another_query(run: Run) -> None:
    whole, first = run.query(*QUERY, k=1), run.query(*QUERY, k=1, span=(0, 1))
    assert whole.id != first.id
    assert first.query["span"] == (0, 1)
    assert whole.provenance["recall_at_10"] is not None
    assert first.provenance["recall_at_10"] is None  # recall was measured with whole completions


def test_metadata_never_stands_for_the_score(run: Run) -> None:
    result = run.query(*QUERY, k=1)
    sequence = replace(result.sequences[0], metadata={"score": "from the web", "year": 2020})
    table = replace(result, sequences=(sequence,)).to_pandas()
    assert table["score"][0] == sequence.score
    assert list(table.columns) == ["rank", "id", "score", "text", "year"]


def test_more_shards_than_fitting_units_give_the_same_scores(run: Run, world: World, tmp_path: Path) -> None:
    other = run_pipeline(world.settings(tmp_path / "run", data={"sequences_per_shard": 3}))
    assert other.store.num_shards > MOST_FIT_UNITS
    assert len(list((tmp_path / "run" / "covariances").iterdir())) == MOST_FIT_UNITS
    assert_same_scores(all_scores(run), all_scores(other))


def test_a_fit_on_few_sequences_has_few_units(world: World, tmp_path: Path) -> None:
    few = run_pipeline(world.settings(tmp_path / "run", data={"sequences_per_shard": 8}, factors={"sequences": 12}))
    assert few.store.num_shards > 2
    assert len(list((tmp_path / "run" / "covariances").iterdir())) == 2


def test_scanning_several_shards_as_one_unit_gives_the_same_fidelity(
    run: Run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.stages.MOST_SCAN_UNITS", 2)
    other = run_pipeline(world.settings(tmp_path / "run"))
    assert len(list((tmp_path / "run" / "scans").iterdir())) == 2 < other.store.num_shards
    assert other.fidelity == run.fidelity


# Ray: one local cluster for all of the tests below, since it takes ten seconds and more to start.


@pytest.fixture(scope="module")
def cluster(world: World, forks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    settings = world.settings(tmp_path_factory.mktemp("ray") / "run", resources={"workers": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # somebody else's, which a run without an address leaves alone
        with ray_cluster(configured(settings)):
            yield


def configured(settings: dict[str, dict[str, object]]) -> Config:
    return load_config(None, {f"{section}.{key}": value for section, values in settings.items() for key, value in values.items()})


def with_layers(config: Config) -> Run:
    """The run brought as far as its layers and sequences."""
    create_run(config)
    run = open_run(config.run.dir)
    for stage in STAGES:
        if stage.name in ("sequences", "layers"):
            do_unit(stage, run, config, "all")
    return run


@pytest.mark.filterwarnings("ignore::FutureWarning")  # Ray's notice of what a later version will do with accelerators
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves the log files of its processes open
class TestOnRay:
    def test_ray_gives_the_same_scores_as_this_process(self, run: Run, world: World, cluster: None, tmp_path: Path) -> None:
        other = run_all(configured(world.settings(tmp_path / "run", resources={"workers": 2})))
        assert_same_scores(all_scores(run), all_scores(other))

    def test_unit_that_is_refused_ends_the_stage_with_its_reason(self, world: World, cluster: None, tmp_path: Path) -> None:
        config = configured(world.settings(tmp_path / "run", resources={"workers": 2, "memory_budget": "1KiB"}))
        opened = with_layers(config)
        stage = next(stage for stage in STAGES if stage.name == "covariances")
        with closing(OnRay(config, 2)) as executor, pytest.raises(RequestError, match="memory_budget"):
            executor.do(stage, dict.fromkeys(opened.shards, 1.0), lambda unit: None, lambda failure: None)
