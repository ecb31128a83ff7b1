"""The health of a training set: equal to what asking one sequence after another gives, whole or not at all, and nothing of what was removed."""

import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from small_run import Influence, everything, write_jsonl

from indexing import ALIKE, RowFormat, RowShards, all_duplicates
from influence import Measurement, RequestError, Run, open_run
from influence.attribution import query_gradients, scan, solve
from influence.health import Health, distances, weights
from influence.report import render_health
from jobs.health import kept_health
from jobs.living import append, erase, remove

QUERIES = [("Oslo lies on the", " Aker. The town"), ("We reached Lima in the", " rain")]


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return open_run(finished)


@pytest.fixture(scope="module")
def health(run: Run) -> Health:
    return run.health()


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def scores_of(run: Run, asked: list[Measurement]) -> np.ndarray:
    """[Q, N], each query on its own."""
    vectors = solve(query_gradients(run.attributed, asked, run.factors).gradients, run.factors)
    return scan(run.attributed, vectors, list(run.store)) / len(run.training)


def whole(run: Run) -> list[Measurement]:
    """Every training sequence as a query: the log-probability of all its tokens."""
    return [Measurement(prompt="", completion=s.text, contrast=None, parts=((1.0, s),)) for s in run.store]


# --- the passes ---


def test_influence_is_the_mean_of_what_asking_for_every_training_sequence_gives(run: Run, health: Health) -> None:
    expected = scores_of(run, whole(run)).mean(0)
    np.testing.assert_allclose(health.columns["influence"], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())  # float32 sums


def test_influence_over_queries_is_the_mean_of_what_asking_each_gives(run: Run) -> None:
    asked = [run.measure(*query) for query in QUERIES]
    expected = scores_of(run, asked).mean(0)
    found = run.health(asked)
    np.testing.assert_allclose(found.columns["influence"], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert [one["completion"] for one in found.summary["about"]["queries"]] == [completion for _, completion in QUERIES]


def test_layers_and_columns_sum_to_the_same_influence(health: Health) -> None:
    total = health.columns["influence"].sum()
    layers = health.summary["layers"].values()
    assert sum(sums["positive"] + sums["negative"] for sums in layers) == pytest.approx(total, rel=1e-9)
    rows = health.summary["by"]["source"]
    assert sum(row["positive"] + row["negative"] for row in rows) == pytest.approx(total, rel=1e-9)
    assert sum(row["self_influence_share"] for row in rows) == pytest.approx(1)
    assert sum(row["sequences"] for row in rows) == health.summary["sequences"]


def test_loss_is_the_models_own(run: Run, health: Health) -> None:
    for place in (0, 7, 21):
        sequence = run.store[place]
        ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None]
        with torch.no_grad():
            loss = run.language_model.model(input_ids=ids, labels=ids).loss.item()
        assert health.columns["loss"][place] == pytest.approx(loss, rel=1e-4)


def test_each_list_is_sorted_and_holds_the_extremes(health: Health) -> None:
    for name, column, sign in (("largest", "influence", 1), ("most_negative", "influence", -1), ("self_influence", "self_influence", 1)):
        shown = [sign * one[column] for one in health.summary[name]]
        assert shown == sorted(shown, reverse=True)
        assert shown[0] == pytest.approx((sign * health.columns[column]).max())


# --- outliers and weights ---


def test_a_value_far_from_what_its_source_and_length_predict_is_an_outlier() -> None:
    draw = np.random.default_rng(0)
    source = np.repeat(np.array(["web", "books"], dtype=object), 100)
    lengths = draw.integers(10, 500, 200)
    values = 0.01 * lengths + np.where(source == "web", 5.0, 0.0) + draw.normal(0, 0.1, 200)
    values[17] += 20  # not large among all values, but for its length and source
    far = distances(values, lengths, source)
    assert np.abs(far).argmax() == 17
    assert far[17] > 10


def test_distances_do_not_depend_on_level_and_unit_of_a_source() -> None:
    draw = np.random.default_rng(1)
    source, lengths, values = np.repeat(np.array(["a", "b"], dtype=object), 50), draw.integers(5, 50, 100), draw.normal(size=100)
    expected = distances(values, lengths, source)
    np.testing.assert_allclose(distances(3 * (values + np.where(source == "a", 7.0, 0.0)), lengths, source), expected, atol=1e-9)


