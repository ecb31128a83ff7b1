"""What people meet at the command line: one clear line and an exit status for every mistake, and one JSON object for every machine."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_run import (
    POSITIONS,
    Influence,
    World,
    alter_one_weight,
    artifacts,
    command,
    documents,
    everything,
    finish,
    write_jsonl,
    write_yaml,
)

from influence.config import Config
from jobs.options import config_options

PROMPT, COMPLETION = "Lisbon lies on", " the Tagus."
NUM_SEQUENCES = 65


@pytest.fixture(scope="module")
def asked(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that keeps answers."""
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("asked") / "run"))


# the request is wrong


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["run", "--dampign", "1"], ["status"], ["query"], ["demo", "--workers", "x"], ["demo", "--wrong"]]
)
def test_wrong_words_are_refused(arguments: list[str], influence: Influence) -> None:
    influence(*arguments).says("")


def test_no_words_show_the_help(influence: Influence) -> None:
    found = influence()
    assert (found.status, found.out) == (2, "")
    assert found.err.startswith("Usage: ")
    assert "The most influential training sequences" in found.err


@pytest.mark.parametrize("name", ["status", "query", "report"])
def test_path_that_is_no_run_is_refused(name: str, influence: Influence, world: World, tmp_path: Path) -> None:
    words = [PROMPT, COMPLETION] if name != "status" else []
    for place in (tmp_path / "nowhere", tmp_path):
        influence(name, place, *words).says(f"{place} is not a run directory: it has no run.json (`influence run` makes one)")
    influence(name, world.data, *words).says("cannot be read: Not a directory")
    assert not list(tmp_path.iterdir())


CONFIGURATIONS = [
    ("", "is empty or not a mapping of sections"),
    ("- model", "is empty or not a mapping of sections"),
    ("a: [1", "is not valid YAML"),
    ("model: {name: x}", "data is missing; run is missing"),
    ("model: x", "model: Input should be a valid dictionary"),
]


@pytest.mark.parametrize(("text", "message"), CONFIGURATIONS)
def test_configuration_that_says_nothing_is_refused(text: str, message: str, influence: Influence, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text)
    influence("run", config).says(message)
    influence("run", config, "--model", "x").says("with the given options: " if text.startswith("model") else message)


def test_missing_configuration_is_refused(influence: Influence, tmp_path: Path) -> None:
    influence("run").says("the given options: model is missing; data is missing; run is missing")
    influence("run", tmp_path / "no.yaml").says(f"no configuration file at {tmp_path / 'no.yaml'}")
    influence("run", tmp_path).says("Is a directory")


SETTINGS = [
    ({"factors": {"dampign": 1}}, "unknown key 'factors.dampign'; did you mean 'factors.damping'?"),
    ({"modle": {"name": "x"}}, "unknown key 'modle'; did you mean 'model'?"),
    ({"factors": {"damping": "lots"}}, "factors.damping: Input should be a valid number, unable to parse string as a number (got 'lots')"),
    ({"factors": {"damping": {"absolut": 1}}}, "factors.damping.absolute is missing"),
    ({"factors": {"damping": -1}}, "factors.damping: Input should be greater than or equal to 0 (got -1)"),
    ({"data": {"sequence_length": "long"}}, "data.sequence_length: Input should be a valid integer"),
    ({"data": {"sequence_length": 1}}, "data.sequence_length: Input should be greater than or equal to 2 (got 1)"),
    ({"data": {"sample_by": "word"}}, "data.sample_by: Input should be 'line', 'paragraph' or 'document' (got 'word')"),
    ({"data": {"prompt": "p"}}, "data: prompt and completion come together"),
    ({"data": {"files": []}}, "data.files: Value should have at least 1 item"),
    ({"data": {"files": None}}, "data.files is missing"),
    ({"index": {"bytes_per_sequence": "1.2.3GiB"}}, "index.bytes_per_sequence: "),
    ({"resources": {"memory_budget": "tiny"}}, "resources.memory_budget: "),
    ({"data": {"sequence_length": POSITIONS + 1}}, f"data.sequence_length is 33, but the model has {POSITIONS} positions: lower it"),
    ({"factors": {"layers": "nothing*"}}, "no attributable layer matches 'nothing*'; there are 15, such as: transformer.wte"),
    (
        {"index": {"bytes_per_sequence": 2}},
        "index.bytes_per_sequence is 2, which in sparse is 0 numbers, fewer than the 15 layers: raise it",
    ),
    (
        {"resources": {"memory_budget": "1KiB"}},
        "memory_budget is too small: the model, the factors of its largest layer and one sequence need",
    ),
    ({"data": {"files": "no.jsonl"}}, "no data file at"),
    ({"data": {"files": "no*.jsonl"}}, "no file matches"),
    ({"data": {"files": "/tmp"}}, "/tmp is a directory without .arrow files; name files or a glob such as /tmp/*.jsonl"),
    ({"model": {"name": "./no"}}, "there is no model directory at"),
]


