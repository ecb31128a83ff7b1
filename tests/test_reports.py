"""Reports as pages, JSON and tables: what a page says is what the data says, tables read back equal, and training text is never markup."""

import html
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from served import application
from small_run import Influence, World, documents, run_pipeline, write_jsonl
from test_report_page import HOSTILE, Page, chromium, query  # noqa: F401

from influence import Client, Report, RequestError, Run, open_run, query_report
from influence.report import render_run, words
from influence.report.charts import Axis, Line, histogram, line_chart
from influence.report.overview import set_facts
from influence.report.report import CSV, PARQUET, table_bytes
from influence.run_facts import run_facts, spectrum
from influence.service import ServiceSettings
from influence.service.settings import named_runs
from jobs.living import erase, remove

QUESTIONS = [("Lisbon lies on", " the Tagus"), ("Oslo lies on", " the Aker"), ("We reached Lima in the", " rain")]
RTL = "שלום \u202eabc\u202c مرحبا"
LONG = "W" * 3000


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return open_run(finished)


@pytest.fixture(scope="module")
def facts(run: Run) -> dict[str, Any]:
    return run_facts(run)


@pytest.fixture(scope="module")
def asked(run: Run) -> Report:
    return run.report_queries([run.measure(*question) for question in QUESTIONS])