@pytest.mark.parametrize("values", [np.zeros(12), np.full(12, np.nan)], ids=["all equal", "none known"])
def test_nothing_is_an_outlier_where_nothing_differs(values: np.ndarray) -> None:
    far = distances(values, np.arange(12), np.zeros(12, dtype=object))
    np.testing.assert_array_equal(far, values)


def test_a_group_of_duplicates_weighs_as_one_sequence() -> None:
    influence = np.array([3.0, 1.0, 1.0, 1.0, -2.0])
    found = weights(influence, np.array([-1, 0, 0, 0, -1]))
    assert found.mean() == pytest.approx(1)
    assert found[0] > found[1:4].sum() > found[4] > 0
    assert found[1:4].sum() / found[0] == pytest.approx((3 - 0.5) / (5 - 0.5))  # ranks 2 to 4, shared, against rank 5


# --- near-duplicates ---


def components(rows: np.ndarray, format: RowFormat, members: np.ndarray) -> list[list[int]]:
    """Groups by comparing every pair."""
    units = format.decode(rows[members])
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    cosines = units @ units.T
    alike = (np.sin(np.pi / 2 * np.clip(cosines, -1, 1)) if format.encoding == "bit" else cosines) >= ALIKE
    label = np.arange(len(members))
    for _ in members:
        label = np.array([label[row].min() for row in alike])
    groups = [members[label == one].tolist() for one in np.unique(label)]
    return [group for group in groups if len(group) > 1]


@pytest.mark.parametrize("encoding", ["bit", "int8", "float16"])
@pytest.mark.parametrize("length", [128, 1000, 8160])
def test_near_duplicates_are_those_of_a_comparison_of_every_pair(encoding: str, length: int) -> None:
    draw = np.random.default_rng(3)
    base = draw.standard_normal((60, length))
    close = base[:25] + 0.2 * draw.standard_normal((25, length))  # a cosine of about .98
    chain = close[:5] + 0.2 * draw.standard_normal((5, length))
    exact = np.repeat(base[40:41], 30, axis=0) * draw.uniform(0.1, 10, (30, 1))
    near = base[:25] + 0.8 * draw.standard_normal((25, length))  # .78: no duplicates
    every = np.concatenate([base, close, chain, exact, near, np.zeros((3, length))])
    format = RowFormat(encoding=encoding, length=length)  # type: ignore[arg-type]
    codes = format.encode(torch.from_numpy(every[draw.permutation(len(every))]))
    rows = RowShards(format=format, shards=(codes[:50], codes[50:]))
    allowed = draw.random(len(codes)) < 0.9
    found = all_duplicates(rows, allowed)
    members = np.flatnonzero(allowed & (np.abs(format.decode(codes)).sum(1) > 0))
    assert [group.tolist() for group in found] == components(codes, format, members)


def test_one_row_has_no_duplicates() -> None:
    format = RowFormat(encoding="bit", length=64)
    rows = RowShards(format=format, shards=(format.encode(torch.ones(1, 64)),))
    assert all_duplicates(rows, np.ones(1, dtype=bool)) == []
    assert all_duplicates(rows, np.zeros(1, dtype=bool)) == []


# --- the command ---


def test_command_writes_table_summary_page_and_weights(influence: Influence, copy: Path, health: Health) -> None:
    printed = influence("health", copy, "--json", "--weights", copy / "weights.parquet", "-k", 3).json
    place = copy / "evaluations" / "health"
    assert {**json.loads((place / "health.json").read_text()), "page": str(place / "health.html")} == printed
    table = pyarrow.parquet.read_table(place / "sequences.parquet").to_pydict()
    assert table["id"] == health.columns["id"].tolist()
    np.testing.assert_allclose(table["influence"], health.columns["influence"], rtol=1e-4, atol=1e-9)
    written = pyarrow.parquet.read_table(copy / "weights.parquet").to_pydict()
    assert (written["id"], written["weight"]) == (table["id"], table["weight"])
    assert influence("health", copy, "--weights", copy / "weights.csv").status == 0
    assert pyarrow.csv.read_csv(copy / "weights.csv")["weight"].to_pylist() == pytest.approx(written["weight"])