@pytest.mark.parametrize(("changes", "message"), SETTINGS)
def test_wrong_setting_is_refused_by_its_name(
    changes: dict[str, Any], message: str, influence: Influence, world: World, tmp_path: Path
) -> None:
    influence("run", write_yaml(tmp_path / "config.yaml", world.settings(tmp_path / "run", **changes))).says(message)


def test_run_directory_that_is_a_file_is_refused(influence: Influence, world: World, tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "config.yaml", world.settings(tmp_path / "config.yaml"))
    influence("run", config).says(f"{config} is a file: the run directory must be a directory")


ROWS = [{"id": "a", "text": "Lisbon lies on the Tagus."}, {"id": "b", "text": "Oslo lies on the Aker."}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)

DATA = [
    ("", {}, "the data holds no sequence with a counted token"),
    ("\n\n", {}, "the data holds no sequence with a counted token"),
    ('{"text": "x"}\n{"text": ""}\n', {}, "every document has fewer than two tokens"),
    (LINES + "{broken\n", {}, "train.jsonl, line 3: not valid JSON (Expecting property name enclosed in double quotes at column 2)"),
    (LINES[:-20], {}, "train.jsonl, line 2: not valid JSON"),
    ("[1]\n", {}, "train.jsonl, line 1: expected a JSON object, got list"),
    (LINES + '{"id": "c", "words": "x"}\n', {}, "train.jsonl, row 2: no column 'text'; there are: id, words"),
    (LINES + '{"id": "c", "text": 5}\n', {}, "train.jsonl, row 2: column 'text' holds int, expected text"),
    (LINES + '{"id": "c", "text": null}\n', {}, "train.jsonl, row 2: column 'text' holds NoneType, expected text"),
    (LINES + '{"id": "c", "text": "half \\ud83d"}\n', {}, "train.jsonl, row 2: column 'text' holds half a character ('\\ud83d'"),
    (
        LINES + LINES,
        {},
        "the id 'a' comes twice in the data: ids must differ (data.id names their column; without one, row numbers are ids)",
    ),
    (LINES, {"metadata": ["year"]}, "train.jsonl, row 0: no column 'year' for metadata; there are: id, text"),
    (LINES, {"prompt": "text", "completion": "c"}, "train.jsonl, row 0: no column 'c'; there are: id, text"),
    (LINES, {"input_ids": "ids"}, "train.jsonl, row 0: no column 'ids'; there are: id, text"),
    (LINES, {"input_ids": "text"}, "train.jsonl, row 0: column 'text' must hold a list of token ids"),
    ('{"ids": [1, 99999]}', {"input_ids": "ids"}, "train.jsonl, row 0: token id 99999 is not one of the 320 that the tokenizer knows"),
]


@pytest.mark.parametrize(("text", "settings", "message"), DATA)
def test_wrong_data_is_refused_at_its_place(
    text: str, settings: dict[str, Any], message: str, influence: Influence, world: World, tmp_path: Path
) -> None:
    (tmp_path / "train.jsonl").write_text(text)
    changes = {"files": str(tmp_path / "train.jsonl"), "metadata": None, **settings}
    config = write_yaml(tmp_path / "config.yaml", world.settings(tmp_path / "run", data=changes))
    influence("run", config).says(message)
    assert artifacts(tmp_path / "run") == {}


def test_document_without_counted_tokens_is_left_out_and_named(influence: Influence, world: World, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [*ROWS, {"id": "short", "text": "x"}])
    settings = world.settings(tmp_path / "run", data={"files": str(tmp_path / "train.jsonl"), "metadata": None})
    found = influence("run", write_yaml(tmp_path / "config.yaml", settings), "--json")
    assert found.json["data"]["sequences"] == 2
    assert found.err.splitlines()[-1] == "left out 1 sequence without a counted token (nothing in them is predicted): short"