@pytest.fixture(scope="module")
def strange(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose texts and metadata are hostile, very long and written from right to left."""
    scratch = tmp_path_factory.mktemp("strange")
    own = world.copy(scratch)
    texts = [HOSTILE, LONG, RTL, "=HYPERLINK(1) of glass."]
    write_jsonl(own.data, [*documents(), *({"id": f"odd<{n}>", "text": text, "source": text[:200]} for n, text in enumerate(texts))])
    return run_pipeline(own.settings(scratch / "run"))


# --- a run ---


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_spectrum_counts_and_shares_are_those_of_sorting_every_eigenvalue(dtype: type) -> None:
    draw = np.random.default_rng(0)
    values = np.concatenate([10.0 ** draw.uniform(-9, 2, 500), np.zeros(7), [100.0]]).astype(dtype).astype(np.float64)
    for damping in (0.0, 1e-4, 3.0, 1e6):
        found = spectrum(torch.from_numpy(values.astype(dtype)).reshape(4, 127), damping)
        assert (found["axes"], found["zero"], found["largest"]) == (508, 7, 100.0)
        assert all(count == (values >= value).sum() for value, count in found["curve"])
        assert found["axes_below_damping"] == pytest.approx((values < damping).mean())
        assert found["curvature_below_damping"] == pytest.approx(values[values < damping].sum() / values.sum(), rel=1e-12)  # float64
    assert found["curve"][0] == [100.0, 1]


def test_spectrum_without_curvature_is_flat() -> None:
    found = spectrum(torch.zeros(3, 2), 0.0)
    assert (found["curve"], found["mean"], found["curvature_below_damping"]) == ([], 0, 0)


def test_layers_of_a_run_are_those_of_its_factors(run: Run, facts: dict[str, Any]) -> None:
    assert [layer["name"] for layer in facts["layers"]] == list(run.factors)
    for layer in facts["layers"]:
        factor = run.factors[layer["name"]]
        assert layer["damping"] == factor.damping
        assert layer["effective_dimension"] == pytest.approx(factor.effective_dimension(), rel=1e-6)
        assert layer["spectrum"]["mean"] == pytest.approx(factor.eigenvalues.double().mean().item(), rel=1e-12)
        assert layer["damping"] == pytest.approx(0.1 * layer["spectrum"]["mean"], rel=1e-5)  # kept in float32
    kept = run.row_format.decode(np.concatenate(run.rows.shards)) != 0
    assert facts["index"]["numbers_per_row"] == round(kept.sum(1).mean())
    for layer, place in zip(facts["layers"], run.features.layers, strict=True):
        assert layer["row_buckets"] == place.width
        assert layer["row_numbers"] == pytest.approx(kept[:, place.start : place.start + place.width].sum(1).mean())


def test_histograms_of_a_run_hold_every_sequence(run: Run, facts: dict[str, Any]) -> None:
    lengths = [len(sequence.tokens) for sequence in run.store]
    assert sum(facts["data"]["lengths"]["counts"]) == sum(facts["self_influence"]["counts"]) == len(lengths)
    assert facts["data"]["lengths"]["edges"][0] <= min(lengths)
    assert max(lengths) <= facts["data"]["lengths"]["edges"][-1]
    assert facts["self_influence"]["quantiles"]["0.5"] == pytest.approx(np.median(run.self_influence))
    found = {row["value"]: row["sequences"] for row in facts["data"]["metadata"]["source"]["values"]}
    assert found == {name: sum(s.metadata["source"] == name for s in run.store) for name in found}


def test_page_of_a_run_says_what_its_data_say(facts: dict[str, Any]) -> None:
    facts = {**facts, "coverage": {**facts["coverage"], "whole": {"transformer.h.0.attn.c_attn": "laid out in an unknown way"}}}
    facts["fidelity"] = {**facts["fidelity"], "ndcg_at_20_of_wider": {"2": 0.91, "4": 0.95}}  # as of rows that are mixed
    page = Page(render_run(facts))
    text = "".join(page.text["main"])
    wider = facts["fidelity"]["ndcg_at_20_of_wider"]
    assert "Not split: laid out in an unknown way" in text
    said = [f"{ndcg:.3f} with {words.size(int(times) * facts['index']['bytes_per_sequence'])}" for times, ndcg in wider.items()]
    said += [len(facts["layers"]), f"{facts['fidelity']['rankings']['proponents']['ndcg_at_20']:.3f}", f"{facts['data']['tokens']:,}"]
    said += [words.number(layer["damping"]) for layer in facts["layers"]] + [layer["name"] for layer in facts["layers"]]
    assert all(str(one) in text for one in said)
    assert [a["aria-label"] for tag, a in page.elements if tag == "svg" and a.get("role") == "img" and not a.get("aria-label")] == []
    ids = page.ids()
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for tag, a in page.elements if tag == "a"} <= set(ids)
    for section in ("data", "coverage", "spectra", "layers", "fidelity", "rows", "size", "self-influence", "provenance"):
        assert section in ids
        assert section in {a["href"][1:] for tag, a in page.elements if tag == "a" and a.get("class") == "anchor"}


def test_status_and_report_say_the_same_of_data_and_coverage(influence: Influence, finished: Path, facts: dict[str, Any]) -> None:
    status = influence("status", finished, "--json").json
    assert status["coverage"] == facts["coverage"]
    assert status["fidelity"] == facts["fidelity"]
    assert status["data"].items() <= facts["data"].items()


def test_report_of_a_run_needs_no_model_and_shows_a_measured_comparison(finished: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "run")
    description = json.loads((copy / "run.json").read_text())
    description["sources"]["model"] = str(tmp_path / "gone")
    (copy / "run.json").write_text(json.dumps(description))
    opened = open_run(copy)
    assert "Not measured yet" in opened.report().to_html()
    end = {"ndcg_at_20": 0.5, "recall": {"10": {"50": 0.75, "100": 1.0}}}
    ranking = {"name": "bit rows", "bytes_per_sequence": 1024, "spearman": 0.25, "proponents": end, "opponents": end}
    evaluated = {
        "rankings": [ranking, {**ranking, "bytes_per_sequence": 4096}],
        "num_queries": 4,
        "queries_are": "held out",
        "num_sequences": 40,
    }
    (copy / "evaluations").mkdir()
    for factors, shown in ((opened.fingerprints["factors"], True), ("sha256:others", False)):
        (copy / "evaluations/fidelity.json").write_text(json.dumps(evaluated | {"provenance": {"factors": factors}}))
        report = open_run(copy).report()
        assert ("4 queries (held out)" in report.to_html()) == shown
        assert ("rankings" in report.tables) == shown


def test_report_of_an_unfinished_run_is_refused(influence: Influence, world: World, tmp_path: Path) -> None:
    settings = world.settings(tmp_path / "run")
    write = tmp_path / "config.yaml"
    write.write_text(json.dumps(settings))
    assert influence("run", write, "--until", "sequences").status == 0
    influence("report", tmp_path / "run", "--about", "run").says("is not finished")


# --- a set of queries ---


def test_set_says_what_answers_share() -> None:
    one, two, three = query("one"), query("two"), query("three")
    two["results"] = [*one["results"][:1], *two["results"][2:]]
    two["opponents"] = []
    three["results"] = [{**result, "id": f"other-{result['id']}"} for result in three["results"]]
    three["opponents"] = []
    found = set_facts([one, two, three])
    shared = {result["id"] for result in two["results"]}
    assert {entry["id"] for entry in found["together"]} == shared
    assert found["together"][0]["sum"] == pytest.approx(one["results"][0]["score"] + two["results"][0]["score"])
    assert found["overlap"][0][1] == found["overlap"][1][0] == 1  # all three of the shorter list
    assert found["overlap"][0][2] == 0
    assert found["families"] == {"all queries": 3}
    blocks = [row["share"] for row in found["layers"]["block"]]
    assert sum(blocks) == pytest.approx(1)
    sums = [
        [math.fsum(v for r in q["results"] for n, v in r["layers"].items() if f".h.{b}." in n) for b in range(12)]
        for q in (one, two, three)
    ]
    assert blocks == pytest.approx([sum(s[b] / math.fsum(s) for s in sums) / 3 for b in range(12)])


def test_sums_of_scores_in_different_units_are_not_told() -> None:
    one, two = query("one"), query("two", unit="√nats")
    assert {entry["sum"] for entry in set_facts([one, two])["together"]} == {None}
    assert query_report([one, two], run="r").to_html()


def test_of_many_queries_the_first_twenty_have_a_section(asked: Report) -> None:
    many = [query(f"q{number}", 1, 5) for number in range(45)]
    report = query_report(many, run="r")
    page = Page(report.to_html())
    assert sum("data-query" in attributes for _, attributes in page.elements) == 20
    text = "".join(page.text["main"])
    assert "q44" in text
    assert "The first 20 queries have a section of their own below" in text
    assert len(report.to_pandas("queries")) == 45
    assert len(report.to_pandas("overlap")) == 45 * 44 / 2


def test_report_of_queries_holds_their_answers(run: Run, asked: Report) -> None:
    frame = asked.to_pandas()
    for place, question in enumerate(QUESTIONS, 1):
        expected = run.query(*question, bm25=True)
        found = frame[(frame["query"] == str(place)) & (frame["side"] == "helped")]
        assert found["sequence"].tolist() == [one.id for one in expected.sequences]
        np.testing.assert_allclose(found["score"], [one.score for one in expected.sequences], rtol=1e-4)  # other queries share the passes
    layers = asked.to_pandas("layers").groupby(["query", "side", "sequence"])["score"].sum()
    for (name, side, sequence), score in layers.items():
        whole = frame[(frame["query"] == name) & (frame["side"] == side) & (frame["sequence"] == sequence)]["score"].item()
        assert score == pytest.approx(whole, rel=1e-4, abs=1e-7)
    with pytest.raises(ValueError, match="no table 'nothing' in this report; it has sequences, layers, tokens, queries, families"):
        asked.to_pandas("nothing")


def test_one_result_is_a_report(run: Run) -> None:
    result = run.query(*QUESTIONS[0], k=3)
    report = result.report()
    assert report.to_json()["queries"][0]["results"] == json.loads(json.dumps(result.to_json()["results"]))
    assert "set" not in report.to_json()
    assert report.title == "Influence on “the Tagus”"
    assert report._repr_html_().count("<tr") == 4
    against = run.query(*QUESTIONS[0], k=3, opponents=True).report()
    assert set(against.to_pandas()["side"]) == {"hurt"}
    assert against.to_html()


# --- tables ---


@pytest.mark.parametrize("kind", [CSV, PARQUET])
def test_every_table_reads_back_equal(run: Run, asked: Report, kind: str, tmp_path: Path) -> None:
    for number, report in enumerate([run.report(), asked, run.health().report()]):
        written = report.write_tables(tmp_path / str(number), kind)
        assert [path.name for path in written] == [f"{name}{kind}" for name in report.tables]
        for path, rows in zip(written, report.tables.values(), strict=True):
            table = pyarrow.parquet.read_table(path) if kind == PARQUET else pyarrow.csv.read_csv(path)
            assert table.num_rows == len(rows)
            for name in table.column_names:
                expected, found = [row.get(name) for row in rows], table[name].to_pylist()
                if kind == CSV:  # where null is nothing, and text may read as a number
                    expected = ["" if one is None else str(one) for one in expected]
                    found = ["" if one is None else str(one) for one in found]
                    if all(re.fullmatch(r"(-?[\d.]+(e[-+]\d+)?|nan|)", one) for one in expected):
                        np.testing.assert_array_equal([float(one or 0) for one in found], [float(one or 0) for one in expected])
                        continue
                    expected = [one if not one.startswith(("=", "+", "-", "@", "\t", "\r")) else f"'{one}" for one in expected]
                np.testing.assert_array_equal(np.array(found, dtype=object), np.array(expected, dtype=object), err_msg=f"{path} {name}")


def test_columns_of_mixed_and_missing_values_are_text(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"a": 1, "b": "x", "c": [1], "d": True},
        {"a": 2.5, "b": 3, "c": None, "d": None},
        {"b": None, "c": {"k": "ü"}},
    ]
    table = pyarrow.parquet.read_table(pyarrow.py_buffer(table_bytes(rows, PARQUET))).to_pydict()
    assert table == {"a": [1.0, 2.5, None], "b": ["x", "3", None], "c": ["[1]", None, '{"k": "ü"}'], "d": [True, None, None]}


def test_text_that_spreadsheets_would_run_is_marked_in_csv_alone() -> None:
    rows = [{"text": text} for text in ("=1+1", "@x", "-5 degrees", "plain", "\ud800 half")]
    assert pyarrow.csv.read_csv(pyarrow.py_buffer(table_bytes(rows, CSV)))["text"].to_pylist() == [
        "'=1+1",
        "'@x",
        "'-5 degrees",
        "plain",
        "? half",
    ]
    assert pyarrow.parquet.read_table(pyarrow.py_buffer(table_bytes(rows, PARQUET)))["text"].to_pylist()[:3] == ["=1+1", "@x", "-5 degrees"]


# --- the command ---


def test_command_writes_page_and_tables_of_each_subject(influence: Influence, finished: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "run")
    for about, name, main in (("run", "report-run.html", "layers"), ("training-set", "report-training-set.html", "sequences")):
        told = influence("report", copy, "--about", about, "--csv", tmp_path / about, "--parquet", tmp_path / about, "--json").json
        assert told["report"] == str(copy / name)
        assert (copy / name).stat().st_size == told["bytes"]
        assert {str(tmp_path / about / f"{main}{kind}") for kind in (CSV, PARQUET)} <= set(told["tables"])
        assert pyarrow.parquet.read_table(tmp_path / about / f"{main}.parquet").num_rows > 0
    questions = write_jsonl(tmp_path / "q.jsonl", [{"prompt": p, "completion": c} for p, c in QUESTIONS])
    told = influence("report", copy, "--queries", questions, "-k", 2, "--parquet", tmp_path / "p", "--json").json
    assert len(told["set"]["overlap"]) == len(told["queries"]) == 3
    gone = told["queries"][0]["results"][0]["id"]
    opened = open_run(copy)
    remove(opened, [gone])
    erase(open_run(copy))
    assert not list(copy.glob("report*.html"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--about", "runs"], "--about: expected queries, run or training-set, got 'runs'"),
        (["--about", "run", "a", "b"], "--about run is not about single queries: leave out the query and its options"),
        (["--about", "training-set", "--exact"], "--about training-set is not about single queries"),
        (["--about", "run", "--queries", "q.jsonl"], "--about run takes no --queries"),
        (["--about", "run", "--csv", "{file}"], "{file} is not a directory; name one for the tables"),
    ],
)
def test_request_for_a_report_that_makes_no_sense_is_refused(
    influence: Influence, finished: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("")
    given = [word.format(file=tmp_path / "file") for word in words]
    influence("report", finished, *given, "--out", tmp_path / "x.html").says(message.format(file=tmp_path / "file"))
    assert not (tmp_path / "x.html").exists()


def test_page_that_cannot_be_written_leaves_the_old_one(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    report = run.report()
    assert report.to_html(page) == page.read_text(encoding="utf-8")
    with pytest.raises(OSError, match="No such file"):
        report.to_html(tmp_path / "no" / "page.html")
    with pytest.raises(RequestError, match="cannot be made"):
        report.write_tables(page / "tables", CSV)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


# --- the service ---


def test_service_gives_the_page_of_a_run_without_paths_and_anew_when_the_run_changed(finished: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "runs" / "small")
    with application(ServiceSettings(runs=named_runs([copy]), state_dir=tmp_path / "state")) as url, Client(url) as client:
        page = client.run_report("small")
        assert "Run small" in Page(page).text["h1"][0]
        assert str(tmp_path) not in html.unescape(page)
        assert str(open_run(copy).model_config.name) not in html.unescape(page)
        assert client.run_report("small") == page
        before = len(open_run(copy).store)
        remove(open_run(copy), [open_run(copy).store.ids[0]])
        assert f"{before - 1:,} sequences are searched" in "".join(Page(client.run_report("small")).text["main"])


# --- as people see them ---


@pytest.fixture(scope="module")
def pages(strange: Run) -> dict[str, str]:
    asked = strange.report_queries([strange.measure(*question) for question in QUESTIONS])
    return {"run": strange.report().to_html(), "queries": asked.to_html(), "training-set": strange.health(k=50).report().to_html()}


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_pages_fit_their_window_and_run_none_of_the_texts(
    chromium: Any,  # noqa: F811
    pages: dict[str, str],
    tmp_path: Path,
    width: int,
    scheme: str,
) -> None:
    for name, page in pages.items():
        (tmp_path / f"{name}.html").write_text(page, encoding="utf-8")
        tab = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
        complaints: list[str] = []
        requests: list[str] = []
        tab.on("console", lambda message, found=complaints: found.append(message.text))
        tab.on("pageerror", lambda error, found=complaints: found.append(str(error)))
        tab.on("request", lambda request, found=requests: found.append(request.url))
        tab.goto((tmp_path / f"{name}.html").as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, name
        assert tab.evaluate("window.intruded") is None
        assert complaints == []
        assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
        faults = tab.evaluate((Path(__file__).parent / "page_faults.js").read_text(encoding="utf-8"))
        assert [fault for fault in faults if "contrast" in fault] == [], name
        if name == "training-set":
            assert HOSTILE in tab.locator("main").inner_text()
        tab.context.close()


def test_charts_keep_to_their_axes() -> None:
    x, y = Axis(title="x", low=1, high=1000, log=True), Axis(title="<y>", low=0, high=3)
    lines = [Line(name=HOSTILE, points=[(0.5, 1), (1, 0), (1000, 3), (10, 9)], mark=(10, 1.5), mark_name="middle", dots=True)]
    drawn = line_chart(lines, x, y, HOSTILE)
    assert HOSTILE not in drawn
    assert re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn) == [("52.0", "206.0"), ("408.0", "22.0"), ("170.7", "114.0")]
    assert [text for _, text in x.ticks()] == ["1", "10", "100", "1,000"]
    assert [text for _, text in y.ticks()] == ["0", "1", "2", "3"]
    bars = re.findall(r'height="([\d.]+)"><title>(.*?)</title>', histogram([0, 1, 2, 4], [2, 0, 4], "x", "d"))
    assert bars == [("92.00", "2 sequences from 0 to 1.00"), ("184.00", "4 sequences from 2.00 to 4.00")]