def test_command_measures_a_file_of_queries_as_their_mean(influence: Influence, copy: Path, run: Run) -> None:
    file = write_jsonl(copy / "queries.jsonl", [{"prompt": prompt, "completion": completion} for prompt, completion in QUERIES])
    printed = influence("health", copy, "--json", "--queries", file).json
    expected = scores_of(run, [run.measure(*query) for query in QUERIES]).mean(0)
    assert printed["largest"][0]["id"] == run.store.ids[int(expected.argmax())]
    assert "mean of 2 queries" in (copy / "evaluations/health/health.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by", "sauce"], "no metadata column 'sauce'"),
        (["--weights", "weights.txt"], "must end in .parquet or .csv"),
        (["--weights", "nowhere/weights.csv"], "there is no directory nowhere"),
        (["--queries", "nowhere.jsonl"], "cannot be read"),
        (["-k", "0"], "k must be at least 1"),
    ],
)
def test_request_that_cannot_be_met_is_refused(influence: Influence, copy: Path, arguments: list[str], message: str) -> None:
    influence("health", copy, *arguments).says(message)
    assert not (copy / "evaluations").exists()


def test_what_was_done_is_not_done_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(copy)
    read = type(run.store).shard

    def stops(store: object, shard: int) -> object:
        if (copy / "evaluations").exists() and list((copy / "evaluations").glob("*/scan-00000")):
            raise KeyboardInterrupt
        return read(store, shard)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(type(run.store), "shard", stops)
        with pytest.raises(KeyboardInterrupt):
            kept_health(run, None, None, 10)
    before = {name: facts for name, facts in everything(copy).items() if "scan-00000/" in name}
    assert before
    whole = kept_health(open_run(copy), None, None, 10)
    assert {name: facts for name, facts in everything(copy).items() if "scan-00000/" in name} == before
    assert not list((copy / "evaluations").glob("*/gradient-*"))
    np.testing.assert_array_equal(whole.columns["influence"], open_run(copy).health().columns["influence"])


def test_what_was_removed_is_in_nothing_and_erasing_removes_what_shows_it(influence: Influence, copy: Path, health: Health) -> None:
    gone = health.summary["largest"][0]["id"]
    assert influence("health", copy).status == 0
    assert gone in (copy / "evaluations/health/health.html").read_text()
    remove(open_run(copy), [gone])
    after = open_run(copy).health()
    assert gone not in after.columns["id"]
    assert after.summary["sequences"] == health.summary["sequences"] - 1
    erase(open_run(copy))
    assert not list((copy / "evaluations").glob("health*"))
    assert open_run(copy).health().columns["id"].tolist() == after.columns["id"].tolist()


def test_what_is_appended_is_measured_beside_the_rest_and_changes_none_of_it(copy: Path, health: Health) -> None:
    more = write_jsonl(
        copy.parent / "more.jsonl", [{"id": "new", "text": "Nobody in Oslo sells timber before spring.", "source": "letter"}]
    )
    append(open_run(copy), [str(more)])
    after = open_run(copy).health()
    assert after.columns["id"].tolist() == [*health.columns["id"].tolist(), "new"]
    np.testing.assert_allclose(after.columns["influence"][:-1], health.columns["influence"], rtol=1e-4, atol=1e-7)
    assert after.summary["provenance"]["appended"] == 1


def test_page_holds_no_script_and_runs_none_of_the_texts(health: Health) -> None:
    evil = '<script>alert(1)</script><img src="//example.org/x" onerror=alert(1)>'
    summary = json.loads(json.dumps(health.to_json()))
    for one in summary["largest"]:
        one |= {"id": evil, "text": evil, "metadata": {evil: evil}}
    summary["by"] = {evil: [row | {"value": evil} for row in summary["by"]["source"]]}
    page = render_health({"run": evil, "created": "today", **summary})
    assert "<script" not in page
    assert "<img" not in page
    assert "default-src 'none'" in html.unescape(page)
    assert not re.search(r"<[a-z][^>]*\s(?:src|href)=\"(?!#|data:)", page)


def test_health_in_a_notebook_is_a_table_of_escaped_text(health: Health) -> None:
    assert health._repr_html_().startswith("<table")
    assert len(health.to_pandas()) == health.summary["sequences"]
    shown = Health(columns=health.columns, summary={**health.summary, "largest": [{**health.summary["largest"][0], "text": "<b>"}]})
    assert "&lt;b&gt;" in shown._repr_html_()


def test_every_sequence_removed_is_refused_and_a_function_is_not_a_measure_of_health(run: Run) -> None:
    with pytest.raises(RequestError, match="not with a function"):
        run.health([run.measure_function(lambda model, batch: model(input_ids=batch.tokens).logits[:, 0, 0], *QUERIES[0])])