@pytest.mark.parametrize("rows", [ROWS[:1], [{"text": "ab"}, {"text": "zq"}]], ids=["one sequence", "one counted token each"])
def test_smallest_training_sets_are_answered_from(rows: list[dict[str, str]], influence: Influence, world: World, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", rows)
    config = write_yaml(tmp_path / "config.yaml", world.settings(tmp_path / "run", data={"files": str(data), "metadata": None}))
    assert influence("run", config, "--json").json["finished"]
    assert len(influence("query", tmp_path / "run", PROMPT, COMPLETION, "--json").json["results"]) == len(rows)
    assert influence("status", tmp_path / "run").status == 0


def overwrite(name: str, content: bytes | None) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).unlink() if content is None else (directory / name).write_bytes(content)

    return change


MODELS = [
    (shutil.rmtree, "there is no model directory at"),
    (overwrite("config.json", b"{"), "is not a valid JSON file"),
    (overwrite("config.json", b"{}"), "no causal language model can be loaded from"),
    (overwrite("config.json", b'{"model_type": "nobody-knows"}'), "no causal language model can be loaded from"),
    (overwrite("model.safetensors", None), "no causal language model can be loaded from"),
    (overwrite("model.safetensors", b"x" * 100), "no causal language model can be loaded from"),
    (overwrite("tokenizer.json", None), "no tokenizer can be loaded from"),
    (overwrite("tokenizer.json", b"{}"), "no tokenizer can be loaded from"),
    (
        lambda directory: alter_one_weight(directory, lambda weight: weight.fill_(math.nan)),
        "the model's weights are not finite: transformer.h.1.mlp.c_fc.weight",
    ),
    (
        lambda directory: alter_one_weight(directory, lambda weight: weight.fill_(-math.inf)),
        "the model's weights are not finite: transformer.h.1.mlp.c_fc.weight",
    ),
]


@pytest.mark.parametrize(("change", "message"), MODELS)
def test_model_that_cannot_be_used_is_refused(
    change: Callable[[Path], None], message: str, influence: Influence, world: World, asked: Path, tmp_path: Path
) -> None:
    other = world.copy(tmp_path)
    change(other.model)
    influence("run", write_yaml(tmp_path / "config.yaml", other.settings(tmp_path / "run"))).says(message)
    assert not (tmp_path / "run").exists()
    influence("query", asked, PROMPT, COMPLETION, "--model", other.model).says(message)


QUERIES = [
    ([PROMPT, ""], "the completion is empty: there is nothing to explain"),
    (["", "x"], "the query has no token to count: nothing comes before its only token; give a prompt, or a longer completion"),
    ([PROMPT], "give PROMPT and COMPLETION, or --queries FILE"),
    ([], "give PROMPT and COMPLETION, or --queries FILE"),
    ([PROMPT, COMPLETION * 20], f"tokens, more than the model's {POSITIONS} positions: shorten the prompt"),
    ([PROMPT, "half \udce9"], "the query holds half a character"),
    *(([PROMPT, COMPLETION, "--span", span], "does not lie within the completion's") for span in ("0:99", "2:1", "1:1")),
    *(([PROMPT, COMPLETION, "--span", span], "expected two token numbers such as 0:3, got") for span in ("1", "a:b", "-1:2", ":", "0:1:2")),
    ([PROMPT, COMPLETION, "--contrast", COMPLETION], "the contrast must be another completion, not empty and not the same"),
    ([PROMPT, COMPLETION, "--contrast", ""], "the contrast must be another completion, not empty and not the same"),
    ([PROMPT, COMPLETION, "--contrast", " Po.", "--span", "0:1"], "a span counts tokens of one completion"),
    ([PROMPT, COMPLETION, "-k", "0"], "k must be at least 1, not 0"),
    ([PROMPT, COMPLETION, "-k", "-3"], "k must be at least 1, not -3"),
    ([PROMPT, COMPLETION, "-k", "many"], "Invalid value for '-k'"),
    ([PROMPT, COMPLETION, "--candidates", "0"], "candidates must be at least 1, not 0"),
    ([PROMPT, COMPLETION, "--layers", "nothing"], "no attributed layer matches 'nothing'; there are 15, such as transformer.wte"),
    ([PROMPT, COMPLETION, "--refine", "--refine-steps", "0"], "refinement needs at least one step and one sequence, not 0 and 512"),
    ([PROMPT, COMPLETION, "--refine-steps", "3"], "--refine-steps and --refine-sequences go with --refine"),
    ([PROMPT, COMPLETION, "--also", "nowhere"], "nowhere is not a run directory"),
    ([PROMPT, COMPLETION, "--unknown"], "No such option: --unknown"),
    ([PROMPT, COMPLETION, "--memory-budget", "much"], "--memory-budget: 'much' is not a size such as 4GiB"),
    ([PROMPT, COMPLETION, "--memory-budget", "1.2.3GiB"], "--memory-budget: '1.2.3GiB' is not a size such as 4GiB"),
    ([PROMPT, COMPLETION, "--memory-budget", "1KiB"], "memory_budget is too small"),
    ([PROMPT, COMPLETION, "--queries", "q.jsonl"], "give a prompt and completion (with --contrast or --span), or --queries FILE, not both"),
    (["--queries", "q.jsonl"], "q.jsonl cannot be read: No such file or directory"),
]


