"""A living index: what was appended is found like everything else, what was removed is in no answer, what was erased is in no file.

And a change that fails at any moment has either happened or not.
"""

import json
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from small_run import Influence, World, documents, everything, forked, run_pipeline, write_jsonl

from influence import QueryOptions, RefineOptions, RequestError, Run, answer, open_run
from influence.lexical import index_texts
from influence.living import Appended, Living
from influence.run_directory import RunDirectory
from jobs import living
from jobs.answers import keep_answers

QUERY = ("Lisbon lies on", " the Tagus.")
NUM_SEQUENCES = 65
NOVEL = "A quagga lies on the Tagus."


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return open_run(finished)


@pytest.fixture(scope="module")
def grown(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to which all its documents were appended once more under other ids, and one that is new. Never to be changed."""
    place = tmp_path_factory.mktemp("grown")
    shutil.copytree(finished, place / "run")
    living.append(open_run(place / "run"), [str(write_jsonl(place / "later.jsonl", [*again(documents()), novel()]))])
    return place / "run"


def again(rows: list[dict[str, Any]], prefix: str = "new-") -> list[dict[str, Any]]:
    """The same texts as other documents."""
    return [{**row, "id": prefix + row["id"], "source": "later"} for row in rows]


def novel(name: str = "novel", text: str = NOVEL) -> dict[str, Any]:
    return {"id": name, "text": text, "source": "menagerie"}


def append(run: Path, rows: list[dict[str, Any]], name: str = "more") -> dict[str, Any]:
    return living.append(open_run(run), [str(write_jsonl(run.parent / f"{name}.jsonl", rows))])


def scores(run: Run, **options: Any) -> dict[str, float]:
    """Of every sequence, by an exact scan."""
    return run.query(*QUERY, k=len(run.store), **{"exact": True, **options}).scores()


def assert_same(found: Mapping[str, float], expected: Mapping[str, float]) -> None:
    """The model computes in float32, and its batches are cut otherwise when others are beside them."""
    assert found.keys() == expected.keys()
    assert dict(found) == pytest.approx(dict(expected), rel=1e-3, abs=1e-5 * max(map(abs, expected.values())))


def contents(run: Path) -> dict[str, str]:
    """Every file and what is in it, but for the lock."""
    return {name: digest for name, (_, digest) in everything(run).items() if digest != "directory"}


# appended


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("options", [{"exact": True}, {"exact": False, "candidates": 1000}], ids=["scan", "index"])
def test_appended_texts_get_the_scores_of_their_originals(options: dict[str, Any], normalize: bool, run: Run, grown: Path) -> None:
    before, after = scores(run, normalize=normalize), scores(open_run(grown), **options, normalize=normalize)
    assert after.keys() - {"novel"} == before.keys() | {f"new-{name}" for name in before}
    assert_same({name: after[name] for name in before}, before)
    assert_same({name: after[f"new-{name}"] for name in before}, before)


def test_rows_of_appended_texts_are_those_of_their_originals(run: Run, grown: Path) -> None:
    opened = open_run(grown)
    numbers = np.array([opened.store.ids.index(f"new-{name}") for name in run.store.ids])
    assert opened.rows.num_rows == len(opened.store) == 2 * NUM_SEQUENCES + 1
    own, copies = opened.rows.take(np.arange(NUM_SEQUENCES)), opened.rows.take(numbers)
    np.testing.assert_array_equal(own, run.rows.take(np.arange(NUM_SEQUENCES)))
    # bits and a scale: the sums that a bit is the sign of differ in their last digit with the batch
    assert np.unpackbits(own[:, :-4] ^ copies[:, :-4]).mean() < 1e-3
    np.testing.assert_allclose(own[:, -4:].copy().view(np.float32), copies[:, -4:].copy().view(np.float32), rtol=1e-4)
    np.testing.assert_allclose(opened.self_influence[numbers], run.self_influence, rtol=1e-4)


def test_appended_sequences_are_found_by_metadata_and_show_what_they_are(run: Run, grown: Path) -> None:
    opened = open_run(grown)
    result = opened.query(*QUERY, k=100, where="source = 'later'")
    assert result.scores().keys() == {f"new-{name}" for name in run.store.ids}
    assert result.provenance["searched"] == NUM_SEQUENCES
    texts = dict(zip(run.store.ids, (sequence.text for sequence in run.store), strict=True))
    for sequence in result.sequences:
        assert sequence.text == texts[sequence.id.removeprefix("new-")]
        assert sequence.metadata == {"source": "later"}
        assert sum(share for _, share in sequence.tokens) == pytest.approx(sequence.score, rel=1e-4, abs=1e-6)
    (alone,) = opened.query(*QUERY, where="source = 'menagerie'").sequences
    assert (alone.id, alone.text, alone.metadata) == ("novel", NOVEL, {"source": "menagerie"})
    assert opened.query(*QUERY).provenance["searched"] == 2 * NUM_SEQUENCES + 1


def test_lexical_search_covers_what_was_appended(grown: Path) -> None:
    opened = open_run(grown)
    expected = index_texts(sequence.text for sequence in opened.store)
    for query in ("quagga", "Lisbon lies on the Tagus.", "nothing of this"):
        np.testing.assert_array_equal(opened.lexical.scores(query, len(opened.store)), expected.scores(query, len(opened.store)))
    (found,) = opened.query("", "The quagga", where="source = 'menagerie'", bm25=True).sequences
    assert found.bm25_rank == 1


def test_appended_in_two_parts_is_appended_at_once(grown: Path, copy: Path) -> None:
    rows = [*again(documents()), novel()]
    assert append(copy, rows[:25], "first")["appended"] + append(copy, rows[25:], "second")["appended"] == NUM_SEQUENCES + 1
    opened, expected = open_run(copy), open_run(grown)
    assert opened.store.ids == expected.store.ids
    assert_same(scores(opened, normalize=True), scores(expected, normalize=True))
    np.testing.assert_array_equal(opened.lexical.scores(NOVEL, 131), expected.lexical.scores(NOVEL, 131))


# refused

LONG = next(row for row in documents() if row["id"] == "doc-03")  # two sequences


@pytest.mark.parametrize("name", ["doc-05", "doc-03", "doc-03:0", "new-doc-07", "new-doc-03"])
def test_id_that_is_in_the_run_is_refused(name: str, grown: Path, tmp_path: Path, influence: Influence) -> None:
    copy = Path(shutil.copytree(grown, tmp_path / "copy"))
    before = contents(copy)
    with pytest.raises(RequestError, match=f"the id '{name}' is in the run already: remove it first to replace it, or take another id"):
        append(copy, [novel("other"), novel(name)])
    status, out, err = influence("append", copy, tmp_path / "more.jsonl")
    assert (status, out) == (2, "")
    assert f"error: the id '{name}' is in the run already" in err
    assert "Traceback" not in err
    assert contents(copy) == before


def test_id_that_comes_twice_is_refused(copy: Path) -> None:
    before = contents(copy)
    with pytest.raises(RequestError, match="the id 'novel' comes twice in the data"):
        append(copy, [novel(), novel()])
    assert contents(copy) == before


def test_files_that_are_in_the_index_are_refused(world: World, copy: Path, tmp_path: Path, influence: Influence) -> None:
    append(copy, [novel()])
    before = contents(copy)
    for name in (tmp_path / "more.jsonl", world.data):
        status, out, err = influence("append", copy, name)
        assert (status, out) == (2, "")
        assert f"these files are in {copy} already" in err
    influence("append", copy, tmp_path / "none.jsonl")
    assert contents(copy) == before


@pytest.fixture(scope="module", params=["split", "pack"])
def numbered(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over documents without ids. Never to be changed."""
    directory = tmp_path_factory.mktemp(request.param) / "run"
    run_pipeline(world.settings(directory, data={"id": "row", "documents": request.param}, index={"recall_queries": 0}))
    return directory


def test_documents_without_ids_get_the_numbers_that_come_next(numbered: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(numbered, tmp_path / "copy"))
    for name in ("first", "second"):
        append(copy, [{"text": NOVEL, "source": name}, {"text": LONG["text"], "source": name}], name)
    opened = open_run(copy)
    assert len(set(opened.store.ids)) == len(opened.store)
    if opened.description["settings"]["data"]["documents"] == "split":
        assert opened.store.ids[len(opened.training) :] == ["40", "41:0", "41:1", "42", "43:0", "43:1"]
        return
    named = {
        source: {name for s in opened.store if s.metadata["source"] == source for name in s.metadata["documents"]}
        for source in ("first", "second")
    }
    assert named == {"first": {"40", "41"}, "second": {"42", "43"}}


def test_same_files_without_ids_are_refused(numbered: Path, world: World, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(numbered, tmp_path / "copy"))
    before = contents(copy)
    with pytest.raises(RequestError, match=f"these files are in {copy} already"):
        living.append(open_run(copy), [str(world.data)])
    assert contents(copy) == before


# interrupted


class Interrupted(Exception):
    pass


def interrupt(patch: pytest.MonkeyPatch, moment: int) -> list[str]:
    """From now on the `moment`-th call of what changes files fails before it has done anything, or, of a deletion, when it is half done.

    Returns the list in which calls are noted.
    """
    calls: list[str] = []

    def watched(name: str, real: Callable[..., None], fail: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            calls.append(name)
            if len(calls) == moment:
                fail(*arguments)
                raise Interrupted(name)
            real(*arguments)

        return call

    def delete_half(path: Path) -> None:
        next(path.iterdir()).unlink()

    for name in ("write_unit", "write_living", "forget_answers"):
        patch.setattr(RunDirectory, name, watched(name, getattr(RunDirectory, name), lambda *_: None))
    patch.setattr(living, "shutil", SimpleNamespace(rmtree=watched("rmtree", shutil.rmtree, delete_half)))
    return calls


def fail(do: Callable[[], Any], moment: int, at: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, moment)
        with pytest.raises(Interrupted, match=at):
            do()


REMOVED = ["doc-28", "doc-31", "novel"]  # all that name the Senegal and the quagga; doc-31 is two sequences


def keep_two_answers(run: Path) -> None:
    """One that shows every sequence and one that shows a ledger; and a report of the first."""
    opened = open_run(run)
    everyone, ledger = opened.query(*QUERY, k=1000, exact=True), opened.query(*QUERY, k=1, where="source = 'ledger'")
    keep_answers(opened, [everyone, ledger], opponents=False)
    (run / "report.html").write_text("".join(sequence.text for sequence in everyone.sequences), encoding="utf-8")


def prepared(name: str, run: Path) -> Callable[[], Any]:
    """The command, and the run as it is before it."""
    if name == "append":
        rows = write_jsonl(run.parent / "later.jsonl", [*again(documents()[:20]), novel()])
        return lambda: living.append(open_run(run), [str(rows)])
    append(run, [novel()])
    keep_two_answers(run)
    if name == "remove":
        return lambda: living.remove(open_run(run), REMOVED)
    living.remove(open_run(run), REMOVED)
    return lambda: living.erase(open_run(run))


@pytest.mark.parametrize("name", ["append", "remove", "erase"])
def test_command_that_fails_at_any_moment_has_happened_or_not_and_goes_on(name: str, finished: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    run = Path(shutil.copytree(finished, place / "run"))
    do = prepared(name, run)
    shutil.copytree(place, tmp_path / "before")
    old = few_scores(run)
    with pytest.MonkeyPatch.context() as patch:
        calls = interrupt(patch, 0)
        outcome = do()
    new, after, expected = few_scores(run), open_run(run).directory.living, contents(run)
    assert (old.keys() == new.keys()) == (name == "erase")
    for moment, failing in enumerate(calls, 1):
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "before", place)
        fail(do, moment, failing)
        happened = open_run(run).directory.living == after
        assert_same(few_scores(run), new if happened else old)
        assert do() == outcome or happened
        assert contents(run) == expected, f"at call {moment} of {calls}"


def few_scores(run: Path) -> dict[str, float]:
    """Of what the index finds first."""
    return open_run(run).query(*QUERY, k=25, candidates=25, bm25=True).scores()


def append_file(run: Path, file: Path) -> None:
    living.append(open_run(run), [str(file)])


def test_append_killed_on_the_way_leaves_the_old_state_and_goes_on(run: Run, copy: Path, tmp_path: Path) -> None:
    rows = [row for part in range(3) for row in again(documents(), f"{part}-")]
    files = write_jsonl(tmp_path / "many.jsonl", rows)
    undisturbed = Path(shutil.copytree(copy, tmp_path / "undisturbed"))
    living.append(open_run(undisturbed), [str(files)])
    process = forked(append_file, copy, files)
    deadline = time.monotonic() + 240
    while not list(copy.glob("rows/append-*-00001")):
        assert process.exitcode is None, "it ended before it was met"
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert_same(scores(open_run(copy)), scores(run))
    other = Path(shutil.copytree(copy, tmp_path / "other"))
    assert living.append(open_run(copy), [str(files)])["appended"] == 3 * NUM_SEQUENCES
    assert contents(copy) == contents(undisturbed)
    # other files: nothing is left of these
    append(other, [novel()])
    assert (
        sorted(path.name[:19] for stage in ("sequences", "rows") for path in other.glob(f"{stage}/append-*"))
        == [open_run(other).appended[0].name] * 2
    )
    assert not list(other.rglob(".partial-*"))
    assert open_run(other).store.ids == [*run.store.ids, "novel"]


def test_lexical_index_of_a_failed_append_is_cleared(copy: Path) -> None:
    fail(lambda: append(copy, [novel()]), 4, "write_living")
    assert "quagga" in words(copy)
    append(copy, again(documents()[:1]), "other")
    assert "quagga" not in words(copy)


@pytest.mark.parametrize("name", ["append", "remove"])
def test_run_that_somebody_works_on_is_refused(name: str, copy: Path, tmp_path: Path, influence: Influence) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [novel("doc-00")])
    words = ["append", copy, tmp_path / "rows.jsonl"] if name == "append" else ["remove", copy, "--ids", tmp_path / "rows.jsonl", "--erase"]
    before = contents(copy)
    with RunDirectory(copy).exclusive():
        status, out, err = influence(*words)
    assert (status, out) == (2, "")
    assert f"error: another process is working on {copy}" in err
    assert contents(copy) == before


@pytest.mark.parametrize("missing", ["rows/part-00001", "fidelity"])
def test_run_that_is_not_finished_is_refused_until_it_is(missing: str, world: World, copy: Path) -> None:
    shutil.rmtree(copy / missing)
    before = contents(copy)
    for do in (lambda: append(copy, [novel()]), lambda: living.remove(open_run(copy), ["doc-00"]), lambda: living.erase(open_run(copy))):
        with pytest.raises(RequestError, match=f"{copy} is not finished: {missing[:4]}.*`influence run` goes on where it stopped"):
            do()
    assert contents(copy) == before
    run_pipeline(world.settings(copy))
    assert append(copy, [novel()])["appended"] == 1


def test_fidelity_made_again_after_an_append_is_what_it_was(world: World, copy: Path) -> None:
    append(copy, again(documents()))
    expected = contents(copy)
    shutil.rmtree(copy / "fidelity")
    run_pipeline(world.settings(copy))
    assert {name: digest for name, digest in contents(copy).items() if name != "progress.json"}.items() <= expected.items()


# removed

KINDS: dict[str, dict[str, Any]] = {
    "index": {},
    "scan": {"exact": True},
    "opponents": {"opponents": True},
    "normalized": {"normalize": True},
    "normalized scan of opponents": {"normalize": True, "exact": True, "opponents": True},
    "layers": {"layers": ("*.mlp.*",)},
    "where": {"where": "source in ('gazetteer', 'letter')"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_rest_of_a_ranking_moves_up_when_its_top_is_removed(kind: str, copy: Path) -> None:
    reader = open_run(copy)
    options = {"candidates": 1000, **KINDS[kind]}
    before = reader.query(*QUERY, **{**options, "k": 1000})
    top = [name for s in before.sequences[:6] for name in (s.id, *(other for other, _ in s.duplicates))]
    living.remove(open_run(copy), top)
    result, expected = reader.query(*QUERY, **{**options, "k": 10}), before.sequences[6:16]
    assert [s.id for s in result.sequences] == [s.id for s in expected]
    assert_same(result.scores(), {name: score for s in expected for name, score in ((s.id, s.score), *s.duplicates)})
    assert len(expected) == 10
    assert result.provenance["searched"] == before.provenance["searched"] - len(top)
    assert open_run(copy).query(*QUERY, **options).scores() == pytest.approx(result.scores(), rel=1e-6)


def test_few_candidates_still_give_k_results_when_the_best_were_removed(grown: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(grown, tmp_path / "copy"))
    living.remove(open_run(copy), [s.id for s in open_run(copy).query(*QUERY, k=40, candidates=100).sequences])
    result = open_run(copy).query(*QUERY, k=10, candidates=20)
    assert len(result.sequences) == 10
    assert result.provenance["candidates"] == 20


def test_removed_is_gone_from_refined_and_averaged_answers(finished: Path, copy: Path, tmp_path: Path) -> None:
    opened = open_run(copy)
    refined = QueryOptions(k=1000, exact=True, refine=RefineOptions(steps=2, sequences=1000))
    before = opened.answer([opened.measure(*QUERY)], refined)[0]
    assert "doc-00:0" in before.scores()
    living.remove(open_run(copy), ["doc-00"])
    others = set(opened.store.ids) - {"doc-00:0", "doc-00:1"}
    result = opened.answer([opened.measure(*QUERY)], refined)[0]
    assert result.scores().keys() == others
    assert result.provenance["refinement"]["sequences"] == NUM_SEQUENCES - 2  # nor is the Hessian averaged over it
    for runs in ([opened, open_run(finished)], [open_run(finished), opened]):
        averaged = answer(runs, [opened.measure(*QUERY)], QueryOptions(k=1000, exact=True))[0]
        assert averaged.scores().keys() == others


def test_lexical_ranks_do_not_count_what_was_removed(copy: Path) -> None:
    before = ranked(open_run(copy))
    (first,) = (name for name, (_, rank) in before.items() if rank == 1)
    (second,) = (name for name, (_, rank) in before.items() if rank == 2)
    living.remove(open_run(copy), [first])
    assert ranked(open_run(copy))[second][1] == 1


def test_distribution_is_estimated_from_what_was_not_removed(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("influence.run.SAMPLE_SIZE", 1)
    for half in (0, 1):  # the sample is in one of them
        copy = Path(shutil.copytree(finished, tmp_path / f"{half}"))
        living.remove(open_run(copy), open_run(copy).store.ids[half::2])
        result = open_run(copy).query(*QUERY)
        assert result.distribution["num_sequences"] == 1
        assert result.distribution["estimated_from"] == "index rows of a sample"


def test_refinement_without_a_training_sequence_is_refused(copy: Path) -> None:
    append(copy, [novel()])
    living.remove(open_run(copy), open_run(copy).training.ids)
    assert scores(open_run(copy)).keys() == {"novel"}
    with pytest.raises(RequestError, match="refine"):
        scores(open_run(copy), refine=RefineOptions(steps=2, sequences=8))


def test_document_is_removed_with_all_its_sequences(copy: Path) -> None:
    assert living.remove(open_run(copy), ["doc-03"]) == {"removed_now": 2, "removed": 2, "sequences": NUM_SEQUENCES}
    assert scores(open_run(copy)).keys() == set(open_run(copy).store.ids) - {"doc-03:0", "doc-03:1"}
    assert living.remove(open_run(copy), ["doc-07:1", "doc-03:1"])["removed_now"] == 1
    assert "doc-07:0" in scores(open_run(copy))


def test_document_in_packed_sequences_is_removed_from_every_one(world: World, tmp_path: Path) -> None:
    run = run_pipeline(world.settings(tmp_path / "run", data={"documents": "pack"}, index={"recall_queries": 0}))
    for name in ("doc-01", "doc-39"):  # neither is the first in all of its sequences
        assert name in run.store.documents or name == "doc-39"
        holding = {sequence.id for sequence in run.store if name in sequence.metadata["documents"]}
        left = set(scores(open_run(tmp_path / "run")))
        living.remove(open_run(tmp_path / "run"), [name])
        assert scores(open_run(tmp_path / "run")).keys() == left - holding


def test_unknown_ids_and_the_removal_of_everything_remove_nothing(copy: Path, tmp_path: Path, influence: Influence) -> None:
    append(copy, [novel()])
    before = contents(copy)
    with pytest.raises(RequestError, match=r"2 of 3 ids are not in .* \('doc-99', 'doc-03:7'\): nothing was removed"):
        living.remove(open_run(copy), ["doc-01", "doc-99", "doc-03:7"])
    with pytest.raises(RequestError, match=r"would remove every sequence of .*: nothing was removed"):
        living.remove(open_run(copy), open_run(copy).store.ids)
    for text, message in (("doc-99\n", "1 of 1 ids are not in"), ("\n", "holds no id"), ('{"name": "doc-01"}\n', "line 1: expected an id")):
        (tmp_path / "ids").write_text(text)
        status, out, err = influence("remove", copy, "--ids", tmp_path / "ids", "--erase")
        assert (status, out) == (2, "")
        assert message in err
    assert influence("remove", copy)[0] == 2
    assert influence("remove", copy, "--ids", tmp_path / "none")[0] == 2
    assert contents(copy) == before


def test_removing_twice_is_removing_once(copy: Path, tmp_path: Path, influence: Influence) -> None:
    (tmp_path / "ids").write_text('doc-03:0\n\n{"id": "doc-03:1"}\r\ndoc-03:0\n')
    found = json.loads(influence("remove", copy, "--ids", tmp_path / "ids", "--json")[1])
    assert found == {"run": str(copy), "removed_now": 2, "removed": 2, "sequences": NUM_SEQUENCES}
    before, left = contents(copy), scores(open_run(copy))
    found = json.loads(influence("remove", copy, "--ids", tmp_path / "ids", "--json")[1])
    assert found == {"run": str(copy), "removed_now": 0, "removed": 2, "sequences": NUM_SEQUENCES}
    assert contents(copy) == before
    assert_same(scores(open_run(copy)), left)


# erased


def words(run: Path) -> str:
    """All that the files of a run say: tables as their rows, other files as they are, names included; in lower case."""
    found = []
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        found += [str(path.relative_to(run)), path.read_bytes().decode(errors="replace")]
        if path.suffix == ".parquet":
            found += map(str, pyarrow.parquet.read_table(path).to_pylist())
        elif path.suffix == ".json":
            found.append(json.dumps(json.loads(path.read_text(encoding="utf-8")), ensure_ascii=False))
        elif path.suffix == ".npy":
            found.append(str(np.load(path, allow_pickle=False).dtype))  # numbers, no words
    return "\n".join(found).lower()


def tokens(run: Path) -> list[list[int]]:
    """Of every sequence in any file of the run."""
    return [row for path in run.rglob("*.parquet") for row in pyarrow.parquet.read_table(path)["tokens"].to_pylist()]


@pytest.fixture(scope="module")
def erased(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run before and after REMOVED were erased. Never to be changed."""
    before = Path(shutil.copytree(finished, tmp_path_factory.mktemp("erased") / "before"))
    append(before, [novel(), {**novel("other"), "text": "Nobody came.", "source": "diary"}])
    keep_two_answers(before)
    after = Path(shutil.copytree(before, before.parent / "after"))
    living.remove(open_run(after), REMOVED)
    assert living.erase(open_run(after)) == {"erased_now": 5, "erased": 5, "sequences": NUM_SEQUENCES + 2}
    return before, after


def test_erased_text_tokens_and_metadata_are_in_no_file(erased: tuple[Path, Path]) -> None:
    before, after = erased
    gone = [sequence for sequence in open_run(before).store if sequence.document in REMOVED]
    assert len(gone) == 5
    for word in ("senegal", "quagga", "menagerie"):
        assert word in words(before)
        assert word not in words(after)
    for sequence in gone:
        assert sequence.tokens.tolist() in tokens(before)
        assert sequence.tokens.tolist() not in tokens(after)
        assert sequence.id in words(after)  # ids stay


def test_erased_rows_and_self_influences_are_zero_and_the_others_as_they_were(erased: tuple[Path, Path]) -> None:
    before, after = map(open_run, erased)
    gone = np.array([document in REMOVED for document in before.store.documents])
    everyone = np.arange(len(before.store))
    assert not after.rows.take(everyone[gone]).any()
    assert not after.self_influence[gone].any()
    np.testing.assert_array_equal(after.rows.take(everyone[~gone]), before.rows.take(everyone[~gone]))
    np.testing.assert_array_equal(after.self_influence[~gone], before.self_influence[~gone])
    for sequence, other, erased_one in zip(after.store, before.store, gone, strict=True):
        assert sequence.id == other.id
        if not erased_one:
            assert replace(sequence, tokens=None, counted=None) == replace(other, tokens=None, counted=None)
            np.testing.assert_array_equal(sequence.tokens, other.tokens)
            np.testing.assert_array_equal(sequence.counted, other.counted)


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"exact": False, "candidates": 1000}])
def test_scores_of_all_others_are_unchanged_by_erasure(options: dict[str, Any], erased: tuple[Path, Path]) -> None:
    before, after = (scores(open_run(run), **options) for run in erased)
    left = {name: score for name, score in before.items() if name.split(":")[0] not in REMOVED}
    assert_same(after, left)


def test_lexical_search_of_what_is_left(erased: tuple[Path, Path]) -> None:
    opened = open_run(erased[1])
    expected = index_texts(sequence.text for sequence in opened.store)
    for query in ("Nobody", "Dakar and the Senegal", "quagga"):
        np.testing.assert_array_equal(opened.lexical.scores(query, len(opened.store)), expected.scores(query, len(opened.store)))


def test_answers_and_report_that_showed_the_erased_are_gone_and_others_stay(erased: tuple[Path, Path]) -> None:
    before, after = erased
    assert (before / "report.html").exists()
    assert not (after / "report.html").exists()
    kept = {path.name: path.read_bytes() for path in (after / "answers").iterdir()}
    assert len(list((before / "answers").iterdir())) == 2
    assert [json.loads(content)["results"][0]["metadata"]["source"] for content in kept.values()] == ["ledger"]
    assert all((before / "answers" / name).read_bytes() == content for name, content in kept.items())


def test_answer_that_names_the_erased_as_a_duplicate_is_gone(grown: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(grown, tmp_path / "copy"))
    opened = open_run(copy)
    result = opened.query(*QUERY, k=1)
    ((name, _), *_) = result.sequences[0].duplicates
    keep_answers(opened, [result], opponents=False)
    living.remove(open_run(copy), [name])
    living.erase(open_run(copy))
    assert not list((copy / "answers").iterdir())


def test_answer_whose_lexical_search_shows_the_erased_is_gone(copy: Path) -> None:
    opened = open_run(copy)
    result = opened.query("", "The Senegal froze again.", k=1, where="source = 'letter'", bm25=True, opponents=True)
    assert not {"doc-31:0", "doc-31:1"} & result.scores().keys()
    keep_answers(opened, [result], opponents=True)
    assert "Dakar" in next((copy / "answers").iterdir()).read_text(encoding="utf-8")
    living.remove(open_run(copy), ["doc-28", "doc-31"])
    living.erase(open_run(copy))
    assert not list((copy / "answers").iterdir())


def test_erased_run_is_finished_whole_and_left_alone_by_the_command_that_made_it(
    world: World, erased: tuple[Path, Path], tmp_path: Path, influence: Influence
) -> None:
    copy = Path(shutil.copytree(erased[1], tmp_path / "copy"))
    status, out, err = influence("status", copy, "--verify", "--json")
    assert status == 0, err
    assert json.loads(out)["finished"] is True
    assert json.loads(out)["living"] == {"appended": 2, "removed": 5, "erased": 5}
    _, out, _ = influence("status", copy)
    assert "since then: 2 sequences appended, 5 removed, 5 of these erased from the files" in out
    before = everything(copy)
    run_pipeline(world.settings(copy))
    assert everything(copy) == before


def test_erased_sequences_that_are_damaged_are_not_made_again_from_the_data(
    world: World, erased: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(erased[1], tmp_path / "copy"))
    (unit,) = copy.glob("sequences/all*")
    shutil.rmtree(unit)  # as the message about a damaged one says
    with suppress(RequestError):
        run_pipeline(world.settings(copy))
    assert "senegal" not in words(copy)


def test_erasing_again_does_nothing(erased: tuple[Path, Path], tmp_path: Path, influence: Influence) -> None:
    copy = Path(shutil.copytree(erased[1], tmp_path / "copy"))
    assert influence("report", copy, "--json")[0] == 0
    before = everything(copy)
    status, out, _ = influence("remove", copy, "--erase", "--json")
    assert (status, json.loads(out)) == (0, {"run": str(copy), "erased_now": 0, "erased": 5, "sequences": NUM_SEQUENCES + 2})
    assert everything(copy) == before


def test_one_erasure_after_another_leaves_what_one_of_both_does(copy: Path, erased: tuple[Path, Path], tmp_path: Path) -> None:
    twice = Path(shutil.copytree(erased[1], tmp_path / "twice"))
    once = Path(shutil.copytree(erased[0], tmp_path / "once"))
    assert living.remove(open_run(twice), ["doc-29", "other"])["removed"] == 8
    assert living.erase(open_run(twice))["erased_now"] == 3
    living.remove(open_run(once), [*REMOVED, "doc-29", "other"])
    assert living.erase(open_run(once))["erased_now"] == 8
    assert contents(twice) == contents(once)
    assert_same(scores(open_run(twice)), scores(open_run(once)))


def test_removed_by_document_and_erased_in_one_command_twice(copy: Path, tmp_path: Path, influence: Influence) -> None:
    (tmp_path / "ids").write_text("doc-03\n")
    for now in (2, 0):
        status, out, err = influence("remove", copy, "--ids", tmp_path / "ids", "--erase", "--json")
        assert status == 0, err
        assert json.loads(out) == {
            "run": str(copy),
            "removed_now": now,
            "removed": 2,
            "erased_now": now,
            "erased": 2,
            "sequences": NUM_SEQUENCES,
        }


@pytest.mark.parametrize("erase", [False, True])
def test_removed_id_may_come_back_with_another_text(erase: bool, copy: Path) -> None:
    old = LONG["text"][:20]
    living.remove(open_run(copy), ["doc-03", "doc-28"])
    if erase:
        living.erase(open_run(copy))
    append(copy, [novel("doc-03"), novel("doc-28", "Nobody came to Dakar.")])
    result = open_run(copy).query(*QUERY, k=1000, exact=True)
    assert [s.text for s in result.sequences if s.id == "doc-03"] == [NOVEL]
    assert result.scores().keys() == {*open_run(copy).training.ids, "doc-03", "doc-28"} - {
        "doc-03:0",
        "doc-03:1",
        "doc-28:0",
        "doc-28:1",
    }
    assert not [s for s in result.sequences if s.text.startswith(old)]
    living.remove(open_run(copy), ["doc-03"])
    assert "doc-03" not in scores(open_run(copy))
    living.erase(open_run(copy))
    assert "quagga" not in words(copy)
    assert append(copy, [novel("doc-03", "A third text.")], "third")["appended"] == 1
    (found,) = (s for s in open_run(copy).query(*QUERY, k=1000, exact=True).sequences if s.id == "doc-03")
    assert found.text == "A third text."


# readers


def lexical_ranks(run: Run) -> dict[str, int | None]:
    return {s.id: s.bm25_rank for s in run.query(*QUERY, k=1000, exact=True, bm25=True).sequences}


@pytest.mark.parametrize("loaded", [False, True])
def test_reader_opened_before_an_append_goes_on_as_before(loaded: bool, copy: Path, run: Run) -> None:
    reader = open_run(copy)
    if loaded:
        assert_same(scores(reader), scores(run))
    append(copy, [*again(documents()), novel()])
    for kind in ("index", "scan", "normalized", "where"):
        assert_same(reader.query(*QUERY, **KINDS[kind]).scores(), run.query(*QUERY, **KINDS[kind]).scores())
    assert reader.rows.num_rows == len(reader.store) == NUM_SEQUENCES
    opened = open_run(copy)
    assert opened.rows.num_rows == len(opened.store) == 2 * NUM_SEQUENCES + 1
    assert "novel" in scores(opened)


def rightly_or_refused(reader: Run, expected: dict[str, Any], **options: Any) -> None:
    """What the reader answers is as expected, or it says to open the run again."""
    try:
        shown = reader.query(*QUERY, k=1000, exact=True, **options).sequences
    except RequestError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert {s.id: (pytest.approx(s.score, rel=1e-3, abs=1e-3), s.bm25_rank) for s in shown} == expected
    assert "open it again" in refusal or not refusal


def ranked(run: Run) -> dict[str, Any]:
    """Score and lexical rank of every result."""
    return {s.id: (s.score, s.bm25_rank) for s in run.query(*QUERY, k=1000, exact=True, bm25=True).sequences}


@pytest.mark.parametrize("loaded", [False, True])
def test_lexical_search_of_a_reader_opened_before_an_append_is_right_or_refused(loaded: bool, copy: Path, run: Run) -> None:
    reader, expected = open_run(copy), ranked(run)
    if loaded:
        assert ranked(reader).keys() == expected.keys()
    append(copy, [*again(documents()), novel()])
    rightly_or_refused(reader, expected, bm25=True)
    append(copy, [novel("other", "Nobody came.")], "second")
    rightly_or_refused(reader, expected, bm25=True)


@pytest.mark.parametrize("loaded", [False, True])
def test_reader_opened_before_an_erasure_answers_rightly_or_says_to_open_again(
    loaded: bool, erased: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(erased[0], tmp_path / "copy"))
    reader = open_run(copy)
    if loaded:
        assert reader.store.ids
    living.remove(open_run(copy), REMOVED)
    living.erase(open_run(copy))
    rightly_or_refused(reader, {name: (score, None) for name, (score, _) in ranked(open_run(copy)).items()})


def test_commands_see_what_was_done_since_their_run_was_opened(copy: Path, tmp_path: Path) -> None:
    old = open_run(copy)
    assert old.store.ids
    append(copy, [novel()])
    with pytest.raises(RequestError, match="the id 'novel' is in the run already"):
        living.append(old, [str(write_jsonl(tmp_path / "other.jsonl", [novel()]))])
    living.append(old, [str(write_jsonl(tmp_path / "other.jsonl", again(documents()[:1])))])
    opened = open_run(copy)
    np.testing.assert_array_equal(opened.lexical.scores(NOVEL, 68), index_texts(s.text for s in opened.store).scores(NOVEL, 68))
    assert living.remove(old, ["novel"])["removed"] == 1
    assert living.erase(old)["erased_now"] == 1
    assert "quagga" not in words(copy)
    assert not open_run(copy).rows.take(np.array([NUM_SEQUENCES])).any()


# the file that tells


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"appended": []}',
        b"\xff\xfe",
        b'{"appended": [{"name": "append-1"}], "removed": [], "erased": [], "replaced": {}}',
        b'{"appended": [], "removed": ["x"], "erased": [], "replaced": {}}',
        b'{"appended": [], "removed": [-1], "erased": [], "replaced": {}}',
        b'{"appended": [], "removed": [], "erased": [], "replaced": []}',
    ],
)
def test_damaged_file_of_changes_is_refused(content: bytes, copy: Path, influence: Influence) -> None:
    living.remove(open_run(copy), ["doc-03"])
    reader = open_run(copy)
    (copy / "living.json").write_bytes(content)
    for words in (["status", copy], ["query", copy, *QUERY], ["remove", copy, "--erase"]):
        status, out, err = influence(*words)
        assert (status, out) == (2, "")
        assert f"error: {copy / 'living.json'} is damaged: it does not tell what was appended and removed; restore it" in err
    with pytest.raises(RequestError, match="is damaged"):
        reader.query(*QUERY)


def test_state_is_read_as_it_was_written() -> None:
    part = Appended(name="append-1", data="sha256:2", num_sequences=3)
    state = Living(appended=(part,), removed=frozenset([5, 2]), erased=frozenset([2]), replaced={"rows/a": "b"})
    assert Living.from_json(json.dumps(state.to_json()), "here") == state
    assert Living.from_json(json.dumps(Living().to_json()), "here") == Living()


def test_lds_needs_the_training_sequences_alone(copy: Path, tmp_path: Path, influence: Influence) -> None:
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"prompt": QUERY[0], "completion": QUERY[1]}])
    np.savez(tmp_path / "bank.npz", masks=np.ones((4, NUM_SEQUENCES), dtype=bool), query_losses=np.ones((4, 1)))
    append(copy, [novel()])
    for change in (lambda: None, lambda: living.remove(open_run(copy), ["novel"]), lambda: living.erase(open_run(copy))):
        change()
        status, out, err = influence("evaluate", copy, "lds", "--queries", queries, "--bank", tmp_path / "bank.npz")
        assert (status, out) == (2, "")
        assert f"sequences were appended to {copy} or removed from it: lds needs the training sequences, all and alone" in err


def test_fidelity_is_measured_over_what_was_not_erased(erased: tuple[Path, Path], tmp_path: Path, influence: Influence) -> None:
    status, out, err = influence("evaluate", erased[1], "fidelity", "--json", "--out", tmp_path / "out")
    assert status == 0, err
    assert json.loads(out)["num_sequences"] == NUM_SEQUENCES - 4


def test_status_tells_what_changed(finished: Path, copy: Path, tmp_path: Path, influence: Influence) -> None:
    def changes(run: Path) -> Any:
        return json.loads(influence("status", run, "--json")[1])["living"]

    assert changes(finished) == {"appended": 0, "removed": 0, "erased": 0}
    assert "since then" not in influence("status", finished)[1]
    write_jsonl(tmp_path / "rows.jsonl", [novel(), novel("other")])
    assert json.loads(influence("append", copy, tmp_path / "rows.jsonl", "--json")[1]) == {
        "run": str(copy),
        "appended": 2,
        "sequences": NUM_SEQUENCES + 2,
        "removed": 0,
    }
    assert changes(copy) == {"appended": 2, "removed": 0, "erased": 0}
    (tmp_path / "ids").write_text("other\n")
    assert influence("remove", copy, "--ids", tmp_path / "ids")[1] == f"{copy}: removed 1 sequences; {NUM_SEQUENCES + 1} are searched\n"
    assert changes(copy) == {"appended": 2, "removed": 1, "erased": 0}
    assert influence("remove", copy, "--erase")[1] == f"{copy}: erased 1 sequences from the files\n"
    assert changes(copy) == {"appended": 2, "removed": 1, "erased": 1}
    assert json.loads(influence("status", copy, "--json")[1])["data"]["sequences"] == NUM_SEQUENCES
