"""How good the index is: the measures against brute force, what answers make of them, and `influence evaluate RUN fidelity`."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from small_run import Influence, World, run_pipeline, write_jsonl

from influence.answering import QueryOptions, num_candidates
from influence.config import load_config
from influence.errors import RequestError
from influence.fidelity import DEPTHS, EndFidelity, Fidelity, end_fidelity, end_name, ndcg_of_wider, rank_correlation, ranked_by
from influence.run import Run
from jobs.driver import run_all
from jobs.stages import STAGES

QUERY = ("Lisbon lies on", " the Tagus.")


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return Run(finished)


def scores_and_noise(num_queries: int = 3, num_sequences: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    exact = rng.standard_t(3, size=(num_queries, num_sequences))
    return exact, exact + 0.7 * rng.normal(size=exact.shape)


# the measures


def test_recall_counts_the_exact_top_among_the_first() -> None:
    exact, estimates = scores_and_noise()
    found = end_fidelity(exact, ranked_by(estimates))
    for k, depths in found.recall.items():
        for depth, share in depths.items():
            expected = [
                len(set(np.argsort(-row)[:k].tolist()) & set(np.argsort(-other)[:depth].tolist())) / k
                for row, other in zip(exact, estimates, strict=True)
            ]
            assert share == pytest.approx(np.mean(expected))
    assert list(found.recall) == [1, 10, 50, 100]
    assert list(found.recall[50]) == [50, 100, 200]  # no list is longer than there are sequences
    assert found.recall[10][200] > found.recall[10][10]


def test_ndcg_is_the_discounted_gain_over_the_best_possible() -> None:
    exact, estimates = scores_and_noise(num_sequences=25)
    expected = []
    for row, other in zip(exact, estimates, strict=True):
        gains = [max(0.0, float(row[number])) for number in np.argsort(-other)]
        ideal = sorted((max(0.0, float(value)) for value in row), reverse=True)
        discounted = [sum(gain / math.log2(place + 2) for place, gain in enumerate(some[:20])) for some in (gains, ideal)]
        expected.append(discounted[0] / discounted[1])
    assert end_fidelity(exact, ranked_by(estimates)).ndcg_at_20 == pytest.approx(np.mean(expected))
    assert end_fidelity(exact, ranked_by(exact)).ndcg_at_20 == pytest.approx(1)
    assert end_fidelity(-np.abs(exact), ranked_by(estimates)).ndcg_at_20 == 1  # nothing helps: nothing can be lost


def test_sequences_that_do_not_count_change_nothing() -> None:
    exact, estimates = scores_and_noise()
    kept = np.delete(np.arange(300), [5, 77])
    hidden = exact.copy()
    hidden[:, [5, 77]] = -np.inf
    ranked = ranked_by(np.where(np.isfinite(hidden), estimates, -np.inf))
    assert end_fidelity(hidden, ranked[:, :298]) == end_fidelity(exact[:, kept], ranked_by(estimates[:, kept]))
    assert rank_correlation(hidden, estimates) == pytest.approx(rank_correlation(exact[:, kept], estimates[:, kept]))


def test_rank_correlation_is_spearmans_where_there_is_one() -> None:
    exact, estimates = scores_and_noise()
    expected = np.mean([spearmanr(one, other).statistic for one, other in zip(exact, estimates, strict=True)])
    assert rank_correlation(exact, estimates) == pytest.approx(expected)
    flat = np.concatenate([exact, np.zeros((1, 300))])
    assert rank_correlation(flat, np.concatenate([estimates, estimates[:1]])) == pytest.approx(expected)
    assert rank_correlation(np.zeros((1, 300)), estimates[:1]) is None


def test_a_single_sequence_can_be_measured() -> None:
    assert end_fidelity(np.ones((1, 1)), np.zeros((1, 1), dtype=np.int64)).recall == {1: {1: 1.0}}


def test_wider_rows_are_worth_what_is_expected_of_them() -> None:
    """From the signs of 400 random projections, against the signs of 1,600: some of 600 sequences share a part with the query."""
    rng = np.random.default_rng(0)
    expected, measured = [], []
    for _ in range(4):
        queries, rows = rng.normal(size=(4, 3000)), rng.normal(size=(600, 3000))
        for place, query in enumerate(queries):
            rows[40 * place : 40 * (place + 1)] += 0.1 * rng.exponential(size=(40, 1)) * query
        exact, projection = queries @ rows.T, rng.normal(size=(3000, 1600))
        by_width = {}
        for width in (400, 1600):
            spread = rows @ projection[:, :width] / np.sqrt(width)
            scales = (spread**2).sum(1) / np.abs(spread).sum(1)
            by_width[width] = queries @ projection[:, :width] / np.sqrt(width) @ np.sign(spread).T * scales
        narrow, wide = (end_fidelity(exact, ranked_by(estimates)).ndcg_at_20 for estimates in by_width.values())
        assert ndcg_of_wider(exact, by_width[400], 1) == pytest.approx(narrow)
        assert ndcg_of_wider(exact, by_width[400], 1e12) == pytest.approx(1)
        expected.append(ndcg_of_wider(exact, by_width[400], 4))
        measured.append(wide)
        assert wide > narrow + 0.05  # so that to expect no change would be wrong
    # 16 queries; means of four differ by .01 from one projection to the next
    assert np.mean(expected) == pytest.approx(np.mean(measured), abs=0.03)


def test_a_coarse_index_is_told_from_a_good_one() -> None:
    def measured(ndcg: float, recall: float) -> Fidelity:
        found = EndFidelity(ndcg_at_20=ndcg, recall={10: {100: 0.9, 200: recall}})
        return Fidelity(num_queries=1, spearman=None, ends={"proponents": found})

    assert measured(0.94, 1.0).is_coarse
    assert measured(0.96, 0.98).is_coarse
    assert not measured(0.96, 0.99).is_coarse


def test_a_coarse_index_says_what_more_bytes_would_give(world: World, tmp_path: Path, influence: Influence) -> None:
    sparse = run_pipeline(world.settings(tmp_path / "sparse", index={"bytes_per_sequence": 40}))
    assert sparse.fidelity is not None
    assert sparse.fidelity.is_coarse
    assert "with 40 bytes a sequence; more would give more (index.bytes_per_sequence" in influence("status", tmp_path / "sparse").out
    run = run_pipeline(world.settings(tmp_path / "run", index={"bytes_per_sequence": 40, "encoding": "bit"}))
    assert run.fidelity is not None
    assert run.fidelity.is_coarse
    assert list(run.fidelity.of_wider) == [2, 4]
    expected = ", ".join(f"{40 * times} would give about {share:.3f}" for times, share in run.fidelity.of_wider.items())
    assert f"with 40 bytes a sequence; {expected} (index.bytes_per_sequence" in influence("status", tmp_path / "run").out
    assert influence("status", tmp_path / "run", "--json").json["fidelity"]["ndcg_at_20_of_wider"].keys() == {"2", "4"}


# how many candidates


def end(shares: dict[int, float]) -> EndFidelity:
    return EndFidelity(ndcg_at_20=0.9, recall={10: shares, 100: {100: 0.5, 800: 0.99}})


def test_candidates_are_the_least_measured_number_that_holds_the_top() -> None:
    assert end({10: 0.7, 100: 0.98, 200: 0.99, 400: 1.0}).candidates_for(10) == 200
    assert end({10: 0.7, 100: 0.98, 200: 0.99, 400: 1.0}).candidates_for(3) == 200
    assert end({10: 0.999}).candidates_for(10) == 100  # never fewer: short completions are harder than what was measured
    assert end({10: 0.5, 400: 0.8}).candidates_for(10) == 400  # none holds it: as many as were measured
    assert end({10: 0.9}).candidates_for(50) == 800
    assert end({10: 0.9}).candidates_for(200) == 1600  # in proportion


def test_recall_is_quoted_of_a_depth_that_was_measured() -> None:
    found = end({10: 0.7, 100: 0.98, 200: 0.99})
    assert found.recall_at(10, 150) == 0.98
    assert found.recall_at(10, 9) is None
    assert found.recall_at(7, 100) is None


def test_answers_rerank_what_was_measured_and_quote_it(run: Run) -> None:
    assert run.fidelity is not None
    for normalized, opponents in itertools.product((False, True), repeat=2):
        result = run.query(*QUERY, normalize=normalized, opponents=opponents)
        measured = run.fidelity.ends[end_name(normalized, opponents)]
        count = num_candidates(run, QueryOptions(normalize=normalized, opponents=opponents), opponents)
        assert count == measured.candidates_for(10)
        assert result.provenance["candidates"] == min(count, len(run.store))
        assert result.provenance["ndcg_at_20"] == measured.ndcg_at_20
        assert result.provenance["recall_at_10"] == measured.recall_at(10, count)
    exact = run.query(*QUERY, exact=True).provenance
    assert (exact["recall_at_10"], exact["ndcg_at_20"]) == (1, 1)
    chosen = run.query(*QUERY, where="source = 'diary'").provenance
    assert (chosen["recall_at_10"], chosen["ndcg_at_20"]) == (None, None)  # the whole index was measured, not a part of it


def test_fidelity_is_that_of_the_index_to_exact_scores(run: Run) -> None:
    """Against a table of all scores, made query by query."""
    from indexing import query_rows
    from influence.attribution import query_gradients, solve
    from jobs.stages import sample_queries

    assert run.fidelity is not None
    assert Fidelity.from_json(json.loads(json.dumps(run.fidelity.to_json()))) == run.fidelity
    shares = []
    for number, measurement in sample_queries(run):
        rotated = query_gradients(run.attributed, [measurement], run.factors).gradients
        estimates = (
            query_rows(rotated, run.features, run.factors_of(run.attributed).spreaders)
            @ run.row_format.decode(np.concatenate(run.rows.shards)).T
        )
        exact = run.exact_scores([(run.attributed, solve(rotated, run.factors))], 1)[0]
        top = [one for one in np.argsort(-exact, kind="stable") if one != number][:10]
        found = [one for one in np.argsort(-estimates[0], kind="stable") if one != number][:20]
        shares.append(len(set(top) & set(found)) / 10)
    measured = run.fidelity.end(normalized=False, opponents=False).recall[10][20]
    assert measured == pytest.approx(np.mean(shares), abs=0.051)  # the search rounds queries to eight bits, which may swap two


# what queries find


def test_conditions_restrict_the_search_itself(run: Run) -> None:
    sources = {sequence.metadata["source"] for sequence in run.store}
    assert len(sources) > 1
    everything = run.query(*QUERY, k=len(run.store), exact=True).scores()
    by_id = {sequence.id: sequence for sequence in run.store}
    for source in sources:
        expected = {name: score for name, score in everything.items() if by_id[name].metadata["source"] == source}
        for exact in (False, True):
            found = run.query(*QUERY, k=len(run.store), candidates=len(run.store), where=f"source = '{source}'", exact=exact)
            assert found.scores() == pytest.approx(expected, rel=1e-3, abs=1e-6 * max(map(abs, everything.values())))
            assert found.provenance["searched"] == len(expected)
            assert sum(found.distribution["histogram"]["counts"]) == len(expected)
    with pytest.raises(RequestError, match="no such column: sauce; did you mean 'source'"):
        run.query(*QUERY, where="sauce = 'web'")
    with pytest.raises(RequestError, match="no sequence fulfils the condition source = 'nowhere'"):
        run.query(*QUERY, where="source = 'nowhere'")


def test_near_duplicates_are_shown_as_one(run: Run) -> None:
    result = run.query(*QUERY, k=len(run.store), candidates=len(run.store))
    together = [(sequence, name) for sequence in result.sequences for name, _ in sequence.duplicates]
    texts = {sequence.id: sequence.text for sequence in run.store}
    assert together  # the same chunk ends two documents
    assert [texts[name] for _, name in together] == [sequence.text for sequence, _ in together]
    assert result.to_json()["results"][0].keys() >= {"duplicates"}
    assert len(run.query(*QUERY, k=10).sequences) == 10


def test_lexical_overlap_counts_what_both_found(run: Run) -> None:
    result = run.query("", "Lisbon lies on the Tagus.", k=5, bm25=True)
    scores = run.lexical.scores("Lisbon lies on the Tagus.", len(run.store))
    best = [run.store.ids[number] for number in np.argsort(-scores, kind="stable")[:5]]
    assert result.lexical is not None
    assert [found["id"] for found in result.lexical["results"]] == best
    assert result.lexical["overlap"] == len(set(best) & set(result.scores()))
    assert result.to_json()["bm25"] == result.lexical
    assert "bm25" not in run.query(*QUERY, k=5).to_json()


# the command


def test_fidelity_can_be_known_before_the_index_is_built(world: World, tmp_path: Path, influence: Influence) -> None:
    settings = world.settings(tmp_path / "run")
    flat = {f"{section}.{key}": value for section, keys in settings.items() for key, value in keys.items()}
    unfinished = run_all(load_config(None, flat), until="factors")
    assert not (unfinished.directory.path / "rows").exists()
    found = influence("evaluate", tmp_path / "run", "fidelity", "--json").json
    assert found == json.loads((tmp_path / "run" / "evaluations" / "fidelity.json").read_text(encoding="utf-8"))
    by_name = {(ranking["name"], ranking["bytes_per_sequence"]): ranking for ranking in found["rankings"]}
    assert len([name for name, _ in by_name if name == "bit rows"]) >= 2
    assert {"float16 rows", "int8 rows", "projections 16 × 16", "gradient cosine", "BM25"} <= {name for name, _ in by_name}
    by_size = [ranking["proponents"]["ndcg_at_20"] for (name, _), ranking in sorted(by_name.items(), key=str) if name == "bit rows"]
    assert max(by_size) > 0.9
    assert found["num_queries"] == 4
    assert "4 queries, 20 of 65 sequences" in influence("evaluate", tmp_path / "run", "fidelity", "--sequences", 20).out
    run = run_all(load_config(None, flat | {"index.bytes_per_sequence": 512}))  # nothing was made with the old size
    assert run.row_format.bytes_per_row <= 512
    with pytest.raises(RequestError, match="--until: there is no stage 'nothing'; there are: sequences"):
        run_all(load_config(None, flat), until="nothing")


def test_nothing_to_ask_is_refused(world: World, tmp_path: Path, influence: Influence) -> None:
    run_pipeline(world.settings(tmp_path / "run", index={"recall_queries": 0}))
    influence("evaluate", tmp_path / "run", "fidelity").says("give --queries FILE, for index.recall_queries is 0")
    narrow = world.settings(tmp_path / "narrow", index={"bytes_per_sequence": 5})
    with pytest.raises(RequestError, match=r"index\.bytes_per_sequence is 5, which in sparse is 0 numbers, fewer than the 15 layers"):
        run_pipeline(narrow)


def test_queries_of_the_users_are_measured_too(finished: Path, tmp_path: Path, influence: Influence) -> None:
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"prompt": QUERY[0], "completion": QUERY[1]}, {"text": "The Tagus froze again."}])
    found = influence("evaluate", finished, "fidelity", "--queries", queries, "--out", tmp_path / "out", "--json").json
    assert (found["num_queries"], found["queries_are"]) == (2, "held out")
    assert (tmp_path / "out" / "fidelity.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fidelity", "--bank", "x.npz"], "No such option: --bank"),
        (["lds", "--sequences", "30", "--queries", "x"], "No such option: --sequences"),
        (["lds"], "Missing option '--queries'"),
        (["faith"], "there is no metric 'faith'; there are: fidelity, lds, removal"),
    ],
)
def test_options_of_another_metric_are_refused(arguments: list[str], message: str, finished: Path, influence: Influence) -> None:
    influence("evaluate", finished, *arguments).says(message)


@pytest.mark.parametrize("encoding", ["float16", "int8", "bit", "sparse"])
def test_every_encoding_makes_a_run(encoding: str, world: World, tmp_path: Path) -> None:
    run = run_pipeline(world.settings(tmp_path / "run", index={"encoding": encoding, "recall_queries": 2}))
    assert run.row_format.bytes_per_row <= 1024
    exact, found = run.query(*QUERY, k=5, exact=True), run.query(*QUERY, k=5)
    assert found.scores() == pytest.approx(exact.scores(), rel=1e-3)
    assert max(DEPTHS) > len(run.store) > 0
    assert [stage.name for stage in STAGES][-1] == "fidelity"