@pytest.mark.parametrize(("arguments", "message"), QUERIES)
def test_wrong_query_is_refused(arguments: list[str], message: str, influence: Influence, finished: Path) -> None:
    before = everything(finished)
    influence("query", finished, *arguments).says(message)
    assert everything(finished) == before


QUERY_FILES = [
    ("", "holds no query"),
    ("[]", "line 1: expected a JSON object"),
    ('{"text": "Oslo lies"}\n{broken', "line 2: not valid JSON"),
    ("{}", "line 1: expected prompt and completion, or text, or messages, or input_ids; got nothing"),
    ('{"prompt": "x"}', "line 1: expected prompt and completion, or text, or messages, or input_ids; got prompt"),
    ('{"prompt": 1, "completion": "x"}', "line 1: expected prompt and completion, or text, or messages, or input_ids"),
    ('{"text": ""}', "line 1: the completion is empty"),
    ('{"input_ids": []}', "line 1: the query has no tokens"),
    ('{"input_ids": [1]}', "line 1: the query has no token to count"),
    ('{"input_ids": [1, "a"]}', "line 1: input_ids must be whole numbers from 0 to 319"),
    ('{"input_ids": [1, 320]}', "line 1: input_ids must be whole numbers from 0 to 319"),
    ('{"input_ids": [true, 2]}', "line 1: input_ids must be whole numbers from 0 to 319"),
    ('{"input_ids": "1 2"}', "line 1: expected prompt and completion, or text, or messages, or input_ids; got input_ids"),
    ('{"input_ids": [' + "1, " * POSITIONS + "1]}", "line 1: the query has 33 tokens"),
]


@pytest.mark.parametrize(("text", "message"), QUERY_FILES)
@pytest.mark.parametrize("name", ["query", "report"])
def test_wrong_file_of_queries_is_refused_at_its_line(
    name: str, text: str, message: str, influence: Influence, finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "queries.jsonl").write_text(text)
    before = everything(finished)
    influence(name, finished, "--queries", tmp_path / "queries.jsonl").says(message)
    assert everything(finished) == before


def test_report_that_cannot_be_written_is_refused_before_the_work(influence: Influence, finished: Path, tmp_path: Path) -> None:
    before = everything(finished)
    influence("report", finished).says(f"nothing was asked of {finished} yet: give a prompt and a completion, or --queries FILE")
    influence("report", finished, PROMPT, COMPLETION, "--out", tmp_path / "no" / "x.html").says(f"there is no directory {tmp_path / 'no'}")
    influence("report", finished, PROMPT, COMPLETION, "--out", tmp_path).says(f"{tmp_path} is a directory; name the HTML file to write")
    influence("report", finished, PROMPT, COMPLETION, "-k", "0").says("k must be at least 1, not 0")
    assert everything(finished) == before
    assert not list(tmp_path.iterdir())


def test_flipped_byte_is_found_by_verify_alone(influence: Influence, finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    assert influence("status", copy, "--verify").status == 0
    path = copy / "rows/part-00001/rows.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert influence("status", copy).status == 0
    influence("status", copy, "--verify").says(f"{path} is damaged: its checksum differs from its record; delete {path.parent}")


def test_debug_shows_where_and_keeps_the_status(influence: Influence, finished: Path) -> None:
    found = influence("query", finished, PROMPT, COMPLETION, "-k", "0", "--debug")
    assert (found.status, found.out) == (2, "")
    assert found.err.startswith("Traceback (most recent call last):")
    assert found.err.splitlines()[-1] == "error: k must be at least 1, not 0"


def test_a_real_process_keeps_its_streams_apart(finished: Path, tmp_path: Path) -> None:
    answer, refusal = command("query", finished, PROMPT, COMPLETION, "--json", "-k", 2), command("status", tmp_path)
    status, out, err = finish(answer)
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert len(json.loads(out)["results"]) == 2
    shutil.rmtree(finished / "answers")
    assert finish(refusal) == (2, "", f"error: {tmp_path} is not a run directory: it has no run.json (`influence run` makes one)\n")


# the request is right


def check_shape(answer: dict[str, Any]) -> None:
    """One answer is what INTERFACE.md says."""
    query, results = answer["query"], answer["results"]
    assert {"prompt", "completion", "log_probability", "tokens"} <= query.keys()
    assert "".join(query["tokens"]) == query["prompt"] + query["completion"]
    assert [result["rank"] for result in results] == list(range(1, len(results) + 1))
    for result in results:
        assert {
            "rank",
            "id",
            "score",
            "text",
            "documents",
            "metadata",
            "layers",
            "tokens",
            "bm25_rank",
            "duplicates",
            "verbatim",
        } == result.keys()
        assert math.isfinite(result["score"])
        assert sum(result["layers"].values()) == pytest.approx(result["score"], rel=1e-4)
        largest = max(abs(share) for _, share in result["tokens"])
        assert sum(share for _, share in result["tokens"]) == pytest.approx(result["score"], rel=1e-4, abs=1e-5 * largest)
        if result["text"].isascii():  # a token may be a part of any other character
            assert "".join(token for token, _ in result["tokens"]) == result["text"]
        assert result["metadata"].keys() == {"source"}
    assert answer["coverage"] == {"parameters_attributed": 1, "excluded": {}}
    provenance = answer["provenance"]
    assert provenance["method"] == "ekfac"
    assert provenance["searched"] == NUM_SEQUENCES
    assert {"run", "model", "data", "damping", "candidates", "reranked", "recall_at_10", "seconds"} <= provenance.keys()
    assert all(provenance[name].startswith("sha256:") for name in ("model", "data", "tokenizer"))


def test_json_answer_has_the_documented_shape(influence: Influence, asked: Path) -> None:
    found = influence("query", asked, PROMPT, COMPLETION, "--json", "-k", 5)
    assert found.err == ""
    check_shape(found.json)
    scores = [result["score"] for result in found.json["results"]]
    assert scores == sorted(scores, reverse=True)
    assert found.json["provenance"]["recall_at_10"] is not None


def test_opponents_are_the_other_end_of_the_same_ranking(influence: Influence, asked: Path) -> None:
    everyone = influence("query", asked, PROMPT, COMPLETION, "--json", "-k", 10_000, "--candidates", 10_000).json
    against = influence("query", asked, PROMPT, COMPLETION, "--json", "-k", 7, "--candidates", 10_000, "--opponents").json
    check_shape(everyone)
    check_shape(against)
    with_duplicates = len(everyone["results"]) + sum(len(result["duplicates"]) for result in everyone["results"])
    assert with_duplicates == everyone["provenance"]["candidates"] == NUM_SEQUENCES
    assert [r["id"] for r in against["results"]] == [r["id"] for r in everyone["results"][::-1][:7]]


def test_exact_scan_agrees_with_rerank_of_all_candidates(influence: Influence, asked: Path) -> None:
    reranked = influence("query", asked, PROMPT, COMPLETION, "--json", "-k", 20, "--candidates", NUM_SEQUENCES).json["results"]
    exact = influence("query", asked, PROMPT, COMPLETION, "--json", "-k", 20, "--exact").json
    scores = {r["id"]: r["score"] for r in reranked}
    assert [r["score"] for r in exact["results"]] == pytest.approx([r["score"] for r in reranked], rel=1e-4)
    assert [r["id"] for r in exact["results"]][:10] == [r["id"] for r in reranked][:10]  # further down, rounding decides between near ties
    assert len(scores.keys() & {r["id"] for r in exact["results"]}) >= 19
    assert exact["provenance"]["recall_at_10"] == 1


def test_refined_and_averaged_answers_say_so(influence: Influence, asked: Path, tmp_path: Path) -> None:
    words = ("--refine", "--refine-steps", 2, "--refine-sequences", 8, "-k", 3)
    refined = influence("query", asked, PROMPT, COMPLETION, *words)
    assert "refined in 2 steps to a relative residual of" in " ".join(refined.out.split())
    assert "refining: 2/2" in refined.err
    other = shutil.copytree(asked, tmp_path / "other")
    answer = influence("query", asked, PROMPT, COMPLETION, *words, "--also", other, "--json").json
    assert answer["provenance"]["method"] == "refined"
    assert answer["provenance"]["refinement"]["sequences"] == 8
    assert len(answer["provenance"]["averaged_over"]) == 2
    assert all(result["runs"] == dict.fromkeys(("run", "other"), pytest.approx(result["score"])) for result in answer["results"])
    influence("query", asked, PROMPT, COMPLETION, "--also", asked).says("is given twice: each run counts once in an average")
    page = influence("report", asked, PROMPT, COMPLETION, *words, "--out", tmp_path / "page.html")
    assert page.status == 0, page.err
    assert "exact Gauss–Newton Hessian of 8 training sequences" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_scores_add_up_over_layers_spans_and_contrasts(influence: Influence, asked: Path) -> None:
    def scores(*options: object, completion: str = COMPLETION) -> dict[str, float]:
        answer = influence("query", asked, PROMPT, completion, "--json", "--exact", "-k", NUM_SEQUENCES, *options).json
        return {result["id"]: result["score"] for result in answer["results"]}

    def assert_sum(parts: list[dict[str, float]], whole: dict[str, float]) -> None:
        tolerance = 1e-4 * max(abs(score) for part in [whole, *parts] for score in part.values())
        assert {name: sum(part[name] for part in parts) for name in whole} == pytest.approx(whole, abs=tolerance)

    whole = scores()
    assert_sum(
        [scores("--layers", "*.attn.*", "--layers", "*.mlp.*"), scores("--layers", "*.wte", "--layers", "*.wpe", "--layers", "*.ln_*")],
        whole,
    )
    num_tokens = sum(
        p is not None for p in influence("query", asked, PROMPT, COMPLETION, "--json").json["query"]["token_log_probabilities"]
    )
    assert_sum([scores("--span", "0:2"), scores("--span", f"2:{num_tokens}")], whole)
    assert_sum([scores("--contrast", " Po."), scores(completion=" Po.")], whole)


def test_three_kinds_of_queries_from_a_file(influence: Influence, asked: Path, world: World, tmp_path: Path) -> None:
    queries = [{"id": "pair", "prompt": PROMPT, "completion": COMPLETION}, {"text": "Oslo lies on"}, {"id": 7, "input_ids": [40, 41, 42]}]
    answers = influence("query", asked, "--queries", write_jsonl(tmp_path / "q.jsonl", queries), "--json", "-k", 3).json["queries"]
    assert [answer["id"] for answer in answers] == ["pair", "2", "7"]
    alone = influence("query", asked, PROMPT, COMPLETION, "--json", "-k", 3).json
    assert [r["id"] for r in answers[0]["results"]] == [r["id"] for r in alone["results"]]
    assert [r["score"] for r in answers[0]["results"]] == pytest.approx([r["score"] for r in alone["results"]], rel=1e-4)
    for answer in answers:
        check_shape(answer)


def test_people_see_ranks_ids_tokens_and_lexical_ranks(influence: Influence, asked: Path) -> None:
    plain = influence("query", asked, PROMPT, COMPLETION)
    coloured = influence("query", asked, PROMPT, COMPLETION, "--tokens", "--bm25", "--opponents")
    assert (plain.status, plain.err, coloured.status, coloured.err) == (0, "", 0, "")
    assert "doc-" in plain.out
    assert "bm25" in coloured.out
    assert "recall of the top 10" in plain.out
    ranks = [r["bm25_rank"] for r in influence("query", asked, "", "Lisbon lies on the Tagus", "--bm25", "--json").json["results"]]
    assert 1 in ranks


def test_missing_numbers_in_metadata_become_null(influence: Influence, world: World, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "Lisbon lies on the Tagus.", "year": NaN}\n{"text": "Oslo lies.", "year": Infinity}\n')
    settings = world.settings(tmp_path / "run", data={"files": str(tmp_path / "train.jsonl"), "metadata": "year"})
    assert influence("run", write_yaml(tmp_path / "config.yaml", settings)).status == 0
    results = influence("query", tmp_path / "run", PROMPT, COMPLETION, "--json").json["results"]
    assert sorted((r["id"], r["metadata"]["year"]) for r in results) == [("0", None), ("1", "inf")]


def test_answer_that_cannot_be_kept_is_given_with_a_warning(influence: Influence, finished: Path, tmp_path: Path) -> None:
    """As in a run directory that may only be read; the superuser, who may write everywhere, is stopped by a file in the way."""
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    (copy / "answers").write_text("")
    found = influence("query", copy, PROMPT, COMPLETION, "--json", "-k", 3)
    assert len(found.json["results"]) == 3
    assert found.err.startswith("warning: the answer is not kept for `influence report`: ")
    assert found.err.count("\n") == 1


def test_report_of_what_was_asked(influence: Influence, finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy [1]"))
    influence("query", copy, PROMPT, COMPLETION)
    found = influence("report", copy, "--json", "-k", 3).json
    assert found["report"] == str(copy / "report.html")
    assert "the Tagus." in (copy / "report.html").read_text()
    check_shape(found["queries"][0])
    assert influence("report", copy, PROMPT, COMPLETION, "--out", tmp_path / "other.html").out == f"{tmp_path / 'other.html'}\n"
    (copy / "answers" / "broken.json").write_text("{")
    influence("report", copy).says("broken.json is damaged: it is not a kept answer; delete it and ask again")


def test_status_tells_what_a_run_is_made_of(influence: Influence, finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy [1]"))
    found = influence("status", copy, "--json").json
    assert found["finished"] is True
    assert found["stages"]["rows"] == {"done": 5, "total": 5}
    assert found["data"]["sequences"] == NUM_SEQUENCES
    assert influence("status", copy).out.splitlines()[0] == f"{copy}: finished"
    shutil.rmtree(copy / "rows" / "part-00002")
    shutil.rmtree(copy / "fidelity")
    found = influence("status", copy, "--json").json
    assert found["finished"] is False
    assert found["stages"]["rows"] == {"done": 4, "total": 5}
    influence("query", copy, PROMPT, COMPLETION).says(
        "is not finished: rows/part-00002 is missing; `influence run` goes on where it stopped"
    )
    shutil.rmtree(copy / "sequences")
    assert influence("status", copy, "--json").json["stages"]["rows"] == {"done": 0, "total": None}


# flags and the file


def test_flags_alone_make_the_same_run_as_the_file(influence: Influence, world: World, finished: Path, tmp_path: Path) -> None:
    settings = world.settings(tmp_path / "run")
    flags = [["--model", settings["model"]["name"]], ["--data", settings["data"]["files"]], ["--out", settings["run"]["dir"]]]
    flags += [["--metadata", "source"], ["--sequence-length", POSITIONS], ["--sequences-per-shard", 16]]
    flags += [["--bytes-per-sequence", "1KiB"], ["--recall-queries", 4]]
    assert influence("run", *(word for flag in flags for word in flag)).status == 0
    assert json.loads((tmp_path / "run/run.json").read_text()) == json.loads((finished / "run.json").read_text())
    assert artifacts(tmp_path / "run") == artifacts(finished)


def test_flags_win_over_the_file(influence: Influence, world: World, tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "config.yaml", world.settings(tmp_path / "run", factors={"damping": 0.5}))
    found = influence("run", config, "--damping", "absolute:1e-2", "--recall-queries", 0, "--out", tmp_path / "other", "--json").json
    assert found["run"] == str(tmp_path / "other")
    assert found["settings"]["factors"]["damping"] == {"absolute": 0.01}
    assert found["settings"]["index"]["recall_queries"] == 0
    assert not (tmp_path / "run").exists()


def test_every_configuration_key_is_a_flag(influence: Influence) -> None:
    keys = {f"{section}.{key}" for section, field in Config.model_fields.items() for key in field.annotation.model_fields}
    options = config_options()
    assert options.keys() == keys
    assert len({flag for flag, _ in options.values()}) == len(keys)
    shown = influence("run", "--help").out
    assert [flag for flag, _ in options.values() if flag not in shown] == []


def test_documents_are_as_many_as_the_tests_count(finished: Path) -> None:
    assert len(documents()) == 40
    assert sum(json.loads((finished / "sequences/all/summary.json").read_text())["shards"]) == NUM_SEQUENCES
